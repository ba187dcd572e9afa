"""Seeing and thinking told apart where nobody has said what is to be seen, by a text-only reader.

`sufficiency` is the share of perceptions from which the reader answers right, `used` the share of
right answers of the policy among those: what it makes of enough. With labels these are `a_p` and a
kin of `a_r`; without them the reader's own skill stands between, so its floor and ceiling are shown
beside (docs/diagnosis.md). Shapes: K groups of G rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewards.coupling import Correlations, coupling
from rewards.intervals import (
    RESAMPLES,
    UNDEFINED,
    Interval,
    Statistics,
    group_bootstrap,
    mean_interval,
)
from rewards.reader import Reading, believed, refused

NO_OUTCOME = Correlations(UNDEFINED, UNDEFINED, 0, 0, None)


@dataclass(frozen=True)
class Sufficiency:
    """What a reader tells of one task's rollouts; undefined where nothing stands behind a number.

    Attributes:
        sufficiency: share of rollouts from whose perception the reader answers right.
        used: share of right answers (the policy's own) among those.
        unused: the same among the others: what is right without having been written down, by
            another look at the image, by guessing, or because the reader is weak.
        blind: share that the reader answers right from the question alone: its floor.
        gain: sufficiency − blind, paired by problem: what the perceptions add.
        ceiling: share that it answers right from `p*`, over the problems with a label.
        stated: share of perceptions that state the answer, which no reader has to conclude.
        asymmetry: used − sufficiency; above 0 where less is seen than is made of it.
        outcome: correlations of right answers with sufficiency, as of any skill.
        rollouts, groups: behind all of it but the ceiling.
        labelled: groups behind the ceiling.
        refusal: for what the reader is not to be believed, and why. Groups of such a kind of
            question are left out; where there are no others, sufficiency, used, unused, gain,
            asymmetry and outcome are undefined, and the rest is of all.
    """

    sufficiency: Interval = UNDEFINED
    used: Interval = UNDEFINED
    unused: Interval = UNDEFINED
    blind: Interval = UNDEFINED
    gain: Interval = UNDEFINED
    ceiling: Interval = UNDEFINED
    stated: Interval = UNDEFINED
    asymmetry: Interval = UNDEFINED
    outcome: Correlations = NO_OUTCOME
    rollouts: int = 0
    groups: int = 0
    labelled: int = 0
    refusal: str | None = None


def sufficiency(
    right: Sequence[np.ndarray],
    readings: Sequence[Reading],
    puzzles: Sequence[str] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Sufficiency:
    """Put a task's groups together; `right` is bool [G] a group, the policy's own answers.

    Intervals are over `puzzles`, the puzzle of each group; each its own where none is named.
    """
    if not right:
        return Sufficiency()
    puzzles = puzzles or [str(k) for k in range(len(right))]
    refusal, trusted = refused(readings), believed(readings)
    if trusted:
        right, readings = [right[k] for k in trusted], [readings[k] for k in trusted]
        puzzles = [puzzles[k] for k in trusted]
    sizes = [len(a) for a in right]
    of_rollouts = np.repeat(puzzles, sizes)
    a, enough = np.concatenate(right), np.concatenate([r.sufficient for r in readings])
    labelled = [k for k, r in enumerate(readings) if r.ceiling is not None]
    intervals = {
        "stated": _share(np.concatenate([r.stated for r in readings]), of_rollouts),
        "blind": _share(np.repeat([r.blind for r in readings], sizes), of_rollouts),
        "ceiling": _share(
            np.repeat([bool(readings[k].ceiling) for k in labelled], [sizes[k] for k in labelled]),
            np.repeat([puzzles[k] for k in labelled], [sizes[k] for k in labelled]),
        ),
    }
    outcome = NO_OUTCOME
    if trusted:
        gain, asymmetry = group_bootstrap(
            _statistics(_sums(right, readings)), len(right), puzzles, resamples, seed
        )
        intervals |= {
            "sufficiency": _share(enough, of_rollouts),
            "used": _share(a[enough], of_rollouts[enough]),
            "unused": _share(a[~enough], of_rollouts[~enough]),
            "gain": gain,
            "asymmetry": asymmetry,
        }
        outcome = coupling(right, [r.sufficient for r in readings], puzzles, resamples, seed)
    return Sufficiency(
        **intervals,
        outcome=outcome,
        rollouts=len(a),
        groups=len(right),
        labelled=len(labelled),
        refusal=refusal,
    )


def asymmetry_change(
    before: tuple[Sequence[np.ndarray], Sequence[Reading], Sequence[str]],
    after: tuple[Sequence[np.ndarray], Sequence[Reading], Sequence[str]],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Δused − Δsufficiency between two lots of groups, each with its readings and puzzles.

    Above 0 where training taught more thinking than seeing, as the index Δa_r − Δa_p. A puzzle
    that is in both is resampled in both at once.
    """
    if not before[0] or not after[0]:
        return UNDEFINED
    sums = [_sums(right, readings) for right, readings, _ in (before, after)]
    cut = len(sums[0])

    def change(weights: np.ndarray) -> np.ndarray:
        was, now = (_statistics(s) for s in sums)
        return now(weights[:, cut:])[:, 1:] - was(weights[:, :cut])[:, 1:]

    puzzles = [*before[2], *after[2]]
    return group_bootstrap(change, cut + len(sums[1]), puzzles, resamples, seed)[0]


def _share(values: np.ndarray, puzzles: np.ndarray) -> Interval:
    """The mean of bool [N] with its interval over puzzles; undefined for N = 0."""
    if not len(values):
        return UNDEFINED
    shares = values.astype(np.float64)
    return Interval(float(shares.mean()), *mean_interval(shares, puzzles.tolist()))


def _sums(right: Sequence[np.ndarray], readings: Sequence[Reading]) -> np.ndarray:
    """float64 [K, 4]: rollouts, sufficient ones, right ones among them, right ones of the floor."""
    return np.array(
        [
            (len(a), r.sufficient.sum(), (a & r.sufficient).sum(), len(a) * r.blind)
            for a, r in zip(right, readings, strict=True)
        ],
        dtype=np.float64,
    )


def _statistics(sums: np.ndarray) -> Statistics:
    """Gain and asymmetry of any resample of the groups."""

    def statistics(weights: np.ndarray) -> np.ndarray:
        n, enough, both, floor = (weights @ sums).T
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.stack([(enough - floor) / n, both / enough - enough / n], axis=1)

    return statistics
