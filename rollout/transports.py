"""Weight-transfer wire, both ends: how a learner's weights reach the live engines.

Worker end: `HostWeightTransferEngine` plugs into vLLM's native weight-transfer API and is
registered in every engine process by `WorkerExtension` (named in the engine's
`worker_extension_cls`). Learner end: `rollout/transfer.py`. The wire of transport `host` is a
safetensors file in shared memory per layer group; its format lives in these two files only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from rollout.adapters import BaseWeights, is_adapter, with_adapters

RELOAD_LOGGER = "vllm.model_executor.model_loader.reload.layerwise"


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """`host` needs no handshake: both ends share a file system in memory."""


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    """One layer group: a safetensors file and the names it must hold, in order."""

    path: str
    names: list[str]


class HostWeightTransferEngine(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """Loads layer groups from shared memory into a live model, on any device.

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
        tensors = load_file(update_info.path, device="cpu")
        missing = [name for name in update_info.names if name not in tensors]
        if missing:
            raise ValueError(f"weight bucket {update_info.path} lacks {missing[0]!r}")
        if any(map(is_adapter, tensors)):
            self._base = self._base or BaseWeights(self.model_config.model)
            self.model.load_weights(with_adapters(self._base, tensors, self._adapted))
        else:
            self.model.load_weights((name, tensors[name]) for name in update_info.names)

    def shutdown(self) -> None:
        pass


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
    """Imported by each engine process; importing this module registers the `host` transport."""


WeightTransferEngineFactory.register_engine("host", HostWeightTransferEngine)
