"""What the loops talk to: one step's measurements and clock, and the run that it is of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from cluster.recipe.recipe import Recipe, RunFailed, resolved_toml
from cluster.record.evaluation import EvalTable
from cluster.record.events import Event, add_events, seconds_down
from cluster.record.mirror import mirrored
from cluster.record.mismatch import mismatch
from cluster.record.stored import last_step
from cluster.record.terminal import Progress
from cluster.record.tracker import Tracker
from cluster.run.budget import Spent, is_over, run_share
from cluster.run.call_rate import CallRate, most_calls
from cluster.run.checkpoints import Position, Resumable, Resumed, StopSignal, stop_signal
from cluster.run.keeping import Keeper
from cluster.run.nodes import leaving
from cluster.run.standstill import Standstill
from learner.actor import LearnerGroup
from learner.checkpoint import checkpoint_folder
from rewards.scored import ScoredGroup
from rollout.jobs import News
from tasks.liveness import beat

T = TypeVar("T")
Metrics = dict[str, float]


class StepLog:
    """One step: what its parts measured, and where its wall time goes. Samplers work in all of it.

    Attributes:
        number: from 1.
        share: of the run that is over; weights of rewards go by it.
        metrics: by the names of docs/metrics.md.
    """

    def __init__(
        self, number: int, share: float = 0.0, counts: Callable[[], Metrics] | None = None
    ) -> None:
        """`counts`: what the sampler pools have counted until it is called, where there are any."""
        self.number, self.share = number, share
        self.metrics: Metrics = {}
        self._counts = counts
        self._before = counts() if counts else {}
        self._begin = self._last = time.perf_counter()

    def part(self, name: str, value: T, metrics: Mapping[str, float] | None = None) -> T:
        """What a part of the step made; the time since the part before is booked under its name."""
        beat()
        now = time.perf_counter()
        self.metrics[f"time/{name}"] = now - self._last
        self.metrics |= metrics or {}
        self._last = now
        return value

    @property
    def seconds(self) -> float:
        """From the begin of the step to the end of its last part."""
        return self._last - self._begin

    def close(self) -> None:
        """Sum up: with samplers, the idle share of both sides and the samplers' tokens/s.

        Idle is what the sides measured themselves: of updates their own seconds, of the pool the
        seconds in which a sampler had no request.
        """
        total = max(self.seconds, 1e-9)
        self.metrics["time/step"] = total
        if self._counts is None:
            return
        counts = self._counts()
        idle = [
            seconds - self._before.get(name, 0.0)
            for name, seconds in counts.items()
            if name.startswith("sampler/idle_seconds/")
        ]
        share = min(1.0, sum(idle) / max(1, len(idle)) / total)
        tokens = self.metrics.get("response/tokens", 0.0)
        self.metrics |= counts | {
            "idle/sampler": share,
            "idle/learner": max(0.0, 1 - self.metrics.get("learner/seconds", 0.0) / total),
            "throughput/sampler_tokens_per_second": tokens / max((1 - share) * total, 1e-9),
        }


class RunLog:
    """A run as its loop sees it: the step that is next, what is due, where things are kept.

    Attributes:
        at: after which step the run is; also what a checkpoint of it says.
        stopped: the loop ended since the user, or the machine, asked for it.
    """

    def __init__(
        self,
        recipe: Recipe,
        tracker: Tracker,
        progress: Progress,
        at: Position,
        steps: int | None = None,
        copy: Callable[[], None] = lambda: None,
    ) -> None:
        """`steps`: after which the run is over; without it [algorithm] says. `copy`: brings the
        folder's copy up to date."""
        self.recipe, self.tracker, self.progress, self.at = recipe, tracker, progress, at
        self.folder, self.say = tracker.run_dir, progress.say
        self.keeper = Keeper(self.folder)
        self.stopped = False
        self._steps, self._stop, self._copy = steps, StopSignal(), copy
        self._standstill = Standstill(progress.say)
        self._calls = CallRate(most_calls(recipe))

    @contextmanager
    def keeping(self, learner: LearnerGroup) -> Iterator[None]:
        """Within, a first SIGTERM or Ctrl-C lets the step end; so does a disk that takes no more,
        but not before the policy is kept."""
        with stop_signal() as self._stop, self.keeper.keeping(learner):
            yield

    def steps(self, counts: Callable[[], Metrics] | None = None) -> Iterator[StepLog]:
        """One step after another until the run is over or told to stop (`StepLog`: `counts`).

        Each ends with `end`, or with `write`.
        """
        while not (self.over or self.stopped):
            share = run_share(self.recipe.algorithm, self.at.step, self.at.spent)
            yield StepLog(self.at.step + 1, share, counts)

    @property
    def over(self) -> bool:
        """Whether no step is left to do."""
        if self._steps is not None:
            return self.at.step >= self._steps
        return is_over(self.recipe.algorithm, self.at.step, self.at.spent)

    def is_due(self, every: int) -> bool:
        """Whether what comes every so many steps comes now; not at the end, which has its own."""
        return bool(every) and self.at.step % every == 0 and not self.over

    def end(
        self, step: StepLog, scored: Sequence[ScoredGroup] = (), updates: int | None = None
    ) -> None:
        """A step of RL is over, of `updates` if there is a learner: write it down and tell it.

        Raises RunFailed where sampler and learner disagree under `algorithm.on_mismatch = "stop"`.
        """
        step.close()
        tokens = int(step.metrics.get("response/tokens", 0))
        spent = self.at.spent.plus(tokens, step.seconds)
        version = self.at.version + (updates or 0)
        step.metrics |= {"policy/version": float(version)} | spent.metrics()
        if scored:
            self.tracker.log_rollouts(step.number, scored)
        self.write(step, version, spent)
        tell_mismatch(self.recipe, step.metrics, self.progress)
        budget = self.recipe.algorithm.budget
        share = run_share(self.recipe.algorithm, step.number, spent) if budget else None
        self.progress.step(step.number, step.metrics, step.seconds, share)
        self._standstill.step(step.metrics, updates)
        if line := self._calls.step(step.number, step.metrics):
            self.say(f"warning: {line}")
            self.note("calls", line)

    def write(self, step: StepLog, version: int, spent: Spent | None = None) -> None:
        """Write a step's metrics; the run is after it now."""
        self.tracker.log(step.number, step.metrics)
        self.at = replace(self.at, step=step.number, version=version, spent=spent or self.at.spent)
        self._copy()
        self.stopped = self._stop.requested
        if not self.stopped and (who := leaving()):
            self.stopped = True
            self.say(f"the node of {who} is to be drained: a checkpoint, then the end")

    def begin(self, evaluate: Callable[[], dict[str, EvalTable]]) -> None:
        """Have the first evaluation, but for a run that goes on, which has it."""
        if not self.at.before:
            self.at = replace(self.at, before=self.measured(evaluate()))
        if not self.at.step and self.at.command == "train":
            self._standstill.measured(self.at.before)

    def measured(self, tables: dict[str, EvalTable]) -> dict[str, EvalTable]:
        """Keep an evaluation, a table a task."""
        self.tracker.log_evaluation(self.at.step, tables)
        return tables

    def tell(self, news: Iterable[News]) -> None:
        """Say what befell samplers, and keep it among the run's events."""
        news = list(news)
        for one in news:
            self.say(str(one) if one.what == "back" else f"warning: {one}")
        since = time.time() - time.monotonic()  # of the pool's clock
        events = (Event(*one[1:], wall_seconds=since + one.at) for one in news)
        add_events(self.folder, *events)

    def note(self, kind: str, why: str = "", lost: str = "", seconds: float | None = None) -> None:
        """Keep what the driver itself did among the run's events."""
        add_events(self.folder, Event("driver", kind, why, lost, seconds))

    def save_if_due(self, learner: LearnerGroup, state: Callable[[], dict[str, Any]]) -> None:
        """Write a checkpoint to go on from where one is due, or the run is to stop; keep the last.

        `state`: fields of the `Position` that the parts of the loop know.
        """
        rule = self.recipe.checkpoint
        if self.stopped or self.is_due(rule.every) or (rule.every and self.over):
            at = replace(self.at, **state())
            learner.save_training(checkpoint_folder(self.folder, at.step), at.to_dict())

    def end_run(self) -> None:
        """All is done; raises RunFailed where the run folder did not take all of it."""
        self.keeper.end()
        self._standstill.end()
        self.note("ended")


