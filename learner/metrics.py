"""Metrics of an update that its parts tell: micro-batches and ranks, however it was split.

Each kind knows how two parts make one, so a loss reports a micro-batch by the name a metric will
have in the end (docs/metrics.md).
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Self

from learner.batch import MicroBatch


class Metric(ABC):
    """Numbers of one part of an update, which add up over all parts."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*map(operator.add, astuple(self), astuple(other)))  # type: ignore[call-overload]

    @abstractmethod
    def value(self) -> float | None:
        """What the numbers tell together; None where there was nothing to tell of."""


@dataclass(frozen=True)
class Total(Metric):
    """A sum."""

    number: float

    def value(self) -> float | None:
        return self.number


@dataclass(frozen=True)
class Mean(Metric):
    """A sum over a count."""

    total: float
    count: float

    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass(frozen=True)
class Largest(Metric):
    """The largest number of all parts."""

    number: float

    def __add__(self, other: Self) -> Self:
        return max(self, other, key=lambda metric: metric.number)

    def value(self) -> float | None:
        return self.number


@dataclass(frozen=True)
class EffectiveShare(Metric):
    """(Σw)² / (n Σw²): the share of n draws that as many of equal weight are worth (Kish 1965)."""

    total: float
    squares: float
    count: float

    def value(self) -> float | None:
        if not self.count:
            return None
        return self.total**2 / (self.count * self.squares) if self.squares else 0.0


def combined(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """The metrics of all parts together."""
    totals: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            totals[name] = totals[name] + metric if name in totals else metric
    return totals


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The numbers to log, of those that have one."""
    return {name: v for name, metric in metrics.items() if (v := metric.value()) is not None}


def layout_metrics(micro: MicroBatch) -> dict[str, Metric]:
    """How much of a micro-batch is padding, and how much of it several sequences share."""
    slots, real = float(micro.inputs["input_ids"].numel()), float(micro.real_tokens)
    shared = float(micro.shared_tokens)
    return {
        "padding_share": Mean(slots - real, slots),
        "shared_share": Mean(shared, real + shared),
    }
