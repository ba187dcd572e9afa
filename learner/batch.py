"""What an update learns from: sequences as they were sampled or written, micro-batches as read.

Shapes: B sequences, P prompt tokens, T response tokens, L padded length, N response tokens of a
whole micro-batch that the policy wrote, laid end to end in sequence order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from tasks.core import ENVIRONMENT

Layout = Literal["padded", "packed", "shared_prefix"]
"""How the sequences of a micro-batch lie: a row each, padded on the right to the longest; end to
end in one row; or so, and a prompt (with its images) that several begin with is there once."""


@dataclass(frozen=True)
class TrainSequence:
    """One sequence to learn from.

    Attributes:
        prompt_ids: int32 [P], image placeholders expanded.
        response_ids: int32 [T], of one turn or several; the last one is the policy's.
        images: the encoded images that the placeholders of all tokens stand for, in their order.
        segments: int8 [T], as in `rollout.record.Rollout`: an `ENVIRONMENT` token is never a
            target.
        sampler_logprobs: float32 [T], nats; zeros where there was no sampler (SFT).
        advantages: float32 [T]; zeros in SFT.
        old_logprobs: float32 [T], those of the learner when the step began; None where this
            sequence's update is the step's first (see `learner.correction`).
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    images: tuple[bytes, ...]
    segments: np.ndarray
    sampler_logprobs: np.ndarray
    advantages: np.ndarray
    old_logprobs: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def known(self) -> np.ndarray:
        """int32 [P + T - 1]: what goes through the model; the last token is only ever a target."""
        return np.concatenate([self.prompt_ids, self.response_ids[:-1]])

    @property
    def targets(self) -> np.ndarray:
        """bool [T]: the tokens that the policy wrote; no loss sees another one."""
        from_policy: np.ndarray = self.segments != ENVIRONMENT
        return from_policy


@dataclass(frozen=True)
class TrainBatch:
    """Everything one policy update learns from, over all ranks."""

    sequences: tuple[TrainSequence, ...]

    def segment_tokens(self) -> dict[int, int]:
        """How many of the policy's tokens each segment index has, `NO_SEGMENT` included."""
        counts: Counter[int] = Counter()
        for sequence in self.sequences:
            counts.update(sequence.segments[sequence.targets].tolist())
        return dict(counts)

    def response_tokens(self) -> int:
        """Tokens that the policy wrote, over all sequences."""
        return sum(int(s.targets.sum()) for s in self.sequences)


@dataclass(frozen=True)
class Tokens:
    """The policy's tokens of a micro-batch, flat; every tensor is [N], each as in `TrainSequence`.

    `sequences` is int64: which sequence of the micro-batch a token belongs to, from 0. A sequence
    is whole within its micro-batch, so a loss may look at all tokens of one. `reference_logprobs`
    are there where the loss asked for them (`learner.reference`).
    """

    ids: torch.Tensor
    segments: torch.Tensor
    sampler_logprobs: torch.Tensor
    advantages: torch.Tensor
    sequences: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    reference_logprobs: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Tokens:
        """The same with `function` of every tensor."""
        present = {name: value for name, value in vars(self).items() if value is not None}
        return Tokens(**{name: function(value) for name, value in present.items()})

    def first(self, count: int) -> Tokens:
        """The first `count` tokens."""
        return self.map(lambda value: value[:count])

    def sequence_sums(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of values [N] over each sequence of the micro-batch."""
        count = int(self.sequences.max()) + 1 if len(self.sequences) else 0
        return values.new_zeros(count).index_add_(0, self.sequences, values)

    def shares(self) -> torch.Tensor:
        """[N]: one over the number of tokens in each token's sequence."""
        ones = torch.ones_like(self.advantages)
        return 1 / self.sequence_sums(ones)[self.sequences]


@dataclass(frozen=True)
class Vision:
    """The distinct images of a micro-batch: the vision tower runs once on each.

    Attributes:
        inputs: what the tower reads, of the distinct images end to end (`pixel_values` and what
            else the family needs).
        images: int64 [I], which of them each use of an image shows, sequence by sequence.
        rows: int64 [R], the same in rows of `pixel_values` (an image may be several tiles).
    """

    inputs: dict[str, torch.Tensor]
    images: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: model inputs and where its response tokens are predicted.

    Attributes:
        inputs: keyword arguments of the model (`input_ids` [B, L], and what else the family
            needs to place its tokens). Padding is on the right, where causal attention never
            looks from a real token, so there is no attention mask. A packed micro-batch is one
            row, B = 1, and has `stretches`, within which its tokens attend.
        vision: the images. A micro-batch without any carries one blank image that nothing uses:
            its features count zero times, so every rank runs the same modules in each step.
        rows, columns: int64 [N], the hidden state that predicts each response token.
        tokens: the targets, all of them the policy's own, and their training signal.
        weight: 0.0 for a filler that only keeps ranks in step, else 1.0.
        real_tokens: how many of `input_ids` are not padding.
        shared_tokens: how many more there would be if every sequence had its own prompt.
    """

    inputs: dict[str, Any]
    vision: Vision
    rows: torch.Tensor
    columns: torch.Tensor
    tokens: Tokens
    weight: float
    real_tokens: int
    shared_tokens: int = 0

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        return self if device.type == "cpu" else _moved(self, device)


def _moved(value: Any, device: torch.device) -> Any:
    """A record, a table or a tensor with all its tensors on a device; other values as they are."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(below, device) for name, below in value.items()}
    if isinstance(value, Tokens | Vision | MicroBatch):
        return replace(value, **_moved(vars(value), device))
    return value


def demonstration(
    prompt_ids: np.ndarray,
    response_ids: np.ndarray,
    images: tuple[bytes, ...],
    segments: np.ndarray,
) -> TrainSequence:
    """A sequence for SFT: no sampler, no advantage."""
    zeros = np.zeros(len(response_ids), np.float32)
    return TrainSequence(prompt_ids, response_ids, images, segments, zeros, zeros)
