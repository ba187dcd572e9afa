"""The cold start: supervised fine-tuning on demonstrations, before there is anything to reward.

Vision warm-up (where the recipe asks for it), then DeepSpeed SFT with the loss of each segment
reported apart. Generated demonstrations are of the `train` split. With `eval.every` one sampler
pool lives beside the learner and measures on the way; otherwise the samplers come when it has gone.
"""

from __future__ import annotations

import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from cluster.recipe.machine import new_run_folder
from cluster.recipe.problems import ProblemSource
from cluster.recipe.recipe import Recipe
from cluster.record.card import model_card
from cluster.record.evaluation import EvalTable
from cluster.record.stored import read_metrics
from cluster.record.terminal import Progress
from cluster.run.checkpoints import Resumed
from cluster.run.engines import sampling_from
from cluster.run.evaluate import evaluate_all
from cluster.run.passes import every_pass
from cluster.run.run_log import Metrics, RunLog, run_log
from cluster.run.runtime import LivePolicy, learning, sft_setup
from cluster.run.session import session
from cluster.run.train import conclude, transfer_metrics, verify_transfer
from learner.actor import LearnerGroup
from learner.balance import Balance, SegmentGradients
from learner.batch import TrainBatch, TrainSequence
from learner.policy import load_policy
from learner.settings import SftConfig
from learner.sft import DemonstrationStream, Demonstrator, Source, draw
from learner.trainer import LearnerSetup
from learner.warmup import warm_up_vision
from rollout.transfer import TransferReport
from tasks.core import SEGMENTS, DataError, HasVisionLabels, Problem
from tasks.files import put_text

WARMUP_BATCH = 128
WARMUP_STREAM = 2**31
"""Warm-up draws from a part of the demonstrations' stream that SFT does not reach."""


@dataclass(frozen=True)
class Shares:
    """How small a part perception is of one SFT update."""

    perception_tokens: float
    perception_loss: float


def run_sft(
    recipe: Recipe,
    address: str | None = None,
    output: Path | None = None,
    resumed: Resumed | None = None,
) -> Path:
    """Fine-tune by a recipe's [sft] section, or go on where a run was; return the run folder.

    The policy is left in `<folder>/checkpoint` as a plain Hugging Face folder. A first SIGTERM or
    Ctrl-C lets the update end and leaves a checkpoint to resume from. Raises DataError or
    ModelError for input that cannot be used, RunFailed when a rank ends the run.
    """
    sft = recipe.sft
    if sft is None:
        raise DataError(f"recipe {recipe.name}: sft: this section is needed and missing")
    folder = resumed.run if resumed else new_run_folder(recipe, output)
    progress, started = Progress(sft.steps), time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="equipoise-warm-") as scratch,
        session(recipe, "sft", address, folder, progress.say, resumed) as ready,
    ):
        recipe = ready.recipe
        sources = demonstration_sources(recipe, ready.sources)
        with run_log(recipe, folder, progress, sft.steps, resumed, "sft") as log:
            start = ""
            if resumed:
                start = str(resumed.checkpoint)
            elif sft.vision_warmup_steps:
                start = scratch
                warm_up(recipe, sft, sources, Path(scratch), log)
            setup = sft_setup(recipe, start, resume=resumed is not None)
            whole = sft.untagged == "whole"
            writer = partial(Demonstrator, ready.processor, whole, recipe.environment, sft.part)
            batches = demonstrations(sources, writer, sft, recipe.seed, log.at.step)
            with tuning(recipe, ready.sources, setup, progress) as (learner, live):
                tables = fine_tune(sft, learner, live, batches, log)
        if tables is None:
            return folder
        seconds = time.perf_counter() - started
        if not tables:
            tables = measure_checkpoint(recipe, ready.sources, folder, progress)
    summary = summarise(past_shares(folder), sft, seconds)
    put_text(folder / "sft.json", json.dumps(summary, indent=1))
    put_text(folder / "checkpoint" / "README.md", model_card(recipe, summary, tables))
    progress.say(f"checkpoint: {folder / 'checkpoint'}")
    return folder


