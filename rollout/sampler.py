"""The sampler as Ray sees it: one actor an engine, and the pool the driver talks to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from rollout.engine import Engine, EngineDied, EngineSettings
from rollout.record import Group, ReplyError, SampleRequest, ScoreRequest
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

    async def answer(self, request: SampleRequest | ScoreRequest) -> Group | np.ndarray:
        """A group for a SampleRequest, float32 [T] log-probs for a ScoreRequest."""
        if isinstance(request, ScoreRequest):
            return await self._engine.score(request)
        return await self._engine.sample(request, load_task(request.problem.task))

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
    """All samplers of one model. Requests are dealt out by tokens, results keep their order."""

    def __init__(
        self,
        settings: EngineSettings,
        count: int,
        cpus: float,
        gpus: float,
        request_timeout_seconds: float,
        name: str = "sampler",
    ) -> None:
        self._timeout = request_timeout_seconds
        names = [f"{name}-{index}" for index in range(count)]
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
        for index, place in enumerate(deal(requests, len(self.clients))):
            shares[place].append(index)
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

    def answer(
        self, requests: Sequence[SampleRequest | ScoreRequest], seconds: float
    ) -> list[Group | np.ndarray | ReplyError]:
        """One reply a request, in order; see `answer_all`. Neither raises nor hangs."""
        return answer_all(self.clients, requests, seconds)

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


def deal(requests: Sequence[SampleRequest | ScoreRequest], samplers: int) -> list[int]:
    """Which sampler answers each request: the one with the fewest tokens to do so far."""
    load = [0] * samplers
    places = []
    for request in requests:
        places.append(load.index(min(load)))
        if isinstance(request, SampleRequest):
            load[places[-1]] += request.n * request.sampling.max_tokens
        else:
            load[places[-1]] += 1 + len(request.response_ids)
    return places


def answer_all(
    samplers: Sequence[RaySamplerClient],
    requests: Sequence[SampleRequest | ScoreRequest],
    seconds: float,
) -> list[Group | np.ndarray | ReplyError]:
    """Ask the samplers and wait at most `seconds`: one reply or `ReplyError` a request, in order.

    Each request is a call of its own, so one that fails, hangs or takes its sampler down leaves
    the replies that others already have. What is late is cancelled, and the engine drops it, as
    soon as its sampler listens.
    """
    until = time.monotonic() + seconds
    places = deal(requests, len(samplers))
    calls = [
        samplers[place].call("answer", request)
        for place, request in zip(places, requests, strict=True)
    ]
    left = max(0.0, until - time.monotonic())
    done = set(ray.wait(calls, num_returns=len(calls), timeout=left)[0]) if calls else set()
    replies: list[Group | np.ndarray | ReplyError] = []
    for call, place, request in zip(calls, places, requests, strict=True):
        if call in done:
            replies.append(_reply(call, samplers[place].name, _id(request)))
            continue
        ray.cancel(call)
        message = f"{samplers[place].name}: no answer within {seconds:g} s"
        replies.append(ReplyError(_id(request), "deadline", message))
    return replies


def _reply(call: Any, sampler: str, request_id: str) -> Group | np.ndarray | ReplyError:
    """What a finished call returned, or its error as a `ReplyError`."""
    try:
        reply: Group | np.ndarray = ray.get(call)
    except RayTaskError as error:
        own = error.cause
        if isinstance(own, EngineDied):
            return ReplyError(request_id, "sampler_died", str(own))
        return ReplyError(request_id, "refused", f"{sampler}: {type(own).__name__}: {own}")
    except RayError as error:
        first = str(error).splitlines()[0]
        return ReplyError(request_id, "sampler_died", f"{sampler}: {type(error).__name__}: {first}")
    return reply


def _id(request: SampleRequest | ScoreRequest) -> str:
    return request.group_id if isinstance(request, SampleRequest) else request.request_id
