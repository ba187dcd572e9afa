"""Advantages: exact zeros where nothing differs, known values where something does."""

from __future__ import annotations

import statistics
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.recipe.algorithm import AlgorithmConfig
from rewards.advantages import (
    EPS,
    Estimator,
    GroupEstimator,
    batch_advantages,
    find_advantage,
    group_advantages,
    is_constant,
    token_advantages,
)
from rewards.compose import Composition, compose_groups
from rewards.scored import RewardError
from rewards.terms import Outcome
from tasks.core import ENVIRONMENT, NO_SEGMENT, SEGMENTS
from tests.support import toys

ESTIMATORS: tuple[GroupEstimator, ...] = ("grpo", "dr_grpo", "rloo")
WHITENED: tuple[Estimator, ...] = ("reinforce_pp", "reinforce_pp_baseline")
sane = st.floats(-100, 100, allow_subnormal=False).map(lambda x: round(x, 3))
batches = st.lists(
    st.one_of(
        st.lists(sane, min_size=2, max_size=6),
        st.tuples(sane, st.integers(2, 6)).map(lambda drawn: [drawn[0]] * drawn[1]),
    ),
    min_size=1,
    max_size=6,
)


def test_six_times_nine_tenths_is_no_signal() -> None:
    rewards = np.full(6, 0.9)
    # The trap: the plain formula sees a difference that is not there.
    single = rewards.astype(np.float32)
    assert np.any(single - single.mean() != 0)
    for estimator in ESTIMATORS:
        assert group_advantages(rewards, estimator).tolist() == [0.0] * 6


@given(value=st.floats(allow_nan=False, allow_infinity=False), size=st.integers(1, 33))
def test_equal_rewards_give_exactly_zero(value: float, size: int) -> None:
    rewards = np.full(size, value)
    assert is_constant(rewards)
    for estimator in ESTIMATORS:
        assert group_advantages(rewards, estimator).tolist() == [0.0] * size


@given(st.lists(sane, min_size=2, max_size=16).filter(lambda r: len(set(r)) > 1))
def test_estimators_equal_exact_arithmetic(rewards: list[float]) -> None:
    exact = [Fraction(r) for r in rewards]
    total, size = sum(exact), len(exact)
    mean = total / size
    std = statistics.pstdev(rewards)
    expected = {
        "dr_grpo": [float(r - mean) for r in exact],
        "rloo": [float(r - (total - r) / (size - 1)) for r in exact],
        "grpo": [float(r - mean) / (std + EPS) for r in exact],
    }
    for estimator in ESTIMATORS:
        found = group_advantages(np.array(rewards), estimator)
        np.testing.assert_allclose(found, expected[estimator], rtol=1e-9, atol=1e-9)


@given(
    st.lists(sane, min_size=2, max_size=12).filter(lambda r: len(set(r)) > 1),
    st.permutations(range(12)),
)
@settings(max_examples=50)
def test_advantages_sum_to_zero_keep_order_and_follow_a_permutation(
    rewards: list[float], order: list[int]
) -> None:
    order = [i for i in order if i < len(rewards)]
    values = np.array(rewards)
    for estimator in ESTIMATORS:
        found = group_advantages(values, estimator)
        assert abs(found.sum()) < 1e-6 * np.abs(values).max()
        assert np.all((found[:, None] > found[None, :]) <= (values[:, None] > values[None, :]))
        again = group_advantages(values[order], estimator)
        np.testing.assert_allclose(again, found[order], rtol=1e-9, atol=1e-9)


@given(batches)
def test_whitened_estimators_equal_exact_arithmetic(batch: list[list[float]]) -> None:
    rewards = [np.array(group) for group in batch]
    for estimator in WHITENED:
        found = batch_advantages(rewards, estimator)
        exact = [[Fraction(r) for r in group] for group in batch]
        if estimator == "reinforce_pp_baseline":
            exact = [[r - sum(group) / len(group) for r in group] for group in exact]
        everything = [float(r) for group in exact for r in group]
        mean = float(sum((r for group in exact for r in group), Fraction(0)) / len(everything))
        std = statistics.pstdev(everything)
        for group, rewarded, advantages in zip(exact, batch, found, strict=True):
            expected = [(float(r) - mean) / (std + EPS) for r in group]
            np.testing.assert_allclose(advantages, expected, rtol=1e-6, atol=1e-6)
            if estimator == "reinforce_pp_baseline" and len(set(rewarded)) == 1:
                assert advantages.tolist() == [0.0] * len(group)


@given(batches)
@settings(max_examples=50)
def test_a_batch_of_group_estimators_is_its_groups(batch: list[list[float]]) -> None:
    rewards = [np.array(group) for group in batch]
    for estimator in ESTIMATORS:
        for found, group in zip(batch_advantages(rewards, estimator), rewards, strict=True):
            assert found.tolist() == group_advantages(group, estimator).tolist()


