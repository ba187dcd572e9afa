"""What a run practises next: a strategy weighs the `[[tasks]]` entries by past success on each.

An entry is one task at one difficulty (its knobs, or its data set). A recipe that lists a task
at several difficulties leaves to the strategy how often each comes; which problems of an entry
come stays with seed and step. Strategies are pure; the successes are in the checkpoint, so a
resumed run draws the same problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cluster.recipe.problems import ProblemSource, step_sources
from cluster.recipe.recipe import Recipe, UserError
from cluster.recipe.strategies import Entry, make_strategy
from rewards.scored import ScoredGroup


class Curriculum:
    """Weighs a run's problem sources anew after every step."""

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
        known = state or {}
        self._entries = [Entry(s.label, s.weight, *_known(known.get(s.label))) for s in self._plain]
        self._weigh()

    def sources(self) -> Sequence[ProblemSource]:
        """The sources as the next step draws from them."""
        return self._sources

    def observe(self, step: int, scored: Sequence[ScoredGroup]) -> dict[str, float]:
        """Learn from the own groups of step `step` (from 1), the first of `scored`, in order.

        Groups on which the task's own code failed are passed over. Returns `metrics` as the step
        was drawn.
        """
        metrics = self.metrics()
        count = self._recipe.algorithm.problems_per_step
        entry_indices = step_sources(self._sources, self._recipe.seed, step - 1, count)
        for index, group in zip(entry_indices, scored, strict=False):
            if group.diagnosis is None:
                continue
            entry, now = self._entries[index], float(group.diagnosis.a.mean())
            old = now if entry.success is None else entry.success
            mean = self._memory * old + (1 - self._memory) * now
            self._entries[index] = replace(entry, success=mean, groups=entry.groups + 1)
        self._weigh()
        return metrics

    def state(self) -> dict[str, list[float]]:
        """For the checkpoint: entry -> success and number of groups; JSON-able."""
        return {
            entry.label: [entry.success, float(entry.groups)]
            for entry in self._entries
            if entry.success is not None
        }

    def metrics(self) -> dict[str, float]:
        """Under `curriculum/`, an entry each; empty where there is only one."""
        if len(self._sources) < 2:
            return {}
        total = sum(source.weight for source in self._sources)
        shares = {f"curriculum/{s.label}/share": s.weight / total for s in self._sources}
        success = {c.label: c.success for c in self._entries if c.success is not None}
        return shares | {f"curriculum/{label}/success": value for label, value in success.items()}

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


def _known(stored: Sequence[float] | None) -> tuple[float | None, int]:
    return (None, 0) if stored is None else (float(stored[0]), int(stored[1]))
