"""A sampler's actor that imports next to nothing, so that a busy machine starts it in seconds."""

from __future__ import annotations

import asyncio
import os

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rollout.record import Group, SampleRequest
from tests.support.pretend import group


def wait_for_nodes(seconds: float = 300) -> None:
    """Until each node starts processes in the job's environment: its agents come up by and by."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    on = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    ray.get([_here.options(scheduling_strategy=one).remote() for one in on], timeout=seconds)


@ray.remote
def _here() -> None: ...


@ray.remote
class LightSampler:
    """Answers every request with a group that is made up of it."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def ready(self, weights: None) -> tuple[int, None]:
        return 100, None

    async def ping(self) -> None:
        pass

    async def shutdown(self) -> None:
        pass

    async def pid(self) -> int:
        return os.getpid()

    async def answer(self, request: SampleRequest) -> Group:
        await asyncio.sleep(0.2)
        return group(request, self.name)
