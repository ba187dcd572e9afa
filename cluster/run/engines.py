"""The engines of a run: samplers on a policy, and one for each frozen model that a command asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cluster.recipe.placement import Command, frozen_models
from cluster.recipe.recipe import Recipe
from cluster.run.nodes import on_nodes
from rollout.pool import SamplerPool
from rollout.sampler import ray_samplers

FrozenPools = Mapping[str, SamplerPool]
"""An engine for each frozen model that a command asks, by checkpoint."""


def sampler_pool(
    recipe: Recipe,
    model: str | None = None,
    name: str = "sampler",
    frozen: bool = False,
    placed: Callable[[int], dict[str, Any]] | None = None,
) -> SamplerPool:
    """The recipe's samplers on the policy or another checkpoint, or the one of a frozen model.

    They are not yet waited for. `placed`: see `ray_samplers`; by default as [placement] says.
    """
    where = on_nodes(recipe.placement.samplers, recipe.placement.spread_samplers)
    policy = recipe.model.model_copy(update={"path": model or recipe.model.path})
    start = ray_samplers(
        policy,
        recipe.sampler,
        placed or (lambda index: where),
        transport=recipe.transfer.transport,
        frozen=frozen,
        seed=recipe.seed,
    )
    count = 1 if frozen else recipe.sampler.count
    return SamplerPool(start, count, recipe.sampler, name, recipe.transfer.deadline_seconds)


@contextmanager
def sampling_from(
    recipe: Recipe, model: str, command: Command
) -> Iterator[tuple[SamplerPool, FrozenPools]]:
    """Samplers on a checkpoint and the frozen models of a command; Ray must be connected."""
    pool, frozen = sampler_pool(recipe, model), frozen_pools(recipe, command)
    try:
        for each in (pool, *frozen.values()):
            each.wait_ready(recipe.sampler.start_timeout_seconds)
        yield pool, frozen
    finally:
        for each in (pool, *frozen.values()):
            each.stop()


def frozen_pools(recipe: Recipe, command: Command) -> FrozenPools:
    """Start them; they are not yet waited for."""
    return {
        model: sampler_pool(recipe, model, f"frozen-{index}", frozen=True)
        for index, model in enumerate(frozen_models(recipe, command))
    }
