"""Dynamic sampling: more groups for a step instead of those that teach nothing.

A group whose rollouts all earn the same has no gradient. DAPO (arXiv 2503.14476, eq. 11) samples
until the batch is full of groups that have one; here up to a budget of rounds and of groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cluster.recipe.algorithm import DynamicSamplingConfig
from cluster.recipe.problems import ProblemSource, step_problems
from cluster.recipe.recipe import Recipe
from cluster.run.stream import free_requests
from rewards.scored import ScoredGroup
from rollout.record import SampleRequest

if TYPE_CHECKING:  # it starts Ray and all engines, which a test of this file does not need
    from cluster.run.runtime import Run

STREAM = 0x5EF1
"""Tells the stream of extra problems from that of the steps' own."""


def refill(
    scored: Sequence[ScoredGroup],
    rule: DynamicSamplingConfig,
    score_extra: Callable[[range], Sequence[ScoredGroup]],
) -> tuple[list[ScoredGroup], dict[str, float]]:
    """Ask for as many groups as lack a gradient, until none does or the budget is spent.

    `score_extra` samples and scores the extra groups of the given numbers; each number, from 0, is
    asked for once. Returns a step's groups, its own first, none thrown away, and metrics: rounds in
    which more was asked for, the groups that came, and how many are still without a gradient.
    """
    groups, rounds, extra = list(scored), 0, 0
    while True:
        missing = len(scored) - sum(group.has_gradient for group in groups)
        count = min(missing, rule.max_groups - extra)
        if count <= 0 or rounds == rule.max_rounds:
            counted = {"rounds": rounds, "extra_groups": extra, "missing": max(0, missing)}
            return groups, {f"refill/{name}": float(number) for name, number in counted.items()}
        groups += score_extra(range(extra, extra + count))
        rounds, extra = rounds + 1, extra + count


def refill_step(
    run: Run, step: int, scored: Sequence[ScoredGroup], share: float
) -> tuple[list[ScoredGroup], dict[str, float]]:
    """The groups of step `step` (from 1) with extra ones, as the recipe says, and its metrics.

    `share` of the run is over: schedules of reward weights go by it. Without
    `[algorithm.dynamic_sampling]` nothing is asked.
    """
    rule = run.recipe.algorithm.dynamic_sampling
    if rule is None:
        return list(scored), {}
    counts: dict[str, float] = {}

    def score_extra(numbers: range) -> Sequence[ScoredGroup]:
        requests = extra_requests(run.recipe, run.sources, step, numbers)
        extra, counted = run.scoring.score(run.samplers.sample(requests), share)
        counts.update(counted)
        return extra

    refilled, metrics = refill(scored, rule, score_extra)
    return refilled, counts | metrics


def extra_requests(
    recipe: Recipe, sources: Sequence[ProblemSource], step: int, numbers: range
) -> list[SampleRequest]:
    """Requests for the extra groups of a step by their numbers, ids unique within the run.

    Their problems come from a stream of their own, so that runs of one seed keep the same problems
    in every step, however many groups each had to replace; and step and number alone decide them,
    so that a resumed run draws them again. Stored problems may come twice in an epoch so.
    """
    algorithm = recipe.algorithm
    most = algorithm.dynamic_sampling.max_groups if algorithm.dynamic_sampling else 0
    seed = int(np.random.SeedSequence([recipe.seed, STREAM]).generate_state(1)[0])
    problems = step_problems(sources, seed, step - 1, most, numbers)
    return free_requests(recipe, step, problems, algorithm.problems_per_step + numbers.start)
