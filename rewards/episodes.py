"""What episodes give to rewards: the environment's own, calls, and that a group lost it."""

from __future__ import annotations

import math

import pydantic

from rewards.diagnosis import solved
from rewards.scored import FailureKind, TermFailure
from rewards.settings import ARGUMENTS
from rollout.record import Group, Rollout
from tasks.core import Task
from tasks.fields import Count

_KINDS: dict[str, FailureKind] = {"deadline": "deadline", "died": "worker_died"}


class EnvironmentReward:
    """The sum of what the environment gave for the turns of a response; 0 without one."""

    name = "environment"

    def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G]."""
        return [math.fsum(turn.reward for turn in rollout.turns) for rollout in group.rollouts]


class CallBonus:
    """1 where the answer is right and at least one call was understood, else 0."""

    name = "call_bonus"

    def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G] in {0, 1}."""
        return [
            float(right and any(turn.called and not turn.defects for turn in rollout.turns))
            for right, rollout in zip(solved(task, group), group.rollouts, strict=True)
        ]


@pydantic.dataclasses.dataclass(config=ARGUMENTS)
class CallCost:
    """−1 for each call beyond the first `free`, understood or not: its weight is the price."""

    name = "call_cost"
    free: Count = 0

    def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G], at most 0."""
        return [0.0 - max(0, calls(rollout) - self.free) for rollout in group.rollouts]


@pydantic.dataclasses.dataclass(config=ARGUMENTS)
class CallCap:
    """−1 where there are more than `most` calls, understood or not, else 0."""

    name = "call_cap"
    most: Count

    def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G] in {−1, 0}."""
        return [0.0 - (calls(rollout) > self.most) for rollout in group.rollouts]


def calls(rollout: Rollout) -> int:
    """How many turns were calls, understood or not."""
    return sum(turn.called for turn in rollout.turns)


def environment_failures(group: Group) -> tuple[TermFailure, ...]:
    """One failure named `environment` for a group in which the environment failed."""
    failed = [rollout.failure for rollout in group.rollouts if rollout.failure]
    if not failed:
        return ()
    kind, _, message = failed[0].partition(": ")
    told = f"{message} ({len(failed)} of {len(group.rollouts)} responses)"
    return (TermFailure("environment", _KINDS.get(kind, "exception"), told),)
