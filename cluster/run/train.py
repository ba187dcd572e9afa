"""The algorithm, top to bottom: sample, score, learn, send the weights back.

Shapes: P problems a step, G rollouts a group, T response tokens.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from cluster.recipe.machine import claimed, new_run_folder
from cluster.recipe.problems import left_out
from cluster.recipe.recipe import Recipe, RunFailed, resolved_toml
from cluster.record.evaluation import EvalTable, before_after, change_table, pooled
from cluster.record.mismatch import mismatch
from cluster.record.terminal import Progress
from cluster.record.tracker import Tracker, put_evaluation
from cluster.run.budget import Spent, is_over, run_share
from cluster.run.checkpoints import Position, Resumed, stop_signal
from cluster.run.curriculum import Curriculum
from cluster.run.evaluate import evaluate_all
from cluster.run.keeping import Keeper
from cluster.run.refill import refill_step
from cluster.run.runtime import LivePolicy, Run, running
from cluster.run.scaling import scale_as_asked
from cluster.run.standstill import Standstill
from cluster.run.step_metrics import step_metrics
from cluster.run.stream import GroupStream
from learner.actor import LearnerGroup
from learner.batch import TrainBatch, TrainSequence
from learner.correction import Correction, with_old_logprobs
from learner.policy_loss import Papo, PolicyLoss
from learner.schedule import learning_rate_at
from rewards.advantages import token_advantages
from rewards.scored import ScoredGroup
from rollout.record import Group
from rollout.transfer import TransferReport, WeightTransferError
from tasks.core import SEGMENTS, Segment
from tasks.files import put_text

T = TypeVar("T")


def run_training(
    recipe: Recipe,
    address: str | None = None,
    output: Path | None = None,
    resumed: Resumed | None = None,
) -> Path:
    """Train by a recipe, from the start or from where a run was, and return the run folder.

    A first SIGTERM or Ctrl-C lets the step end and leaves a checkpoint to resume from. Raises
    DataError or ModelError for input that cannot be used (nothing is written then), and
    RunFailed when an actor ends the run.
    """
    folder = resumed.run if resumed else new_run_folder(recipe, output)
    at = resumed.position if resumed else Position()
    progress = Progress(recipe.algorithm.steps)
    keeper = Keeper(folder)
    with (
        claimed(folder, new=resumed is None),
        running(recipe, address, folder, progress, resumed) as run,
        Tracker(
            folder, resolved_toml(recipe), at.step if resumed else None, recipe.output
        ) as tracker,
        stop_signal() as stop,
        keeper.keeping(run.learner),
    ):
        progress.say(f"run folder: {folder}")
        verify_transfer(run, at.version)
        before = at.before or measure(run, tracker, step=0)
        standstill = Standstill(progress.say)
        standstill.measured(before if not at.step else {})
        step, version, spent = at.step, at.version, at.spent
        curriculum = Curriculum(recipe, run.sources, at.curriculum)
        stream = GroupStream(recipe, curriculum, run.samplers, step, at.buffer)
        while not is_over(recipe.algorithm, step, spent):
            scale_as_asked(run, folder, progress)
            share = run_share(recipe.algorithm, step, spent)
            step += 1
            clock = StepClock(run.samplers.counts())
            groups = stream.take(version)
            clock.lap("sample")
            scored = run.rewards.score(groups, share)
            clock.lap("score")
            refilled = refill_step(run, step, scored, share)
            scored, groups = refilled.scored, refilled.groups
            clock.lap("refill")
            metrics = step_metrics(scored, version) | reward_metrics(run) | refilled.metrics()
            metrics |= curriculum.metrics() | left_out(run.sources)
            curriculum.observe(step, scored)
            rate = learning_rate(recipe, step)
            batches = anchored(recipe, train_batches(recipe, scored), run.learner)
            updates = [run.learner.update(b, policy_loss(recipe), rate) for b in batches]
            version += len(updates)
            metrics |= learner_metrics(updates) | {"learner/lr": rate}
            clock.lap("learn")
            metrics |= transfer_metrics(stream.renew(run.renew_weights, version))
            clock.lap("transfer")
            metrics |= {"policy/version": float(version)} | stream.metrics() | sampler_metrics(run)
            metrics |= clock.metrics(groups, batches, updates, run.samplers.counts())
            spent = spent.plus(sampled_tokens(groups), clock.total())
            metrics |= spent.metrics()
            over = is_over(recipe.algorithm, step, spent)
            tracker.log_rollouts(step, scored)
            tracker.log(step, metrics)
            tell_mismatch(recipe, metrics, progress)
            for loss in run.news():
                progress.say(f"warning: {loss}")
            progress.step(step, metrics, clock.total(), budget_share(recipe, step, spent))
            standstill.step(metrics, len(updates))
            if recipe.eval.every and step % recipe.eval.every == 0 and not over:
                measure(run, tracker, step)
            if stop.asked or checkpoint_due(recipe, step, over):
                state = (stream.state(), curriculum.state())
                run.save(folder, Position(step, version, spent, before, *state))
            if stop.asked:
                run.settle_weights()
                run.learner.finish_saving()
                progress.say(f"stopped after step {step}; equipoise train --resume {folder}")
                return folder
        stream.end()
        after = save_and_measure(
            run.learner, keeper, step, lambda: evaluate_all(run.samplers, run.sources, recipe)
        )
        keeper.keep(lambda place: report_change(place, before, after, progress))
        progress.say(f"checkpoint: {keeper.folder / 'checkpoint'}")
        tracker.log_evaluation(step, after)
        keeper.end()
    standstill.end()
    return folder


def checkpoint_due(recipe: Recipe, step: int, last: bool) -> bool:
    """Whether a step ends with a training checkpoint; with `checkpoint.every` the last one does."""
    every = recipe.checkpoint.every
    return bool(every) and (step % every == 0 or last)


def budget_share(recipe: Recipe, step: int, spent: Spent) -> float | None:
    """The share of its budget that a run has spent; None where only its steps end it."""
    return run_share(recipe.algorithm, step, spent) if recipe.algorithm.budget else None


def sampled_tokens(groups: Sequence[Group]) -> int:
    """Response tokens of all rollouts."""
    return sum(len(r.response_ids) for g in groups for r in g.rollouts)


def train_batches(recipe: Recipe, scored: Sequence[ScoredGroup]) -> list[TrainBatch]:
    """The step's minibatches of whole groups; groups without a gradient are left out.

    Empty when no group has one: the policy stays as it is.
    """
    algorithm = recipe.algorithm
    kept = [
        g
        for g in scored
        if not g.dropped and not (g.zero_variance and algorithm.drop_zero_variance)
    ]
    if not any(g.has_gradient for g in kept):
        return []
    chosen = algorithm.segment_weights
    weights: dict[Segment, float] = {s: getattr(chosen, s) for s in SEGMENTS}
    parts = [kept[i :: algorithm.updates_per_step] for i in range(algorithm.updates_per_step)]
    return [
        TrainBatch(
            tuple(
                TrainSequence(
                    prompt_ids=rollout.prompt_ids,
                    response_ids=rollout.response_ids,
                    image=group.group.problem.image if rollout.view == "shown" else None,
                    segments=rollout.segments,
                    sampler_logprobs=rollout.logprobs,
                    advantages=token_advantages(advantages, rollout.segments, weights),
                )
                for group in part
                for rollout, advantages in zip(group.group.rollouts, group.advantages, strict=True)
            )
        )
        for part in parts
        if part
    ]


def anchored(recipe: Recipe, batches: list[TrainBatch], learner: LearnerGroup) -> list[TrainBatch]:
    """The minibatches with the log-probs of the policy that the step begins with, where needed.

    A correction needs them (`learner.correction`). The first update has them from its own
    forward pass; each further minibatch costs one without gradients.
    """
    if recipe.algorithm.correction.kind == "none":
        return batches
    return batches[:1] + [with_old_logprobs(b, learner.logprobs(b)) for b in batches[1:]]


def policy_loss(recipe: Recipe) -> PolicyLoss:
    """The loss a recipe asks for."""
    algorithm = recipe.algorithm
    return PolicyLoss(
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        entropy_weight=algorithm.entropy_weight,
        objective=algorithm.loss,
        aggregation=algorithm.aggregation,
        max_tokens=recipe.sampler.max_tokens,
        kl_weight=algorithm.kl_weight,
        kl_estimator=algorithm.kl_estimator,
        entropy_weights={s: getattr(algorithm.entropy_weights, s) for s in SEGMENTS},
        papo=Papo(**algorithm.papo.model_dump()) if algorithm.papo else None,
        correction=correction(recipe),
    )


def correction(recipe: Recipe) -> Correction | None:
    """The off-policy correction a recipe asks for."""
    chosen = recipe.algorithm.correction
    if chosen.kind == "none" or chosen.high is None:
        return None
    return Correction(chosen.kind, chosen.high, chosen.low)


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of a step: linear warm-up, then constant."""
    learner = recipe.learner
    return learning_rate_at(
        step - 1, recipe.algorithm.steps, learner.learning_rate, learner.warmup_steps, "constant"
    )


