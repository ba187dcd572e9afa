"""How often each `[[tasks]]` entry comes: strategies weigh them by past success on each. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.recipe.recipe import UserError
from tasks.load import import_named


@dataclass(frozen=True)
class Entry:
    """What a strategy knows of one entry.

    Attributes:
        label: the entry's name in tables and metrics.
        weight: the recipe's.
        success: running mean of `a` over its groups, newer ones counting more; None before one.
        groups: how many groups that is of.
    """

    label: str
    weight: float
    success: float | None = None
    groups: int = 0


class Strategy(Protocol):
    """Named in a recipe, or `"module:Class"`; made with the recipe's `args`."""

    def weights(self, entries: Sequence[Entry]) -> Sequence[float]:
        """How often each entry should come next: not negative, not all 0. Pure."""


@dataclass(frozen=True)
class Uniform:
    """The recipe's own weights, whatever the success."""

    def weights(self, entries: Sequence[Entry]) -> list[float]:
        """As `Strategy.weights`."""
        return [entry.weight for entry in entries]


@dataclass(frozen=True)
class SuccessBand:
    """The recipe's weight times 4·p·(1 − p), p the success: most where every second try succeeds.

    p·(1 − p) is the variance of a right-or-wrong reward, which is 0 where a group can teach
    nothing; "learnability" in arXiv 2408.15099, for LLMs in arXiv 2502.12272.

    Attributes:
        floor: what an entry keeps at p = 0 or 1, so that its success is still measured. An entry
            that was never drawn counts as p = 1/2.
    """

    floor: float = 0.1

    def weights(self, entries: Sequence[Entry]) -> list[float]:
        """As `Strategy.weights`."""
        weights = []
        for entry in entries:
            p = 0.5 if entry.success is None else entry.success
            weights.append(entry.weight * (self.floor + (1 - self.floor) * 4 * p * (1 - p)))
        return weights


STRATEGIES: dict[str, type] = {"uniform": Uniform, "success_band": SuccessBand}


def make_strategy(name: str, args: Mapping[str, Any]) -> Strategy:
    """The strategy of a recipe. Raises UserError naming the field for one that cannot be made."""
    where = "algorithm.curriculum"
    try:
        kind = STRATEGIES.get(name) or import_named(f"{where}.strategy", name)
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        strategy: Strategy = kind(**args)
    except Exception as error:  # a user's own class may raise anything
        raise UserError(f"{where}.args: {name!r} does not take them: {error}") from error
    if not callable(getattr(strategy, "weights", None)):
        raise UserError(f"{where}.strategy: {name!r} has no method weights(entries)")
    return strategy
