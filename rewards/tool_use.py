"""What a tool gives a policy and takes from it: the difference of accuracies, split in four.

One policy on the same problems with the tool offered and without, and what it does when it is
shown something else than it asked for. Pure. Shapes: P problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewards.intervals import UNDEFINED, Interval, group_bootstrap, mean_interval

TERMS = ("call_gain", "prompt_gain", "call_harm", "prompt_harm")
"""Wrong alone and right after a call; wrong alone and right without one, though it was offered;
right alone and lost after a call; right alone and lost by the mere offer."""


def four(alone: np.ndarray, tool: np.ndarray, called: np.ndarray) -> dict[str, np.ndarray]:
    """bool [P] of each of `TERMS`, for bool [P]: right alone, right with the tool, it called.

    On each problem tool − alone is gains − harms, of which one at most is true.
    """
    gained, lost = tool & ~alone, alone & ~tool
    return {
        "call_gain": gained & called,
        "prompt_gain": gained & ~called,
        "call_harm": lost & called,
        "prompt_harm": lost & ~called,
    }


@dataclass(frozen=True)
class Term:
    """One of the four: `share` = `of_problems` × `rate` × `success`.

    Attributes:
        count: problems of which it is true; `share` of all.
        of_problems: share that is wrong alone (a gain), or right alone (a harm).
        rate: of calling on these (of not calling, for what the prompt does).
        success: how often these then change sides. Undefined where there is none to change.
    """

    name: str
    count: int
    share: Interval
    of_problems: Interval
    rate: Interval
    success: Interval


@dataclass(frozen=True)
class ToolUse:
    """One accuracy with the tool and without, over the P problems that have both.

    Attributes:
        difference: tool − alone, paired: the gains less the harms, exactly.
        called: share of problems on which it called.
        terms: in the order of `TERMS`.
    """

    n: int
    tool: Interval
    alone: Interval
    difference: Interval
    called: Interval
    terms: tuple[Term, ...]


def tool_use(
    alone: np.ndarray, tool: np.ndarray, called: np.ndarray, puzzles: Sequence[str] = ()
) -> ToolUse:
    """Split a difference. `alone`, `tool`, `called`: bool [P]; `puzzles`: see `rewards.intervals`.

    Shares have Wilson's intervals at the effective sample size, the difference a bootstrap's.
    """

    def share(of: np.ndarray, among: np.ndarray) -> Interval:
        return _share(
            of[among], [name for name, inside in zip(puzzles, among, strict=True) if inside]
        )

    puzzles = puzzles or [str(i) for i in range(len(alone))]
    every = np.ones(len(alone), dtype=bool)
    terms = []
    for name, true in four(alone, tool, called).items():
        side = ~alone if name.endswith("gain") else alone
        did = called if name.startswith("call") else ~called
        terms.append(
            Term(
                name,
                int(true.sum()),
                share(true, every),
                share(side, every),
                share(did, side),
                share(true, side & did),
            )
        )
    return ToolUse(
        n=len(alone),
        tool=share(tool, every),
        alone=share(alone, every),
        difference=paired(alone, tool, puzzles),
        called=share(called, every),
        terms=tuple(terms),
    )


@dataclass(frozen=True)
class Returned:
    """One accuracy where other pictures were returned than asked for (`tasks.returns`).

    Attributes:
        n: problems that have both; `looked` of them were shown a picture with the true returns.
        value: the accuracy.
        lost: with the true pictures − with these, paired: what the shown pictures were worth.
        lost_where_looked: the same of the `looked`.
    """

    n: int
    looked: int
    value: Interval
    lost: Interval
    lost_where_looked: Interval


def returned(
    original: np.ndarray, replaced: np.ndarray, looked: np.ndarray, puzzles: Sequence[str] = ()
) -> Returned:
    """Compare true returns with others. `original`, `replaced` (right), `looked`: bool [P]."""
    puzzles = puzzles or [str(i) for i in range(len(original))]
    names = [name for name, inside in zip(puzzles, looked, strict=True) if inside]
    return Returned(
        n=len(original),
        looked=int(looked.sum()),
        value=_share(replaced, puzzles),
        lost=paired(replaced, original, puzzles),
        lost_where_looked=paired(replaced[looked], original[looked], names),
    )


def paired(before: np.ndarray, after: np.ndarray, puzzles: Sequence[str]) -> Interval:
    """Mean of after − before, bool [P], with a bootstrap over puzzles; undefined without any."""
    if not len(before):
        return UNDEFINED
    changes = after.astype(np.float64) - before.astype(np.float64)
    (difference,) = group_bootstrap(
        lambda weights: (weights @ changes / weights.sum(axis=1))[:, None], len(changes), puzzles
    )
    return difference


def _share(of: np.ndarray, puzzles: Sequence[str]) -> Interval:
    if not len(of):
        return UNDEFINED
    return Interval(float(of.mean()), *mean_interval(of.astype(np.float64), puzzles))
