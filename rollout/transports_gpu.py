"""Transports `nccl` and `ipc`: the learner sends by vLLM's own trainer engines.

Written against vLLM 0.32's documented API and type checked; not run, since no GPU was at hand.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Sequence
from typing import Any, Protocol

from rollout.settings import TransferConfig
from rollout.transfer import TransferReport, WeightTransferError


class SamplerClient(Protocol):
    """A sampler as a learner rank sees it."""

    name: str

    def call(self, method: str, *args: Any) -> Any:
        """Start a method on the sampler; returns a future."""

    def wait(self, future: Any, seconds: float) -> Any:
        """Its result; raises TimeoutError after `seconds`, or the sampler's own error."""


class GpuSender:
    """Sends through a vLLM `TrainerWeightTransferEngine`, made on the first transfer.

    Lives in every learner rank: all ranks gather, rank 0 sends.
    """

    def __init__(
        self,
        transfer: TransferConfig,
        samplers: Sequence[SamplerClient],
        ranks_each: int,
    ) -> None:
        """`ranks_each`: tensor-parallel ranks of one sampler."""
        self._transport = transfer.transport
        self._engine_ranks = ranks_each * len(samplers)
        self._client = _Client(list(samplers), ranks_each, transfer.deadline_seconds)
        self._engine: Any = None

    def send(self, source: Any, version: int, rank: int) -> TransferReport | None:
        """Send what a learner offers (`learner.weights.OfferedWeights`, which is vLLM's source)."""
        start = time.perf_counter()
        self._client.open(version)
        if self._engine is None:
            from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

            self._engine = WeightTransferTrainerFactory.trainer_init(
                self._init_info(rank), client=self._client, source=source
            )
        self._engine.send_weights()
        if rank:
            return None
        sizes = [m.dtype.itemsize * math.prod(m.shape) for m in source.metadata()]
        return TransferReport(time.perf_counter() - start, sum(sizes), 1, sum(sizes))

    def _init_info(self, rank: int) -> Any:
        if self._transport == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            return IPCTrainerInitInfo(rank=rank, packed=True)
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return NCCLTrainerInitInfo(
            master_address=socket.gethostbyname(socket.gethostname()),
            master_port=port,
            world_size=1 + self._engine_ranks,
            rank=rank,
        )


class _Client:
    """vLLM's `VLLMWeightSyncClient` over our samplers, under one deadline a transfer."""

    def __init__(
        self, samplers: list[SamplerClient], ranks_each: int, deadline_seconds: float
    ) -> None:
        self._samplers, self._ranks_each = samplers, ranks_each
        self._deadline = deadline_seconds
        self._version, self._until = 0, 0.0

    def open(self, version: int) -> None:
        self._version, self._until = version, time.perf_counter() + self._deadline

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        futures = []
        for place, sampler in enumerate(self._samplers):
            info = dict(init_info)
            if "rank_offset" in info:
                info["rank_offset"] += place * self._ranks_each
            # Engines rendezvous together: all are called before any is waited for.
            futures.append((sampler, sampler.call("init_weight_transfer", info)))
        self._wait(futures, "init_weight_transfer")

    def start_weight_update(self) -> None:
        self._all("begin_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._all("load_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish_weight_update", self._version)

    def _all(self, method: str, *args: Any) -> None:
        self._wait([(s, s.call(method, *args)) for s in self._samplers], method)

    def _wait(self, futures: Sequence[tuple[SamplerClient, Any]], method: str) -> None:
        """Raises WeightTransferError naming the sampler that failed or let the deadline pass."""
        for sampler, future in futures:
            try:
                sampler.wait(future, max(0.0, self._until - time.perf_counter()))
            except TimeoutError as error:
                raise WeightTransferError(
                    f"weight transfer: sampler {sampler.name!r} did not finish {method} within "
                    f"the deadline of {self._deadline:g} s (transfer.deadline_seconds)",
                    sampler.name,
                ) from error
            except Exception as error:
                # Ray wraps what the sampler raised; its own words belong on the first line.
                own = getattr(error, "cause", None) or error
                raise WeightTransferError(
                    f"weight transfer: sampler {sampler.name!r} failed in {method}: "
                    f"{type(own).__name__}: {own}",
                    sampler.name,
                ) from error
