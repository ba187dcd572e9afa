"""Going on with a run: how far it was, under which recipe it may go on, how it is stopped.

The files of a training checkpoint are the learner's (`learner/checkpoint.py`); what the driver
itself must remember is a `Position`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from cluster.recipe.recipe import Recipe, RecipeError, UserError, load_recipe
from cluster.record.evaluation import EvalTable
from cluster.run.budget import Spent, is_over
from learner.checkpoint import STATE, CheckpointError, check, checkpoint_folders
from rollout.buffer import BufferState

MAY_CHANGE = (
    "name", "question", "tasks.too_long", "tasks.bad_rows",
    "algorithm.steps", "algorithm.epochs", "algorithm.budget.kind", "algorithm.budget.amount",
    "algorithm.on_mismatch",
    "sft.steps", "sft.save_every", "eval.every", "eval.reader_place",
    "model.attention",
    "learner.ranks", "learner.zero_stage", "learner.cpus", "learner.gpus", "learner.threads",
    "learner.micro_batch_tokens", "learner.logits_mib", "learner.layout",
    "learner.activation_checkpointing", "learner.offload", "learner.timeout_seconds",
    "sampler.count", "sampler.tensor_parallel", "sampler.cpus", "sampler.gpus", "sampler.threads",
    "sampler.kv_cache_gib", "sampler.max_num_seqs", "sampler.gpu_memory_utilization",
    "sampler.enforce_eager", "sampler.start_timeout_seconds", "sampler.request_timeout_seconds",
    "sampler.heartbeat_seconds", "sampler.max_restarts", "sampler.restart_window_seconds",
    "transfer.transport", "transfer.deadline_seconds", "transfer.bucket_mib", "transfer.checksum",
    "transfer.overlap",
    "placement.mode", "placement.learner", "placement.samplers", "placement.reward_workers",
    "placement.spread_samplers", "placement.wait_seconds",
    "watch.stall_seconds", "watch.on_stall",
    "environment.step_seconds", "environment.seconds", "environment.workers",
    "environment.memory_gib",
    "reward.workers", "reward.deadline_seconds", "reward.answer_seconds", "reward.remote_seconds",
    "reward.remote_in_flight", "reward.memory_gib",
    "checkpoint.every", "checkpoint.keep", "checkpoint.background", "checkpoint.restarts",
    "output.folder", "output.mirror", "output.rollouts_every", "output.rollouts_keep",
    "output.rollout_tokens", "output.trackers", "output.project", "output.tracked_rollouts",
    "job.include", "job.travel_mib", "job.env", "job.runtime_env", "job.python", "job.stop_seconds",
)  # fmt: skip
"""Recipe fields that a resumed run may set: where it runs, how long and in what memory, not what
it learns or measures. A test holds every other field to be one that decides."""


Resumable = Literal["train", "sft"]


@dataclass(frozen=True)
class Position:
    """How far a run is: `step` steps and `version` policy updates are done.

    Problems, group ids, sampling seeds, learning rate and reward weights of a step follow from
    recipe and step (under a budget from what was `spent`, under a curriculum from the successes
    in `curriculum`); so do the demonstrations of an update of SFT. `before` holds the evaluation
    of the untrained policy, a table a task. `buffer` says which groups were started and not yet
    used: they are sampled again. None stands for the groups of the steps done, and no others.
    `balance` is what SFT's `Balance` has measured.
    """

    step: int = 0
    version: int = 0
    spent: Spent = field(default_factory=Spent)
    before: dict[str, EvalTable] = field(default_factory=dict)
    buffer: BufferState | None = None
    curriculum: dict[str, list[float]] = field(default_factory=dict)
    command: Resumable = "train"
    balance: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it back."""
        before = {task: table.to_dict() for task, table in self.before.items()}
        position = {"step": self.step, "version": self.version, "spent": asdict(self.spent)}
        buffer = {"buffer": self.buffer.to_dict()} if self.buffer else {}
        sft = {"command": "sft", "balance": self.balance} if self.command == "sft" else {}
        return position | {"before": before, "curriculum": self.curriculum} | buffer | sft

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Position:
        """Read what `to_dict` wrote."""
        before = {task: EvalTable.from_dict(table) for task, table in data["before"].items()}
        # Checkpoints of before there was a buffer have none: nothing was in flight.
        buffer = BufferState.from_dict(data["buffer"]) if "buffer" in data else None
        return cls(
            data["step"],
            data["version"],
            Spent(**data["spent"]),
            before,
            buffer,
            data.get("curriculum", {}),
            data.get("command", "train"),
            dict(data.get("balance", {})),
        )


@dataclass(frozen=True)
class Resumed:
    """A run to go on with: its folder, the checkpoint to go on from, and those refused, why."""

    run: Path
    checkpoint: Path
    position: Position
    refused: tuple[str, ...] = ()


