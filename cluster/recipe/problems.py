"""Where a run's problems come from: generated or stored, mixed by weight, by split."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from cluster.recipe.context import Context
from tasks.core import DataError, Generates, Problem, Task, need
from tasks.datasets import Example, read_examples
from tasks.load import load_task
from tasks.settings import TaskConfig
from tasks.splits import Split, draw_problem

PATIENCE = 200
"""Draws in a row without a new test problem before there are taken to be no more."""
REDRAWS = 20
"""Draws in a row of problems that do not fit the policy before none is taken to fit."""


@dataclass(frozen=True)
class ProblemSource:
    """One `[[tasks]]` entry, ready to draw from: a task with knobs, or stored examples.

    `label` names the entry in tables and metrics: the task's name, with a number from the
    second entry of one task on. Stored rows fit the policy; of a task with knobs each problem is
    held against `context` when it is drawn, and with `redraws` another takes its place. `left_out`
    counts those that did not fit.
    """

    label: str
    task: Task
    weight: float
    spec: BaseModel | None
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    context: Context | None = None
    redraws: bool = False
    left_out: Counter[Split] = field(default_factory=Counter)
    drawn: dict[tuple[int, int], list[Problem]] = field(
        default_factory=dict, repr=False, compare=False
    )
    """Held-out problems by (seed, count): drawn once, for all evaluations of a run."""

    @classmethod
    def open(
        cls, config: TaskConfig, index: int, label: str, check_images: bool = True
    ) -> ProblemSource:
        """Load the task and, where the recipe names a data set, its splits.

        Raises DataError naming file and field for data that cannot be used.
        """
        task = load_task(config.name)
        if config.data is None:
            task = need(task, Generates, f"tasks[{index}].data: without a data set it", "name one")
            spec = task.spec.model_validate(config.knobs)
            return cls(label, task, config.weight, spec, (), ())
        require_folder(config, index)
        train = tuple(read_examples(config.data, "train", check_images=check_images))
        test = tuple(read_examples(config.data, "test", check_images=check_images))
        for split, rows in (("train", train), ("test", test)):
            if not rows:
                raise DataError(f"tasks[{index}].data: {config.data}: split {split} has no rows")
            other = next((e.problem for e in rows if e.problem.task != config.name), None)
            if other is not None:
                raise DataError(
                    f"tasks[{index}].data: {config.data}: split {split} holds problem {other.id} "
                    f"of task {other.task!r}, but tasks[{index}].name is {config.name!r}"
                )
        held_out = {e.problem.symmetry_key: e.problem.id for e in test}
        for problem in (e.problem for e in train):
            if problem.symmetry_key in held_out:
                raise DataError(
                    f"tasks[{index}].data: {config.data}: problem {problem.id} of split train is, "
                    f"up to symmetry, {held_out[problem.symmetry_key]} of split test; take it out "
                    "of one of them (`equipoise tasks import --skip-bad` does)"
                )
        return cls(label, task, config.weight, None, train, test)

    def rows(self, split: Split) -> tuple[Example, ...]:
        """The stored examples of a split."""
        return self.train if split == "train" else self.test

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        """Problem `index` of a split; stored rows come in an order shuffled anew each epoch."""
        if self.spec is not None:
            return self._drawn(self.spec, split, seed, index)
        rows = self.rows(split)
        epoch, place = divmod(index, len(rows))
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        return rows[int(order[place])].problem

    def _drawn(self, spec: BaseModel, split: Split, seed: int, index: int) -> Problem:
        """Raises DataError for a problem that does not fit, or where none does."""
        stream: int | tuple[int, int] = seed
        for again in itertools.count(1):
            problem = draw_problem(self.task, spec, split, stream, index)
            fault = self.context.lack(self.context.taken_by(problem)) if self.context else None
            if fault is None:
                break
            if not self.redraws or again == REDRAWS:
                drawn = f"{again} problems in a row, the last " if self.redraws else "problem "
                remedy = "" if self.redraws else ', or draw others by tasks.too_long = "drop"'
                raise DataError(
                    f"task {self.label}: {drawn}{problem.id}: {fault.field}: {fault.reason}; "
                    f"change these or the knobs{remedy}"
                )
            self.left_out[split] += 1
            stream = (seed, again)
        return problem


def require_folder(config: TaskConfig, index: int) -> None:
    """Raise DataError where what an entry names as stored problems is no folder."""
    folder = Path(config.data or ".")
    if not folder.is_dir():
        found = "is one file" if folder.exists() else f"no such folder ({folder.absolute()})"
        raise DataError(
            f"tasks[{index}].data: {config.data}: {found}; give the folder of a data set, with "
            "train.parquet and test.parquet, as `equipoise tasks generate` and `import` make it"
        )


def left_out(sources: Sequence[ProblemSource]) -> dict[str, float]:
    """`problems/<task>/left_out`: how many of train did not fit, where some did not."""
    return {
        f"problems/{source.label}/left_out": float(source.left_out["train"])
        for source in sources
        if source.left_out["train"]
    }


def open_sources(configs: Sequence[TaskConfig], check_images: bool = True) -> list[ProblemSource]:
    """All task entries of a recipe, in order.

    `check_images`: decode all that is stored; `preflight` does so where it measures.
    """
    sources: list[ProblemSource] = []
    for index, config in enumerate(configs):
        before = sum(other.name == config.name for other in configs[:index])
        label = f"{config.name}-{before + 1}" if before else config.name
        sources.append(ProblemSource.open(config, index, label, check_images))
    return sources


def step_sources(sources: Sequence[ProblemSource], seed: int, step: int, count: int) -> list[int]:
    """Which source each problem of training step `step` (from 0) comes from."""
    weights = np.array([source.weight for source in sources])
    chosen = np.random.default_rng([seed, step]).choice(
        len(sources), size=count, p=weights / weights.sum()
    )
    found: list[int] = chosen.tolist()
    return found


def step_problems(
    sources: Sequence[ProblemSource],
    seed: int,
    step: int,
    count: int,
    places: Sequence[int] | None = None,
) -> list[Problem]:
    """The `count` problems of training step `step` (from 0), or those at `places` among them.

    They are the same for every run with this seed.
    """
    chosen = step_sources(sources, seed, step, count)
    return [
        sources[chosen[place]].problem("train", seed, step * count + place)
        for place in (range(count) if places is None else places)
    ]


def held_out(source: ProblemSource, seed: int, count: int) -> list[Problem]:
    """`count` test problems of one source, no two with the same id."""
    if (seed, count) not in source.drawn:
        source.drawn[seed, count] = _draw_held_out(source, seed, count)
    return source.drawn[seed, count]


def _draw_held_out(source: ProblemSource, seed: int, count: int) -> list[Problem]:
    found: dict[str, Problem] = {}
    barren = 0
    if source.spec is None and count > len(source.test):
        raise DataError(
            f"eval.problems: asked for {count} of task {source.task.name}, whose test split has "
            f"{len(source.test)}; lower eval.problems"
        )
    for index in itertools.count():
        problem = source.problem("test", seed, index)
        barren = barren + 1 if problem.id in found else 0
        found.setdefault(problem.id, problem)
        if len(found) == count:
            return list(found.values())
        if barren == PATIENCE:
            break
    raise DataError(
        f"eval.problems: task {source.task.name}: these knobs allow only {len(found)} different "
        f"test problems, {count} were asked for; lower eval.problems or loosen the knobs"
    )
