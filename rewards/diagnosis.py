"""What is true of a group whatever is rewarded: by its task's checker, labels and solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from rewards.scored import Diagnosis
from rewards.surrogates import SelfConsistency
from rollout.record import Group
from tasks.core import DataError, Parsed, Solves, Task, labelled
from tasks.turns import readings


def diagnose(task: Task, group: Group) -> Diagnosis:
    """What is true of a group, as far as its task can tell; never used as a reward."""
    diagnosis = Diagnosis(
        a=np.array(solved(task, group), dtype=bool),
        defects=tuple(tuple(rollout.parsed.defects) for rollout in group.rollouts),
    )
    if isinstance(task, Solves):
        valid = np.array(SelfConsistency()(task, group), dtype=bool)
        diagnosis = replace(diagnosis, self_consistency=valid)
    if labelled(task, group.problem):
        scores = seen(task, group)
        a_p = np.array([exact for exact, _ in scores], dtype=bool)
        if any(rollout.turns for rollout in group.rollouts):
            before = seen(task, group, lambda parsed: readings(parsed)[0])
            first = np.array([exact for exact, _ in before], dtype=bool)
            diagnosis = replace(diagnosis, reread_gain=a_p & ~first, reread_loss=first & ~a_p)
        graded = np.array([score for _, score in scores], dtype=np.float64)
        diagnosis = replace(diagnosis, a_p=a_p, a_p_graded=graded, leak=diagnosis.a & ~a_p)
    return diagnosis


def solved(task: Task, group: Group) -> list[bool]:
    """Whether each rollout's answer is right; what cannot be read is not."""
    answers = [rollout.parsed.answer for rollout in group.rollouts]
    return [answer is not None and bool(task.check(group.problem, answer)) for answer in answers]


def seen(
    task: Task, group: Group, which: Callable[[Parsed], Any] = lambda parsed: parsed.perception
) -> list[tuple[bool, float]]:
    """Each rollout's perception: (equals p*, graded score); what cannot be read is (False, 0).

    `which` of the perceptions of its turns; by default the last. Raises DataError for a problem
    without a perception label.
    """
    problem, scores = group.problem, []
    if not labelled(task, problem):
        raise DataError(f'problem {problem.id} of task "{task.name}" has no perception label')
    for perception in (which(rollout.parsed) for rollout in group.rollouts):
        exact, graded = (
            (False, 0.0) if perception is None else task.score_perception(problem, perception)
        )
        scores.append((bool(exact), float(graded)))
    return scores
