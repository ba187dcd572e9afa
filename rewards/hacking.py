"""Reward hacking: a reward rises over training while what it stands for falls.

Shapes: K groups, G rollouts a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewards.intervals import RESAMPLES, Interval, group_bootstrap


@dataclass(frozen=True)
class Drift:
    """How a reward and `a_p` moved from the first third of the steps to the last.

    Attributes:
        reward: mean over rollouts of the last third, less that of the first third.
        a_p: the same for the share of right perceptions, on the same rollouts.
        flagged: the reward rose and `a_p` fell, both by more than chance: the interval of the
            one lies above 0 and that of the other below it.
    """

    reward: Interval
    a_p: Interval
    flagged: bool


PHASES = ("first third", "second third", "last third")


def thirds(steps: Sequence[int]) -> tuple[frozenset[int], ...]:
    """The distinct steps in order, cut into three of about equal length (some may be empty)."""
    return tuple(frozenset(part.tolist()) for part in np.array_split(np.unique(steps), 3))


def drift(
    steps: Sequence[int],
    rewards: Sequence[np.ndarray],
    a_p: Sequence[np.ndarray],
    puzzles: Sequence[str] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Drift | None:
    """Compare the first and the last third of training; None with fewer than three steps.

    One step and one array [G] a group. Intervals resample `puzzles`, the puzzle of each group
    (each its own where none is named), which are drawn alike in every step; so compare one task at
    a time where tasks are mixed. Without a trend both intervals miss 0 in opposite directions in
    well under 2.5 % of runs.
    """
    first, _, last = thirds(steps)
    if len(set(steps)) < 3:
        return None
    sums = np.zeros((len(rewards), 6))
    for row, step, r, s in zip(sums, steps, rewards, a_p, strict=True):
        if step in first:
            row[:3] = len(r), np.sum(r), np.sum(s)
        elif step in last:
            row[3:] = len(r), np.sum(r), np.sum(s)

    def statistics(weights: np.ndarray) -> np.ndarray:
        n, r, s, late_n, late_r, late_s = (weights @ sums).T
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.stack([late_r / late_n - r / n, late_s / late_n - s / n], axis=1)

    reward, perception = group_bootstrap(statistics, len(rewards), puzzles, resamples, seed)
    rose = reward.low is not None and reward.low > 0
    fell = perception.high is not None and perception.high < 0
    return Drift(reward, perception, rose and fell)
