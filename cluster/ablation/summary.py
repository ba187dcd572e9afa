"""What an ablation says, in numbers: the records of `summary.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cluster.ablation.statistics import Estimate, PairedTest, Reach
from cluster.record.table import finite

ALL_TASKS = "all tasks"
COMPARED = ("a", "a_p", "a_r", "sufficiency")
"""Accuracies that arms are compared by; others are in the table to compare by hand. Not `used`: it
is of other problems in each arm."""
COUPLINGS = ("outcome_perception", "outcome_reasoning")
SHARES = {
    "tokens": "sft/share/tokens/perception",
    "loss": "sft/share/loss/perception",
    "gradient norm": "sft/share/grad_norm/perception",
    "λ": "sft/lambda",
}
"""Of SFT: what perception has a share of, and the metric of an update that tells it."""


@dataclass(frozen=True)
class Level:
    """One arm's accuracy on one task before and after training, and its change."""

    difficulty: str
    task: str
    arm: str
    metric: str
    before: Estimate
    after: Estimate
    change: Estimate


@dataclass(frozen=True)
class Comparison:
    """An arm less the reference after training, at the same seeds and problems.

    Attributes:
        p_holm: `difference.p` adjusted over the arms compared on this difficulty, task and
            metric; None where there is no p.
        test: exact paired tests seed by seed; None for values that are not right or wrong.
    """

    difficulty: str
    task: str
    arm: str
    reference: str
    metric: str
    difference: Estimate
    p_holm: float | None
    test: PairedTest | None


@dataclass(frozen=True)
class Asymmetry:
    """Δa_r − Δa_p of an arm since step 0; above 0 where thinking gained more than seeing.

    At the last step over seeds and problems, at earlier evaluations over seeds.
    """

    difficulty: str
    task: str
    arm: str
    step: int
    index: Estimate


@dataclass(frozen=True)
class Coupling:
    """Within-group correlation of the outcome with seeing or thinking in a third of training."""

    difficulty: str
    arm: str
    of: str
    phase: str
    correlation: Estimate


@dataclass(frozen=True)
class Curve:
    """A metric of training step by step with its band, and its mean level over training."""

    difficulty: str
    arm: str
    metric: str
    steps: tuple[int, ...]
    points: tuple[Estimate, ...]
    mean_level: Estimate


@dataclass(frozen=True)
class Cost:
    """What an arm spent until training accuracy `acc/a` reached `target`."""

    difficulty: str
    arm: str
    unit: str
    target: float
    reach: Reach


@dataclass(frozen=True)
class SegmentShare:
    """Perception's mean share, over SFT's updates, of what `SHARES` names; interval over seeds."""

    difficulty: str
    arm: str
    of: str
    share: Estimate


@dataclass(frozen=True)
class Summary:
    """Everything an ablation says. `reference` is the first arm."""

    question: str
    reference: str
    levels: tuple[Level, ...]
    comparisons: tuple[Comparison, ...]
    asymmetries: tuple[Asymmetry, ...]
    couplings: tuple[Coupling, ...]
    curves: tuple[Curve, ...]
    costs: tuple[Cost, ...]
    shares: tuple[SegmentShare, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; NaN (a step that no seed has) becomes null."""
        values: dict[str, Any] = finite(asdict(self))
        return values

    def headlines(self) -> list[tuple[str, str]]:
        """(difficulty, task) of the verdict: of each difficulty all tasks, or its only one."""
        task_of: dict[str, str] = {}
        for level in self.levels:
            if level.task == ALL_TASKS or level.difficulty not in task_of:
                task_of[level.difficulty] = level.task
        return list(task_of.items())

    def of(self, difficulty: str, task: str, arm: str) -> dict[str, Level]:
        """An arm's accuracies on a task, by metric."""
        cell = (difficulty, task, arm)
        return {v.metric: v for v in self.levels if (v.difficulty, v.task, v.arm) == cell}


def at(difficulty: str, label: str) -> str:
    """Such as `sudoku` or `sudoku (hard)`."""
    return f"{label} ({difficulty})" if difficulty else label
