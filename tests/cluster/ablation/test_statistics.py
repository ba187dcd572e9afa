"""The statistics of an ablation against simulated truth, SciPy, and definitions by brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from benchmarks.interval_coverage import (
    HARDNESS,
    NODES,
    WEIGHTS,
    Draw,
    center,
    coverage,
    difference,
    graded,
    right,
    simulated,
)
from cluster.ablation.statistics import (
    PHASES,
    accuracy_interval,
    asymmetry,
    band,
    correlation_interval,
    cost_to_reach,
    crossed_interval,
    holm,
    mean_correlation,
    mean_level,
    paired_test,
    phase_of,
    reach,
    seed_interval,
    smoothed,
)
from cluster.record.evaluation import mcnemar
from rewards.intervals import wilson

PROBLEMS = 512


def apart(rng: np.random.Generator, chances: np.ndarray) -> np.ndarray:
    """Differences of two arms that share seeds and problems, and differ in both: see `GAP`."""
    seeds, problems = chances.shape
    shifts = 0.3 + rng.normal(0, 0.5, (1, problems)) + rng.normal(0, 0.25, (seeds, 1))
    return right(rng, special.expit(special.logit(chances) + shifts)) - right(rng, chances)


def mean_chance(logit: float, variance: float) -> float:
    """Over normal logits of that variance."""
    chances = special.expit(logit + math.sqrt(variance) * NODES)
    return float((WEIGHTS * chances).sum() / math.sqrt(2 * math.pi))


def gap(spread: float) -> float:
    """The true difference of `apart` at an accuracy of .57."""
    variance = HARDNESS**2 + spread**2
    logit = center(0.57, variance)
    return mean_chance(logit + 0.3, variance + 0.5**2 + 0.25**2) - 0.57


def bootstrap_covered(data: Iterable[np.ndarray], true: float, rng: np.random.Generator) -> float:
    """Coverage of a percentile bootstrap that draws seeds, then problems (one draw for all)."""
    draws, hits = 200, []
    for v in data:
        seeds, problems = v.shape
        of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
        of_problems = rng.multinomial(problems, np.full(problems, 1 / problems), draws) / problems
        low, high = np.quantile(((of_problems @ v.T) * of_seeds).sum(axis=1), (0.025, 0.975))
        hits.append(low <= true <= high)
    return float(np.mean(hits))


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("spread", [0.25, 0.5])
@pytest.mark.parametrize("draw", [right, apart])
def test_intervals_hold_the_truth_95_times_in_100(draw: Draw, spread: float, seeds: int) -> None:
    data = simulated(draw, 0.57, (seeds, PROBLEMS), spread, 250, 7)
    true = gap(spread) if draw is apart else 0.57
    # 250 intervals: the share itself has a standard error of 1.4 points.
    assert 0.92 <= coverage(data, true, draw is apart) <= 0.98


@pytest.mark.parametrize("seeds", [3, 10])
@pytest.mark.parametrize("draw", [right, difference])
def test_without_differences_between_seeds_intervals_are_at_most_a_little_wide(
    draw: Draw, seeds: int
) -> None:
    data = simulated(draw, 0.57, (seeds, PROBLEMS), 0.0, 250, 11)
    true = 0.0 if draw is difference else 0.57
    assert 0.93 <= coverage(data, true, draw is difference) <= 0.99


def test_few_seeds_are_why_intervals_are_no_bootstrap_and_no_t_over_seeds() -> None:
    rng = np.random.default_rng(3)
    few = simulated(right, 0.57, (3, PROBLEMS), 0.5, 100, 3)
    assert bootstrap_covered(few, 0.57, rng) < 0.88
    many = simulated(right, 0.57, (10, PROBLEMS), 0.0, 100, 3)
    alone = [seed_interval(v.mean(axis=1)) for v in many]
    assert np.mean([e.low <= 0.57 <= e.high for e in alone]) < 0.75  # type: ignore[operator]


@pytest.mark.parametrize("share", [0.01, 0.02, 0.98])
@pytest.mark.parametrize("seeds", [1, 2, 8])
def test_near_the_ends_intervals_hold_the_truth_too(seeds: int, share: float) -> None:
    """A symmetric interval held it .83 to .93 of the time here."""
    data = simulated(right, share, (seeds, 64), 0.0, 300, 13)
    # Two seeds of a handful of right answers: rounding widens what cannot be known.
    assert 0.93 <= coverage(data, share) <= (1.0 if seeds == 2 else 0.99)


def test_graded_means_near_one_hold_the_truth() -> None:
    assert 0.92 <= coverage(simulated(graded, 0.98, (1, 64), 0.0, 1000, 17), 0.98) <= 0.97


@pytest.mark.parametrize("seeds", [2, 3])
def test_seeds_that_tie_do_not_make_a_difference_certain(seeds: int) -> None:
    """Two arms without a difference: the seeds' means often tie at such accuracies."""
    data = simulated(difference, 0.02, (seeds, 64), 0.0, 800, 19)
    p = np.array([crossed_interval(v, (-1, 1)).p for v in data], float)
    assert (p <= 0.05).mean() <= 0.05 and (p <= 0.001).mean() <= 0.002
    assert p.min() > 1e-6


