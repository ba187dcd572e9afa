"""The engine's end of a weight transfer: from what a sampler was sent into the live model.

The engines here plug into vLLM's native weight-transfer API and are registered in every engine
process by `WorkerExtension` (named in the engine's `worker_extension_cls`). On the host a bucket
comes from the engine's sampler as a file in memory (`rollout.transfer.in_memory`).
"""

from __future__ import annotations

import logging
import math
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.ipc_engine import (
    IPCWeightTransferEngine,
    IPCWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from rollout.adapters import BaseWeights, is_adapter, with_adapters
from rollout.transports_gpu import with_classes

RELOAD_LOGGER = "vllm.model_executor.model_loader.reload.layerwise"


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """`host` needs no handshake."""


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    """One bucket: a file, and [name, dtype, shape, first byte] of each tensor in it."""

    path: str
    tensors: list[list[Any]]


class HostWeightTransferEngine(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """Loads buckets into a live model, on any device.

    Groups of adapters become groups of whole weights first (`rollout/adapters.py`). Layers that no
    group was sent for stay as they are. The layerwise reload undoes and redoes what the backend
    did to the loaded weights (the CPU backend repacks linear layers), so checkpoint names and
    shapes are what travels.
    """

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        pass

    _base: BaseWeights | None = None

    def start_weight_update(self) -> None:
        self._adapted: set[str] = set()
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        with _quiet(RELOAD_LOGGER):  # it warns of every layer that was not sent
            finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            # A head tied to the embedding is loaded through the embedding, so the reload leaves
            # the CPU backend's packed copy of the old head in place, and checksums do not see it.
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)

    def update_weights(self, update_info: dict[str, object]) -> None:
        # The base class synchronises an accelerator, which a CPU-only host has not.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: HostUpdateInfo) -> None:
        tensors = mapped(update_info)
        model: Any = self.model  # a module, which says of no method of its own
        if any(map(is_adapter, tensors)):
            self._base = self._base or BaseWeights(self.model_config.model)
            model.load_weights(with_adapters(self._base, tensors, self._adapted))
        else:
            model.load_weights(iter(tensors.items()))

    def shutdown(self) -> None:
        pass


class PlainIpcEngine(IPCWeightTransferEngine):
    """vLLM's `ipc`, with handles that its own encoder lets through."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> IPCWeightTransferUpdateInfo:
        handles = with_classes(update_dict["ipc_handles"])
        return super().parse_update_info(update_dict | {"ipc_handles": handles})


@dataclass(kw_only=True)
class WatchedInitInfo(NCCLWeightTransferInitInfo):
    """`deadline_seconds`: how long an engine may wait for what the learner broadcasts."""

    deadline_seconds: float


class WatchedNcclEngine(NCCLWeightTransferEngine):
    """vLLM's `nccl`, which does not wait for ever: an NCCL call has no deadline of its own."""

    init_info_cls: Any = WatchedInitInfo  # of a narrower type than vLLM declares

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        assert isinstance(init_info, WatchedInitInfo)
        self.shutdown()  # the group of the transfers before, of which a sampler was lost
        self._seconds = init_info.deadline_seconds
        super().init_transfer_engine(init_info)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        late = threading.Event()

        def abort() -> None:
            late.set()
            self.shutdown()

        watchdog = threading.Timer(self._seconds, abort)
        watchdog.start()
        try:
            super().receive_weights(update_info)
        finally:
            watchdog.cancel()
            if late.is_set():
                raise TimeoutError(
                    f"the learner's broadcast was not over after {self._seconds:g} s "
                    "(transfer.deadline_seconds)"
                )


def mapped(bucket: HostUpdateInfo) -> dict[str, torch.Tensor]:
    """A bucket's tensors by name, on pages that stay as long as one of them does."""
    with open(bucket.path, "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {
        name: torch.frombuffer(
            pages, dtype=getattr(torch, dtype), count=math.prod(shape), offset=start
        ).reshape(shape)
        for name, dtype, shape, start in bucket.tensors
    }


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Within, a logger says nothing below errors."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class WorkerExtension:
    """Imported by each engine process; importing this module registers the transports."""


WeightTransferEngineFactory.register_engine("host", HostWeightTransferEngine)
WeightTransferEngineFactory.register_engine("plain_ipc", PlainIpcEngine)
WeightTransferEngineFactory.register_engine("watched_nccl", WatchedNcclEngine)
