"""The sampler as Ray sees it: one actor an engine, and the actor as the pool sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from rollout.engine import Engine, EngineDied
from rollout.environments import EnvironmentPool
from rollout.jobs import Cause, Died, PoolClient, Refused
from rollout.record import Group, SampleRequest, ScoreRequest, Weights
from rollout.settings import ModelConfig, SamplerConfig
from rollout.starting import own_words
from rollout.transfer import fetched
from tasks.liveness import listen
from tasks.load import load_task


@ray.remote
class Sampler:
    """One vLLM engine in its own actor; every method is a coroutine on one event loop."""

    def __init__(
        self, model: ModelConfig, sampler: SamplerConfig, name: str, **options: Any
    ) -> None:
        """`options`: of `Engine.start`."""
        listen(name)
        self._engine = Engine.start(model, sampler, name, **options)
        self._name = name
        self._held: int | None = None
        self._environments: EnvironmentPool | None = None

    def __repr__(self) -> str:
        return self._name  # Ray's dashboard and logs show it

    async def begin(self, seed: int) -> None:
        """Be as new for another run; its weights are still to come."""
        self._engine.begin(seed)
        self._held = None

    async def ready(self, weights: Weights | None) -> tuple[int, int | None]:
        """How many token ids the model has, and the version that it holds: `weights` by then."""
        if weights is None:
            return self._engine.vocabulary, None
        return self._engine.vocabulary, await self.renew(weights)

    async def renew(self, weights: Weights) -> int:
        """Fetch a version of the weights, load it, and say which; requests go on under it."""
        await self._engine.renew(weights.version, fetched(weights, self._name))
        self._held = weights.version
        return weights.version

    async def sleep(self) -> None:
        """Give the GPU's memory to whoever shares it; nothing is to be answered until `wake`."""
        await self._engine.sleep()

    async def wake(self, weights: Weights | None) -> int | None:
        """Take it back, with a version of the weights, or those that it slept with.

        Returns the version that it fetched, if it did.
        """
        if weights is not None and weights.version != self._held:
            await self.renew(weights)
        await self._engine.wake()
        return weights.version if weights else None

    async def ping(self) -> None:
        """Comes back between two steps of the engine."""
        await self._engine.ping()

    async def answer(self, request: SampleRequest | ScoreRequest) -> Group | np.ndarray:
        """A group for a SampleRequest, float32 [T] log-probs for a ScoreRequest."""
        if isinstance(request, ScoreRequest):
            return await self._engine.score(request)
        task = load_task(request.problem.task)
        if request.environment is None:
            return await self._engine.sample(request, task)
        if self._environments is None or self._environments.config != request.environment:
            self._close_environments()
            self._environments = EnvironmentPool(request.environment)
        return await self._engine.converse(request, task, self._environments)

    async def init_weight_transfer(self, info: dict[str, Any]) -> None:
        await self._engine.init_weight_transfer(info)

    async def begin_weight_update(self) -> None:
        await self._engine.begin_weight_update()

    async def load_weights(self, update: dict[str, Any]) -> None:
        await self._engine.load_weights(update)

    async def finish_weight_update(self, version: int) -> None:
        await self._engine.finish_weight_update(version)

    async def weight_checksums(self) -> dict[str, str]:
        return await self._engine.weight_checksums()

    async def shutdown(self) -> None:
        self._close_environments()
        self._engine.shutdown()

    def _close_environments(self) -> None:
        if self._environments is not None:
            self._environments.close()


class RaySamplerClient:
    """A sampler actor as the pool, and the GPU transports, see it."""

    def __init__(self, name: str, actor: Any, ended: Callable[[], None] = lambda: None) -> None:
        """`ended`: called when the actor is no more."""
        self.name, self.actor, self._ended = name, actor, ended

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.actor, method).remote(*args)

    def wait(self, future: Any, seconds: float) -> Any:
        try:
            return ray.get(future, timeout=seconds)
        except GetTimeoutError as error:
            raise TimeoutError(str(error)) from error

    def watch(self, future: Any, then: Callable[[Any], None]) -> None:
        """Call `then`, on a thread of Ray's, with the result, or with `Died` or `Refused`."""
        future.future().add_done_callback(lambda reply: then(self._outcome(reply)))

    def cancel(self, future: Any) -> None:
        """The engine drops the request as soon as its sampler listens."""
        ray.cancel(future)

    def kill(self) -> None:
        """SIGKILL in the end; the engine goes with it."""
        ray.kill(self.actor)
        self._ended()

    def _outcome(self, reply: Any) -> Any:
        error = reply.exception()
        if error is None:
            return reply.result()
        if isinstance(error, RayTaskError):
            original = error.cause
            if isinstance(original, EngineDied):
                return Died("engine", f"EngineDied: {original}")
            return Refused(error, f"{self.name}: {type(original).__name__}: {original}")
        # What is no error of Ray's is a reply that could not be unpickled.
        cause: Cause = "actor" if isinstance(error, RayError) else "garbage"
        return Died(cause, f"{self.name}: {own_words(f'{type(error).__name__}: {error}')}")


def ray_samplers(
    model: ModelConfig,
    sampler: SamplerConfig,
    placed: Callable[[int], dict[str, Any]] = lambda index: {},
    left: Callable[[int], None] = lambda index: None,
    waiting: dict[str, PoolClient] | None = None,
    **options: Any,
) -> Callable[[str], PoolClient]:
    """What starts a `Sampler` actor under a name ("sampler-3"), with cores and GPUs of its own.

    `placed`: where its number is to run, as options of the actor; `left`: is told when that ended.
    `waiting`: samplers of an earlier pool, started alike but for the seed, by name; one that is
    there is taken out, and begins again. `options`: of `Engine.start`.
    """
    resources = {"num_cpus": sampler.cpus, "num_gpus": sampler.gpus}

    def start(name: str) -> PoolClient:
        if waiting and (kept := waiting.pop(name, None)) is not None:
            kept.call("begin", options["seed"])
            return kept
        index = int(name.rpartition("-")[-1])
        actor = Sampler.options(**resources, **placed(index)).remote(  # type: ignore[attr-defined]
            model, sampler, name, **options
        )
        return RaySamplerClient(name, actor, lambda: left(index))

    return start
