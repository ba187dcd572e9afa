"""Surrogates: self-consistency and the blind solver; and of all of them guards, hostile text, and
that no truth is peeked at. The others are in test_agreement, test_blind_policy and
test_image_dependence."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rewards.surrogates import (
    BlindPolicy,
    BlindSolver,
    GroupAgreement,
    ImageDependence,
    SelfConsistency,
)
from rollout.record import Group
from tasks.core import Problem, Task
from tasks.sudoku import SudokuSpec, grid_text
from tests.support.surrogate_groups import (
    DRAWINGS,
    FILLED,
    GRAPHS,
    HOSTILE,
    MISREAD,
    PUZZLE,
    PUZZLES,
    SOLUTION,
    SUDOKU,
    TASK_OF,
    TRUE,
    answered,
    group_of,
    perception_length,
    random_groups,
    reason,
    says,
    toy_logprobs,
)
from tests.support.toys import TASK as DOUBLING
from tests.support.toys import group as doubling

# Self-consistency and the exact blind solver


def test_the_solver_and_self_consistency_by_hand() -> None:
    answer = grid_text(SOLUTION)
    texts = [
        says(grid_text(TRUE), answer),
        says(grid_text(TRUE), grid_text(TRUE)),  # an answer with blanks is none
        says(grid_text(FILLED), answer),
        says(grid_text(MISREAD), answer),
        says(grid_text(SOLUTION), answer),  # a leak
        says("-", answer),
        "",
    ]
    group = group_of(PUZZLE, *texts)
    assert BlindSolver()(SUDOKU, group) == [1, 1, 1, 0, 0, 0, 0]
    assert BlindSolver(leakage_check=False)(SUDOKU, group) == [1, 1, 1, 0, 1, 0, 0]
    assert SelfConsistency()(SUDOKU, group) == [1, 0, 1, 0, 1, 0, 0]
    # One blank is enough for an honest puzzle to state no answer.
    easy = SUDOKU.generate(np.random.default_rng(0), SudokuSpec(size=4, blanks=1, prompt="brief"))
    assert BlindSolver()(SUDOKU, group_of(easy, says(easy.perception))) == [1]


@pytest.mark.parametrize("problem", [*PUZZLES, *DRAWINGS], ids=lambda p: p.id)
def test_an_oracle_perception_earns_everything(problem: Problem) -> None:
    task = TASK_OF[problem.task]
    group = group_of(problem, *[task.demonstrate(problem, s) for s in ("terse", "verbose")])
    assert BlindSolver()(task, group) == [1, 1]
    assert SelfConsistency()(task, group) == [1, 1]
    assert GroupAgreement()(task, group) == GroupAgreement("soft")(task, group) == [1, 1]
    term = BlindPolicy()
    assert term.score(task, group, answered(term.ask(task, group, None), reason)) == [1, 1]


def test_solver_and_consistency_equal_other_implementations_on_random_groups() -> None:
    for group in random_groups():
        problem, task = group.problem, TASK_OF[group.problem.task]
        solver, consistent = [], []
        for rollout in group.rollouts:
            p, a = rollout.parsed.perception, rollout.parsed.answer
            answers = [] if p is None else brute_force(task, problem, p)
            leak = task is SUDOKU and p is not None and not any(0 in row for row in p)
            good = bool(answers) and not leak and (task is GRAPHS or len(answers) == 1)
            solver.append(float(good and task.check(problem, answers[0])))
            consistent.append(float(a in answers))
        assert BlindSolver()(task, group) == solver
        assert SelfConsistency()(task, group) == consistent


def brute_force(task: Task, problem: Problem, perception: Any) -> list[Any]:
    """All answers of a perception: 4x4 grids out of all 288, colourings out of all of them."""
    if task is SUDOKU:
        fits = (
            all(perception[r][c] in (0, full[r][c]) for r in range(4) for c in range(4))
            for full in ALL_GRIDS
        )
        return list(itertools.compress(ALL_GRIDS, fits))
    if perception not in COLORINGS:
        proper = [
            colors
            for colors in itertools.product("abcde", repeat=5)
            if all(colors[i] != colors[j] for i, j in perception)
        ]
        fewest = min(len(set(colors)) for colors in proper)
        COLORINGS[perception] = [
            tuple(enumerate(colors)) for colors in proper if len(set(colors)) == fewest
        ]
    return COLORINGS[perception]


COLORINGS: dict[Any, list[Any]] = {}
BOXES = [[(r + i, c + j) for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
ALL_GRIDS = [
    rows
    for rows in itertools.product(itertools.permutations(range(1, 5)), repeat=4)
    if all(len(set(column)) == 4 for column in zip(*rows, strict=True))
    and all(len({rows[r][c] for r, c in box}) == 4 for box in BOXES)
]


# All of them


def test_too_long_a_perception_earns_nothing_and_is_not_asked() -> None:
    text = says(grid_text(TRUE), grid_text(SOLUTION))
    n = perception_length(text)
    group = group_of(PUZZLE, text, text)
    for factory in (GroupAgreement, SelfConsistency, BlindSolver):
        assert factory(max_perception_tokens=n)(SUDOKU, group) == [1, 1]
        assert factory(max_perception_tokens=n - 1)(SUDOKU, group) == [0, 0]
    for asking in (BlindPolicy, ImageDependence):
        assert asking(max_perception_tokens=n).ask(SUDOKU, group, None)
        term = asking(max_perception_tokens=n - 1)
        assert term.ask(SUDOKU, group, None) == []
        assert term.score(SUDOKU, group, []) == [0, 0]


def test_a_task_that_does_not_know_leaks_is_checked_by_equality() -> None:
    group = doubling(0, "0;0;", "0;1;", "0;;")
    assert BlindSolver()(DOUBLING, group) == [0, 1, 1]
    assert BlindSolver(leakage_check=False)(DOUBLING, group) == [1, 1, 1]


def test_a_parser_without_spans_is_told_what_it_lacks() -> None:
    group = doubling(5, "5;10;")
    with pytest.raises(ValueError, match=r"Doubling.*spans\[.perception.\]"):
        replaced = replace(group, problem=replace(group.problem, perception="5;;"))
        BlindPolicy().ask(DOUBLING, replaced, None)


@pytest.mark.parametrize(
    ("term", "replies", "message"),
    [
        (BlindPolicy(), [], "1 requests and got 0"),
        (BlindPolicy(), [np.zeros(3)], "one rollout"),
        (BlindPolicy(), [Group("g", PUZZLE, ())], "one rollout"),
        (ImageDependence(), [np.zeros(3)], "2 requests and got 1"),
        (ImageDependence(), [np.zeros(3), np.zeros(3)], "log-probs"),
        (ImageDependence(), [Group("g", PUZZLE, ())] * 2, "log-probs"),
    ],
)
def test_replies_that_do_not_fit_are_refused(term: Any, replies: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        term.score(SUDOKU, group_of(PUZZLE, says(grid_text(TRUE))), replies)


@pytest.mark.parametrize("problem", [PUZZLE, DRAWINGS[0]], ids=["sudoku", "graph_coloring"])
def test_hostile_text_raises_nothing_and_earns_a_number(problem: Problem) -> None:
    task = TASK_OF[problem.task]
    group = group_of(problem, *HOSTILE)
    terms = [GroupAgreement(), GroupAgreement("soft"), SelfConsistency(), BlindSolver()]
    for term in terms:
        found = np.array(term(task, group))
        assert found.shape == (len(HOSTILE),) and ((found >= 0) & (found <= 1)).all()
    solver = BlindSolver()(task, group)
    assert not any(solver)
    for asking in (BlindPolicy(), ImageDependence()):
        requests = asking.ask(task, group, None)
        replies: Any = (
            answered(requests, reason)  # type: ignore[arg-type]
            if isinstance(asking, BlindPolicy)
            else [toy_logprobs(r) for r in requests]
        )
        found = np.array(asking.score(task, group, replies))
        assert found.shape == (len(HOSTILE),) and ((found >= 0) & (found <= 1)).all()


def test_no_surrogate_looks_at_perception_labels() -> None:
    """Another `p*` and other pictures of the truth, with the answers the same, change nothing."""
    for group in random_groups()[:50]:
        problem, task = group.problem, TASK_OF[group.problem.task]
        wrong = PUZZLES[0] if task is SUDOKU else DRAWINGS[0]
        blind = replace(group, problem=replace(problem, perception=wrong.perception))
        unlabelled = replace(blind, problem=replace(blind.problem, truth={"v": 5}))
        for term in (GroupAgreement(), GroupAgreement("soft"), SelfConsistency()):
            assert term(task, unlabelled) == term(task, group)
        assert BlindSolver()(task, blind) == BlindSolver()(task, group)
        prefixes = [[r.prefix for r in BlindPolicy().ask(task, g, None)] for g in (blind, group)]
        assert prefixes[0] == prefixes[1]
