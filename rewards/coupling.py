"""Which skill does the outcome reward teach? Correlations of the outcome with its factors.

Pooled over all rollouts they mix easy and hard problems; what GRPO sees is the correlation
within a group, so both are given (arXiv 2605.29496 reports the pairing as reward coupling).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewards.advantages import is_constant
from rewards.intervals import Interval, Statistics, group_bootstrap
from rewards.scored import Diagnosis, known

ROUNDING = 1e-12
"""A sum of squares this small beside its uncentred one is a constant and its rounding."""


@dataclass(frozen=True)
class Correlations:
    """Pearson correlation of a reward with a skill.

    Attributes:
        pooled: over all rollouts; None where either side is constant.
        within: both sides centred by group mean, over groups whose reward varies (the only
            ones GRPO learns from); a skill that is constant in such a group stays in, as
            reward variance it does not explain. None where undefined.
        n: rollouts behind `pooled`.
        n_within: rollouts behind `within`.
        zero_variance: share of groups whose reward is constant; None without groups.
    """

    pooled: Interval
    within: Interval
    n: int
    n_within: int
    zero_variance: float | None


def coupling(
    reward: Sequence[np.ndarray],
    skill: Sequence[np.ndarray],
    puzzles: Sequence[str] = (),
    resamples: int = 0,
    seed: int = 0,
) -> Correlations:
    """Couple a reward with a skill; both are one array [G] a group, bool or float.

    With `resamples` the correlations have 95 % intervals over `puzzles`, the puzzle of each group
    (each its own where none is named; see `intervals.group_bootstrap`).
    """
    if not reward:
        return Correlations(Interval(), Interval(), 0, 0, None)
    statistics = correlation_statistics(reward, skill)
    pooled, within = group_bootstrap(statistics, len(reward), puzzles, resamples, seed)
    varying = [len(r) for r in reward if not is_constant(r)]
    n = sum(len(r) for r in reward)
    return Correlations(pooled, within, n, sum(varying), 1.0 - len(varying) / len(reward))


def correlation_statistics(reward: Sequence[np.ndarray], skill: Sequence[np.ndarray]) -> Statistics:
    """Pooled and within-group correlation, as in `coupling`, of any resample of the groups.

    Both follow from sums over groups, so a resample costs one product with K group sums.
    """
    rewards = [np.asarray(r, dtype=np.float64) for r in reward]
    skills = [np.asarray(s, dtype=np.float64) for s in skill]
    # A shift of the origin changes no correlation and keeps the sums of squares exact.
    x_mean, y_mean = np.concatenate(rewards).mean(), np.concatenate(skills).mean()
    sums = np.zeros((len(rewards), 9))
    for row, r, s in zip(sums, rewards, skills, strict=True):
        x, y = r - x_mean, s - y_mean
        row[:6] = len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y
        if not is_constant(r):
            x, y = _centred(r), _centred(s)
            row[6:] = x @ x, y @ y, x @ y

    def statistics(weights: np.ndarray) -> np.ndarray:
        n, x, y, xx, yy, xy, within_xx, within_yy, within_xy = (weights @ sums).T
        pooled = _correlation(xx - x * x / n, yy - y * y / n, xy - x * y / n, xx, yy)
        within = _correlation(within_xx, within_yy, within_xy, within_xx, within_yy)
        return np.stack([pooled, within], axis=1)

    return statistics


def outcome_couplings(diagnoses: Sequence[Diagnosis]) -> tuple[Correlations, Correlations]:
    """Outcome with perception (`a_p`), and outcome with reasoning, on free rollouts.

    True `a_r` needs an oracle pass, which a training step does not make, so reasoning is
    indicated by `self_consistency`: the answer is valid for the rollout's own perception. Each is
    over the groups of which the skill is known.
    """
    of_a_p, of_thinking = (known(diagnoses, name) for name in ("a_p", "self_consistency"))
    return (
        coupling([a for a, _ in of_a_p], [perceived for _, perceived in of_a_p]),
        coupling([a for a, _ in of_thinking], [thought for _, thought in of_thinking]),
    )


def independent_reference(p: float, q: float) -> tuple[float | None, float | None]:
    """(corr(A, P), corr(A, Q)) for A = P·Q, P ~ Bern(p) and Q ~ Bern(q) independent.

    corr(A, P) = √(q(1−p)/(1−pq)) and corr(A, Q) = √(p(1−q)/(1−pq)): the outcome follows the
    weaker factor. Derivation: E[AP] = pq, Var A = pq(1−pq), Var P = p(1−p). None where a
    side is constant. Raises ValueError outside [0, 1].
    """
    if not (0.0 <= p <= 1.0 and 0.0 <= q <= 1.0):
        raise ValueError(f"p = {p}, q = {q}: probabilities lie in [0, 1]")
    if p * q in (0.0, 1.0):
        return None, None
    with_p = math.sqrt(q * (1 - p) / (1 - p * q)) if p < 1 else None
    with_q = math.sqrt(p * (1 - q) / (1 - p * q)) if q < 1 else None
    return with_p, with_q


def _centred(x: np.ndarray) -> np.ndarray:
    return np.zeros_like(x) if is_constant(x) else x - x.mean()


def _correlation(
    xx: np.ndarray, yy: np.ndarray, xy: np.ndarray, x_scale: np.ndarray, y_scale: np.ndarray
) -> np.ndarray:
    """xy / √(xx·yy) [R], NaN where a side is constant but for rounding at its scale."""
    varies = (xx > ROUNDING * x_scale) & (yy > ROUNDING * y_scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.clip(xy / np.sqrt(xx * yy), -1.0, 1.0)
    return np.where(varies, ratio, np.nan)
