"""The engines of a run: samplers on a policy, and one for each frozen model that a command asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from cluster.recipe.nodes import actors_of
from cluster.recipe.placement import Command, Role, frozen_models
from cluster.recipe.recipe import Recipe
from cluster.run.places import Places, places_of
from rollout.jobs import PoolClient
from rollout.pool import SamplerPool
from rollout.sampler import ray_samplers

FrozenPools = Mapping[str, SamplerPool]
"""An engine for each frozen model that a command asks, by checkpoint."""


def sampler_pool(
    recipe: Recipe,
    places: Places,
    model: str | None = None,
    frozen: int | None = None,
    waiting: dict[str, PoolClient] | None = None,
) -> SamplerPool:
    """The recipe's samplers on the policy or another checkpoint, or the engine of a frozen model.

    They are not yet waited for. `frozen`: the number of the frozen model; `waiting`: of
    `ray_samplers`.
    """

    def who(index: int) -> tuple[Role, int]:
        return ("sampler", index) if frozen is None else ("frozen model", frozen)

    policy = recipe.model.model_copy(update={"path": model or recipe.model.path})
    start = ray_samplers(
        policy,
        recipe.sampler,
        lambda index: places.options(*who(index)),
        lambda index: places.leave(*who(index)),
        waiting,
        transport=recipe.transfer.transport,
        frozen=frozen is not None,
        seed=recipe.seed,
        sleeps=recipe.placement.by_turns and not frozen,
    )
    name, count = ("sampler", recipe.sampler.count) if frozen is None else (f"frozen-{frozen}", 1)
    return SamplerPool(start, count, recipe.sampler, name, recipe.transfer.deadline_seconds)


@contextmanager
def sampling_from(
    recipe: Recipe, model: str, command: Literal["sample", "eval"]
) -> Iterator[tuple[SamplerPool, FrozenPools, Places]]:
    """Samplers on a checkpoint, the frozen models of a command, and where all its actors are.

    Ray must be connected.
    """
    with places_of(recipe, actors_of(recipe, command)) as places:
        pool, frozen = sampler_pool(recipe, places, model), frozen_pools(recipe, command, places)
        try:
            for each in (pool, *frozen.values()):
                each.wait_ready(recipe.sampler.start_timeout_seconds)
            yield pool, frozen, places
        finally:
            for each in (pool, *frozen.values()):
                each.stop()


def frozen_pools(
    recipe: Recipe,
    command: Command,
    places: Places,
    waiting: dict[str, PoolClient] | None = None,
) -> FrozenPools:
    """Start them; they are not yet waited for. `waiting`: of `ray_samplers`."""
    return {
        model: sampler_pool(recipe, places, model, index, waiting)
        for index, model in enumerate(frozen_models(recipe, command))
    }
