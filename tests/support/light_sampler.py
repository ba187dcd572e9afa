"""A sampler's actor that imports next to nothing, so that a busy machine starts it in seconds."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import ray

from rollout.record import Group, SampleRequest, ScoreRequest
from tests.support.pretend import group
from tests.support.waiting import until


@ray.remote(num_cpus=0)
class LightSampler:
    """Answers what it is to sample with a group that is made up of it.

    What it is to score it meets as the request's id says before the dash: it answers with the
    number after it, raises, hangs or dies. A path after the dash is a file that is made, and what
    was said is done only without it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.begun: list[str] = []
        self.cancelled: list[str] = []

    async def ready(self, weights: None) -> tuple[int, None]:
        return 100, None

    async def ping(self) -> None:
        pass

    async def shutdown(self) -> None:
        pass

    async def pid(self) -> int:
        return os.getpid()

    async def log(self) -> tuple[list[str], list[str]]:
        """The ids of what it was to score, and of those of it that were cancelled."""
        return self.begun, self.cancelled

    async def answer(self, request: SampleRequest | ScoreRequest) -> Group | np.ndarray:
        if isinstance(request, SampleRequest):
            await asyncio.sleep(0.2)
            return group(request, self.name)
        self.begun.append(request.request_id)
        what, _, number = request.request_id.partition("-")
        if what == "block":
            return _blocked(Path(number))
        if number.startswith("/"):
            done = Path(number) / "done"
            what = "ok" if done.exists() else what
            done.touch()
            number = "0"
        try:
            await self._meet(what)
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise
        return np.array([np.nan if what == "garbage" else -float(number)], np.float32)

    async def _meet(self, what: str) -> None:
        if what in ("refuse", "dead"):
            from rollout.engine import EngineDied, SamplerError  # seconds of imports

            if what == "refuse":
                raise SamplerError("problem p: too long")
            raise EngineDied(f"{self.name}: the engine's process died")
        if what == "crash":
            raise KeyError("x")
        if what == "exit":
            os._exit(3)
        if what in ("slow", "hang"):
            await asyncio.sleep(0.5 if what == "slow" else 3600)


def _blocked(folder: Path) -> np.ndarray:
    """Keep the whole process from listening until the file `end` is there."""
    (folder / "begun").touch()
    until((folder / "end").exists, 120)
    return np.array([0.0], np.float32)
