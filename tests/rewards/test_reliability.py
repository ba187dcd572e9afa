"""Reliability: against brute force and SciPy, and intervals that cover what they say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rewards.coupling import correlation_statistics, coupling
from rewards.intervals import Interval, group_bootstrap
from rewards.reliability import auc_statistics, calibration, reliability, roc_auc

GROUP = st.integers(2, 5).flatmap(
    lambda size: st.tuples(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=size, max_size=size),
        st.lists(st.booleans(), min_size=size, max_size=size),
    )
)


def pairs_won(values: np.ndarray, truth: np.ndarray) -> tuple[float, int]:
    """(wins of right over wrong with ties half, pairs), by looking at every pair."""
    wins, pairs = 0.0, 0
    for right, is_right in zip(values, truth, strict=True):
        for wrong, is_other in zip(values, truth, strict=True):
            if is_right and not is_other:
                wins += 1.0 if right > wrong else 0.5 if right == wrong else 0.0
                pairs += 1
    return wins, pairs


def or_none(value: float) -> float | None:
    return None if np.isnan(value) else value


def test_auc_equals_every_pair_and_scipy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        values = rng.integers(0, rng.integers(1, 9), size=23) / 4
        truth = rng.random(23) < rng.random()
        wins, pairs = pairs_won(values, truth)
        assert roc_auc(values, truth) == (pytest.approx(wins / pairs) if pairs else None)
        if pairs:
            u = stats.mannwhitneyu(values[truth], values[~truth]).statistic
            assert roc_auc(values, truth) == pytest.approx(u / pairs)


@settings(max_examples=150)
@given(st.lists(GROUP, min_size=1, max_size=6), st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_a_resample_scores_like_the_groups_it_drew(
    groups: list[tuple[list[float], list[bool]]], times: list[int]
) -> None:
    # Weights stand for repeated groups: the sums must agree with really repeating them.
    values = [np.array(v) for v, _ in groups]
    truth = [np.array(t) for _, t in groups]
    drawn = [i for i in range(len(groups)) for _ in range(times[i])]
    if not drawn:
        return
    weights = np.array([times[: len(groups)]], dtype=np.float64)
    x, y = [values[i] for i in drawn], [truth[i] for i in drawn]
    pooled, within = correlation_statistics(values, truth)(weights)[0]
    expected = coupling(x, [t.astype(float) for t in y])
    assert or_none(pooled) == pytest.approx(expected.pooled.value, abs=1e-9)
    assert or_none(within) == pytest.approx(expected.within.value, abs=1e-9)
    auc, auc_within = auc_statistics(values, truth)(weights)[0]
    assert or_none(auc) == pytest.approx(roc_auc(np.concatenate(x), np.concatenate(y)), abs=1e-9)
    won = np.array([pairs_won(v, t) for v, t in zip(x, y, strict=True)]).sum(axis=0)
    assert or_none(auc_within) == (pytest.approx(won[0] / won[1]) if won[1] else None)


def test_a_reliability_worked_out_by_hand() -> None:
    # Group 1: right 1.0 and 0.5, wrong 0.5 and 0.0. Group 2: constant term. Group 3: no wrong one.
    values = [np.array([1.0, 0.5, 0.5, 0.0]), np.full(2, 0.5), np.array([0.0, 1.0])]
    truth = [np.array([1, 1, 0, 0]), np.array([1, 0]), np.array([1, 1])]
    found = reliability(values, truth)
    assert (found.n, found.groups) == (8, 3)
    assert (found.mean, found.a_p) == (0.5, 0.625)
    assert found.zero_variance.value == pytest.approx(1 / 3)
    assert found.auc_within.value == pytest.approx((3.5 + 0.5) / 5)
    assert found.brier.value == pytest.approx((0 + 0.25 + 0.25 + 0 + 0.25 + 0.25 + 1 + 0) / 8)
    expected = coupling(values, truth)
    assert found.pooled.value == pytest.approx(expected.pooled.value)
    assert found.within.value == pytest.approx(expected.within.value)
    near = [np.array([1.0, 1.0, 0.7, 0.1]), np.array([1.0, 0.2]), np.ones(2)]
    graded = reliability(values, truth, graded=near)
    assert graded.graded.value == pytest.approx(coupling(values, near).within.value)
    assert graded.within == found.within and found.graded == Interval()
    assert [(b.low, b.high, b.n, b.a_p.value) for b in found.calibration] == [
        (0.0, 0.0, 2, 0.5),
        (0.5, 0.5, 4, 0.5),
        (1.0, 1.0, 2, 1.0),
    ]


def test_what_is_undefined_is_none_and_few_groups_have_no_interval() -> None:
    assert reliability([], []).pooled == Interval()
    constant = reliability([np.ones(4)] * 3, [np.array([1, 0, 1, 0])] * 3)
    assert (constant.pooled.value, constant.within.value) == (None, None)
    assert (constant.auc.value, constant.zero_variance.value) == (0.5, 1.0)
    one = reliability([np.array([0.0, 1.0])], [np.array([0, 1])])
    assert one.pooled == Interval(pytest.approx(1.0))
    # The term varies in one group of four: most resamples cannot say.
    rare = reliability([np.array([0.0, 1.0]), *[np.ones(2)] * 3], [np.array([0, 1])] * 4)
    assert rare.within == Interval(pytest.approx(1.0))
    assert reliability([np.array([0.0, 2.0])], [np.array([0, 1])]).brier.value is None
    all_right = reliability([np.array([0.0, 1.0])] * 3, [np.ones(2)] * 3)
    assert (all_right.auc.value, all_right.pooled.value) == (None, None)
    assert coupling([], []).pooled == Interval()


def test_calibration_bins_part_the_rollouts_and_rise_with_a_calibrated_term() -> None:
    rng = np.random.default_rng(3)
    values = rng.random(5000)
    truth = rng.random(5000) < values
    bins = calibration(values, truth)
    assert len(bins) == 10
    assert sum(b.n for b in bins) == 5000
    assert all(b.n == 500 for b in bins)
    assert all(a.high < b.low for a, b in itertools.pairwise(bins))
    assert all(b.a_p.low <= b.a_p.value <= b.a_p.high for b in bins)
    assert all(abs(b.a_p.value - b.mean) < 0.08 for b in bins)
    # Equal values are never parted, however many there are.
    tied = calibration(np.r_[np.zeros(900), np.linspace(0.1, 1, 100)], np.ones(1000, bool))
    assert (tied[0].low, tied[0].high, tied[0].n) == (0.0, 0.0, 900)
    assert sum(b.n for b in tied) == 1000


def test_intervals_are_seeded_and_chunks_do_not_change_them() -> None:
    rng = np.random.default_rng(4)
    values = [rng.random(8) for _ in range(20)]
    truth = [rng.random(8) < v for v in values]
    statistics = auc_statistics(values, truth)
    whole = group_bootstrap(statistics, 20, resamples=300, seed=1)
    assert group_bootstrap(statistics, 20, resamples=300, seed=1, size=2**21) == whole
    assert group_bootstrap(statistics, 20, resamples=300, seed=2) != whole
    assert all(e.low is not None and e.low < e.value < e.high for e in whole)


def test_more_groups_of_the_same_puzzles_make_nothing_surer() -> None:
    rng = np.random.default_rng(6)
    values = [rng.integers(0, 2, 6).astype(float) for _ in range(12)]
    truth = [(v + rng.integers(0, 2, 6)) > 0 for v in values]
    names = [f"p{i}" for i in range(12)]
    once = reliability(values, truth, names)
    thrice = reliability(values * 3, truth * 3, names * 3)
    for name in ("pooled", "within", "auc", "auc_within", "brier"):
        one, three = getattr(once, name), getattr(thrice, name)
        assert (three.value, three.low, three.high) == pytest.approx((one.value, one.low, one.high))
    # As if they were puzzles of their own: surer than it is.
    alone = reliability(values * 3, truth * 3)
    assert alone.pooled.high - alone.pooled.low < 0.7 * (once.pooled.high - once.pooled.low)
    for mine, theirs in zip(thrice.calibration, alone.calibration, strict=True):
        assert theirs.a_p.high - theirs.a_p.low < mine.a_p.high - mine.a_p.low


def test_intervals_cover_the_truth_where_rollouts_of_a_group_resemble_each_other() -> None:
    # x = d·y + s·u_group + noise and y ~ Bern(0.2 or 0.8 by group): the population's figures.
    d, s, groups, runs = 1.2, 0.8, 50, 400
    truth = {
        "pooled": 0.5 * d / np.sqrt(0.25 * d**2 + s**2 + 1),
        "within": 0.4 * d / np.sqrt(0.16 * d**2 + 1),
        "auc": stats.norm.cdf(d / np.sqrt(2 * (s**2 + 1))),
        "auc_within": stats.norm.cdf(d / np.sqrt(2)),
    }
    rng = np.random.default_rng(5)
    hits = dict.fromkeys(truth, 0)
    alone = 0
    for run in range(runs):
        y = rng.random((groups, 8)) < rng.choice([0.2, 0.8], size=(groups, 1))
        x = d * y + s * rng.normal(size=(groups, 1)) + rng.normal(size=(groups, 8))
        found = reliability(list(x), list(y), resamples=300, seed=run)
        for name, value in truth.items():
            estimate = getattr(found, name)
            hits[name] += estimate.low <= value <= estimate.high
        if run < 100:
            # Drawing rollouts one by one, as if they knew nothing of each other.
            single = coupling(
                list(x.reshape(-1, 1)), list(y.reshape(-1, 1)), resamples=300, seed=run
            )
            assert single.pooled.low is not None and single.pooled.high is not None
            alone += single.pooled.low <= truth["pooled"] <= single.pooled.high
    assert all(0.92 <= n / runs <= 0.98 for n in hits.values()), hits
    assert alone / 100 < 0.9
