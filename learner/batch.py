"""From sequences to tensors: who trains on what, in which micro-batch, padded how.

Shapes: B sequences, P prompt tokens, T response tokens, L padded length, N response tokens of a
whole micro-batch, laid end to end in sequence order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tasks.images import check_image


@dataclass(frozen=True)
class TrainSequence:
    """One sequence to learn from.

    Attributes:
        prompt_ids: int32 [P], image placeholders expanded.
        response_ids: int32 [T].
        image: the encoded image the prompt's placeholders stand for, or None.
        segments: int8 [T], index into `tasks.core.SEGMENTS` or `tasks.core.NO_SEGMENT`.
        sampler_logprobs: float32 [T], nats; zeros where there was no sampler (SFT).
        advantages: float32 [T]; zeros in SFT.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    image: bytes | None
    segments: np.ndarray
    sampler_logprobs: np.ndarray
    advantages: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class TrainBatch:
    """Everything one policy update learns from, over all ranks."""

    sequences: tuple[TrainSequence, ...]

    def segment_tokens(self) -> dict[int, int]:
        """How many response tokens each segment index has, `NO_SEGMENT` included."""
        counts: Counter[int] = Counter()
        for sequence in self.sequences:
            counts.update(sequence.segments.tolist())
        return dict(counts)

    def response_tokens(self) -> int:
        """Response tokens over all sequences."""
        return sum(len(s.response_ids) for s in self.sequences)


@dataclass(frozen=True)
class Tokens:
    """The response tokens of a micro-batch, flat; every tensor is [N]."""

    ids: torch.Tensor
    segments: torch.Tensor
    sampler_logprobs: torch.Tensor
    advantages: torch.Tensor


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: model inputs and where its response tokens are predicted.

    Attributes:
        inputs: keyword arguments of the model (`input_ids` [B, L], `attention_mask` [B, L],
            image tensors in sequence order, and what else the family needs).
        rows, columns: int64 [N], the hidden state that predicts each response token.
        tokens: the targets and their training signal.
        weight: 0.0 for a filler that only keeps ranks in step, else 1.0.
    """

    inputs: dict[str, torch.Tensor]
    rows: torch.Tensor
    columns: torch.Tensor
    tokens: Tokens
    weight: float


def plan_micro_batches(
    lengths: Sequence[int], ranks: int, token_budget: int
) -> list[list[list[int]]]:
    """Indices of each micro-batch of each rank: `[rank][micro-batch] -> sequence indices`.

    Sequences are dealt in order of length, so ranks carry like loads and a micro-batch pads
    little; a micro-batch holds at most `token_budget` padded tokens (or one longer sequence).
    Every rank gets the same number of micro-batches, as collectives need; where sequences run
    out the list is empty, and the rank runs a filler of weight zero. An index appears once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    plan: list[list[list[int]]] = []
    for rank in range(ranks):
        batches: list[list[int]] = []
        width = 0
        for index in order[rank::ranks]:
            if not batches or (len(batches[-1]) + 1) * width > token_budget:
                batches.append([])
                width = lengths[index]
            batches[-1].append(index)
        plan.append(batches)
    most = max((len(batches) for batches in plan), default=0)
    for batches in plan:
        batches.extend([] for _ in range(most - len(batches)))
    return plan


class Collator:
    """Builds micro-batches for one family of models.

    Images are encoded by the checkpoint's own processor, once per distinct image of a batch.
    """

    def __init__(self, processor: Any, forward_parameters: Sequence[str], image_token_id: int):
        self._processor = processor
        self._accepts = set(forward_parameters)
        self._image_token_id = image_token_id
        self._encoded: dict[bytes, dict[str, torch.Tensor]] = {}

    def encode_image(self, image: bytes) -> dict[str, torch.Tensor]:
        """The model's image tensors for one encoded image, cached until `forget`.

        Raises DataError for an image that cannot be used.
        """
        known = self._encoded.get(image)
        if known is None:
            picture = check_image(image, "training image")
            token = self._processor.tokenizer.convert_ids_to_tokens(self._image_token_id)
            out = self._processor(images=[picture], text=[token], return_tensors="pt")
            known = {
                name: value
                for name, value in out.items()
                if name in self._accepts
                and name not in ("input_ids", "attention_mask", "mm_token_type_ids")
            }
            known["placeholders"] = (out["input_ids"] == self._image_token_id).sum()
            self._encoded[image] = known
        return known

    def forget(self) -> None:
        """Drop encoded images (after each update, so memory stays that of one batch)."""
        self._encoded.clear()

    def __call__(self, sequences: Sequence[TrainSequence], weight: float = 1.0) -> MicroBatch:
        """Pad and stack. Raises ValueError when a prompt's placeholders do not fit its image."""
        widths = [len(s) - 1 for s in sequences]
        length = max(widths)
        ids = torch.full(
            (len(sequences), length), self._processor.tokenizer.pad_token_id, dtype=torch.long
        )
        mask = torch.zeros(len(sequences), length, dtype=torch.long)
        image_mask = torch.zeros(len(sequences), length, dtype=torch.int32)
        rows, columns = [], []
        images: dict[str, list[torch.Tensor]] = {}
        for row, sequence in enumerate(sequences):
            prompt, response = sequence.prompt_ids, sequence.response_ids
            # The last token is only ever a target.
            ids[row, : widths[row]] = torch.from_numpy(
                np.concatenate([prompt, response[:-1]]).astype(np.int64)
            )
            mask[row, : widths[row]] = 1
            placeholders = prompt == self._image_token_id
            image_mask[row, : len(prompt)] = torch.from_numpy(placeholders.astype(np.int32))
            rows.append(torch.full((len(response),), row, dtype=torch.long))
            columns.append(torch.arange(len(response)) + len(prompt) - 1)
            expected = 0
            if sequence.image is not None:
                encoded = self.encode_image(sequence.image)
                expected = int(encoded["placeholders"])
                for name, value in encoded.items():
                    if name != "placeholders":
                        images.setdefault(name, []).append(value)
            if int(placeholders.sum()) != expected:
                raise ValueError(
                    f"sequence {row}: {int(placeholders.sum())} image placeholders in the prompt "
                    f"but {expected} visual features from its image; sampler and learner must "
                    "load the same processor"
                )
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs |= {name: torch.cat(values) for name, values in images.items()}
        if "mm_token_type_ids" in self._accepts:
            inputs["mm_token_type_ids"] = image_mask
        tokens = Tokens(
            ids=_flat(sequences, "response_ids", torch.long),
            segments=_flat(sequences, "segments", torch.int8),
            sampler_logprobs=_flat(sequences, "sampler_logprobs", torch.float32),
            advantages=_flat(sequences, "advantages", torch.float32),
        )
        return MicroBatch(inputs, torch.cat(rows), torch.cat(columns), tokens, weight)


def _flat(sequences: Sequence[TrainSequence], name: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([getattr(s, name) for s in sequences])).to(dtype)


def demonstration(
    prompt_ids: np.ndarray, response_ids: np.ndarray, image: bytes | None, segments: np.ndarray
) -> TrainSequence:
    """A sequence for SFT: no sampler, no advantage."""
    zeros = np.zeros(len(response_ids), np.float32)
    return TrainSequence(prompt_ids, response_ids, image, segments, zeros, zeros)
