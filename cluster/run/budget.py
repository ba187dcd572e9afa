"""What a run has spent, how far that is of what it may, and whether it is over.

A run ends after `algorithm.steps`, and under `algorithm.budget` at the end of the step that
spends the last of it: a step is never cut, so a run overshoots by less than one step.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.recipe.algorithm import AlgorithmConfig


@dataclass(frozen=True)
class Spent:
    """What the steps of a run cost so far.

    Attributes:
        tokens: response tokens that were sampled to learn from.
        seconds: wall time of the steps: sampling, scoring, learning and weight transfer, without
            start-up, evaluations and checkpoints.
    """

    tokens: int = 0
    seconds: float = 0.0

    def plus(self, tokens: int, seconds: float) -> Spent:
        """After one more step."""
        return Spent(self.tokens + tokens, self.seconds + seconds)

    def metrics(self) -> dict[str, float]:
        """Under `spent/`, to be logged with each step."""
        return {"spent/tokens": float(self.tokens), "spent/seconds": self.seconds}


def is_over(algorithm: AlgorithmConfig, steps_done: int, spent: Spent) -> bool:
    """Whether a run that did `steps_done` steps has no step left to do."""
    budget = algorithm.budget
    if steps_done >= algorithm.steps:
        return True
    return budget is not None and getattr(spent, budget.kind) >= budget.amount


def run_share(algorithm: AlgorithmConfig, steps_done: int, spent: Spent) -> float:
    """How far a run is before its next step, in [0, 1]; what weights of rewards go by.

    0 at the first step. At the last of `algorithm.steps` it is 1; under a budget it is what was
    spent of it, since which step will be the last is not known.
    """
    if (budget := algorithm.budget) is not None:
        share: float = getattr(spent, budget.kind) / budget.amount
        return min(1.0, share)
    return min(1.0, steps_done / max(1, algorithm.steps - 1))
