"""Several named rewards become the advantages of a rollout: one a credit column.

A term's credit may go to the tokens of some segments only (as MoCA, arXiv 2605.14054, and
Perceval, 2604.24583, do). Each column has a total of its own, the weighted sum of the terms that
are credited to it, and is normalised on its own; without routing all columns are equal. Tokens
outside every segment get all terms: what the parser could not place is answerable for everything.

Shapes: G rollouts in a group, C credit columns; a batch is the groups of one step. In float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rewards.advantages import (
    CREDIT_COLUMNS,
    Advantages,
    Estimator,
    batch_advantages,
    group_advantages,
    whiten,
)
from rewards.scored import DIAGNOSIS, RewardError, ScoredGroup, ScoredTerms, TermFailure
from rewards.settings import Method, OnFailure
from rollout.record import Group
from tasks.core import Segment


@dataclass(frozen=True)
class Composition:
    """How terms are put together.

    Attributes:
        weights: term name -> weight; a scored term without a weight is only logged.
        method: `sum_then_normalize`: R = Σ w_k·r_k, then the estimator.
            `normalize_then_sum` (GDPO, arXiv 2601.05242): each r_k is standardised within
            its group, then weighted and summed, then whitened over the batch.
        estimator: see `advantages.group_advantages` and `advantages.batch_advantages`; GDPO
            standardises, so it is `grpo`.
        on_failure: term name -> what its failure does: end the run (also where a term is
            not named), drop the group, or count as zero.
        credit: term name -> segments that get its advantage; a term not named goes to all.
        gates: term name -> (gate's name, threshold): the term counts as 0 in the total of a
            rollout whose gate is below the threshold (as PEARL, arXiv 2511.18437, rewards
            reasoning only behind passed perception). The raw value is logged as it is.
    """

    weights: Mapping[str, float]
    method: Method = "sum_then_normalize"
    estimator: Estimator | Advantages = "grpo"
    on_failure: Mapping[str, OnFailure] = field(default_factory=dict)
    credit: Mapping[str, tuple[Segment, ...]] = field(default_factory=dict)
    gates: Mapping[str, tuple[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights: at least one reward term is needed")
        if not np.isfinite(list(self.weights.values())).all():
            raise ValueError(f"weights: {dict(self.weights)}: every weight is a finite number")
        if self.method == "normalize_then_sum" and self.estimator != "grpo":
            raise ValueError(
                f"estimator {self.estimator!r}: normalize_then_sum standardises every term; "
                "use 'grpo', or sum_then_normalize"
            )

    def credited(self, column: str) -> dict[str, float]:
        """The weights of the terms that are credited to a column of `CREDIT_COLUMNS`."""
        return {
            name: weight
            for name, weight in self.weights.items()
            if column == "none" or column in self.credit.get(name, CREDIT_COLUMNS)
        }

    def gated(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Values with 0 where a term's gate is not passed; raises KeyError for a missing gate."""
        passed = dict(values)
        for name, (gate, threshold) in self.gates.items():
            passed[name] = np.where(values[gate] >= threshold, values[name], 0.0)
        return passed

    def consequence(self, failure: TermFailure) -> OnFailure:
        """What this failure does to its group.

        A failed diagnosis (the task's own code raised) ends the run where a failing term may;
        else the group keeps its rewards and goes undiagnosed, and the failure is counted.
        """
        if failure.term != DIAGNOSIS:
            return self.on_failure.get(failure.term, "abort")
        all_survive = all(self.on_failure.get(n, "abort") != "abort" for n in self.weights)
        return "zero" if all_survive else "abort"


def weighted_sum(values: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """float64 [G]: Σ w_k·values_k in the order of `weights`, zeros for no weights.

    A missing term is a KeyError.
    """
    total = np.zeros(len(next(iter(values.values()))), dtype=np.float64)
    for name, weight in weights.items():
        total = total + weight * values[name]
    return total


def normalize_then_sum(
    batch: Sequence[Mapping[str, np.ndarray]], weights: Mapping[str, float]
) -> list[np.ndarray]:
    """Advantages float64 [G] of each group by GDPO (arXiv 2601.05242).

    A_k = (r_k − mean_group) / (std_group + EPS); A = Σ w_k·A_k; then A is whitened over the batch.
    """
    return whiten(
        [
            weighted_sum({name: group_advantages(v) for name, v in group.items()}, weights)
            for group in batch
        ]
    )


def compose_groups(
    groups: Sequence[Group], scored: Sequence[ScoredTerms], composition: Composition
) -> list[ScoredGroup]:
    """Turn scored terms into totals and advantages, one `ScoredGroup` a group, in order.

    Raises `RewardError` for the first failure that ends the run, and for a weight that
    names a term nobody scored.
    """
    values: list[dict[str, np.ndarray]] = []
    dropped: list[bool] = []
    for group, terms in zip(groups, scored, strict=True):
        raise_if_fatal(terms.failures, group, composition)
        filled = dict(terms.values)
        failed = {f.term: composition.consequence(f) for f in terms.failures}
        for name, consequence in failed.items():
            if consequence == "zero" and name != DIAGNOSIS:
                filled[name] = np.zeros(len(group.rollouts))
        needed = set(composition.weights) | {gate for gate, _ in composition.gates.values()}
        missing = sorted(needed - set(filled) - set(failed))
        if missing:
            raise RewardError(f"weights name {missing}, which no reward term scored")
        values.append(filled)
        dropped.append("drop_group" in failed.values())

    retained = [i for i, drop in enumerate(dropped) if not drop]
    gated = {i: composition.gated(values[i]) for i in retained}
    columns = _column_advantages([gated[i] for i in retained], composition)
    advantages = dict(zip(retained, columns, strict=True))

    result = []
    for i, (group, terms) in enumerate(zip(groups, scored, strict=True)):
        size = len(group.rollouts)
        advantage = advantages.get(i, np.zeros((size, len(CREDIT_COLUMNS))))
        result.append(
            ScoredGroup(
                group=group,
                terms=values[i],
                totals=np.full(size, np.nan)
                if dropped[i]
                else weighted_sum(gated[i], composition.weights),
                advantages=advantage,
                zero_variance=not dropped[i] and not advantage.any(),
                dropped=dropped[i],
                failures=terms.failures,
                seconds=terms.seconds,
                diagnosis=terms.diagnosis,
            )
        )
    return result


def _column_advantages(
    batch: Sequence[Mapping[str, np.ndarray]], composition: Composition
) -> list[np.ndarray]:
    """float64 [G, C] of each group; columns credited with the same terms are worked out once."""
    of_columns: dict[tuple[str, ...], list[np.ndarray]] = {}
    columns: list[list[np.ndarray]] = []
    for column in CREDIT_COLUMNS:
        weights = composition.credited(column)
        key = tuple(weights)
        if key not in of_columns:
            if composition.method == "normalize_then_sum":
                of_columns[key] = normalize_then_sum(batch, weights)
            else:
                totals = [weighted_sum(values, weights) for values in batch]
                of_columns[key] = batch_advantages(totals, composition.estimator)
        columns.append(of_columns[key])
    return [np.stack(of_group, axis=1) for of_group in zip(*columns, strict=True)]


def raise_if_fatal(failures: Sequence[TermFailure], group: Group, composition: Composition) -> None:
    """Raise `RewardError` for the first failure that ends the run, if there is one.

    The term's own traceback stands on top of the message.
    """
    for failure in failures:
        if composition.consequence(failure) == "abort":
            head = f"{failure.traceback.rstrip()}\n\n" if failure.traceback else ""
            source = "the task's own code" if failure.term == DIAGNOSIS else "reward term"
            raise RewardError(
                f"{head}{source} {failure.term!r} failed on group {group.group_id!r} "
                f"(problem {group.problem.id!r}), {failure.kind}: {failure.message}\n"
                'Fix it, or set the term\'s on_failure to "drop_group" or "zero" in the recipe.'
            )
