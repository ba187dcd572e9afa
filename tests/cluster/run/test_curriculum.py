"""Curricula: weights follow success, a resumed run draws the same, and the default none other."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.recipe.problems import open_sources, step_problems, step_sources
from cluster.recipe.recipe import Recipe, RecipeError, UserError
from cluster.recipe.strategies import Entry, SuccessBand, Uniform, make_strategy
from cluster.run.checkpoints import Position
from cluster.run.curriculum import Curriculum
from tests.cluster.run.test_train import two_tasks
from tests.support.toys import graded

BAND = ("algorithm.problems_per_step=6", "algorithm.curriculum.strategy=success_band")

entries = st.lists(
    st.builds(
        Entry,
        label=st.uuids().map(str),
        weight=st.floats(0.01, 10),
        success=st.none() | st.floats(0, 1),
        groups=st.integers(0, 100),
    ),
    min_size=1,
    max_size=6,
)


@dataclass(frozen=True)
class Last:
    """All weight on the last entry, or weights that cannot be used."""

    spoilt: bool = False

    def weights(self, entries: Any) -> list[float]:
        return [-1.0 if self.spoilt else 0.0] * (len(entries) - 1) + [1.0]


@pytest.fixture
def recipe() -> Recipe:
    return two_tasks(*BAND)


@given(entries=entries, floor=st.floats(0.01, 1))
@settings(max_examples=200)
def test_the_nearer_to_one_in_two_the_oftener(entries: list[Entry], floor: float) -> None:
    found = SuccessBand(floor).weights(entries)
    shares = [weight / entry.weight for weight, entry in zip(found, entries, strict=True)]
    far = [0.0 if c.success is None else abs(c.success - 0.5) for c in entries]
    for a, b in zip(np.argsort(far)[:-1], np.argsort(far)[1:], strict=True):
        assert shares[a] >= shares[b] - 1e-12
    assert all(floor - 1e-12 <= share <= 1 + 1e-12 for share in shares)
    mirrored = [Entry(c.label, c.weight, None if c.success is None else 1 - c.success)
                for c in entries]  # fmt: skip
    assert SuccessBand(floor).weights(mirrored) == pytest.approx(found)
    assert Uniform().weights(entries) == [c.weight for c in entries]


def practise(
    curriculum: Curriculum, recipe: Recipe, steps: range, rates: list[float]
) -> list[list[int]]:
    """Draw steps and observe groups of two whose rollouts are right at each entry's rate."""
    drawn = []
    for step in steps:
        places = step_sources(curriculum.sources(), recipe.seed, step - 1, 6)
        rng = np.random.default_rng([9, step])
        answers = [(rng.random(2) < rates[place]).tolist() for place in places]
        drawn.append(places)
        told = curriculum.metrics()
        found = [graded(a, f"{step}-{i}") for i, a in enumerate(answers)]
        assert curriculum.observe(step, found) == told
    return drawn


def test_it_turns_to_what_is_neither_mastered_nor_hopeless(recipe: Recipe) -> None:
    sources = open_sources(recipe.tasks)
    curriculum = Curriculum(recipe, sources)
    assert [s.weight for s in curriculum.sources()] == [3.0, 1.0]  # unseen: as the recipe has it
    drawn = practise(curriculum, recipe, range(1, 41), [1.0, 0.5])
    late = sum(place == 1 for places in drawn[-10:] for place in places)
    assert late > 2 * 60 * 0.25  # of 60 problems; the recipe's weights give a quarter
    metrics = curriculum.metrics()
    assert metrics["curriculum/sudoku/success"] == pytest.approx(1.0)
    assert 0.2 < metrics["curriculum/graph_coloring/success"] < 0.8
    assert metrics["curriculum/graph_coloring/share"] > 0.6
    assert metrics["curriculum/sudoku/share"] > 0.05  # never given up


def test_a_resumed_run_draws_what_it_would_have_drawn(recipe: Recipe) -> None:
    sources = open_sources(recipe.tasks)
    whole = Curriculum(recipe, sources)
    expected = practise(whole, recipe, range(1, 13), [0.9, 0.4])
    first = Curriculum(recipe, sources)
    assert practise(first, recipe, range(1, 6), [0.9, 0.4]) == expected[:5]
    stored = json.dumps(Position(5, 5, curriculum=first.state()).to_dict())
    again = Curriculum(recipe, sources, Position.from_dict(json.loads(stored)).curriculum)
    assert practise(again, recipe, range(6, 13), [0.9, 0.4]) == expected[5:]
    assert again.state() == whole.state()


def test_without_a_strategy_the_problems_are_the_recipes() -> None:
    recipe = two_tasks()
    sources = open_sources(recipe.tasks)
    curriculum = Curriculum(recipe, sources)
    for step in (1, 2, 3):
        plain = step_problems(sources, recipe.seed, step - 1, 5)
        assert step_problems(curriculum.sources(), recipe.seed, step - 1, 5) == plain
        curriculum.observe(step, [graded([True, False], str(i)) for i in range(5)])


def test_a_strategy_of_ones_own_and_what_is_wrong_with_one(recipe: Recipe) -> None:
    sources = open_sources(recipe.tasks)

    def using(strategy: str, **args: Any) -> Recipe:
        chosen = recipe.algorithm.curriculum.model_copy(update={"strategy": strategy, "args": args})
        algorithm = recipe.algorithm.model_copy(update={"curriculum": chosen})
        return recipe.model_copy(update={"algorithm": algorithm})

    own = f"{__name__}:Last"
    assert set(step_sources(Curriculum(using(own), sources).sources(), 1, 0, 50)) == {1}
    with pytest.raises(UserError, match="gave the weights"):
        Curriculum(using(own, spoilt=True), sources)
    with pytest.raises(UserError, match=r'strategy: .* has no "Nobody"'):
        make_strategy(f"{__name__}:Nobody", {})
    with pytest.raises(UserError, match="does not take them"):
        make_strategy("success_band", {"ceiling": 1})
    for override in ('algorithm.curriculum.strategy="easy"', 'tasks=[{name="sudoku"}]'):
        with pytest.raises(RecipeError, match=r"^x\.toml: algorithm\.curriculum\.strategy: "):
            two_tasks(*BAND, override)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "class Mine:\n    pass\n1 / 0\n",
            "strategy: own_way cannot be imported: ZeroDivisionError",
        ),
        ("class Mine\n", "strategy: own_way cannot be imported: SyntaxError"),
        ("class Mine:\n    def __init__(self): raise KeyError('x')\n", "args: .*: 'x'"),
        ("class Mine:\n    pass\n", "no method weights"),
    ],
)
def test_a_strategy_of_ones_own_that_fails_in_whatever_way_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, says: str
) -> None:
    (tmp_path / "own_way.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_way", raising=False)
    with pytest.raises(UserError, match=says) as caught:
        make_strategy("own_way:Mine", {})
    assert str(caught.value).startswith("algorithm.curriculum.")
