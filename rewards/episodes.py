"""What episodes give to rewards: the environment's own, and that a group lost its environment."""

from __future__ import annotations

import math

from rewards.scored import FailureKind, TermFailure
from rollout.record import Group
from tasks.core import Task

_KINDS: dict[str, FailureKind] = {"deadline": "deadline", "died": "worker_died"}


class EnvironmentReward:
    """The sum of what the environment gave for the turns of a response; 0 without one."""

    name = "environment"

    def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G]."""
        return [math.fsum(turn.reward for turn in rollout.turns) for rollout in group.rollouts]


def environment_failures(group: Group) -> tuple[TermFailure, ...]:
    """One failure named `environment` for a group in which the environment failed."""
    failed = [rollout.failure for rollout in group.rollouts if rollout.failure]
    if not failed:
        return ()
    kind, _, message = failed[0].partition(": ")
    told = f"{message} ({len(failed)} of {len(group.rollouts)} responses)"
    return (TermFailure("environment", _KINDS.get(kind, "exception"), told),)
