"""When a run has spent what it may: updates, sampled tokens or seconds of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

BudgetKind = Literal["updates", "sampled_tokens", "seconds"]


@dataclass
class Meter:
    """Adds up a run's steps against its budget.

    Attributes:
        kind: `updates` counts optimizer updates, `sampled_tokens` response tokens of training
            rollouts, `seconds` the wall time of training steps; evaluation is free of charge.
        amount: the budget, in that unit.
        spent: what the steps so far took.
    """

    kind: BudgetKind
    amount: float
    spent: float = 0.0

    def add(self, metrics: Mapping[str, float], updates: int) -> bool:
        """Book a step by its metrics; True where the run has spent its budget and should stop.

        The step that crosses the line is the last: no arm gets less than the budget, and none
        more than one step above it. Raises KeyError where the step lacks its cost.
        """
        if self.kind == "updates":
            self.spent += updates
        else:
            names = {"sampled_tokens": "response/tokens", "seconds": "time/step"}
            self.spent += metrics[names[self.kind]]
        return self.spent >= self.amount
