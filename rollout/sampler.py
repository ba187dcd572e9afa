"""The sampler as Ray sees it: one actor an engine, and the pool the driver talks to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from rollout.engine import Engine, EngineSettings
from rollout.record import Group, SampleRequest
from tasks.load import load_task


@ray.remote
class Sampler:
    """One vLLM engine in its own actor; every method is a coroutine on one event loop."""

    def __init__(self, settings: EngineSettings, name: str) -> None:
        self._engine = Engine.start(settings, name)

    async def ready(self) -> bool:
        return True

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Group]:
        """Groups in the order of their requests; all requests are in flight at once."""
        return await asyncio.gather(
            *(self._engine.sample(r, load_task(r.problem.task)) for r in requests)
        )

    async def init_weight_transfer(self, info: dict[str, Any]) -> None:
        await self._engine.init_weight_transfer(info)

    async def begin_weight_update(self, version: int) -> None:
        await self._engine.begin_weight_update(version)

    async def load_weights(self, update: dict[str, Any]) -> None:
        await self._engine.load_weights(update)

    async def finish_weight_update(self, version: int) -> None:
        await self._engine.finish_weight_update(version)

    async def weight_checksums(self) -> dict[str, str]:
        return await self._engine.weight_checksums()

    async def shutdown(self) -> None:
        self._engine.shutdown()


class RaySamplerClient:
    """A sampler actor as `rollout.transfer` sees it."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name, self.actor = name, actor

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.actor, method).remote(*args)

    def wait(self, future: Any, seconds: float) -> Any:
        try:
            return ray.get(future, timeout=seconds)
        except GetTimeoutError as error:
            raise TimeoutError(str(error)) from error


class SamplerPool:
    """All samplers. Requests are dealt to them by expected tokens, results keep their order."""

    def __init__(
        self,
        settings: EngineSettings,
        count: int,
        cpus: float,
        gpus: float,
        request_timeout_seconds: float,
    ) -> None:
        self._timeout = request_timeout_seconds
        names = [f"sampler-{index}" for index in range(count)]
        self.clients = [
            RaySamplerClient(
                name,
                Sampler.options(num_cpus=cpus, num_gpus=gpus).remote(settings, name),  # type: ignore[attr-defined]
            )
            for name in names
        ]

    def wait_ready(self, seconds: float) -> None:
        """Block until every engine is up; an engine's own start-up error is raised."""
        for client in self.clients:
            try:
                client.wait(client.call("ready"), seconds)
            except TimeoutError as error:
                raise TimeoutError(
                    f"sampler {client.name!r} was not up after {seconds:g} s "
                    "(sampler.start_timeout_seconds); see its log in the Ray session folder"
                ) from error

    def sample(self, requests: Sequence[SampleRequest]) -> list[Group]:
        """One group a request, in order. Raises TimeoutError naming a sampler that hangs."""
        shares: list[list[int]] = [[] for _ in self.clients]
        load = [0] * len(self.clients)
        for index, request in enumerate(requests):
            lightest = load.index(min(load))
            shares[lightest].append(index)
            load[lightest] += request.n * request.sampling.max_tokens
        pending = {
            client.call("sample", [requests[i] for i in share]): (client, share)
            for client, share in zip(self.clients, shares, strict=True)
            if share
        }
        groups: dict[int, Group] = {}
        while pending:
            done, _ = ray.wait(list(pending), timeout=self._timeout)
            if not done:
                names = ", ".join(client.name for client, _ in pending.values())
                raise TimeoutError(
                    f"no answer from {names} within {self._timeout:g} s "
                    "(sampler.request_timeout_seconds)"
                )
            for future in done:
                _, share = pending.pop(future)
                groups.update(zip(share, ray.get(future), strict=True))
        return [groups[index] for index in range(len(requests))]

    def weight_checksums(self) -> list[dict[str, str]]:
        """Per sampler: digest of every parameter as the engine holds it."""
        futures = [client.call("weight_checksums") for client in self.clients]
        return [c.wait(f, self._timeout) for c, f in zip(self.clients, futures, strict=True)]

    def stop(self) -> None:
        """Shut the engines down, then their actors."""
        for client in self.clients:
            # An engine that is already dead is as stopped as one can be.
            with contextlib.suppress(TimeoutError, RayError):
                client.wait(client.call("shutdown"), 10)
            ray.kill(client.actor)
