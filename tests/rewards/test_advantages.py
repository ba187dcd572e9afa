"""Advantages: exact zeros where nothing differs, known values where something does."""

from __future__ import annotations

import statistics
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.advantages import (
    EPS,
    Estimator,
    GroupEstimator,
    batch_advantages,
    group_advantages,
    is_constant,
    token_advantages,
)
from tasks.core import NO_SEGMENT, SEGMENTS

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
@settings(max_examples=100, deadline=None, derandomize=True)
def test_equal_rewards_give_exactly_zero(value: float, size: int) -> None:
    rewards = np.full(size, value)
    assert is_constant(rewards)
    for estimator in ESTIMATORS:
        assert group_advantages(rewards, estimator).tolist() == [0.0] * size


@given(st.lists(sane, min_size=2, max_size=16).filter(lambda r: len(set(r)) > 1))
@settings(max_examples=100, deadline=None, derandomize=True)
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
@settings(max_examples=50, deadline=None, derandomize=True)
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
@settings(max_examples=100, deadline=None, derandomize=True)
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
@settings(max_examples=50, deadline=None, derandomize=True)
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
    segments=st.lists(st.integers(NO_SEGMENT, 2), max_size=40),
    weights=st.dictionaries(st.sampled_from(SEGMENTS), st.floats(0, 4)),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_token_advantages_equal_a_loop(
    advantage: float, segments: list[int], weights: dict
) -> None:
    found = token_advantages(advantage, np.array(segments, dtype=np.int8), weights)
    expected = [
        advantage * (weights.get(SEGMENTS[s], 1.0) if s != NO_SEGMENT else 1.0) for s in segments
    ]
    assert found.dtype == np.float32
    assert found.tolist() == np.array(expected, dtype=np.float32).tolist()
