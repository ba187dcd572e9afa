"""What an ablation may conclude: intervals over seeds and problems, tests, curves, budgets.

Pure functions of NumPy arrays. Shapes: S seeds, P problems, K steps.

The interval. Every seed of an arm is measured on the same test problems, so the values [S, P]
are a crossed layout with two random factors: other seeds and other problems would have given
another mean. `_parts` finds the share of each in the variance of the mean. For a paired
difference of two arms, pass the difference at each seed and problem to `crossed_interval`: what
the arms share cancels. An arm's own accuracy goes to `accuracy_interval`.

Why not a bootstrap. The share of nominal 95 % intervals that hold the truth, measured on simulated
right-or-wrong answers: 512 problems of varying difficulty (logit s.d. 1.5), seeds that differ by 0
to 10 points of accuracy, means of one arm and paired differences; lowest and highest found:

                                             3 seeds   5 seeds  10 seeds
    ours                                     .95 .97   .95 .96   .96 .97
    t over seed means alone                  .90 .95   .80 .95   .65 .95
    hierarchical bootstrap, percentile:
      problems drawn anew for each seed      .77 .98   .81 .98   .77 .99
      the same draw of problems for all      .80 1.0   .85 .99   .88 1.0

A percentile of three resampled seeds is too narrow where seeds differ, and resampling answers
that are noisy already makes it too wide where they do not. benchmarks/interval_coverage.py has
accuracies from .01 to .99 and 1 to 12 seeds; its test measures some again.
No method can see a tail that none of the seeds drew: where one seed in seven collapses to nothing,
from .9, the interval of three seeds holds the mean of all only about half of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, special

from cluster.record.evaluation import paired_p
from rewards.intervals import Z95, by_puzzle, mean_interval, score_interval, wilson

LEVEL = 0.95
"""Coverage of every interval here."""

SMALLEST_P = 1e-15
"""Smaller p-values are given as this."""

PHASES = ("early", "middle", "late")
"""Thirds of training, for correlations that change on the way."""


Parts = Sequence[tuple[float, float]]
"""(variance, its degrees of freedom) of the independent parts of a mean."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval and what it rests on.

    Attributes:
        low, high: the interval; None where one seed alone, or one number that all seeds share, says
            nothing about other seeds.
        p: two-sided p-value of "the true mean is 0", by the same reasoning; None with it.
        seeds, problems: S and P. With one seed and several problems the interval is over other
            problems only; with one problem (a number a seed) it is over other seeds only.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    seeds: int
    problems: int


def crossed_interval(
    values: np.ndarray,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    puzzles: Sequence[str] = (),
) -> Estimate:
    """Mean of float [S, P] values, one a seed and problem, over other seeds and other problems.

    The half width is √(Σ t²·v) over the independent parts of the mean's variance (`_parts`), added
    in quadrature (Howe 1974), and clipped to `bounds`. For accuracies see `accuracy_interval`.
    `puzzles` names the puzzle of each problem where some share one: the interval is over other
    puzzles, and the estimate's `problems` counts these. Raises ValueError for an empty array
    and for values that are not finite.
    """
    values, mean = _checked(values)
    values = by_puzzle(values, puzzles)
    parts = _parts(values)
    if not parts:
        return Estimate(mean, None, None, None, *values.shape)
    half = _half_width(1 - LEVEL, parts)
    low, high = max(bounds[0], mean - half), min(bounds[1], mean + half)
    return Estimate(mean, low, high, _p_value(mean, parts), *values.shape)


def accuracy_interval(values: np.ndarray, puzzles: Sequence[str] = ()) -> Estimate:
    """The same of values in [0, 1]: Wilson's interval at the effective sample size of that width.

    Near 0 and 1 errors are skewed, and a symmetric interval holds the truth less often than it
    says. One seed's right and wrong answers get Wilson's own. There is no p: that the true
    accuracy is not 0 is shown by one right answer. `puzzles`: as in `crossed_interval`.
    """
    values, mean = _checked(values)
    scores = by_puzzle(values, puzzles)
    seeds, problems = scores.shape
    parts = _parts(scores)
    if not parts:
        return Estimate(mean, None, None, None, seeds, problems)
    variance = (_half_width(1 - LEVEL, parts) / Z95) ** 2
    flat = np.ptp(values) == 0
    low, high = score_interval(min(1.0, max(0.0, mean)), 0.0 if flat else variance, problems)
    if seeds == 1:
        low, high = mean_interval(values[0], puzzles)
    return Estimate(mean, low, high, None, seeds, problems)


