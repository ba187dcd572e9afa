"""What an evaluation tells of [environment], by problem. Pure.

Shapes: P problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cluster.recipe.sections import EvalPass
from rollout.record import Group

PerProblem = Mapping[str, Mapping[str, float]]
"""metric -> problem id -> value in [0, 1]."""

FREE: Mapping[EvalPass, str] = {
    "greedy_alone": "_alone",
    "returns_blank": "_returns_blank",
    "returns_other": "_returns_other",
    "returns_elsewhere": "_returns_elsewhere",
}
"""Greedy passes that differ from `greedy` in what of [environment] there is: what their `a` and
`a_p` are called by."""

COMPARED = {
    "a": ("a_alone", "a", "called"),
    "a_p": ("a_p_alone", "a_p", "called"),
    "a_r": ("a_r", "a_r_tool", "a_r_called"),
}
"""A skill without the tool, with it, and whether it called then."""


def called(group: Group) -> float:
    """Share of responses that called, understood or not."""
    return float(np.mean([any(turn.called for turn in r.turns) for r in group.rollouts]))


def looked(group: Group) -> float:
    """Share of responses that were shown a picture."""
    return float(np.mean([any(turn.images for turn in r.turns) for r in group.rollouts]))


def compared(values: PerProblem, skill: str) -> tuple[list[str], np.ndarray]:
    """The problems that have a skill without the tool and with it, and bool [3, P] of `COMPARED`.

    Of passes with one rollout a problem, as these are.
    """
    return shared_by(values, COMPARED[skill])


def shared_by(values: PerProblem, metrics: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The problems that have all of M metrics, and bool [M, P]: whether each is true of them."""
    columns = [values.get(metric, {}) for metric in metrics]
    shared = [problem for problem in columns[0] if all(problem in column for column in columns)]
    rows = [[column[problem] > 0 for problem in shared] for column in columns]
    return shared, np.array(rows, dtype=bool)