def verify_transfer(run: LivePolicy, version: int) -> None:
    """Send the weights once before any step: untrained, they must not change the checksums.

    Sampler and learner loaded the same checkpoint, so tensors that land in the wrong place or
    dtype show here, before a step is spent; that they land at all shows in `learner/logprob_gap`
    of the next steps. Under `transfer.checksum = "never"`, and for the trained weights of a
    resumed run, only the transfer is made. A sampler that is lost on the way is started again
    (`SamplerPool.weight_checksums`, `Delivery`). Raises WeightTransferError naming the sampler and
    the first parameter that changed.
    """
    check = run.recipe.transfer.checksum != "never" and version == 0
    before = run.samplers.weight_checksums() if check else {}
    run.send_weights(version)
    after = run.samplers.weight_checksums() if check else {}
    for sampler, new in after.items():
        # One that was lost before it told is held against another: they loaded the same files.
        old = before.get(sampler) or next(iter(before.values()))
        changed = sorted(name for name in old if old[name] != new.get(name))
        if changed:
            raise WeightTransferError(
                f"weight transfer: after sending the weights that sampler {sampler!r} already "
                f"has, {len(changed)} of its {len(old)} parameters differ, first {changed[0]!r}; "
                "sampler and learner do not agree on this model's parameter names"
            )