def _checked(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Values as float64 [S, P], and their mean."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"expected finite values [seeds, problems], got shape {values.shape}")
    return values, float(values.mean())


def _parts(values: np.ndarray) -> Parts:
    """The parts of the variance of the mean of float [S, P]; none where nothing can be said.

    Two-way random effects without replication. With mean squares MS_s = P·var(seed means),
    MS_p = S·var(problem means) and MS_r of the residual, the mean's variance is A + B with
    A = MS_s / SP (seeds, and the noise of single answers; S − 1 degrees of freedom) and
    B = max(0, MS_p − MS_r) / SP (problems). One seed leaves var / P with P − 1.

    Seed means of right and wrong answers lie on a grid of 1 / P, and may tie without being equal
    in truth: A has the variance of that rounding too (grid² / 12, Sheppard). Values that do
    not vary at all have Wilson's bound of 0 in P problems. One number a seed that all seeds
    share says nothing of other seeds.
    """
    seeds, problems = values.shape
    grid = np.unique(values.round(9))
    flat = len(grid) == 1
    parts: list[tuple[float, float]] = []
    if flat and problems > 1:
        parts.append(((wilson(0, problems)[1] / Z95) ** 2, math.inf))
    if seeds == 1:
        return parts if flat else [(float(values.var(ddof=1)) / problems, float(problems - 1))]
    by_seed, by_problem = values.mean(axis=1), values.mean(axis=0)
    if problems == 1:
        return [] if flat else [(float(by_seed.var(ddof=1)) / seeds, float(seeds - 1))]
    step = 1.0 if flat else float(np.diff(grid).min())
    of_seeds = float(by_seed.var(ddof=1)) + (step / problems) ** 2 / 12
    residual = values - by_seed[:, None] - by_problem[None, :] + values.mean()
    of_residual = float((residual**2).sum()) / ((seeds - 1) * (problems - 1))
    excess = seeds * float(by_problem.var(ddof=1)) - of_residual
    parts.append((of_seeds / seeds, float(seeds - 1)))
    parts.append((max(0.0, excess) / (seeds * problems), math.inf))
    return parts


def seed_interval(
    values: Sequence[float] | np.ndarray, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Estimate:
    """Mean and t-interval of one number a seed, float [S]."""
    return crossed_interval(np.asarray(values, dtype=np.float64)[:, None], bounds)


def _half_width(alpha: float, parts: Parts) -> float:
    """√Σ t²·v at the two-sided level `alpha`; t at infinite degrees of freedom is the normal."""
    variances, df = np.array(parts).T
    return math.sqrt(float(variances @ special.stdtrit(df, alpha / 2) ** 2))


def _p_value(mean: float, parts: Parts) -> float:
    """The level at which the interval just touches 0."""
    if mean == 0:
        return 1.0

    def excess(log_p: float) -> float:
        return _half_width(math.exp(log_p), parts) - abs(mean)

    least = math.log(SMALLEST_P)
    if excess(least) <= 0:
        return SMALLEST_P
    return math.exp(optimize.brentq(excess, least, 0.0, xtol=1e-9))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (1979), in the order given; never below the raw ones."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.minimum(1.0, p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(stepped)
    return [float(value) for value in adjusted]


@dataclass(frozen=True)
class PairedTest:
    """Exact tests of two arms on the same problems, seed by seed (`paired_p`).

    Each tests whether these two checkpoints differ on this kind of problem, not whether another
    seed would differ: for that there is `crossed_interval`. `gained` and `lost` are summed over
    seeds; the p-values are one a seed, since answers to one problem are not independent over seeds.
    """

    gained: int
    lost: int
    p_by_seed: tuple[float, ...]


def paired_test(reference: np.ndarray, arm: np.ndarray, puzzles: Sequence[str] = ()) -> PairedTest:
    """McNemar's test on right-or-wrong values [S, P] of two arms with the same seeds and problems.

    `gained`: wrong in the reference, right in the arm. `puzzles`: as in `crossed_interval`.
    Raises ValueError for other values than 0 and 1 or for different shapes.
    """
    if reference.shape != arm.shape or reference.ndim != 2:
        raise ValueError(f"expected two arrays [S, P], got {reference.shape} and {arm.shape}")
    if not (np.isin(reference, (0, 1)).all() and np.isin(arm, (0, 1)).all()):
        raise ValueError("McNemar's test needs values that are 0 or 1")
    gained = ((reference == 0) & (arm == 1)).sum(axis=1)
    lost = ((reference == 1) & (arm == 0)).sum(axis=1)
    p = tuple(paired_p(changes, puzzles) for changes in arm - reference)
    return PairedTest(int(gained.sum()), int(lost.sum()), p)


def asymmetry(
    reasoning: tuple[np.ndarray, np.ndarray], perception: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """The asymmetry index Δa_r − Δa_p, element by element; each pair is (before, after).

    Above 0 where training taught more thinking than seeing. Our definition: arXiv 2605.29496
    contrasts the two changes without naming a scalar. Given per-problem values [S, P], the result
    goes to `crossed_interval`; given one number a seed, to `seed_interval`.
    """
    return (reasoning[1] - reasoning[0]) - (perception[1] - perception[0])


def band(curves: np.ndarray, bounds: tuple[float, float] = (-math.inf, math.inf)) -> list[Estimate]:
    """Mean over seeds with its t-interval at each step, of curves [S, K].

    Pointwise: each interval holds the truth 95 % of the time, the whole band less often. NaN
    marks a step that a seed lacks; a step that all lack has the value NaN and no interval.
    """
    intervals = []
    for column in np.asarray(curves, dtype=np.float64).T:
        finite = column[np.isfinite(column)]
        none = Estimate(math.nan, None, None, None, 0, 1)
        intervals.append(seed_interval(finite, bounds) if len(finite) else none)
    return intervals


def mean_level(steps: np.ndarray, values: np.ndarray) -> float:
    """Area under a curve [K] by the trapezoid rule, over the steps it spans: its mean height.

    In the unit of `values`. A curve of one point is that point's height. Raises ValueError for
    steps that do not rise.
    """
    steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    if len(steps) == 0 or (np.diff(steps) <= 0).any():
        raise ValueError("expected at least one step, and steps that rise")
    if len(steps) == 1:
        return float(values[0])
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value [K] and up to `window − 1` before it."""
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    smooth: np.ndarray = (total[ends] - total[starts]) / (ends - starts)
    return smooth


def cost_to_reach(
    cost: np.ndarray, values: np.ndarray, target: float, window: int = 5
) -> float | None:
    """What had been spent when a curve first reached `target`; None where it never did (censored).

    `cost` [K] is what each step took (sampled tokens, seconds), `values` [K] the curve. It counts
    as reached when a full window's mean does: a single lucky step is not an accuracy.
    """
    reached = smoothed(values, window) >= target
    reached[: window - 1] = False
    if not reached.any():
        return None
    return float(np.cumsum(cost)[int(np.argmax(reached))])


@dataclass(frozen=True)
class Reach:
    """Seeds that reached a target, and the median cost of reaching it.

    `median` is None where at least half the seeds never did: it then lies beyond what was spent,
    which is `spent_at_least` (the least that a seed which never got there had spent).
    """

    reached: int
    seeds: int
    median: float | None
    spent_at_least: float | None


def reach(costs: Sequence[float | None], spent: Sequence[float]) -> Reach:
    """Summarise `cost_to_reach` over seeds; `spent` is what each seed spent in all.

    The lower median, with seeds that never reached it counted as later than all that did.
    """
    known = sorted(cost for cost in costs if cost is not None)
    middle = (len(costs) - 1) // 2
    missing = [total for cost, total in zip(costs, spent, strict=True) if cost is None]
    return Reach(
        reached=len(known),
        seeds=len(costs),
        median=known[middle] if middle < len(known) else None,
        spent_at_least=min(missing, default=None),
    )


def phase_of(step: int, steps: int) -> str:
    """The third of training that step 1..`steps` belongs to: a name of `PHASES`."""
    return PHASES[min(len(PHASES) - 1, (step - 1) * len(PHASES) // steps)]


def mean_correlation(correlations: np.ndarray, counts: np.ndarray) -> float | None:
    """Correlations [K] of several steps as one: mean of Fisher's z, weighted by n − 3.

    None where no step has more than 3 values. A correlation of ±1 counts as ±0.999999, since its
    z is infinite.
    """
    correlations, counts = np.asarray(correlations, np.float64), np.asarray(counts, np.float64)
    weights = np.where(np.isfinite(correlations), np.maximum(counts - 3, 0.0), 0.0)
    if weights.sum() == 0:
        return None
    z = np.arctanh(np.clip(np.nan_to_num(correlations), -0.999999, 0.999999))
    return float(np.tanh((z * weights).sum() / weights.sum()))


def correlation_interval(by_seed: Sequence[float]) -> Estimate:
    """Mean over seeds of a correlation, its t-interval made on Fisher's z and taken back."""
    z = np.arctanh(np.clip(np.asarray(by_seed, np.float64), -0.999999, 0.999999))
    interval = seed_interval(z)
    low, high = (None if end is None else math.tanh(end) for end in (interval.low, interval.high))
    return replace(interval, value=math.tanh(interval.value), low=low, high=high)
