"""Intervals: of a proportion, and of anything by resampling whole puzzles.

Rollouts of one problem resemble each other, and so do groups of one puzzle (task and
`symmetry_key`): resampling single rollouts would claim too much.
Shapes: P problems, K groups, R resamples, S statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from rewards.advantages import is_constant

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""

RESAMPLES = 1000
MOST_UNDEFINED = 0.05
"""Share of resamples in which a statistic may be undefined before its interval is given up."""
CHUNK = 2**22
"""Numbers held at once while resampling: 32 MiB."""

Statistics = Callable[[np.ndarray], np.ndarray]
"""float64 [R, K], how often each group is drawn -> float64 [R, S], NaN where undefined."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; None where undefined, or where puzzles are too few."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


UNDEFINED = Interval()


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Wilson's score interval (1927) of a proportion; (0, 1) for n = 0.

    Both may be fractional: `score_interval` makes them of a mean and its variance.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: expected 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    share, z = successes / n, Z95
    shrink = 1 + z * z / n
    middle = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the bound is exact; rounding must not take it past the value itself.
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == n else min(1.0, middle + half)
    return low, high


def score_interval(mean: float, variance: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a mean of values in [0, 1] whose sampling variance is `variance`.

    Such a mean is as sure as a share of mean·(1 − mean)/variance coins, its effective sample
    size; for n coins that is n. Without any variance, n is taken: values that all agree are
    not certain. So an interval near an end leans inwards, as errors there do, and has a width.
    """
    effective = mean * (1 - mean) / variance if variance > 0 else n
    return wilson(mean * effective, effective)


def by_puzzle(values: np.ndarray, puzzles: Sequence[str]) -> np.ndarray:
    """Values [..., K], one a puzzle, for values [..., P], one a problem of the puzzle named.

    Of the same mean, and with var / K the sampling variance of that mean where answers to problems
    of one puzzle are not independent (linearised; Binder 1983). Where every problem is a puzzle
    of its own, or none is named, they are the values as they are.
    """
    count = len(set(puzzles))
    if count in (0, values.shape[-1]):
        return values
    puzzle_index = np.unique(puzzles, return_inverse=True)[1]
    mean = values.mean(axis=-1, keepdims=True)
    member = puzzle_index[:, None] == np.arange(count)  # [P, K]
    clustered: np.ndarray = mean + (values - mean) @ member * (count / len(puzzle_index))
    return clustered


def mean_interval(values: np.ndarray, puzzles: Sequence[str] = ()) -> tuple[float, float]:
    """Interval of the mean of float [P] values in [0, 1], one a problem; Wilson's for 0 and 1.

    Where problems share a puzzle (`puzzles`: the puzzle of each) it is Wilson's at the effective
    sample size that answers alike within a puzzle leave, never above P, with Student's t of
    the number of puzzles (Korn and Graubard 1998).
    """
    scores = by_puzzle(values, puzzles)
    n = len(scores)
    # Of equal values the mean, and with it the variance, is off by rounding.
    variance = 0.0 if is_constant(values) else float(values.var()) / len(values)
    if n == 1 < len(values):
        return 0.0, 1.0
    if n < len(values) and not is_constant(values):
        wider = float(special.stdtrit(n - 1, 0.975)) / Z95
        variance = max(variance, float(scores.var(ddof=1)) / n * wider**2)
    return score_interval(float(values.mean()), variance, n)


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """Student's interval of the mean of float [P] values of any size; of one value it has no width.

    It is of the spread between these values: where the same ones are measured again, as the loss
    on a fixed text is, it says nothing of the difference.
    """
    mean, n = float(values.mean()), len(values)
    half = float(special.stdtrit(n - 1, 0.975) * values.std(ddof=1) / n**0.5) if n > 1 else 0.0
    return mean - half, mean + half


def group_bootstrap(
    statistics: Statistics,
    groups: int,
    puzzles: Sequence[str] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
    size: int = 0,
) -> tuple[Interval, ...]:
    """S values with percentile intervals over resampled puzzles (the cluster bootstrap).

    Args:
        statistics: of weighted groups.
        groups: K.
        puzzles: [K], the puzzle of each group, whose groups are drawn together; if none is named,
            each group is one of its own.
        resamples: 0 gives values without intervals.
        size: numbers the statistics hold for one resample, if more than K.

    The percentiles are expanded (Hesterberg 2015, The American Statistician 69): plain ones are
    too narrow for few puzzles. A statistic that is undefined in more than `MOST_UNDEFINED` of the
    resamples has no interval, nor has any where there is but one puzzle. One that is at its bound
    in every resample (an AUC of 1) has an interval of no width. The same seed gives the same.
    """
    values = statistics(np.ones((1, groups)))[0]
    different, puzzle_index = np.unique(puzzles or range(groups), return_inverse=True)
    count = len(different)
    resampled_chunks = [np.full((1, len(values)), np.nan)]
    if count > 1 and resamples:
        rng = np.random.default_rng(seed)
        rows = max(1, CHUNK // max(groups, size))
        chunks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
        weights = (rng.multinomial(count, np.full(count, 1 / count), size=n) for n in chunks)
        resampled_chunks = [
            statistics(times[:, puzzle_index].astype(np.float64)) for times in weights
        ]
    tail = _expanded_tail(count)
    resampled = np.concatenate(resampled_chunks).T
    return tuple(_interval(float(v), one, tail) for v, one in zip(values, resampled, strict=True))


def _expanded_tail(puzzles: int) -> float:
    """Φ(−√(K/(K−1))·t) for the 97.5 % quantile t of K − 1 degrees of freedom; 0.025 as K grows."""
    if puzzles < 2:
        return 0.025
    t = special.stdtrit(puzzles - 1, 0.975)
    return float(special.ndtr(-math.sqrt(puzzles / (puzzles - 1)) * t))


def _interval(value: float, resampled: np.ndarray, tail: float) -> Interval:
    if math.isnan(value):
        return Interval()
    defined = resampled[~np.isnan(resampled)]
    if len(defined) < (1 - MOST_UNDEFINED) * len(resampled):
        return Interval(value)
    low, high = np.quantile(defined, (tail, 1 - tail))
    return Interval(value, float(low), float(high))
