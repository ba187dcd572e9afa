"""What [learner] comes to in DeepSpeed: its configuration, and states that leave the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from learner.settings import LearnerConfig

WEIGHTS = "lp_params"
STATES = ("optim_states", "hp_params", "lp_grads", "contiguous_grad_buffer")
"""By DeepSpeed's names (`OffloadStateTypeEnum`): optimizer's, its float32 weights, gradients."""


def zero_optimization(learner: LearnerConfig) -> dict[str, Any]:
    """DeepSpeed's section `zero_optimization`.

    With offload the optimizer is torch's fused AdamW on the host's cores. `DeepSpeedCPUAdam` gave
    the same numbers (2e-7 after 5 steps) in the same time (25 against 27 ms for 20 M parameters on
    one core), but took two minutes to compile.
    """
    options: dict[str, Any] = {"stage": learner.zero_stage}
    on_host = {"device": "cpu", "pin_memory": learner.gpus > 0}
    if learner.offload != "none":
        options["offload_optimizer"] = on_host
    if learner.offload == "all":
        options["offload_param"] = on_host
    return options


def gradient_dtype(learner: LearnerConfig, dtype: torch.dtype) -> str | None:
    """In what gradients of many micro-batches are added up; None: as the weights are.

    Sums in bfloat16 are off by percents after some hundred micro-batches. DeepSpeed adds up in
    float32 where it shards gradients; stage 1 would take another optimizer for it, and 0 refuses.
    """
    return "fp32" if dtype == torch.bfloat16 and learner.zero_stage >= 2 else None


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
