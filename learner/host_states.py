"""A rank's states in main memory, while samplers have its GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from learner.settings import LearnerConfig

WEIGHTS = "lp_params"
STATES = ("optim_states", "hp_params", "lp_grads", "contiguous_grad_buffer")
"""By DeepSpeed's names (`OffloadStateTypeEnum`): optimizer's, its float32 weights, gradients."""


class HostStates:
    """Moves what a DeepSpeed engine holds between its device and main memory."""

    def __init__(self, engine: Any, learner: LearnerConfig, others: Sequence[nn.Module]) -> None:
        """`others`: modules beside the engine's own that live on its device."""
        self._engine, self._others = engine, others
        self._always_there = learner.offload == "all"
        # DeepSpeed moves what it steps on; under ZeRO-3 what is frozen lies in the same buffer.
        self._frozen = [
            p for p in engine.module.parameters() if not p.requires_grad and learner.zero_stage < 3
        ]

    def offload(self, weights: bool) -> None:
        """Leave the device; without `weights` these stay, to be sent from there."""
        if weights:
            self._place("cpu")
        if not self._always_there:
            include = [*STATES, WEIGHTS] if weights else STATES
            self._engine.offload_states(include=include)

    def reload(self) -> None:
        """Come back, ready for an update; nothing where nothing has left."""
        self._place(self._engine.device)
        if not self._always_there:
            self._engine.reload_states()

    def _place(self, device: Any) -> None:
        for parameter in self._frozen:
            parameter.data = parameter.data.to(device)
        for module in self._others:
            module.to(device)
