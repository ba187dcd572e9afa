"""Intervals: of a proportion, and of anything by resampling whole groups.

Rollouts of one problem resemble each other, so resampling single rollouts would claim too much.
Shapes: K groups, R resamples, S statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

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
class Estimate:
    """A value with its 95 % interval; None where undefined, or where groups are too few."""

    value: float | None
    low: float | None
    high: float | None


def wilson(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a proportion; (0, 1) for n = 0.

    Both may be fractional: `score_interval` makes them of a mean and its variance.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: expected 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
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
    place = np.unique(puzzles, return_inverse=True)[1]
    mean = values.mean(axis=-1, keepdims=True)
    member = place[:, None] == np.arange(count)  # [P, K]
    found: np.ndarray = mean + (values - mean) @ member * (count / len(place))
    return found


def group_bootstrap(
    statistics: Statistics, groups: int, resamples: int = RESAMPLES, seed: int = 0, size: int = 0
) -> tuple[Estimate, ...]:
    """S estimates with percentile intervals over resampled groups (the cluster bootstrap).

    The percentiles are expanded (Hesterberg 2015, The American Statistician 69): plain ones are
    too narrow for few groups. `size`: numbers the statistics hold for one resample, if more than
    K. A statistic that is undefined in more than `MOST_UNDEFINED` of the resamples has no
    interval, nor has any where there is but one group. One that is at its bound in every
    resample (an AUC of 1) has an interval of no width. The same seed gives the same interval.
    """
    values = statistics(np.ones((1, groups)))[0]
    drawn = []
    if groups > 1:
        rng = np.random.default_rng(seed)
        rows = max(1, CHUNK // max(groups, size))
        for start in range(0, resamples, rows):
            count = min(rows, resamples - start)
            weights = rng.multinomial(groups, np.full(groups, 1 / groups), size=count)
            drawn.append(statistics(weights.astype(np.float64)))
    found = np.concatenate(drawn) if drawn else np.full((1, len(values)), np.nan)
    tail = _expanded_tail(groups)
    return tuple(_estimate(float(v), one, tail) for v, one in zip(values, found.T, strict=True))


def _expanded_tail(groups: int) -> float:
    """Φ(−√(K/(K−1))·t) for the 97.5 % quantile t of K − 1 degrees of freedom; 0.025 as K grows."""
    if groups < 2:
        return 0.025
    t = stats.t.ppf(0.975, groups - 1)
    return float(stats.norm.cdf(-math.sqrt(groups / (groups - 1)) * t))


def _estimate(value: float, drawn: np.ndarray, tail: float) -> Estimate:
    if math.isnan(value):
        return Estimate(None, None, None)
    defined = drawn[~np.isnan(drawn)]
    if len(defined) < (1 - MOST_UNDEFINED) * len(drawn):
        return Estimate(value, None, None)
    low, high = np.quantile(defined, (tail, 1 - tail))
    return Estimate(value, float(low), float(high))
