"""From sequences to tensors: who trains on what, in which micro-batch, padded how.

Shapes: B sequences, P prompt tokens, T response tokens, L padded length, N response tokens of a
whole micro-batch, laid end to end in sequence order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from learner.families.base import Family
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
        old_logprobs: float32 [T], those of the learner when the step began; None where this
            sequence's update is the step's first (see `learner.correction`).
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    image: bytes | None
    segments: np.ndarray
    sampler_logprobs: np.ndarray
    advantages: np.ndarray
    old_logprobs: np.ndarray | None = None

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
    """The response tokens of a micro-batch, flat; every tensor is [N], each as in `TrainSequence`.

    `sequences` is int64: which sequence of the micro-batch a token belongs to, from 0. A sequence
    is whole within its micro-batch, so a loss may look at all tokens of one.
    """

    ids: torch.Tensor
    segments: torch.Tensor
    sampler_logprobs: torch.Tensor
    advantages: torch.Tensor
    sequences: torch.Tensor
    old_logprobs: torch.Tensor | None = None

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
        images: int64 [I], the distinct image of each sequence that has one, in sequence order.
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
            looks from a real token, so there is no attention mask.
        vision: the images. A micro-batch without any carries one blank image that nothing uses:
            its features count zero times, so every rank runs the same modules in each step.
        rows, columns: int64 [N], the hidden state that predicts each response token.
        tokens: the targets and their training signal.
        weight: 0.0 for a filler that only keeps ranks in step, else 1.0.
        real_tokens: how many of `input_ids` are not padding.
    """

    inputs: dict[str, torch.Tensor]
    vision: Vision
    rows: torch.Tensor
    columns: torch.Tensor
    tokens: Tokens
    weight: float
    real_tokens: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            "inputs": {name: value.to(device) for name, value in self.inputs.items()},
            "vision": Vision(
                {name: value.to(device) for name, value in self.vision.inputs.items()},
                self.vision.images,
                self.vision.rows.to(device),
            ),
            "rows": self.rows.to(device),
            "columns": self.columns.to(device),
            "tokens": self.tokens.map(lambda value: value.to(device)),
        }
        return replace(self, **moved)


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


@dataclass(frozen=True)
class EncodedImage:
    """One image as the checkpoint's processor made it.

    Attributes:
        inputs: the model's image tensors.
        placeholders: how many prompt tokens stand for it.
    """

    inputs: dict[str, torch.Tensor]
    placeholders: int


