"""The algorithm, top to bottom: sample, score, learn, send the weights back.

A part of a step returns what it made and what it measured; `step.part` keeps the measurements.
Shapes: P problems a step, G rollouts a group, T response tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from cluster.recipe.algorithm import AlgorithmConfig
from cluster.recipe.machine import new_run_folder
from cluster.recipe.problems import left_out
from cluster.recipe.recipe import Recipe
from cluster.record.evaluation import EvalTable, before_after, change_table, pooled
from cluster.record.terminal import Progress
from cluster.record.tracker import put_evaluation
from cluster.run.checkpoints import Resumed
from cluster.run.curriculum import Curriculum
from cluster.run.keeping import Keeper
from cluster.run.refill import refill_step
from cluster.run.run_log import Metrics, RunLog, run_log
from cluster.run.runtime import LivePolicy, running
from cluster.run.scaling import scale_as_asked
from cluster.run.step_metrics import step_metrics
from cluster.run.stream import GroupStream
from learner.actor import LearnerGroup
from learner.batch import TrainBatch, TrainSequence
from learner.correction import with_old_logprobs
from learner.policy_loss import PolicyLoss
from rewards.advantages import token_advantages
from rewards.scored import ScoredGroup
from rollout.transfer import TransferReport, WeightTransferError
from tasks.core import SEGMENTS, Segment
from tasks.files import put_text


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
    progress = Progress(recipe.algorithm.steps)
    with (
        running(recipe, address, folder, progress, resumed) as run,
        run_log(run.recipe, folder, progress, resumed=resumed) as log,
        log.keeping(run.learner),
    ):
        recipe = run.recipe
        verify_transfer(run, log.at.version)
        log.begin(run.evaluate)
        curriculum = Curriculum(recipe, run.sources, log.at.curriculum)
        stream = GroupStream(recipe, curriculum.sources, run.samplers, log.at.step, log.at.buffer)
        for step in log.steps(run.counts):
            scale_as_asked(run, folder, progress)
            groups = step.part("sample", stream.take(log.at.version))
            scored = step.part("score", *run.scoring.score(groups, step.share))
            scored = step.part("refill", *refill_step(run, step.number, scored, step.share))
            step.metrics |= step_metrics(scored, log.at.version) | left_out(run.sources)
            step.metrics |= curriculum.observe(step.number, scored)
            updates = step.part("learn", *learn(recipe, step.number, scored, run.learner))
            step.part("transfer", *renew(stream, run, log.at.version + updates))
            log.end(step, scored, updates)
            log.tell(run.news())
            if log.is_due(recipe.eval.every):
                log.measured(run.evaluate())
            log.save_if_due(
                run.learner, lambda: {"buffer": stream.state(), "curriculum": curriculum.state()}
            )
        if log.stopped:
            run.settle_weights()
            run.learner.finish_saving()
            log.say(f"stopped after step {log.at.step}; equipoise train --resume {folder}")
            log.note("stopped", "it was asked to stop")
            return folder
        stream.end()
        conclude(log, run.learner, run.evaluate)
        log.say(f"checkpoint: {folder / 'checkpoint'}")
    return folder


def learn(
    recipe: Recipe, step: int, scored: Sequence[ScoredGroup], learner: LearnerGroup
) -> tuple[int, Metrics]:
    """Update the policy with a step's groups; the number of updates, 0 where none has a gradient.

    Measured: `learner/`, and the learner's tokens/s over batching and updates.
    """
    start, algorithm, loss = time.perf_counter(), recipe.algorithm, policy_loss(recipe)
    rate = recipe.learner.rate_at(step)
    batches = anchored(algorithm, train_batches(algorithm, scored), learner)
    updates = [learner.update(batch, loss, rate) for batch in batches]
    metrics = learner_metrics(updates) | {"learner/lr": rate}
    if tokens := sum(batch.response_tokens() for batch in batches):
        seconds = time.perf_counter() - start
        metrics["throughput/learner_tokens_per_second"] = tokens / seconds
    return len(updates), metrics


def renew(stream: GroupStream, run: LivePolicy, version: int) -> tuple[None, Metrics]:
    """Send the samplers new weights; measured: `transfer/` and `buffer/`."""
    report = stream.renew(run.renew_weights, version)
    return None, transfer_metrics(report) | stream.metrics()


def train_batches(algorithm: AlgorithmConfig, scored: Sequence[ScoredGroup]) -> list[TrainBatch]:
    """The step's minibatches of whole groups; groups without a gradient are left out.

    Empty when no group has one: the policy stays as it is.
    """
    retained = [
        g
        for g in scored
        if not g.dropped and not (g.zero_variance and algorithm.drop_zero_variance)
    ]
    if not any(g.has_gradient for g in retained):
        return []
    chosen = algorithm.segment_weights
    weights: dict[Segment, float] = {s: getattr(chosen, s) for s in SEGMENTS}
    parts = [retained[i :: algorithm.updates_per_step] for i in range(algorithm.updates_per_step)]
    return [
        TrainBatch(
            tuple(
                TrainSequence(
                    prompt_ids=rollout.prompt_ids,
                    response_ids=rollout.response_ids,
                    images=rollout.images,
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


def anchored(
    algorithm: AlgorithmConfig, batches: list[TrainBatch], learner: LearnerGroup
) -> list[TrainBatch]:
    """The minibatches with the log-probs of the policy that the step begins with, where needed.

    A correction needs them (`learner.correction`). The first update has them from its own
    forward pass; each further minibatch costs one without gradients.
    """
    if algorithm.correction.kind == "none":
        return batches
    return batches[:1] + [with_old_logprobs(b, learner.logprobs(b)) for b in batches[1:]]


def policy_loss(recipe: Recipe) -> PolicyLoss:
    """The loss a recipe asks for."""
    return PolicyLoss(recipe.algorithm, recipe.sampler.max_tokens)


def verify_transfer(run: LivePolicy, version: int) -> None:
    """Send the weights once before any step: untrained, they must not change the checksums.

    Sampler and learner loaded the same checkpoint, so tensors that land in the wrong place or
    dtype show here, before a step is spent; that they land at all shows in `learner/logprob_gap`
    of the next steps. Samplers that had another run's weights are held against what they held
    before that one. Under `transfer.checksum = "never"`, and for the trained weights of a
    resumed run, only the transfer is made. A sampler that is lost on the way is started again
    (`SamplerPool.weight_checksums`, `Delivery`). Raises WeightTransferError naming the sampler and
    the first parameter that changed.
    """
    check = run.recipe.transfer.checksum != "never" and version == 0
    before = run.parts.first_held or (run.samplers.weight_checksums() if check else {})
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
    run.parts.first_held = before


def conclude(
    log: RunLog, learner: LearnerGroup, evaluate: Callable[[], dict[str, EvalTable]]
) -> dict[str, EvalTable]:
    """Keep the last policy, measure it, and tell what changed; a table a task."""
    after = save_and_measure(learner, log.keeper, log.at.step, evaluate)
    log.keeper.keep(lambda target: report_change(target, log.at.before, after, log.progress))
    log.measured(after)
    log.end_run()
    return after


def save_and_measure(
    learner: LearnerGroup, keeper: Keeper, step: int, measured: Callable[[], dict[str, EvalTable]]
) -> dict[str, EvalTable]:
    """Save the last policy, then measure it; one that cannot be saved is still measured."""
    failed: Exception | None = None
    try:
        keeper.keep(lambda folder: learner.save(folder / "checkpoint"))
    except Exception as error:
        failed = error
    tables = measured()
    keeper.keep(lambda folder: put_evaluation(folder, step, tables))
    if failed is not None:
        raise failed
    return tables


def learner_metrics(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """A step's update metrics under `learner/`: means over its updates, `seconds` their sum.

    `ratio_gap`, `logprob_gap` and `mismatch/…` are those of the first update: only then does
    the learner hold the weights that the step began with.
    """
    if not updates:
        return {}
    names = set.intersection(*(set(update) for update in updates))
    means = {name: sum(u[name] for u in updates) / len(updates) for name in names}
    means["seconds"] = sum(u["seconds"] for u in updates)
    first = ("ratio_gap", "logprob_gap", "mismatch/")
    means |= {name: value for name, value in updates[0].items() if name.startswith(first)}
    return {f"learner/{name}": value for name, value in sorted(means.items())}


def transfer_metrics(report: TransferReport | None) -> dict[str, float]:
    """What a weight transfer cost, under `transfer/`; of one that was only begun, nothing yet."""
    fields = vars(report) if report else {}
    return {f"transfer/{name}": float(value) for name, value in fields.items()}


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
    evaluation = {
        task: {
            "before": before[task].to_dict(),
            "after": after[task].to_dict(),
            "change": {"rows": [asdict(row) for row in change]},
        }
        for task, change in changes.items()
    }
    put_text(folder / "evaluation.json", json.dumps(evaluation, indent=1))
    for task, change in changes.items():
        progress.console.print(change_table(change, f"{task}: before and after").to_rich())