def fine_tune(
    sft: SftConfig,
    learner: LearnerGroup,
    live: LivePolicy | None,
    batches: Iterator[list[TrainSequence]],
    log: RunLog,
) -> dict[str, EvalTable] | None:
    """All updates from where the log stands; leaves `<folder>/checkpoint`.

    Where the recipe measures on the way (`live`), `evaluation.json` is left too, and the last
    evaluation returned, a table a task; else there is none in it. None: it was told to stop.
    """
    balance = Balance(sft)
    balance.restore(log.at.balance)
    with log.keeping(learner):
        if live:
            verify_transfer(live, log.at.step)
            log.begin(live.evaluate)
            if not log.at.step:
                log.say(in_short(0, log.at.before))
        started, done = time.perf_counter(), log.at.step
        for step in log.steps():
            batch = TrainBatch(tuple(next(batches)))
            if step.number == 1:
                log.tracker.log_demonstrations(step.number, batch)
            step.metrics |= update(sft, learner, balance, step.number, batch)
            log.write(step, step.number)
            if step.number % 10 == 0 or log.over:
                seconds = (time.perf_counter() - started) / (step.number - done)
                log.say(describe(step.number, sft.steps, step.metrics, seconds))
            if live and log.is_due(log.recipe.eval.every):
                log.tracker.log(step.number, transfer_metrics(live.send_weights(step.number)))
                log.say(in_short(step.number, log.measured(live.evaluate())))
            if sft.save_every and step.number % sft.save_every == 0:
                learner.save(log.folder / "checkpoint")
            log.save_if_due(learner, lambda: {"balance": balance.state()})
        if log.stopped:
            log.say(f"stopped after update {log.at.step}; equipoise sft --resume {log.folder}")
            log.note("stopped", "it was asked to stop")
            return None
        if not live:
            log.keeper.keep(lambda folder: learner.save(folder / "checkpoint"))
            log.keeper.end()
            log.note("ended")
            return {}
        costs: list[TransferReport] = []

        def measured_last() -> dict[str, EvalTable]:
            costs.append(live.send_weights(sft.steps))
            return live.evaluate()

        after = conclude(log, learner, measured_last)
        log.tracker.log(sft.steps, transfer_metrics(costs[0]))
        log.say(in_short(sft.steps, after))
    return after


def update(
    sft: SftConfig, learner: LearnerGroup, balance: Balance, step: int, batch: TrainBatch
) -> Metrics:
    """One update, and what it measured."""
    gradients, rate = None, sft.rate_at(step)
    if balance.measures(step):
        gradients = learner.segment_gradients(batch, sft.norm_of)
        balance.observe(step, gradients)
    metrics = learner.update(batch, balance.loss(step, batch), rate)
    balanced = balance_metrics(metrics, balance.weight_at(step, batch), gradients)
    return balanced | {f"sft/{k}": v for k, v in metrics.items()} | {"sft/lr": rate}


def past_shares(folder: Path) -> list[Shares]:
    """Perception's shares of every update that a run logged, also before it was resumed."""
    by_step: dict[int, dict[str, float]] = {}
    for row in read_metrics(folder).to_pylist():
        if row["name"].startswith(("sft/tokens/", "sft/nll/")):
            by_step.setdefault(row["step"], {})[row["name"].removeprefix("sft/")] = row["value"]
    return [perception_shares(metrics) for _, metrics in sorted(by_step.items())]


@contextmanager
def tuning(
    recipe: Recipe, opened: Sequence[ProblemSource], setup: LearnerSetup, progress: Progress
) -> Iterator[tuple[LearnerGroup, LivePolicy | None]]:
    """The learner, started, and where the recipe measures on the way the samplers beside it."""
    if recipe.eval.every:
        progress.say("starting the learner (DeepSpeed), and samplers (vLLM) to measure with ...")
        live = LivePolicy(recipe, opened, setup)
        ended_well = False
        try:
            live.wait_ready()
            yield live.learner, live
            ended_well = True
        finally:
            live.stop(ended_well)
        return
    with learning(recipe, setup) as learner:
        yield learner, None


