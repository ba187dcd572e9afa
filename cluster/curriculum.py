"""What a run practises next: a strategy weighs the `[[tasks]]` entries by past success on each.

An entry is one task at one difficulty (its knobs, or its data set). A recipe that lists a task
at several difficulties leaves to the strategy how often each comes; which problems of an entry
come stays with seed and step. Strategies are pure; the successes are in the checkpoint, so a
resumed run draws the same problems.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Protocol, overload

import numpy as np

from cluster.config import Recipe, UserError
from cluster.problems import ProblemSource, step_sources
from rewards.records import ScoredGroup


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
        found = []
        for entry in entries:
            p = 0.5 if entry.success is None else entry.success
            found.append(entry.weight * (self.floor + (1 - self.floor) * 4 * p * (1 - p)))
        return found


STRATEGIES: dict[str, type] = {"uniform": Uniform, "success_band": SuccessBand}


def make_strategy(name: str, args: Mapping[str, Any]) -> Strategy:
    """The strategy of a recipe. Raises UserError naming the field for one that cannot be made."""
    where = "algorithm.curriculum"
    kind = STRATEGIES.get(name)
    try:
        if kind is None:
            module, _, attribute = name.partition(":")
            kind = getattr(import_module(module), attribute)
        made: Strategy = kind(**args)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{where}.strategy: {name!r} cannot be loaded: {error}") from error
    except TypeError as error:
        raise UserError(f"{where}.args: {name!r} does not take them: {error}") from error
    if not callable(getattr(made, "weights", None)):
        raise UserError(f"{where}.strategy: {name!r} has no method weights(entries)")
    return made


class Curriculum(Sequence[ProblemSource]):
    """A run's problem sources, weighed anew after every step; stands where the plain ones would."""

    def __init__(
        self,
        recipe: Recipe,
        sources: Sequence[ProblemSource],
        state: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """`state`: of the checkpoint of a run that goes on (see `state`)."""
        chosen = recipe.algorithm.curriculum
        self._recipe, self._memory = recipe, chosen.memory
        self._strategy = make_strategy(chosen.strategy, chosen.args)
        self._plain = list(sources)
        done = state or {}
        self._entries = [Entry(s.label, s.weight, *_known(done.get(s.label))) for s in self._plain]
        self._weigh()

    def observe(self, step: int, scored: Sequence[ScoredGroup]) -> None:
        """Learn from the own groups of step `step` (from 1), the first of `scored`, in order.

        Groups on which the task's own code failed are passed over.
        """
        count = self._recipe.algorithm.problems_per_step
        places = step_sources(self, self._recipe.seed, step - 1, count)
        for place, group in zip(places, scored, strict=False):
            if group.diagnosis is None:
                continue
            entry, now = self._entries[place], float(group.diagnosis.a.mean())
            old = now if entry.success is None else entry.success
            mean = self._memory * old + (1 - self._memory) * now
            self._entries[place] = replace(entry, success=mean, groups=entry.groups + 1)
        self._weigh()

    def state(self) -> dict[str, list[float]]:
        """For the checkpoint: entry -> success and number of groups; JSON-able."""
        return {
            entry.label: [entry.success, float(entry.groups)]
            for entry in self._entries
            if entry.success is not None
        }

    def metrics(self) -> dict[str, float]:
        """Under `curriculum/`, an entry each; empty where there is only one."""
        if len(self) < 2:
            return {}
        total = sum(source.weight for source in self)
        found = {f"curriculum/{s.label}/share": s.weight / total for s in self}
        success = {c.label: c.success for c in self._entries if c.success is not None}
        return found | {f"curriculum/{label}/success": value for label, value in success.items()}

    def _weigh(self) -> None:
        weights = np.asarray(self._strategy.weights(tuple(self._entries)), np.float64)
        fits = weights.shape == (len(self._entries),) and np.isfinite(weights).all()
        if not fits or (weights < 0).any() or not weights.any():
            raise UserError(
                f"algorithm.curriculum.strategy: {self._recipe.algorithm.curriculum.strategy!r} "
                f"gave the weights {weights.tolist()} for {len(self._entries)} entries; they must "
                "be one each, finite, not negative, and not all 0"
            )
        self._sources = [
            replace(source, weight=weight)
            for source, weight in zip(self._plain, weights.tolist(), strict=True)
        ]

    def __len__(self) -> int:
        return len(self._sources)

    def __iter__(self) -> Iterator[ProblemSource]:
        return iter(self._sources)

    @overload
    def __getitem__(self, index: int) -> ProblemSource: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[ProblemSource]: ...

    def __getitem__(self, index: int | slice) -> ProblemSource | Sequence[ProblemSource]:
        return self._sources[index]


def _known(stored: Sequence[float] | None) -> tuple[float | None, int]:
    return (None, 0) if stored is None else (float(stored[0]), int(stored[1]))