class Collator:
    """Builds micro-batches for one family of models.

    Images are encoded by the checkpoint's own processor, once per distinct image of a batch.
    """

    def __init__(
        self,
        processor: Any,
        forward_parameters: Sequence[str],
        image_token_id: int,
        family: Family,
    ):
        self._processor = processor
        self._family = family
        self._accepts = set(forward_parameters)
        self._image_token_id = image_token_id
        self._image_token = processor.tokenizer.convert_ids_to_tokens(image_token_id)
        self._encoded: dict[bytes, EncodedImage] = {}
        (self._blank,) = self._process([Image.new("RGB", (64, 64), (128, 128, 128))])

    def encode_images(self, images: Iterable[bytes]) -> list[EncodedImage]:
        """Each encoded image file as the model's tensors, cached until `forget`.

        Raises DataError for an image that cannot be used.
        """
        images = list(images)
        by_size: dict[tuple[int, int], dict[bytes, Image.Image]] = {}
        for image in dict.fromkeys(images):
            if image not in self._encoded:
                picture = check_image(image, "training image")
                by_size.setdefault(picture.size, {})[image] = picture
        # A processor's call costs more than its work on a small image, and images of one size
        # make tensors of one shape: one call a size, cut into equal parts.
        for pictures in by_size.values():
            self._encoded |= zip(pictures, self._process(list(pictures.values())), strict=True)
        return [self._encoded[image] for image in images]

    def _process(self, pictures: list[Image.Image]) -> list[EncodedImage]:
        """Encode pictures of one size."""
        out = self._processor(
            images=pictures, text=[self._image_token] * len(pictures), return_tensors="pt"
        )
        placeholders = (out["input_ids"] == self._image_token_id).sum(-1).tolist()
        made = {
            name: value
            for name, value in out.items()
            if name in self._accepts
            and name not in ("input_ids", "attention_mask", "mm_token_type_ids")
        }
        parts = self._family.split_images(made, len(pictures))
        return [EncodedImage(*of) for of in zip(parts, placeholders, strict=True)]

    def forget(self) -> None:
        """Drop encoded images (after each update, so memory stays that of one batch)."""
        self._encoded.clear()

    def __call__(self, sequences: Sequence[TrainSequence], weight: float = 1.0) -> MicroBatch:
        """Pad and stack. Raises ValueError when a prompt's placeholders do not fit its image."""
        widths = [len(s) - 1 for s in sequences]
        shape = (len(sequences), max(widths))
        ids = torch.full(shape, self._processor.tokenizer.pad_token_id, dtype=torch.long)
        image_mask = torch.zeros(shape, dtype=torch.int32)
        shown = [s.image for s in sequences if s.image is not None]
        encoded = dict(zip(shown, self.encode_images(shown), strict=True))
        rows, columns = [], []
        for row, sequence in enumerate(sequences):
            prompt, response = sequence.prompt_ids, sequence.response_ids
            # The last token is only ever a target.
            known = np.concatenate([prompt, response])[:-1].astype(np.int64)
            placeholders = known == self._image_token_id
            expected = encoded[sequence.image].placeholders if sequence.image is not None else 0
            if placeholders.sum() != expected:
                raise ValueError(
                    f"sequence {row}: {placeholders.sum()} image placeholders before its last "
                    f"token but {expected} visual features from its image; sampler and learner "
                    "must load the same processor, and end a response at a sampled placeholder"
                )
            ids[row, : widths[row]] = torch.from_numpy(known)
            image_mask[row, : widths[row]] = torch.from_numpy(placeholders)
            rows.append(torch.full((len(response),), row, dtype=torch.long))
            columns.append(torch.arange(len(response)) + len(prompt) - 1)
        inputs = {"input_ids": ids}
        for name in self._blank.inputs:
            # Tensors that place image tokens (a grid, a size) go with every use of the image.
            if name not in self._family.tower_only and shown:
                inputs[name] = torch.cat([encoded[image].inputs[name] for image in shown])
        if "mm_token_type_ids" in self._accepts:
            inputs["mm_token_type_ids"] = image_mask
        row_of = torch.cat(rows)
        tokens = Tokens(
            ids=_flat(sequences, "response_ids", torch.long),
            segments=_flat(sequences, "segments", torch.int8),
            sampler_logprobs=_flat(sequences, "sampler_logprobs", torch.float32),
            advantages=_flat(sequences, "advantages", torch.float32),
            sequences=row_of,
            old_logprobs=_flat(sequences, "old_logprobs", torch.float32)
            if all(s.old_logprobs is not None for s in sequences)
            else None,
        )
        return MicroBatch(
            inputs=inputs,
            vision=self._vision(encoded, shown),
            rows=row_of,
            columns=torch.cat(columns),
            tokens=tokens,
            weight=weight,
            real_tokens=sum(widths),
        )

    def _vision(self, encoded: Mapping[bytes, EncodedImage], shown: Sequence[bytes]) -> Vision:
        """What the tower reads for `encoded` (or one blank), and which image each use shows."""
        distinct = list(encoded.values()) or [self._blank]
        place = {image: index for index, image in enumerate(encoded)}
        heights = [len(image.inputs["pixel_values"]) for image in distinct]
        starts = np.cumsum([0, *heights])
        images = [place[image] for image in shown]
        rows = [np.arange(starts[i], starts[i + 1]) for i in images]
        return Vision(
            {n: torch.cat([image.inputs[n] for image in distinct]) for n in self._blank.inputs},
            torch.tensor(images, dtype=torch.long),
            torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *rows])),
        )


def _flat(sequences: Sequence[TrainSequence], name: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([getattr(s, name) for s in sequences])).to(dtype)


def demonstration(
    prompt_ids: np.ndarray, response_ids: np.ndarray, image: bytes | None, segments: np.ndarray
) -> TrainSequence:
    """A sequence for SFT: no sampler, no advantage."""
    zeros = np.zeros(len(response_ids), np.float32)
    return TrainSequence(prompt_ids, response_ids, image, segments, zeros, zeros)
