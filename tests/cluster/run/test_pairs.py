"""A sampler and the learner rank of its number share a GPU, and no other pair does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray

from cluster.recipe.recipe import load_recipe
from cluster.run.pairs import GpuPairs
from tests.support.ray_heads import local_ray
from tests.support.recipes import ROOT

RECIPE = [
    'transfer.transport="ipc"', "sampler.count=3", "learner.ranks=3", "sampler.gpus=0.5",
    "sampler.gpu_memory_utilization=0.5", "learner.gpus=0.5",
]  # fmt: skip


@pytest.fixture
def three_gpus() -> Iterator[None]:
    """Ray counts GPUs that it is told of, and shows each actor its own."""
    with local_ray(cpus=6, gpus=3):
        yield


@ray.remote(num_cpus=1, num_gpus=0.5)
class Half:
    def gpus(self) -> list[Any]:
        return ray.get_gpu_ids()


@pytest.mark.usefixtures("three_gpus")
def test_each_pair_has_a_gpu_of_its_own() -> None:
    pairs = GpuPairs(load_recipe(ROOT / "recipes/tiny/sudoku.toml", RECIPE))
    # In an order in which Ray alone would fill GPUs with samplers first.
    actors = [Half.options(**pairs.options(place)).remote() for place in (0, 1, 2, 2, 0, 1)]  # type: ignore[attr-defined]
    seen = ray.get([actor.gpus.remote() for actor in actors], timeout=60)
    samplers, ranks = seen[:3], [seen[4], seen[5], seen[3]]
    assert samplers == ranks
    assert len({tuple(gpus) for gpus in samplers}) == 3
    pairs.release()
