"""What a learner rank is asked to do, whatever engine does it.

`learner/actor.py` and with it the driver know a `Trainer` and nothing of DeepSpeed. Another engine
(FSDP2, say) is one more class with these methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from learner.balance import NormOf, SegmentGradients
from learner.batch import TrainBatch
from learner.losses import Loss
from learner.settings import CheckpointConfig, LearnerConfig
from learner.weights import OfferedWeights
from rollout.settings import ModelConfig, TransferConfig


@dataclass(frozen=True)
class LearnerSetup:
    """What a learner rank is started with: sections of the recipe, and what is in none of them.

    folder: where weights and processor are read from; empty: `model.path`.
    resume: `folder` is a training checkpoint, whose optimizer and random streams to go on with.
    temperature: that of the sampler, so log-probs are of the same distribution.
    reference: whether a loss will ask for the log-probs of `model.path` (`learner.reference`).
    """

    model: ModelConfig
    learner: LearnerConfig
    transfer: TransferConfig
    checkpoint: CheckpointConfig
    folder: str = ""
    resume: bool = False
    temperature: float = 1.0
    seed: int = 0
    reference: bool = False

    @property
    def start(self) -> str:
        """The folder or hub name that weights and processor are of."""
        return self.folder or self.model.path


@dataclass(frozen=True)
class WorldPlace:
    """This rank's place in the group of ranks; `master` is `host:port` of rank 0."""

    rank: int = 0
    size: int = 1
    master: str = "127.0.0.1:29500"


class NonFiniteLoss(RuntimeError):
    """The loss or gradient was not finite; the update was not applied."""


class Trainer(Protocol):
    """One rank of a learner. Every rank gets the same calls with the same arguments.

    A batch is always the whole step's; a rank takes its own share of it. What a call returns is
    over all ranks, so rank 0's is enough. `LearnerGroup` has the methods that a driver calls.
    """

    def update(
        self, batch: TrainBatch, loss: Loss, learning_rate: float | None = None
    ) -> dict[str, float]:
        """One optimizer step on a batch; metrics over the whole batch, all ranks.

        Metrics: `loss` and `loss/<term>`, `grad_norm` (before clipping), `padding_share`,
        `shared_share`, `seconds` and those of `Loss.metrics`. Raises NonFiniteLoss, before any
        step is taken; the run cannot go on from there (other ranks may wait in a collective).
        """

    def segment_gradients(self, batch: TrainBatch, of: NormOf = "all") -> SegmentGradients:
        """Gradient norms of the perception and the reasoning loss of a batch (`learner.balance`).

        To be called before `update`: they are of the very batch and weights that it will use, and
        nothing changes. Raises NonFiniteLoss when a norm is not finite.
        """

    def logprobs(self, batch: TrainBatch) -> list[np.ndarray]:
        """float32 [n] log-probs of every sequence's targets under the current weights."""

    def weights(self) -> OfferedWeights:
        """What a sampler needs to hold the current policy."""

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder (weights, processor, chat template), atomically.

        An existing folder is replaced.
        """

    def save_training(self, folder: Path, state: dict[str, Any]) -> None:
        """Write a training checkpoint (see `learner.checkpoint`); keep the last `checkpoint.keep`.

        `state` is the driver's own part of it, JSON-able. With `checkpoint.background` all of it is
        copied to host memory, and a thread writes it while training goes on. What that thread
        raises comes up in the next save or `finish_saving`.
        """

    def finish_saving(self) -> None:
        """Wait until nothing is being written; raises what went wrong in the background."""

    def offload(self, weights: bool = True) -> None:
        """Leave the GPU to samplers: hold all states in main memory until `reload`.

        Without `weights` these stay, to be sent from there. On a CPU nothing is done.
        """

    def reload(self) -> None:
        """Take the GPU back; before any other call but `finish_saving` and the above."""

    def close(self) -> None:
        """Let go of memory, processes and communication."""