@contextmanager
def run_log(
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    steps: int | None = None,
    resumed: Resumed | None = None,
    command: Resumable = "train",
) -> Iterator[RunLog]:
    """The log of a run, or of one that goes on; it ends after `steps`, or as [algorithm] says."""
    at = resumed.position if resumed else Position(command=command)
    after = at.step if resumed else None
    # Before the tracker forgets what came after the checkpoint.
    last = last_step(folder) if resumed else 0
    lost = f"{last - at.step} steps after step {at.step}, done again" if last > at.step else ""
    with (
        mirrored(recipe.output.mirror, folder, progress.say) as copy,
        Tracker(folder, resolved_toml(recipe), after, recipe.output) as tracker,
    ):
        progress.say(f"run folder: {folder}")
        log = RunLog(recipe, tracker, progress, at, steps, copy)
        if resumed is None:
            log.note("began")
        else:
            down = seconds_down(folder, time.time())
            log.note("went on", f"from {resumed.checkpoint.name}", lost, down)
        yield log


def tell_mismatch(recipe: Recipe, metrics: Mapping[str, float], progress: Progress) -> None:
    """Say it when sampler and learner disagree (`cluster.record.mismatch`), or end the run.

    Raises RunFailed under `algorithm.on_mismatch = "stop"`.
    """
    wrong = mismatch(metrics, recipe.model.dtype, recipe.sampler.gpus > 0)
    if wrong and recipe.algorithm.on_mismatch == "stop":
        raise RunFailed(f'{wrong}; algorithm.on_mismatch = "stop" ends the run')
    if wrong:
        progress.say(f"warning: {wrong}")