def test_plain_reinforce_pp_teaches_from_groups_of_equal_rewards() -> None:
    easy, hard, mixed = np.ones(4), np.zeros(4), np.array([0.0, 1.0, 0.0, 1.0])
    found = batch_advantages([easy, hard, mixed], "reinforce_pp")
    np.testing.assert_allclose([found[0], found[1]], [[1.0] * 4, [-1.0] * 4], rtol=1e-5)
    # A batch without any difference teaches nothing, whatever rounding says.
    for estimator in WHITENED:
        assert not np.any(batch_advantages([np.full(6, 0.9), np.full(5, 0.9)], estimator)[0])
        assert batch_advantages([], estimator) == []


def test_a_spread_of_rounding_errors_stays_negligible() -> None:
    rewards = np.array([0.1 + 0.2, 0.3, 0.3, 0.3])
    assert not is_constant(rewards)
    assert np.abs(group_advantages(rewards)).max() < 1e-9


def test_an_unknown_estimator_is_an_error() -> None:
    with pytest.raises(ValueError, match="grpo, dr_grpo, rloo"):
        group_advantages(np.array([0.0, 1.0]), "gpro")  # type: ignore[arg-type]


@given(
    advantage=st.floats(-5, 5),
    segments=st.lists(st.integers(ENVIRONMENT, len(SEGMENTS) - 1), max_size=40),
    weights=st.dictionaries(st.sampled_from(SEGMENTS), st.floats(0, 4)),
)
@settings(max_examples=50)
def test_token_advantages_equal_a_loop(
    advantage: float, segments: list[int], weights: dict
) -> None:
    found = token_advantages(advantage, np.array(segments, dtype=np.int8), weights)
    factor = {NO_SEGMENT: 1.0, ENVIRONMENT: 0.0}
    factor |= {i: weights.get(name, 1.0) for i, name in enumerate(SEGMENTS)}
    expected = [advantage * factor[s] for s in segments]
    assert found.dtype == np.float32
    assert found.tolist() == np.array(expected, dtype=np.float32).tolist()


OWN = """
import numpy as np

def above_the_median(rewards, scale=1.0):
    return [scale * (group - np.median(group)) for group in rewards]

def grpo(rewards):
    return [(group - group.mean()) / (group.std() + 1e-6) for group in rewards]

def spoils_its_argument(rewards):
    for group in rewards:
        group -= group.mean()
    return rewards

def no_eps(rewards):
    return [(group - group.mean()) / group.std() for group in rewards]

def flat(rewards):
    return np.concatenate(rewards)

def raises(rewards):
    raise KeyError("cells")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def test_one_of_a_users_own_is_composed_as_the_built_in_ones(own: None) -> None:
    groups = [
        toys.group(3, "3;6;", "3;5;", "3;4;"),
        toys.group(2, "2;4;", "2;4;"),
        toys.group(1, "1;2;", "1;1;"),
    ]
    values = [toys.score(one, Outcome()) for one in groups]

    def composed(estimator: Any) -> list[Any]:
        return compose_groups(groups, values, Composition({"outcome": 2.0}, estimator=estimator))

    mine = composed(find_advantage("mine.py:above_the_median", {"scale": 0.5}))
    assert [g.advantages[:, 0].tolist() for g in mine] == [[1.0, 0.0, 0.0], [0, 0], [0.5, -0.5]]
    assert [g.zero_variance for g in mine] == [False, True, False]
    assert [g.totals.tolist() for g in mine] == [[2.0, 0.0, 0.0], [2, 2], [2, 0]]
    again, built_in = composed(find_advantage("mine.py:grpo", {})), composed("grpo")
    for ours, theirs in zip(again, built_in, strict=True):
        np.testing.assert_allclose(ours.advantages, theirs.advantages, rtol=1e-12)
    # What it does to its argument is its own affair: of two columns each sees the rewards.
    spoilt = find_advantage("mine.py:spoils_its_argument", {})
    rewards = [np.array([1.0, 2.0])]
    assert batch_advantages(rewards, spoilt)[0].tolist() == [-0.5, 0.5]
    assert rewards[0].tolist() == [1.0, 2.0]
    assert find_advantage("rloo", {}) == "rloo"


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("mine.py:no_eps", {}, "gave [nan, nan, nan, nan] for rewards [1.0, 1.0, 1.0, 1.0]"),
        ("mine.py:flat", {}, "gave arrays of shapes [(),"),
        ("mine.py:raises", {}, "KeyError: 'cells'"),
        ("mine.py:grpo", {"scale": 1}, "unexpected keyword argument 'scale'"),
        ("mine.py:np", {}, "'module' object is not callable"),
        ("mine.py:gpro", {}, 'did you mean "grpo"'),
    ],
)
def test_what_gives_no_advantages_is_refused_in_one_line(
    own: None, name: str, args: dict[str, Any], says: str
) -> None:
    AlgorithmConfig(advantage=name, advantage_args=args)
    with pytest.raises(RewardError) as error:
        find_advantage(name, args)
    said = str(error.value)
    assert said.startswith("algorithm.advantage: ") and says in said and "\n" not in said


def test_the_example_of_the_page_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "your_algorithm.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    (tmp_path / "my_algorithm.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    mine = find_advantage("my_algorithm.py:above_the_median", {"scale": 0.5})
    assert batch_advantages([np.array([0.0, 1.0, 3.0])], mine)[0].tolist() == [-0.5, 0.0, 1.0]
