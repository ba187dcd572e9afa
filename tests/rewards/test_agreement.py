"""Agreement within a group: by hand, and against another implementation on random groups."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rewards.surrogates import (
    BlindSolver,
    GroupAgreement,
)
from tasks.core import DataError, Task
from tasks.sudoku import grid_text
from tests.support.surrogate_groups import (
    BLANKS,
    DRAWINGS,
    FILLED,
    GRAPHS,
    MISREAD,
    PUZZLE,
    SOLUTION,
    SUDOKU,
    TASK_OF,
    TRUE,
    changed,
    group_of,
    random_groups,
    says,
)
from tests.support.toys import TASK as DOUBLING
from tests.support.toys import group as doubling


def test_plurality_by_hand() -> None:
    a, b, c = (says(grid_text(g)) for g in (TRUE, FILLED, MISREAD))
    term = GroupAgreement()
    assert term(SUDOKU, group_of(PUZZLE, a, a, b, c)) == [1, 1, 0, 0]
    assert term(SUDOKU, group_of(PUZZLE, b, a, b, a, c)) == [1, 1, 1, 1, 0]  # a tie
    assert term(SUDOKU, group_of(PUZZLE, a, b, c)) == [0, 0, 0]  # one alone is no group
    assert term(SUDOKU, group_of(PUZZLE, a)) == [0]
    assert term(SUDOKU, group_of(PUZZLE, "", "", "", b, b)) == [0, 0, 0, 1, 1]
    assert term(SUDOKU, group_of(PUZZLE, "", "")) == [0, 0]
    # The same grid in another notation is the same perception.
    assert term(SUDOKU, group_of(PUZZLE, a, says(json.dumps(TRUE)))) == [1, 1]


def test_soft_votes_by_hand() -> None:
    term = GroupAgreement("soft")
    drawing = DRAWINGS[0]
    found = term(GRAPHS, group_of(drawing, *map(says, ("0-1 1-2", "1-0", "2-1 3-4", "3-3"))))
    # Four rollouts, the last unreadable; votes: 01 twice, 12 twice, 34 once. In thirds:
    # first: w(01)=1, w(12)=1, w(34)=1: 2·2/(2·3 + 3); second: w(01)=1, w(12)=2, w(34)=1:
    # 2·1/(3 + 4); third: w(12)=1, w(34)=0, w(01)=2: 2·1/(2·3 + 3)
    np.testing.assert_allclose(found, [4 / 9, 2 / 7, 2 / 9, 0], rtol=1e-15)
    whole = says(drawing.perception)
    assert term(GRAPHS, group_of(drawing, whole, whole, whole)) == [1, 1, 1]
    assert term(GRAPHS, group_of(drawing, whole)) == [0]
    assert term(GRAPHS, group_of(drawing, whole, "")) == [0, 0]
    assert term(GRAPHS, group_of(drawing, "0-1", says("0-1"), says("2-3"))) == [0, 0, 0]


def test_filling_in_blanks_costs_soft_agreement_cell_by_cell() -> None:
    """What the leakage check lets pass, the honest rest of a group makes costly."""
    paid = []
    for k in range(len(BLANKS)):
        partial = changed(TRUE, *[(r, c, SOLUTION[r][c]) for r, c in BLANKS[:k]])
        group = group_of(PUZZLE, says(grid_text(partial)), *[says(grid_text(TRUE))] * 7)
        assert BlindSolver()(SUDOKU, group)[0] == 1
        paid.append(GroupAgreement("soft")(SUDOKU, group)[0])
    np.testing.assert_allclose(paid, [1 - k / 16 for k in range(len(BLANKS))])


def test_agreement_on_random_groups_equals_another_implementation() -> None:
    rng = np.random.default_rng(0)
    plurality, soft = GroupAgreement(), GroupAgreement("soft")
    for group in random_groups():
        task = TASK_OF[group.problem.task]
        seen = [r.parsed.perception for r in group.rollouts]
        assert plurality(task, group) == slow_plurality(seen)
        found = soft(task, group)
        np.testing.assert_allclose(found, slow_soft(task, seen), rtol=0, atol=1e-12)
        assert all(0 <= value <= 1 for value in found)
        order = rng.permutation(len(seen)).tolist()
        shuffled = replace(group, rollouts=tuple(group.rollouts[i] for i in order))
        for term, values in ((plurality, plurality(task, group)), (soft, found)):
            assert term(task, shuffled) == [values[i] for i in order]


def slow_plurality(seen: list[Any]) -> list[float]:
    readable = sorted(repr(sorted(p) if isinstance(p, frozenset) else p) for p in seen if p)
    runs = {key: len(list(run)) for key, run in itertools.groupby(readable)}
    best = max([2, *runs.values()])
    keys = [p and repr(sorted(p) if isinstance(p, frozenset) else p) for p in seen]
    return [float(runs.get(key, 0) == best) for key in keys]


def slow_soft(task: Task, seen: list[Any]) -> list[float]:
    """As a matrix of zeros and ones, one row a rollout, one column a possible item."""
    columns = (
        [(r, c, v) for r in range(4) for c in range(4) for v in range(5)]
        if task is SUDOKU
        else [(i, j) for j in range(5) for i in range(j)]
    )
    held = np.zeros((len(seen), len(columns)))
    for row, perception in zip(held, seen, strict=True):
        if perception is not None:
            row[:] = [
                perception[k[0]][k[1]] == k[2] if task is SUDOKU else k in perception
                for k in columns
            ]
    values = []
    for i, own in enumerate(held):
        rest = np.delete(held, i, axis=0)
        w = rest.mean(axis=0) if len(rest) else np.zeros(len(columns))
        below = own.sum() + w.sum()
        values.append(2 * float(own @ w) / below if below else 0.0)
    return values


def test_soft_votes_need_items() -> None:
    with pytest.raises(DataError, match=r"perception_items.*Doubling.*plurality"):
        GroupAgreement("soft")(DOUBLING, doubling(5, "5;10;"))
    assert GroupAgreement()(DOUBLING, doubling(5, "5;10;", "5;1;", "4;8;")) == [1, 1, 0]
