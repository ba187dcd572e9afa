"""What a learner rank is asked to do, whatever engine does it.

`LearnerRank` (`learner/actor.py`) and with it the driver know a `Trainer` and nothing of
DeepSpeed. Another engine (FSDP2, say) is one more class with these methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from learner.balance import NormOf, SegmentGradients
from learner.batch import Layout, TrainBatch
from learner.lora import LoraSettings
from learner.losses import Loss
from learner.policy import LOGITS_MIB

Offload = Literal["none", "optimizer", "all"]


@dataclass(frozen=True)
class LearnerSettings:
    """What a learner rank is started with.

    micro_batch_tokens: tokens of one forward pass, padding included. layout: see
    `learner.batch.Layout`. logits_mib: see `Policy`. threads: intra-op threads, 0 keeps torch's
    default. temperature: that of the sampler, so log-probs are of the same distribution.
    resume: `model` is a training checkpoint, whose optimizer and random streams to go on with.
    freeze, rates: parts or patterns of parameters (`learner.parts`) that are not trained, and
    what the learning rate is multiplied by for others. activation_checkpointing: keep no
    activations of a layer, compute them again for its gradient. offload: what lives in host
    memory instead of the GPU's, the optimizer's state (ZeRO 1 and up) or the weights too (ZeRO 3).
    background_saving: training goes on while a training checkpoint is written. lora: train
    adapters instead of the weights; on resuming, `base` is the model that they are of.
    bucket_mib: layer groups of weights that are sent together (`learner.weights.in_buckets`).
    """

    model: str
    dtype: str = "float32"
    attention: str = "sdpa"
    head_float32: bool = True
    logits_mib: float = LOGITS_MIB
    temperature: float = 1.0
    zero_stage: int = 2
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    micro_batch_tokens: int = 8192
    layout: Layout = "padded"
    threads: int = 0
    seed: int = 0
    resume: bool = False
    freeze: tuple[str, ...] = ()
    rates: dict[str, float] = field(default_factory=dict)
    activation_checkpointing: bool = False
    offload: Offload = "none"
    background_saving: bool = False
    lora: LoraSettings | None = None
    base: str = ""
    bucket_mib: float = 0.0


@dataclass(frozen=True)
class WorldPlace:
    """This rank's place in the group of ranks; `master` is `host:port` of rank 0."""

    rank: int = 0
    size: int = 1
    master: str = "127.0.0.1:29500"


class NonFiniteLoss(RuntimeError):
    """The loss or gradient was not finite; the update was not applied."""


class OfferedWeights(Protocol):
    """The weights a trainer offers; fits `rollout.transfer.WeightSource`.

    Iterating may be a collective: every rank does it, in the same order.
    """

    def metadata(self) -> list[Any]:
        """Name, dtype and whole shape of each tensor, in the order of iteration."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor), one at a time."""

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        """(names, whole tensors) of one layer group at a time, valid until the next."""


class Trainer(Protocol):
    """One rank of a learner. Every rank gets the same calls with the same arguments.

    A batch is always the whole step's; a rank takes its own share of it. What a call returns is
    over all ranks, so rank 0's is enough.
    """

    def update(
        self, batch: TrainBatch, loss: Loss, learning_rate: float | None = None
    ) -> dict[str, float]:
        """One optimizer step; metrics of the whole batch. Raises NonFiniteLoss before the step."""

    def segment_gradients(self, batch: TrainBatch, of: NormOf = "all") -> SegmentGradients:
        """Gradient norms by segment; changes nothing."""

    def logprobs(self, batch: TrainBatch) -> list[np.ndarray]:
        """float32 [T] log-probs of every sequence's response under the current weights."""

    def weights(self) -> OfferedWeights:
        """What a sampler needs to hold the current policy."""

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder in place of what is there."""

    def save_training(self, folder: Path, state: dict[str, Any], keep: int) -> None:
        """Write a training checkpoint, or begin to, and keep the last `keep`."""

    def finish_saving(self) -> None:
        """Wait until nothing is being written; raises what went wrong in the background."""

    def close(self) -> None:
        """Let go of memory, processes and communication."""