def test_one_problem_is_scipys_t_interval_and_one_seed_is_the_same_over_problems() -> None:
    values = np.random.default_rng(0).normal(0.3, 0.2, 7)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    for found in (seed_interval(values), crossed_interval(values[None, :])):
        assert (found.low, found.high) == pytest.approx((low, high))
        assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-6)
    assert (seed_interval(values).seeds, crossed_interval(values[None, :]).problems) == (7, 7)


def test_variance_parts_equal_those_of_the_textbook() -> None:
    """Half width from the components of a two-way layout, computed cell by cell."""
    rng = np.random.default_rng(5)
    values = rng.normal(0, 1, (4, 6)) + rng.normal(0, 2, (4, 1)) + rng.normal(0, 3, (1, 6))
    mean = values.mean()
    seed_square = sum(6 * (row.mean() - mean) ** 2 for row in values) / 3
    problem_square = sum(4 * (column.mean() - mean) ** 2 for column in values.T) / 5
    residual = sum(
        (values[s, p] - values[s].mean() - values[:, p].mean() + mean) ** 2
        for s in range(4)
        for p in range(6)
    ) / (3 * 5)
    half = math.sqrt(
        stats.t.ppf(0.975, 3) ** 2 * seed_square / 24
        + stats.norm.ppf(0.975) ** 2 * (problem_square - residual) / 24
    )
    found = crossed_interval(values)
    assert found.high is not None and found.high - found.value == pytest.approx(half)


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(2, 30), st.floats(-1, 1))
@settings(max_examples=40)
def test_p_is_below_5_percent_exactly_where_the_interval_leaves_out_0(
    seed: int, seeds: int, problems: int, shift: float
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(shift, 1, (seeds, problems)) + rng.normal(0, 0.3, (seeds, 1))
    found = crossed_interval(values)
    assert found.low is not None and found.high is not None and found.p is not None
    assert (found.p < 0.05) == (not found.low <= 0 <= found.high)
    order = rng.permutation(seeds), rng.permutation(problems)
    assert crossed_interval(values[order[0]][:, order[1]]).low == pytest.approx(found.low)
    mirrored = crossed_interval(-values)
    assert (mirrored.low, mirrored.p) == pytest.approx((-found.high, found.p))


def test_values_that_never_vary_do_not_claim_certainty() -> None:
    right = accuracy_interval(np.ones((3, 100)))
    assert (right.value, right.high) == (1.0, 1.0)
    assert right.low == pytest.approx(1 - wilson(0, 100)[1])
    same = crossed_interval(np.zeros((3, 100)), (-1, 1))
    assert same.p == 1.0 and same.low is not None and same.low < -0.03
    # A number a seed that all seeds share, or one seed, says nothing of other seeds.
    for alone in (seed_interval([0.4]), seed_interval([0.4, 0.4, 0.4])):
        assert (alone.value, alone.low, alone.p) == (pytest.approx(0.4), None, None)
    for bad in (np.zeros((0, 3)), np.zeros(3), np.array([[0.0, math.nan]])):
        for interval in (crossed_interval, accuracy_interval):
            with pytest.raises(ValueError, match="seeds, problems"):
                interval(bad)


def test_one_seeds_answers_have_wilsons_own_interval() -> None:
    answers = np.random.default_rng(23).random((1, 200)) < 0.1
    found = accuracy_interval(answers)
    assert (found.low, found.high) == pytest.approx(wilson(float(answers.sum()), 200))


def holm_by_closed_testing(p: list[float]) -> list[float]:
    """The definition: the largest Bonferroni p-value over all sets of hypotheses with this one."""
    sets = [s for size in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), size)]
    return [
        max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(len(p))
    ]


@given(st.lists(st.floats(0, 1), max_size=7))
@settings(max_examples=60)
def test_holm_is_closed_testing_with_bonferroni(p: list[float]) -> None:
    assert holm(p) == pytest.approx(holm_by_closed_testing(p))


