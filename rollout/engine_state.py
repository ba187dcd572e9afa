"""What a live engine holds: a version of the weights, and the memory that it has, or gave away.

Part of `rollout.engine.Engine`, which says what is relied on of vLLM.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable
from typing import TYPE_CHECKING, Any, TypeVar

from rollout.engine_thread import EngineFailed, EngineThread
from rollout.prompts import SamplerError

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

T = TypeVar("T")
SLEEPING = ("weights", "kv_cache")
"""What a sleeping engine has given away, by vLLM's tags, in the order in which it comes back."""


class EngineDied(SamplerError):
    """The engine failed; no later request will be answered."""


class EngineState:
    """An engine's weights and sleep; each change is made between two of its steps."""

    def __init__(self, llm: EngineThread, name: str, frozen: bool) -> None:
        self._llm, self._name, self._frozen = llm, name, frozen
        self._version = 0
        self._updating = False
        self._asleep: set[str] = set()

    async def ping(self) -> None:
        """Return between two steps of the engine; raises EngineDied where it takes none."""
        await self._answered(self._llm.do(lambda llm: None))

    async def init_weight_transfer(self, info: dict[str, Any]) -> None:
        """Meet the learner on the transport's own terms (NCCL's rendezvous); `host` needs none."""
        await self._workers("init_weight_transfer_engine", init_info=info)

    async def begin_weight_update(self) -> None:
        """Freeze generation and open a weight update; running requests keep their place.

        One that was left open, since another sampler failed its part, is closed first: some
        weights are newer than others until the one that begins here is finished.

        Raises SamplerError where the model is frozen; this and all below raise EngineDied when
        the engine is gone or goes.
        """
        if self._frozen:
            raise SamplerError(f"{self._name}: a frozen model takes no weight updates")
        await self._answered(self._llm.pause())
        await self._wake("weights")
        if self._updating:
            await self._workers("finish_weight_update")
        self._updating = True
        await self._workers("start_weight_update")

    async def load_weights(self, update: dict[str, Any]) -> None:
        """Load one bucket of weights (the transport's own update info)."""
        await self._workers("update_weights", update_info=update)

    async def finish_weight_update(self, version: int) -> None:
        """Commit the update as `version`, drop every cache made by older weights, go on."""

        def commit(llm: LLMEngine) -> None:
            llm.set_weight_version(str(version))
            # What a trained vision tower made lives in two places; a stale one is silent. The
            # cache of processed images holds pixels, which no weight changes.
            llm.reset_prefix_cache(reset_running_requests=True)
            llm.reset_encoder_cache()

        await self._workers("finish_weight_update")
        self._updating = False
        await self._answered(self._llm.do(commit))
        self._version = version
        if not self._asleep:
            await self._answered(self._llm.resume())

    async def sleep(self) -> None:
        """Leave the GPU's memory to others: weights wait in main memory, the KV cache is dropped.

        Requests wait until `wake`. On a CPU vLLM pauses and frees nothing. Raises as
        `finish_weight_update`.
        """
        await self._answered(self._llm.pause())
        self._asleep = set(SLEEPING)
        # Level 1: a later version may leave out what is frozen, and a step may bring none.
        await self._answered(self._llm.do(lambda llm: llm.sleep(level=1, mode="keep")))

    async def wake(self) -> None:
        """Take the memory back, the weights' first, and answer requests; nothing where it is awake.

        To wake with another version: `begin_weight_update`, which takes that of the weights,
        `load_weights`, `finish_weight_update`, then this.
        """
        if self._asleep:
            for what in SLEEPING:
                await self._wake(what)
            await self._answered(self._llm.resume())

    async def _wake(self, what: str) -> None:
        if what in self._asleep:
            await self._answered(self._llm.do(lambda llm: llm.wake_up([what])))
            self._asleep.remove(what)

    async def renew(self, version: int, buckets: AsyncIterator[tuple[int, dict[str, Any]]]) -> None:
        """Load a version of the weights (`rollout.transfer.fetched`); generation is paused.

        The next bucket is fetched while one is read. Raises what fetching raises; the update is
        left open then.
        """
        await self.begin_weight_update()
        reading: asyncio.Future[None] | None = None
        async for descriptor, update in buckets:
            if reading is not None:
                await reading
            reading = asyncio.ensure_future(self._load_bucket(descriptor, update))
        if reading is not None:
            await reading
        await self.finish_weight_update(version)

    async def _load_bucket(self, descriptor: int, update: dict[str, Any]) -> None:
        try:
            await self.load_weights(update)
        finally:
            os.close(descriptor)

    async def weight_checksums(self) -> dict[str, str]:
        """Digest of every parameter as the engine holds it, keyed by rank and name."""
        per_rank = await self._workers("compute_weight_checksums")
        return {
            f"{rank}/{name}": digest
            for rank, digests in enumerate(per_rank)
            for name, digest in digests.items()
        }

    async def _workers(self, method: str, **arguments: Any) -> list[Any]:
        """What the model's ranks return, called between two steps."""
        work = self._llm.do(lambda llm: llm.collective_rpc(method, kwargs=arguments))
        return await self._answered(work)

    async def _answered(self, work: Awaitable[T]) -> T:
        """What the engine answers; raises EngineDied where it has failed or fails."""
        try:
            return await work
        except EngineFailed as error:
            raise EngineDied(f"{self._name}: the engine failed: {error}") from error
