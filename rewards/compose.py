"""Several named rewards become one advantage a rollout.

Shapes: G rollouts in a group; a batch is the groups of one step. All in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from rewards.advantages import EPS, Estimator, group_advantages, is_constant
from rewards.records import DIAGNOSIS, RewardError, ScoredGroup, ScoredTerms, TermFailure
from rollout.record import Group

Method = Literal["sum_then_normalize", "normalize_then_sum"]
OnFailure = Literal["abort", "drop_group", "zero"]


class TermSpec(Protocol):
    """What a recipe says of one term; `[[reward.terms]]` fits as it is."""

    @property
    def name(self) -> str:
        """`"outcome"` or `"module:Class"`."""

    @property
    def weight(self) -> float:
        """Its share in the total; 0 logs the term without rewarding it."""

    @property
    def args(self) -> Mapping[str, Any]:
        """Keyword arguments of the term's class."""

    @property
    def on_failure(self) -> OnFailure:
        """What happens to a group on which the term fails."""


def alpha_weights(alpha: float) -> dict[str, float]:
    """R = α·a_p + (1−α)·a as term weights (arXiv 2605.29496); raises outside [0, 1]."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha = {alpha}: a share between 0 (outcome only) and 1")
    return {"perception": alpha, "outcome": 1.0 - alpha}


@dataclass(frozen=True)
class Composition:
    """How terms are put together.

    Attributes:
        weights: term name -> weight; a scored term without a weight is only logged.
        method: `sum_then_normalize`: R = Σ w_k·r_k, then the estimator within the group.
            `normalize_then_sum` (GDPO, arXiv 2601.05242): each r_k is standardised within
            its group, then weighted and summed, then whitened over the batch.
        estimator: see `advantages.group_advantages`; GDPO standardises, so it is `grpo`.
        on_failure: term name -> what its failure does: end the run (also where a term is
            not named), drop the group, or count as zero.
    """

    weights: Mapping[str, float]
    method: Method = "sum_then_normalize"
    estimator: Estimator = "grpo"
    on_failure: Mapping[str, OnFailure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.weights or not any(self.weights.values()):
            raise ValueError("weights: at least one reward term needs a weight other than 0")
        if not np.isfinite(list(self.weights.values())).all():
            raise ValueError(f"weights: {dict(self.weights)}: every weight is a finite number")
        if self.method == "normalize_then_sum" and self.estimator != "grpo":
            raise ValueError(
                f"estimator {self.estimator!r}: normalize_then_sum standardises every term; "
                "use 'grpo', or sum_then_normalize"
            )

    def policy(self, failure: TermFailure) -> OnFailure:
        """What this failure does to its group.

        A failed diagnosis (the task's own code raised) ends the run where a failing term may;
        else the group keeps its rewards and goes undiagnosed, and the failure is counted.
        """
        if failure.term != DIAGNOSIS:
            return self.on_failure.get(failure.term, "abort")
        policies = {self.on_failure.get(name, "abort") for name in self.weights}
        return "abort" if "abort" in policies else "zero"


def weighted_sum(values: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """float64 [G]: Σ w_k·values_k in the order of `weights`; a missing term is a KeyError."""
    total = np.zeros_like(values[next(iter(weights))], dtype=np.float64)
    for name, weight in weights.items():
        total = total + weight * values[name]
    return total


def normalize_then_sum(
    batch: Sequence[Mapping[str, np.ndarray]], weights: Mapping[str, float]
) -> list[np.ndarray]:
    """Advantages float64 [G] of each group by GDPO (arXiv 2601.05242).

    A_k = (r_k − mean_group) / (std_group + EPS); A = Σ w_k·A_k; then A is whitened with the
    mean and population standard deviation of the whole batch, groups without signal
    included. Those groups keep exactly 0.
    """
    sums = [
        weighted_sum({name: group_advantages(group[name]) for name in weights}, weights)
        for group in batch
    ]
    if not sums:
        return []
    everything = np.concatenate(sums)
    mean, std = everything.mean(), everything.std()
    return [np.zeros_like(s) if is_constant(s) else (s - mean) / (std + EPS) for s in sums]


def compose_groups(
    groups: Sequence[Group], scored: Sequence[ScoredTerms], composition: Composition
) -> list[ScoredGroup]:
    """Turn scored terms into totals and advantages, one `ScoredGroup` a group, in order.

    Raises `RewardError` for the first failure whose policy is `abort`, and for a weight that
    names a term nobody scored.
    """
    values: list[dict[str, np.ndarray]] = []
    dropped: list[bool] = []
    for group, terms in zip(groups, scored, strict=True):
        raise_if_fatal(terms.failures, group, composition)
        filled = dict(terms.values)
        policies = {f.term: composition.policy(f) for f in terms.failures}
        for name, policy in policies.items():
            if policy == "zero" and name != DIAGNOSIS:
                filled[name] = np.zeros(len(group.rollouts))
        missing = sorted(set(composition.weights) - set(filled) - set(policies))
        if missing:
            raise RewardError(f"weights name {missing}, which no reward term scored")
        values.append(filled)
        dropped.append("drop_group" in policies.values())

    kept = [i for i, drop in enumerate(dropped) if not drop]
    if composition.method == "normalize_then_sum":
        whitened = normalize_then_sum([values[i] for i in kept], composition.weights)
        advantages = dict(zip(kept, whitened, strict=True))
    else:
        advantages = {
            i: group_advantages(weighted_sum(values[i], composition.weights), composition.estimator)
            for i in kept
        }

    result = []
    for i, (group, terms) in enumerate(zip(groups, scored, strict=True)):
        size = len(group.rollouts)
        advantage = advantages.get(i, np.zeros(size))
        result.append(
            ScoredGroup(
                group=group,
                terms=values[i],
                totals=np.full(size, np.nan)
                if dropped[i]
                else weighted_sum(values[i], composition.weights),
                advantages=advantage,
                zero_variance=not dropped[i] and not advantage.any(),
                dropped=dropped[i],
                failures=terms.failures,
                seconds=terms.seconds,
                diagnosis=terms.diagnosis,
            )
        )
    return result


def raise_if_fatal(failures: Sequence[TermFailure], group: Group, composition: Composition) -> None:
    """Raise `RewardError` for the first failure whose policy is `abort`, if there is one.

    The term's own traceback stands on top of the message.
    """
    for failure in failures:
        if composition.policy(failure) == "abort":
            head = f"{failure.traceback.rstrip()}\n\n" if failure.traceback else ""
            what = "the task's own code" if failure.term == DIAGNOSIS else "reward term"
            raise RewardError(
                f"{head}{what} {failure.term!r} failed on group {group.group_id!r} "
                f"(problem {group.problem.id!r}), {failure.kind}: {failure.message}\n"
                'Fix it, or set the term\'s on_failure to "drop_group" or "zero" in the recipe.'
            )