def measure_checkpoint(
    recipe: Recipe, opened: Sequence[ProblemSource], folder: Path, progress: Progress
) -> dict[str, EvalTable]:
    """All evaluation passes on the recipe's tasks; kept as `evaluation.json`, and printed."""
    progress.say(f"measuring on {recipe.eval.problems} held-out problems a task ...")
    passes = every_pass(recipe.environment)
    measured = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"passes": passes})})
    with sampling_from(measured, str(folder / "checkpoint"), "eval") as (samplers, frozen, _):
        tables = evaluate_all(samplers, opened, measured, frozen)
    tables_json = json.dumps({task: table.to_dict() for task, table in tables.items()}, indent=1)
    put_text(folder / "evaluation.json", tables_json)
    for task, table in tables.items():
        progress.console.print(table.table(f"{recipe.name} on {task}").to_rich())
    return tables


def demonstration_sources(recipe: Recipe, opened: Sequence[ProblemSource]) -> list[Source]:
    """The recipe's tasks as sources of demonstrations; of stored rows those with a response."""
    sources = []
    for config, source in zip(recipe.tasks, opened, strict=True):
        rows = source.train.chosen(
            at for at in range(len(source.train)) if source.train.fact(at).responds
        )
        sources.append(Source(source.task, source.weight, config.style, source.spec, rows))
    return sources


def demonstrations(
    sources: Sequence[Source],
    writer: Callable[[], Demonstrator],
    sft: SftConfig,
    seed: int,
    done: int = 0,
) -> Iterator[list[TrainSequence]]:
    """Endless batches after the first `done`, made ahead of the learner by one worker process."""
    stream = DemonstrationStream(
        sources, writer, sft.batch_size, seed, done, sft.blind_share, sft.call_share
    )
    loader = DataLoader(
        stream, batch_size=None, num_workers=1, prefetch_factor=4, worker_init_fn=_leave_signals
    )
    return iter(loader)


