"""Can a reward term be trusted to tell who saw right? Its values against the true `a_p`.

A surrogate earns its place by the correlation *within* groups, which is what GRPO learns from;
pooled figures also count that it knows easy problems from hard ones. Everything is by group:
shapes are K groups of G rollouts, N rollouts in all, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewards.advantages import is_constant
from rewards.coupling import correlation_statistics
from rewards.intervals import (
    RESAMPLES,
    UNDEFINED,
    Interval,
    Statistics,
    group_bootstrap,
    mean_interval,
)

BINS = 10
"""At most so many calibration bins; a term with no more distinct values has one for each."""


@dataclass(frozen=True)
class Bin:
    """Rollouts to which a term gave about the same value.

    Attributes:
        low, high: the smallest and largest value in the bin.
        mean: of the values.
        a_p: share of its rollouts whose perception is right.
        n: rollouts.
    """

    low: float
    high: float
    mean: float
    a_p: Interval
    n: int


@dataclass(frozen=True)
class Reliability:
    """How well a term's value tells a right perception (`a_p` = 1) from a wrong one.

    Attributes:
        mean: of the term's values; None without rollouts, as `a_p`.
        a_p: share of right perceptions among the same rollouts.
        pooled, within: Pearson correlation with `a_p`, as in `coupling.Correlations`.
        graded: `within` with the graded perception score, which varies where equality does not, as
            in free text.
        auc: chance that a right perception has a higher value than a wrong one, ties half.
        auc_within: the same over pairs of one group only.
        brier: mean of (value − a_p)²; None where a value lies outside [0, 1].
        zero_variance: share of groups in which the term is constant.
        calibration: by value, from low to high.
        n, groups: rollouts and groups behind all of it.
    """

    mean: float | None = None
    a_p: float | None = None
    pooled: Interval = UNDEFINED
    within: Interval = UNDEFINED
    graded: Interval = UNDEFINED
    auc: Interval = UNDEFINED
    auc_within: Interval = UNDEFINED
    brier: Interval = UNDEFINED
    zero_variance: Interval = UNDEFINED
    calibration: tuple[Bin, ...] = ()
    n: int = 0
    groups: int = 0


def reliability(
    values: Sequence[np.ndarray],
    a_p: Sequence[np.ndarray],
    puzzles: Sequence[str] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
    graded: Sequence[np.ndarray] = (),
) -> Reliability:
    """Judge one term; all arguments but `puzzles` hold one array [G] a group.

    Intervals are over `puzzles`, the puzzle of each group; each its own where none is named.
    """
    if not values:
        return Reliability()
    values = [np.asarray(v, dtype=np.float64) for v in values]
    truth = [np.asarray(t, dtype=bool) for t in a_p]
    puzzles = puzzles or [str(k) for k in range(len(values))]
    everything, right = np.concatenate(values), np.concatenate(truth)
    of_rollouts = [name for name, v in zip(puzzles, values, strict=True) for _ in v]
    constant = np.array([is_constant(v) for v in values], dtype=np.float64)
    parts = [
        correlation_statistics(values, truth),
        correlation_statistics(values, graded or truth),
        auc_statistics(values, truth),
        _brier_statistics(values, truth),
    ]

    def statistics(weights: np.ndarray) -> np.ndarray:
        return np.concatenate([part(weights) for part in parts], axis=1)

    pooled, within, _, by_grade, auc, auc_within, brier = group_bootstrap(
        statistics, len(values), puzzles, resamples, seed, size=len(everything)
    )
    return Reliability(
        mean=float(everything.mean()),
        a_p=float(right.mean()),
        pooled=pooled,
        within=within,
        graded=by_grade if graded else UNDEFINED,
        auc=auc,
        auc_within=auc_within,
        brier=brier,
        zero_variance=Interval(float(constant.mean()), *mean_interval(constant, puzzles)),
        calibration=calibration(everything, right, of_rollouts),
        n=len(everything),
        groups=len(values),
    )


def roc_auc(values: np.ndarray, truth: np.ndarray) -> float | None:
    """P(value of a true one > value of a false one), ties half; None without both kinds.

    U / (n₁·n₀) of Mann and Whitney (1947); float [N] and bool [N].
    """
    truth = np.asarray(truth, dtype=bool)
    pairs = int(truth.sum()) * int((~truth).sum())
    if not pairs:
        return None
    from scipy import stats  # a second of imports that a run's start does without

    test = stats.mannwhitneyu(values[truth], values[~truth], method="asymptotic")
    return float(test.statistic) / pairs


def auc_statistics(values: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> Statistics:
    """ROC AUC of any resample of the groups: over all pairs, and over pairs within a group."""
    sizes = [len(v) for v in values]
    everything, right = np.concatenate(values), np.concatenate(truth).astype(bool)
    order = np.argsort(everything, kind="stable")
    group_of = np.repeat(np.arange(len(values)), sizes)[order]
    positive = right[order].astype(np.float64)
    ordered = everything[order]
    # Where each block of equal values starts.
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    won, pairs = np.array([_won(v, t) for v, t in zip(values, truth, strict=True)]).T

    def statistics(weights: np.ndarray) -> np.ndarray:
        drawn = weights[:, group_of]
        ups = np.add.reduceat(drawn * positive, starts, axis=1)
        downs = np.add.reduceat(drawn * (1 - positive), starts, axis=1)
        below = np.cumsum(downs, axis=1) - downs
        u = (ups * (below + downs / 2)).sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            pooled = u / (ups.sum(axis=1) * downs.sum(axis=1))
            within = (weights @ won) / (weights @ pairs)
        return np.stack([pooled, within], axis=1)

    return statistics


def _won(values: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """(pairs of a group won by the right perception, ties half; all its pairs), G small."""
    right, wrong = values[truth.astype(bool)][:, None], values[~truth.astype(bool)]
    ties = np.count_nonzero(right == wrong)
    return np.count_nonzero(right > wrong) + ties / 2, float(right.size * wrong.size)


def calibration(
    values: np.ndarray, truth: np.ndarray, puzzles: Sequence[str] = ()
) -> tuple[Bin, ...]:
    """Share of right perceptions by the term's value; float [N], bool [N], the puzzle of each.

    One bin a distinct value where there are at most `BINS` of them, else bins of about equal
    counts between quantiles, equal values always together.
    """
    distinct = np.unique(values)
    if len(distinct) <= BINS:
        bin_of = np.searchsorted(distinct, values)
    else:
        edges = np.unique(np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1]))
        bin_of = np.searchsorted(edges, values)
    names = np.asarray(puzzles)
    bins = []
    for index in np.unique(bin_of):
        in_bin = bin_of == index
        inside, right = values[in_bin], truth[in_bin].astype(np.float64)
        share = Interval(
            float(right.mean()), *mean_interval(right, list(names[in_bin]) if len(names) else ())
        )
        low, high = float(inside.min()), float(inside.max())
        bins.append(Bin(low, high, float(inside.mean()), share, len(inside)))
    return tuple(bins)


def _brier_statistics(values: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> Statistics:
    """Brier score (1950) over the rollouts of any resample; NaN outside [0, 1]."""
    in_range = all(v.min() >= 0.0 and v.max() <= 1.0 for v in values)
    errors = [np.sum((v - t) ** 2) for v, t in zip(values, truth, strict=True)]
    sizes = np.array([len(v) for v in values], dtype=np.float64)
    total = np.array(errors) if in_range else np.full(len(values), np.nan)
    return lambda weights: (weights @ total / (weights @ sizes))[:, None]
