"""The divide into train and test: shares, and no symmetric twin across it, by brute force."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import combinations, permutations, product
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from tasks import graph_coloring, splits, sudoku
from tasks.core import DataError, Problem
from tasks.load import load_task
from tasks.splits import SPLITS, TEST_SHARE, draw_problem, split_of
from tests.support.puzzles import SMALL, TINY

COUNT = 2000
"""Of the 1040 classes of 4x4 Sudokus with 8 blanks these bring some 850. A key that told apart the
twins of one class in a hundred would go unseen here with a chance of 1 %: 10 such classes, each
drawn twice with both keys with a chance of .38."""
SUDOKU: dict[str, Any] = TINY | {"blanks": 8}
GRAPH: dict[str, Any] = SMALL | {"vertices": 6, "label_size": 0}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures: they take half of the time, and it is puzzles that are told apart."""
    monkeypatch.setattr(sudoku, "render", lambda *_: b"")
    monkeypatch.setattr(graph_coloring, "render", lambda *_: b"")
    monkeypatch.setattr(graph_coloring, "place", lambda *_: None)


def divided(name: str, knobs: dict[str, Any], count: int) -> dict[str, list[Problem]]:
    """`count` problems by the side they fall on, and some that each side's stream brings."""
    task = load_task(name)
    spec = task.spec(**knobs)
    rng = np.random.default_rng(0)
    found: dict[str, list[Problem]] = {split: [] for split in SPLITS}
    for _ in range(count):
        problem = task.generate(rng, spec)
        found[split_of(problem)].append(problem)
    # The hash draws classes, so it is their share that is binomial.
    test, train = (len({p.symmetry_key for p in found[split]}) for split in ("test", "train"))
    sigma = (TEST_SHARE * (1 - TEST_SHARE) / (test + train)) ** 0.5
    assert abs(test / (test + train) - TEST_SHARE) < 3 * sigma
    for split in SPLITS:
        drawn = [draw_problem(task, spec, split, seed=9, index=index) for index in range(100)]
        assert {split_of(problem) for problem in drawn} == {split}
        found[split] += drawn
    keys = {split: {p.symmetry_key for p in problems} for split, problems in found.items()}
    assert not keys["train"] & keys["test"]
    return found


def sudoku_group() -> np.ndarray:
    """int64 [128, 16]: cell permutations, grown from a line swap, a band swap and transposing."""
    cells = np.arange(16).reshape(4, 4)
    steps = [cells.T, cells[[1, 0, 2, 3]], cells[[2, 3, 0, 1]]]
    group = new = {tuple(range(16))}
    while new:
        new = {tuple(np.array(g)[step.reshape(-1)].tolist()) for g in new for step in steps} - group
        group = group | new
    return np.array(sorted(group))


SUDOKU_GROUP = sudoku_group()
DIGIT_NAMES = np.array([(0, *names) for names in permutations((1, 2, 3, 4))])  # [24, 5]


def sudoku_twins(problem: Problem) -> set[int]:
    """Every puzzle that is this one up to symmetry, itself first: a number in base 5 each."""
    board = np.reshape(problem.truth["puzzle"], 16)
    twins = DIGIT_NAMES[:, board[SUDOKU_GROUP]] @ 5 ** np.arange(16)  # [24, 128]
    return set(twins.reshape(-1).tolist())


def sudoku_number(problem: Problem) -> int:
    return int(np.reshape(problem.truth["puzzle"], 16) @ 5 ** np.arange(16))


def graph_number(problem: Problem) -> int:
    """The adjacency bits of a graph of six vertices."""
    pairs = {pair: 1 << bit for bit, pair in enumerate(combinations(range(6), 2))}
    return sum(pairs[i, j] for i, j in problem.truth["edges"])


def graph_twins(problem: Problem) -> set[int]:
    """Every graph that is this one up to labels."""
    matrix = np.zeros((6, 6), dtype=np.int64)
    for i, j in problem.truth["edges"]:
        matrix[i, j] = matrix[j, i] = 1
    orders = np.array(list(permutations(range(6))))  # [720, 6]
    rows, columns = np.triu_indices(6, 1)
    return set((matrix[orders[:, rows], orders[:, columns]] @ (1 << np.arange(15))).tolist())


def twins_of(problems: list[Problem], number: Any, twins: Any) -> tuple[set[int], int]:
    """(all that is symmetric to one of the problems, how many classes that is)."""
    covered: set[int] = set()
    classes = 0
    for problem in problems:
        if number(problem) not in covered:
            orbit = twins(problem)
            assert number(problem) in orbit
            covered |= orbit
            classes += 1
    return covered, classes


@pytest.mark.usefixtures("undrawn")
def test_no_sudoku_of_thousands_has_a_twin_across_the_divide() -> None:
    assert len(SUDOKU_GROUP) == 128
    found = divided("sudoku", SUDOKU, COUNT)
    twins = {split: twins_of(found[split], sudoku_number, sudoku_twins) for split in SPLITS}
    assert twins["test"][0].isdisjoint(twins["train"][0])
    # The key is exact: it tells as many puzzles apart as there are orbits, and no more.
    for split, least in (("test", 150), ("train", 600)):
        assert twins[split][1] == len({p.symmetry_key for p in found[split]}) > least


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("split_by", "count"), [("labelled", COUNT), ("isomorphism", 1000)])
def test_no_graph_of_thousands_is_on_both_sides_of_the_divide(split_by: str, count: int) -> None:
    found = divided("graph_coloring", GRAPH | {"split_by": split_by}, count)
    edges = {split: {p.perception for p in problems} for split, problems in found.items()}
    assert not edges["train"] & edges["test"]
    if split_by == "isomorphism":
        held_out, classes = twins_of(found["test"], graph_number, graph_twins)
        assert held_out.isdisjoint(map(graph_number, found["train"]))
        assert classes == len({p.symmetry_key for p in found["test"]}) > 5