def _leave_signals(_: int) -> None:
    """A terminal, Slurm and `kill` signal the whole group: the driver still needs its batches for
    the step it lets end, and a worker ends with its driver anyway."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def balance_metrics(
    metrics: dict[str, float], weight: float, gradients: SegmentGradients | None
) -> dict[str, float]:
    """λ, and each segment's share of tokens, of the loss, and of the gradient norm if measured.

    A token's share of the loss is as λ weighs it: λ over the perception tokens, 1-λ over all
    others. The gradient's parts are L_p and L_r, so its `reasoning` is all that is not perception.
    """
    names = [n for n in (*SEGMENTS, "other") if f"tokens/{n}" in metrics]
    tokens = {n: metrics[f"tokens/{n}"] for n in names}
    total = max(1.0, sum(tokens.values()))
    rest = max(1.0, total - tokens["perception"])
    scale = dict.fromkeys(names, (1 - weight) / rest)
    scale["perception"] = weight / max(1.0, tokens["perception"])
    loss = {n: scale[n] * tokens[n] * metrics.get(f"nll/{n}", 0.0) for n in names}
    measures = {"sft/lambda": weight}
    measures |= {f"sft/share/tokens/{segment}": tokens[segment] / total for segment in names}
    whole = max(1e-12, sum(loss.values()))
    measures |= {f"sft/share/loss/{segment}": loss[segment] / whole for segment in names}
    if gradients is not None:
        norms = {"perception": gradients.perception, "reasoning": gradients.reasoning}
        pull = {"perception": weight * norms["perception"]}
        pull["reasoning"] = (1 - weight) * norms["reasoning"]
        sum_of_pulls = max(1e-12, sum(pull.values()))
        measures |= {f"sft/grad_norm/{part}": norms[part] for part in norms}
        measures |= {f"sft/share/grad_norm/{part}": pull[part] / sum_of_pulls for part in pull}
        measures |= {"sft/grad_cosine": gradients.cosine, "sft/norm_seconds": gradients.seconds}
    return measures


def warm_up(
    recipe: Recipe,
    sft: SftConfig,
    sources: Sequence[Source],
    out: Path,
    log: RunLog,
) -> None:
    """Warm the vision tower up and write the policy to `out` (see `learner.warmup`)."""
    dtype = "mixed" if recipe.model.dtype == "mixed" else "float32"
    policy, processor = load_policy(
        recipe.model.path, dtype, recipe.model.attention, reading=recipe.model
    )

    def batches() -> Iterator[list[tuple[str, Problem, np.ndarray]]]:
        index = WARMUP_STREAM
        while True:
            batch = []
            for _ in range(WARMUP_BATCH):
                source, (problem, *_) = draw(sources, recipe.seed, index)
                index += 1
                assert isinstance(source.task, HasVisionLabels)  # preflight asked
                batch.append((source.task.name, problem, source.task.vision_labels(problem)))
            yield batch

    def report(step: int, metrics: dict[str, float]) -> None:
        log.tracker.log(step + 1, metrics)
        if (step + 1) % 10 == 0:
            shown = "  ".join(f"{k.removeprefix('warmup/')} {v:.3f}" for k, v in metrics.items())
            log.say(f"vision warm-up {step + 1}/{sft.vision_warmup_steps}  {shown}")

    warm_up_vision(
        policy,
        processor,
        batches(),
        sft.vision_warmup_steps,
        sft.vision_warmup_lr,
        report,
        as_words="language" in recipe.learner.freeze,
    )
    policy.model.save_pretrained(out)  # type: ignore[operator]
    processor.save_pretrained(out)


def perception_shares(metrics: dict[str, float]) -> Shares:
    """Perception's share of response tokens, and of the token-mean loss they would make."""
    names = (*SEGMENTS, "other")
    tokens = {n: metrics.get(f"tokens/{n}", 0.0) for n in names}
    loss = {n: tokens[n] * metrics.get(f"nll/{n}", 0.0) for n in names}
    return Shares(
        tokens["perception"] / max(1.0, sum(tokens.values())),
        loss["perception"] / max(1e-12, sum(loss.values())),
    )


def describe(step: int, steps: int, metrics: dict[str, float], seconds: float) -> str:
    """One progress line: the loss of each segment, in nats a token; `seconds` are of an update."""
    parts = "  ".join(
        f"{name} {metrics[f'sft/nll/{name}']:.3f}"
        for name in SEGMENTS
        if f"sft/nll/{name}" in metrics
    )
    left = seconds * (steps - step)
    return (
        f"sft {step}/{steps}  nll: {parts}  {metrics['sft/seconds']:.1f} s/step  ETA {left:.0f} s"
    )


def in_short(step: int, tables: Mapping[str, EvalTable]) -> str:
    """One progress line: the accuracies of an evaluation on the way."""
    measures = [
        f"{task} " + "  ".join(f"{row.metric} {row.value:.3f}" for row in chosen)
        for task, table in tables.items()
        if (chosen := [row for row in table.rows if row.metric in ("a", "a_p", "a_r")])
    ]
    return f"measured after {step} updates: {'; '.join(measures)}"


def summarise(shares: Sequence[Shares], sft: SftConfig, seconds: float) -> dict[str, Any]:
    """What the model card tells: wall time and perception's shares, early and late."""
    fifth = max(1, len(shares) // 5)

    def mean(chosen: Sequence[Shares]) -> dict[str, float]:
        return {k: float(np.mean([asdict(s)[k] for s in chosen])) for k in asdict(chosen[0])}

    return {
        "steps": sft.steps,
        "batch_size": sft.batch_size,
        "wall_seconds": seconds,
        "shares_first_fifth": mean(shares[:fifth]),
        "shares_last_fifth": mean(shares[-fifth:]),
    }