def resume(
    run: Path, overrides: Sequence[str] = (), command: Resumable = "train"
) -> tuple[Recipe, Resumed]:
    """The recipe of a run, with `overrides` as after `--set`, and where it goes on.

    Raises UserError for a folder that is no run of `command` or has no checkpoint that can be used
    (each file that was refused is named), RecipeError for an override that would make another run.
    """
    stored = run / "recipe.toml"
    if not stored.is_file():
        raise UserError(f"--resume {run}: no run folder: it has no recipe.toml")
    recipe = load_recipe(stored, overrides)
    changed = changed_fields(load_recipe(stored).model_dump(), recipe.model_dump())
    # Tables of labels and variables are free as a whole: `placement.learner.zone`.
    free = tuple(f"{name}." for name in MAY_CHANGE)
    if wrong := [name for name in changed if not f"{name}.".startswith(free)]:
        raise RecipeError(
            f"--resume {run}: --set changes {', '.join(wrong)}, which would make another run of "
            "it; start one, or leave that out (where a run goes on, and in what memory, may change)"
        )
    resumed = newest(run)
    at = resumed.position
    if at.command != command:
        raise UserError(
            f"--resume {run}: a run of `equipoise {at.command}`; go on with it by "
            f"equipoise {at.command} --resume {run}"
        )
    if "algorithm.epochs" in changed:
        return recipe, resumed  # how many steps they are is known once the data is read
    counting_field, steps = "algorithm.steps", recipe.algorithm.steps
    over, budget = is_over(recipe.algorithm, at.step, at.spent), recipe.algorithm.budget
    if command == "sft" and recipe.sft is not None:
        counting_field, steps, budget = "sft.steps", recipe.sft.steps, None
        over = at.step == steps
    if at.step > steps:
        raise RecipeError(
            f"--resume {run}: {counting_field} is {steps}, but {at.step} steps are done; "
            "set it higher"
        )
    if over and (run / "evaluation.json").exists():
        reason = f"all {steps} steps are done"
        if at.step < steps and budget is not None:
            reason = f"its budget of {budget.amount:,} {budget.kind} is spent"
            counting_field = "algorithm.budget.amount"
        raise UserError(f"--resume {run}: {reason}; to go on beyond, add --set {counting_field}=N")
    return recipe, resumed


def newest(run: Path) -> Resumed:
    """The last training checkpoint of a run that is whole; every byte of it was read.

    Raises UserError where there is none.
    """
    refused: list[str] = []
    for folder in reversed(checkpoint_folders(run)):
        try:
            state = check(folder)
            position = Position.from_dict(state)
        except CheckpointError as error:
            refused.append(str(error))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            refused.append(f"{folder / STATE}: not a training state: {error!r}")
        else:
            return Resumed(run, folder.resolve(), position, tuple(refused))
    if refused:
        listed = "\n".join(f"  {reason}" for reason in refused)
        raise UserError(f"--resume {run}: no training checkpoint can be used:\n{listed}")
    raise UserError(
        f"--resume {run}: it has no training checkpoint, so it can only be started again; "
        "checkpoint.every = N in a recipe writes one every N steps"
    )


class StopSignal:
    """Whether the user, or the machine, asked the run to stop."""

    requested = False


ONE_SIGNAL_SECONDS = 1.0
"""Signals this near to the first are the same one: of a supervisor's death the kernel tells its
driver once for each thread that it had, and a terminal or Slurm may signal group and process."""


@contextmanager
def stop_signal(now: Callable[[], float] = time.monotonic) -> Iterator[StopSignal]:
    """Turn the first SIGTERM or Ctrl-C into a wish to stop; a later one ends the run at once."""
    stop = StopSignal()
    before = {int(n): signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    first: dict[int, float] = {}

    def note(number: int, _: FrameType | None) -> None:
        if number in first:
            if now() - first[number] >= ONE_SIGNAL_SECONDS:
                signal.signal(number, before[number])
                signal.raise_signal(number)
            return
        first[number] = now()
        stop.requested = True
        name = signal.Signals(number).name
        # Not by print: the signal may have come in the middle of one.
        os.write(2, f"{name}: finishing this step, then a checkpoint ...\n".encode())

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def changed_fields(old: Any, new: Any, at: str = "") -> list[str]:
    """Dotted names of the fields that differ, also of a table that only one side has."""
    if old == new:
        return []
    if isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        # Entries of one list have one name.
        pairs = [(at, one, two) for one, two in zip(old, new, strict=True)]
    elif isinstance(old or new, dict) and isinstance(new or old, dict):
        old_fields, new_fields = old or {}, new or {}
        names = dict.fromkeys([*old_fields, *new_fields])
        pairs = [(f"{at}.{n}" if at else n, old_fields.get(n), new_fields.get(n)) for n in names]
    else:
        return [at]
    names_changed = [
        name for prefix, one, two in pairs for name in changed_fields(one, two, prefix)
    ]
    return list(dict.fromkeys(names_changed))
