"""Sampler and learner rank on one GPU, where weights go from memory to memory."""

from __future__ import annotations

from typing import Any

from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.recipe.recipe import Recipe


class GpuPairs:
    """A whole GPU for each sampler and the learner rank of the same number.

    Ray alone would put two halves of any actors on one GPU. Transport `ipc` needs it so, and the
    recipe check has seen that there are as many samplers as ranks.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Asks Ray for the GPUs; what is placed waits for them."""
        bundle = {"GPU": 1.0, "CPU": recipe.sampler.cpus + recipe.learner.cpus}
        resources = {name: amount for name, amount in bundle.items() if amount}
        ranks, labels = recipe.learner.ranks, recipe.placement.learner
        self._group = placement_group(
            [dict(resources) for _ in range(ranks)],
            bundle_label_selector=[dict(labels) for _ in range(ranks)] if labels else None,
        )

    def options(self, index: int) -> dict[str, Any]:
        """Of the Ray actor that is sampler, or rank, number `index`."""
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        return {"scheduling_strategy": strategy}

    def release(self) -> None:
        """Give the GPUs back; ends what is still there."""
        remove_placement_group(self._group)