def test_holm_of_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_the_paired_test_counts_each_seed_on_its_own() -> None:
    rng = np.random.default_rng(2)
    reference, arm = (rng.random((3, 60)) < share for share in (0.4, 0.6))
    found = paired_test(reference.astype(float), arm.astype(float))
    assert found.gained - found.lost == int(arm.sum()) - int(reference.sum())
    for seed, p in enumerate(found.p_by_seed):
        table = [int((~reference & arm)[seed].sum()), int((reference & ~arm)[seed].sum())]
        assert p == pytest.approx(stats.binomtest(table[0], sum(table)).pvalue)
        assert p == mcnemar(*table)
    with pytest.raises(ValueError, match="0 or 1"):
        paired_test(reference * 0.5, arm)
    with pytest.raises(ValueError, match="two arrays"):
        paired_test(reference[:2], arm)


def test_the_asymmetry_index_is_a_difference_of_changes() -> None:
    rng = np.random.default_rng(4)
    a_r, a_p = rng.random((2, 3, 50)), rng.random((2, 3, 50))
    index = asymmetry((a_r[0], a_r[1]), (a_p[0], a_p[1]))
    expected = (a_r[1].mean() - a_r[0].mean()) - (a_p[1].mean() - a_p[0].mean())
    assert crossed_interval(index).value == pytest.approx(expected)


def test_bands_have_an_interval_at_each_step_and_none_where_there_is_one_seed() -> None:
    curves = np.array([[0.1, 0.4, math.nan], [0.3, math.nan, math.nan]])
    first, second, third = band(curves, (0, 1))
    assert first.value == pytest.approx(0.2) and first.seeds == 2
    assert (first.low, first.high) == (0.0, 1.0)  # t with one degree of freedom, clipped
    assert (second.value, second.low, second.seeds) == (0.4, None, 1)
    assert math.isnan(third.value) and third.seeds == 0


def test_mean_level_is_the_area_over_the_span() -> None:
    assert mean_level(np.array([0, 10, 40]), np.array([0.0, 1.0, 1.0])) == pytest.approx(35 / 40)
    assert mean_level(np.array([3]), np.array([0.7])) == 0.7
    with pytest.raises(ValueError, match="rise"):
        mean_level(np.array([1, 1]), np.zeros(2))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 8))
@settings(max_examples=40)
def test_reaching_a_target_is_what_a_loop_over_windows_finds(
    values: list[float], window: int
) -> None:
    cost = np.arange(1.0, len(values) + 1)
    smooth = [np.mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
    assert smoothed(np.array(values), window) == pytest.approx(smooth)
    expected = next(
        (sum(cost[: i + 1]) for i in range(window - 1, len(values)) if smooth[i] >= 0.5 + 1e-9),
        None,
    )
    assert cost_to_reach(cost, np.array(values), 0.5 + 1e-9, window) == expected


def test_seeds_that_never_got_there_are_later_than_all_that_did() -> None:
    most = reach([5.0, None, 3.0], [9.0, 8.0, 9.0])
    assert (most.reached, most.median, most.spent_at_least) == (2, 5.0, 8.0)
    few = reach([None, None, 3.0], [9.0, 8.0, 9.0])
    assert (few.reached, few.median, few.spent_at_least) == (1, None, 8.0)
    assert reach([2.0], [4.0]).spent_at_least is None


def test_phases_are_thirds_and_cover_every_step() -> None:
    for steps in (1, 2, 3, 40, 41):
        named = [phase_of(step, steps) for step in range(1, steps + 1)]
        assert named == sorted(named, key=PHASES.index)
        if steps >= 3:
            assert set(named) == set(PHASES)
    assert [phase_of(s, 6) for s in range(1, 7)] == [p for p in PHASES for _ in range(2)]


def test_correlations_average_on_fishers_scale() -> None:
    rng = np.random.default_rng(6)
    drawn = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], (40, 128))
    by_step = np.array([np.corrcoef(d.T)[0, 1] for d in drawn])
    counts = np.full(40, 128.0)
    found = mean_correlation(by_step, counts)
    assert found == pytest.approx(np.corrcoef(drawn.reshape(-1, 2).T)[0, 1], abs=0.01)
    missing = np.append(by_step, math.nan)
    assert mean_correlation(missing, np.append(counts, 500)) == pytest.approx(found)
    assert mean_correlation(np.array([1.0]), np.array([3])) is None
    seeds = correlation_interval([0.9, 0.95, 1.0])
    assert seeds.low is not None and seeds.high is not None
    assert -1 < seeds.low < 0.9 < seeds.high <= 1.0
