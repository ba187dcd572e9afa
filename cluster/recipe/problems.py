"""Where a run's problems come from: generated or stored, mixed by weight, by split."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from cluster.recipe.context import Context
from cluster.recipe.rows import watched
from tasks.core import DataError, Generates, Problem, Task, need
from tasks.fetched import fetched, local
from tasks.load import load_task
from tasks.rows import Rows
from tasks.settings import TaskConfig
from tasks.splits import Split, draw_problem
from tasks.vqa.opening import Opened, bad_rows_message, open_data, open_stored, row_reader

PATIENCE = 200
"""Draws in a row without a new test problem before there are taken to be no more."""
REDRAWS = 20
"""Draws in a row of problems that do not fit the policy before none is taken to fit."""


@dataclass(frozen=True)
class ProblemSource:
    """One `[[tasks]]` entry, ready to draw from: a task with knobs, or stored rows.

    `label` names the entry in tables and metrics: the task's name, with a number from the
    second entry of one task on. Stored rows fit the policy; of a task with knobs each problem is
    held against `context` when it is drawn, and with `redraws` another takes its place. `left_out`
    counts those that did not fit. `notes` is what a user is to hear of the data.
    """

    label: str
    task: Task
    weight: float
    spec: BaseModel | None
    train: Rows = field(default_factory=Rows)
    test: Rows = field(default_factory=Rows)
    context: Context | None = None
    redraws: bool = False
    notes: Sequence[str] = ()
    left_out: Counter[Split] = field(default_factory=Counter)
    drawn: dict[tuple[int, int], list[Problem]] = field(
        default_factory=dict, repr=False, compare=False
    )
    """Held-out problems by (seed, count): drawn once, for all evaluations of a run."""

    @classmethod
    def open(cls, config: TaskConfig, index: int, label: str) -> ProblemSource:
        """Load the task and, where the recipe names a data set, its splits.

        Raises DataError naming file and field for data that cannot be used.
        """
        task = load_task(config.task_name)
        at = f"tasks[{index}].data"
        if config.data is None:
            task = need(task, Generates, f"{at}: without a data set it", "name one")
            return cls(label, task, config.weight, task.spec.model_validate(config.knobs))
        opened = opened_rows(config, index)
        notes = [f"{at}: {note}" for note in opened.notes]
        if opened.bad:
            of = f"of {at}: {config.data_named}"
            if config.bad_rows == "error":
                mend = "mend or remove them"
                skip = f', or leave them out by tasks[{index}].bad_rows = "skip"'
                mend += skip if config.name == "vqa" else ""
                raise DataError(bad_rows_message(opened.bad, f"{of} cannot be used; {mend}"))
            notes += bad_rows_message(opened.bad, f"{of} are left out").splitlines()
        rows = opened.rows
        return cls(label, task, config.weight, None, rows["train"], rows["test"], notes=notes)

    def rows(self, split: Split) -> Rows:
        """The stored rows of a split."""
        return self.train if split == "train" else self.test

    def require_rows(self, splits: Sequence[Split], index: int) -> None:
        """Raise DataError where a split that is to be drawn from has no rows."""
        for split in splits if self.spec is None else ():
            if not self.rows(split):
                raise DataError(f"tasks[{index}].data: split {split} has no rows")

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        """Problem `index` of a split; stored rows come in an order shuffled anew each epoch."""
        if self.spec is not None:
            return self._drawn(self.spec, split, seed, index)
        rows = self.rows(split)
        epoch, position = divmod(index, len(rows))
        return rows[int(_order(seed, epoch, len(rows))[position])].problem

    def _drawn(self, spec: BaseModel, split: Split, seed: int, index: int) -> Problem:
        """Raises DataError for a problem that does not fit, or where none does."""
        stream: int | tuple[int, int] = seed
        for attempt in itertools.count(1):
            problem = draw_problem(self.task, spec, split, stream, index)
            fault = (
                self.context.lack(self.context.token_counts_of(problem)) if self.context else None
            )
            if fault is None:
                break
            if not self.redraws or attempt == REDRAWS:
                drawn = f"{attempt} problems in a row, the last " if self.redraws else "problem "
                remedy = "" if self.redraws else ', or draw others by tasks.too_long = "drop"'
                raise DataError(
                    f"task {self.label}: {drawn}{problem.id}: {fault.field}: {fault.reason}; "
                    f"change these or the knobs{remedy}"
                )
            self.left_out[split] += 1
            stream = (seed, attempt)
        return problem


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def opened_rows(config: TaskConfig, index: int) -> Opened:
    """The rows of an entry with data, bad ones too. Raises DataError for data that is not there."""
    require_data(config, index)
    assert config.data is not None
    try:
        if config.name == "vqa":
            data = config.data
            there = (
                fetched(data)
                if isinstance(data, str)
                else {side: fetched(part) for side, part in data.items()}
            )
            return open_data(there, row_reader(config), watched)
        return open_stored(fetched(config.data_named), config.name, watched)
    except DataError as error:
        raise DataError(f"tasks[{index}].data: {error}") from error


def require_data(config: TaskConfig, index: int) -> None:
    """Raise DataError where what an entry names as stored problems is not of the right kind."""
    folder = Path(local(config.data_named))
    if config.data is not None and config.name != "vqa" and not folder.is_dir():
        defect = "is one file" if folder.exists() else f"no such folder ({folder.absolute()})"
        raise DataError(
            f"tasks[{index}].data: {config.data}: {defect}; give the folder of a data set, with "
            "train.parquet and test.parquet, as `equipoise tasks generate` and `import` make it"
        )


def left_out(sources: Sequence[ProblemSource]) -> dict[str, float]:
    """`problems/<task>/left_out`: how many of train did not fit, where some did not."""
    return {
        f"problems/{source.label}/left_out": float(source.left_out["train"])
        for source in sources
        if source.left_out["train"]
    }


def open_sources(configs: Sequence[TaskConfig]) -> list[ProblemSource]:
    """All task entries of a recipe, in order."""
    sources: list[ProblemSource] = []
    for index, config in enumerate(configs):
        before = sum(other.name == config.name for other in configs[:index])
        label = f"{config.name}-{before + 1}" if before else config.name
        sources.append(ProblemSource.open(config, index, label))
    return sources


def step_sources(sources: Sequence[ProblemSource], seed: int, step: int, count: int) -> list[int]:
    """Which source each problem of training step `step` (from 0) comes from."""
    weights = np.array([source.weight for source in sources])
    chosen = np.random.default_rng([seed, step]).choice(
        len(sources), size=count, p=weights / weights.sum()
    )
    source_indices: list[int] = chosen.tolist()
    return source_indices


def step_problems(
    sources: Sequence[ProblemSource],
    seed: int,
    step: int,
    count: int,
    positions: Sequence[int] | None = None,
) -> list[Problem]:
    """The `count` problems of training step `step` (from 0), or those at `positions` among them.

    They are the same for every run with this seed.
    """
    chosen = step_sources(sources, seed, step, count)
    return [
        sources[chosen[position]].problem("train", seed, step * count + position)
        for position in (range(count) if positions is None else positions)
    ]


def held_out(source: ProblemSource, seed: int, count: int) -> list[Problem]:
    """`count` test problems of one source, no two alike in id; all of fewer stored rows."""
    if source.spec is None:
        count = min(count, len(source.test))
    if (seed, count) not in source.drawn:
        source.drawn[seed, count] = _draw_held_out(source, seed, count)
    return source.drawn[seed, count]


def _draw_held_out(source: ProblemSource, seed: int, count: int) -> list[Problem]:
    problems: dict[str, Problem] = {}
    barren = 0
    if not count:
        raise DataError(
            f"{source.label}: data: no row is left in the test split to evaluate on; put some "
            "there that fit the policy"
        )
    for index in itertools.count():
        problem = source.problem("test", seed, index)
        barren = barren + 1 if problem.id in problems else 0
        problems.setdefault(problem.id, problem)
        if len(problems) == count:
            return list(problems.values())
        if barren == PATIENCE:
            break
    raise DataError(
        f"eval.problems: task {source.task.name}: these knobs allow only {len(problems)} different "
        f"test problems, {count} were asked for; lower eval.problems or loosen the knobs"
    )