def tell_mismatch(recipe: Recipe, metrics: dict[str, float], progress: Progress) -> None:
    """Say it when sampler and learner disagree (`cluster.record.mismatch`), or end the run.

    Raises RunFailed under `algorithm.on_mismatch = "stop"`.
    """
    wrong = mismatch(metrics, recipe.model.dtype)
    if wrong and recipe.algorithm.on_mismatch == "stop":
        raise RunFailed(f'{wrong}; algorithm.on_mismatch = "stop" ends the run')
    if wrong:
        progress.say(f"warning: {wrong}")


def measure(run: LivePolicy, tracker: Tracker, step: int) -> dict[str, EvalTable]:
    """Evaluate, keep what was measured, and return a table a task."""
    tables = evaluate_all(run.samplers, run.sources, run.recipe)
    tracker.log_evaluation(step, tables)
    return tables


def save_and_measure(
    learner: LearnerGroup, keeper: Keeper, step: int, measured: Callable[[], dict[str, EvalTable]]
) -> dict[str, EvalTable]:
    """Save the last policy, then measure it; one that cannot be saved is still measured."""
    failed: Exception | None = None
    try:
        keeper.keep(lambda place: learner.save(place / "checkpoint"))
    except Exception as error:
        failed = error
    found = measured()
    keeper.keep(lambda place: put_evaluation(place, step, found))
    if failed is not None:
        raise failed
    return found


