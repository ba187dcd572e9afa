"""Which split a problem belongs to: decided by the problem itself, once and for all.

A hash of the symmetry key sends every problem, and with it all its symmetric twins, to `train`
or to `test`. So no training run, data set or evaluation can meet in a problem, whatever their
seeds and sizes, and nobody has to pass a list of held-out problems around.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal, TypeGuard

import numpy as np
from pydantic import BaseModel

from tasks.core import DataError, DrawsLate, Generates, Problem, Task, need

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

TEST_SHARE = 0.2
"""Share of symmetry classes held out. Small spaces (4x4 Sudoku) keep enough of both."""

PATIENCE = 1000
"""Draws without a problem of the wanted split before the knobs are called too narrow."""

UNLUCKY = 8
"""Draws in a row that may fail (no legible layout, no such puzzle in the tries a task allows)
before the knobs are called impossible. Each has the task's own tries in it, so few are enough."""


def split_of(problem: Problem) -> Split:
    """The split a problem belongs to, by its task and symmetry key alone."""
    return split_of_key(problem.task, problem.symmetry_key)


def split_of_key(task: str, symmetry_key: str) -> Split:
    """The same of a problem that is not made yet."""
    digest = hashlib.sha256(f"{task}\n{symmetry_key}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if share < TEST_SHARE else "train"


def _begin(
    task: Generates, rng: np.random.Generator, spec: BaseModel
) -> tuple[str, Callable[[], Problem]]:
    """As `DrawsLate.begin`, of any task."""
    if draws_late(task):
        return task.begin(rng, spec)
    problem = task.generate(rng, spec)
    return problem.symmetry_key, lambda: problem


def draws_late(task: object) -> TypeGuard[DrawsLate]:
    """Whether a task is `DrawsLate`, and no subclass's own `generate` overrules that."""
    owners = (c for c in type(task).__mro__ if {"begin", "generate"} & vars(c).keys())
    return isinstance(task, DrawsLate) and "begin" in vars(next(owners))


def draw_problem(
    task: Task, spec: BaseModel, split: Split, seed: int | tuple[int, int], index: int
) -> Problem:
    """Problem number `index` of a split's endless stream.

    Depends on (seed, split, index) and the knobs alone, so any part of the stream can be drawn
    in any order by any process. The problem's puzzle is fixed by the reasoning knobs; the
    perception knobs change its picture only. Where `generate` raises ValueError, the stream goes
    on to its next draw: one unlucky drawing is no reason to end a run.

    Raises DataError when `UNLUCKY` draws in a row failed, the knobs leave too few problems, or the
    task draws none.
    """
    task = need(task, Generates, "drawing problems", "name a data set to take them from")
    stream = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index))
    rng = np.random.default_rng(stream)
    failed = 0
    for _ in range(PATIENCE):
        try:
            key, finish = _begin(task, rng, spec)
            problem = finish() if split_of_key(task.name, key) == split else None
        except ValueError as error:
            failed += 1
            if failed < UNLUCKY:
                continue
            raise DataError(
                f"{task.name}: drawing problem {index} of {split}: {failed} draws in a row "
                f"failed, the last: {error}"
            ) from error
        failed = 0
        if problem is not None:
            return problem
    raise DataError(
        f"{task.name}: {PATIENCE} draws brought no problem of the {split} split; these knobs allow "
        "too few problems that differ up to symmetry: loosen them (larger problems, wider ranges)"
    )