def test_any_part_of_a_stream_can_be_drawn_alone() -> None:
    task = load_task("sudoku")
    spec = task.spec(**SUDOKU)
    first = [draw_problem(task, spec, "test", 3, index) for index in range(6)]
    again = [draw_problem(task, spec, "test", 3, index) for index in reversed(range(6))]
    assert first == again[::-1]
    other = [
        draw_problem(task, spec, split, seed, index)
        for split, seed, index in (("train", 3, 0), ("test", 4, 0), ("test", 3, 6))
    ]
    assert len({p.id for p in first + other}) == 9


@pytest.mark.parametrize(("name", "knobs"), [("sudoku", SUDOKU), ("graph_coloring", GRAPH)])
def test_another_look_at_a_stream_shows_the_same_puzzles(name: str, knobs: dict[str, Any]) -> None:
    task = load_task(name)
    looks = [task.spec(**knobs | more) for more in ({}, {"noise": 20, "ink": "random"})]
    for split, index in product(SPLITS, range(3)):
        one, two = (draw_problem(task, spec, split, 0, index) for spec in looks)
        assert one.truth == two.truth and one.images[0] != two.images[0]


def test_sides_are_decided_for_good() -> None:
    task = load_task("sudoku")
    problem = draw_problem(task, task.spec(**SUDOKU), "train", 0, 0)
    sides = [split_of(replace(problem, symmetry_key=f"key-{n}"))[1] for n in range(24)]
    # Changing these moves held-out problems of old runs and data sets into training.
    assert "".join(sides) == "rrerreeerrrerrrrerrrrrrr"


class Unlucky(sudoku.Sudoku):
    """Fails as often as `failing` says, before it draws anything else."""

    failing = 0.25

    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        if rng.random() < self.failing:
            raise ValueError("no such luck")
        return super().generate(rng, spec)


@pytest.mark.usefixtures("undrawn")
def test_an_unlucky_drawing_is_drawn_again_and_depends_on_nothing_else() -> None:
    task = Unlucky()
    spec = task.spec(**SUDOKU)
    forth = [draw_problem(task, spec, "test", 3, index) for index in range(30)]
    back = [draw_problem(task, spec, "test", 3, index) for index in reversed(range(30))]
    assert forth == back[::-1]
    assert {split_of(problem) for problem in forth} == {"test"}
    task.failing = 1.0
    with pytest.raises(DataError, match=r"problem 2 of test: 8 draws in a row .* no such luck"):
        draw_problem(task, spec, "test", 3, 2)


@pytest.mark.parametrize(
    ("knobs", "unlucky"),
    [
        ({"vertices": 12, "layout": "random"}, (27, 34)),
        ({"vertices": 14, "layout": "random", "canvas": 224}, (3, 6)),
    ],
)
def test_a_graph_without_a_legible_layout_at_once_is_drawn_all_the_same(
    knobs: dict[str, Any], unlucky: tuple[int, ...]
) -> None:
    """These raised `no legible random layout`; the graph does not depend on the picture."""
    task = load_task("graph_coloring")
    for index in unlucky:
        drawn = draw_problem(task, task.spec(**knobs), "train", 0, index)
        plain = draw_problem(task, task.spec(vertices=knobs["vertices"]), "train", 0, index)
        assert drawn.truth == plain.truth


@pytest.mark.usefixtures("undrawn")
def test_too_narrow_knobs_say_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "PATIENCE", 50)
    task = load_task("graph_coloring")
    only_one = {"vertices": 2, "canvas": 64}
    with pytest.raises(DataError, match=r"no problem of the (train|test) split.*loosen them"):
        for split in SPLITS:
            draw_problem(task, task.spec(**only_one), split, 0, 0)
    impossible = {"vertices": 6, "edges": 9, "chromatic": 3, "planar": "nonplanar"}
    with pytest.raises(DataError, match=r"drawing problem 7 of test: .* relax one"):
        draw_problem(task, task.spec(**impossible), "test", 0, 7)


@pytest.mark.parametrize(
    ("module", "knobs", "recorded"),
    [
        (sudoku, SUDOKU | {"noise": 9, "jitter": 2}, "f48972128e6c4289"),
        (graph_coloring, GRAPH | {"split_by": "labelled"}, "5384e334a547bff7"),
        (graph_coloring, GRAPH | {"split_by": "isomorphism"}, "ec811b3dc87997ce"),
    ],
)
def test_a_streams_problems_stay_and_no_picture_is_drawn_in_vain(
    module: Any, knobs: dict[str, Any], recorded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task(module.__name__.removeprefix("tasks."))
    spec = task.spec(**knobs)
    render, pictures = module.render, []

    def counted(*args: Any) -> bytes:
        pictures.append(render(*args))
        return pictures[-1]

    monkeypatch.setattr(module, "render", counted)
    wanted = [(split, index) for split in SPLITS for index in range(12)]
    drawn = [draw_problem(task, spec, split, 11, index) for split, index in wanted]
    assert pictures == [problem.images[0] for problem in drawn]
    for problem, (split, index) in zip(drawn, wanted, strict=True):
        rng = np.random.default_rng(np.random.SeedSequence(11, spawn_key=(split == "test", index)))
        while split_of(whole := task.generate(rng, spec)) != split:
            pass
        assert whole == problem
    # Of the puzzles alone: pixels are the libraries' business.
    text = "\n".join(problem.perception for problem in drawn)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == recorded