def reward_metrics(run: Run) -> dict[str, float]:
    """What the reward workers count since the run began: restarts, and remote terms' own counts."""
    counts = {f"reward/{name}": value for name, value in run.rewards.counts().items()}
    return counts | {"reward/worker_restarts": float(run.rewards.restarts)}


def sampler_metrics(run: Run) -> dict[str, float]:
    """What befell the samplers since the run began, under `sampler/`.

    Under `frozen/` the same of the engines of frozen models, all together.
    """
    frozen: Counter[str] = Counter()
    for pool in run.frozen.values():
        frozen.update(pool.counts())
    found = {f"frozen/{name}": value for name, value in frozen.items()}
    return {f"sampler/{name}": value for name, value in run.samplers.counts().items()} | found


def learner_metrics(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """A step's update metrics under `learner/`: means over its updates, `seconds` their sum.

    `ratio_gap`, `logprob_gap` and `mismatch/…` are those of the first update: only then does
    the learner hold the weights that the step began with.
    """
    if not updates:
        return {}
    names = set.intersection(*(set(update) for update in updates))
    found = {name: sum(u[name] for u in updates) / len(updates) for name in names}
    found["seconds"] = sum(u["seconds"] for u in updates)
    first = ("ratio_gap", "logprob_gap", "mismatch/")
    found |= {name: value for name, value in updates[0].items() if name.startswith(first)}
    return {f"learner/{name}": value for name, value in sorted(found.items())}


def transfer_metrics(report: TransferReport | None) -> dict[str, float]:
    """What a weight transfer cost, under `transfer/`; of one that was only begun, nothing yet."""
    told = vars(report) if report else {}
    return {f"transfer/{name}": float(value) for name, value in told.items()}


def report_change(
    folder: Path,
    before: dict[str, EvalTable],
    after: dict[str, EvalTable],
    progress: Progress,
) -> None:
    """Keep `evaluation.json`, then print its tables: each task's, and all together."""
    if len(before) > 1:
        before, after = (tables | {"all tasks": pooled(tables)} for tables in (before, after))
    changes = {task: before_after(before[task], after[task]) for task in before}
    kept = {
        task: {
            "before": before[task].to_dict(),
            "after": after[task].to_dict(),
            "change": {"rows": [asdict(row) for row in change]},
        }
        for task, change in changes.items()
    }
    put_text(folder / "evaluation.json", json.dumps(kept, indent=1))
    for task, change in changes.items():
        progress.console.print(change_table(change, f"{task}: before and after"))


class StepClock:
    """Where a step's wall time goes. Samplers may work in all of it."""

    def __init__(self, samplers: Mapping[str, float]) -> None:
        """`samplers`: what the sampler pool counted until now."""
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}
        self._samplers = samplers

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def total(self) -> float:
        """Seconds since the step began."""
        return self._last - self._start

    def metrics(
        self,
        groups: Sequence[Group],
        batches: Sequence[TrainBatch],
        updates: Sequence[Mapping[str, float]],
        samplers: Mapping[str, float],
    ) -> dict[str, float]:
        """`time/<phase>` in seconds; idle shares and response tokens/s of both sides.

        Idle is what the sides measured themselves: of `updates` their own seconds, of the pool
        (`samplers`, its counts by now) the seconds in which a sampler had no request.
        """
        total = max(self.total(), 1e-9)
        found = {f"time/{name}": seconds for name, seconds in self._laps.items()}
        found["time/step"] = total
        found["idle/learner"] = max(0.0, 1 - sum(u["seconds"] for u in updates) / total)
        idle = [
            seconds - self._samplers.get(name, 0.0)
            for name, seconds in samplers.items()
            if name.startswith("idle_seconds/")
        ]
        found["idle/sampler"] = min(1.0, sum(idle) / max(1, len(idle)) / total)
        busy = max((1 - found["idle/sampler"]) * total, 1e-9)
        found["throughput/sampler_tokens_per_second"] = sampled_tokens(groups) / busy
        if learnt := sum(batch.response_tokens() for batch in batches):
            found["throughput/learner_tokens_per_second"] = learnt / self._laps["learn"]
        return found
