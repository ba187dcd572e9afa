"""From sequences to tensors: a micro-batch, padded or packed.

Shapes: B sequences, P prompt tokens, T response tokens, L padded length, N response tokens of a
whole micro-batch, laid end to end in sequence order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from learner.families.base import Family
from tasks.images import check_image

Layout = Literal["padded", "packed", "shared_prefix"]
"""How the sequences of a micro-batch lie: a row each, padded on the right to the longest; end to
end in one row; or so, and a prompt (with its image) that several begin with is there once."""


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
            looks from a real token, so there is no attention mask. A packed micro-batch is one
            row, B = 1, and has `stretches`, within which its tokens attend.
        vision: the images. A micro-batch without any carries one blank image that nothing uses:
            its features count zero times, so every rank runs the same modules in each step.
        rows, columns: int64 [N], the hidden state that predicts each response token.
        tokens: the targets and their training signal.
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
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            "inputs": {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in self.inputs.items()
            },
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


@dataclass(frozen=True)
class EncodedImage:
    """One image as the checkpoint's processor made it.

    Attributes:
        inputs: the model's image tensors.
        placeholders: how many prompt tokens stand for it.
    """

    inputs: dict[str, torch.Tensor]
    placeholders: int


Positions = Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]
"""int64 [planes, P]: where a family's tokens are, of ids [1, P] and what places their image."""


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
        positions: Positions,
        layout: Layout = "padded",
    ):
        self._processor = processor
        self._family = family
        self._accepts = set(forward_parameters)
        self.image_token_id = image_token_id
        self._image_token = processor.tokenizer.convert_ids_to_tokens(image_token_id)
        self._positions, self._layout = positions, layout
        self._placed: dict[Hashable, torch.Tensor] = {}
        self._encoded: dict[bytes, EncodedImage] = {}
        (self.blank,) = self._process([Image.new("RGB", (64, 64), (128, 128, 128))])

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
        placeholders = (out["input_ids"] == self.image_token_id).sum(-1).tolist()
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
        self._placed.clear()

    def __call__(self, sequences: Sequence[TrainSequence], weight: float = 1.0) -> MicroBatch:
        """Lay out. Raises ValueError when a prompt's placeholders do not fit its image."""
        shown = [s.image for s in sequences if s.image is not None]
        encoded = dict(zip(shown, self.encode_images(shown), strict=True))
        self._check_placeholders(sequences, encoded)
        lay_out = self._padded if self._layout == "padded" else self._packed
        inputs, rows, columns, written = lay_out(sequences, encoded)
        tokens = Tokens(
            ids=_flat(sequences, "response_ids", torch.long),
            segments=_flat(sequences, "segments", torch.int8),
            sampler_logprobs=_flat(sequences, "sampler_logprobs", torch.float32),
            advantages=_flat(sequences, "advantages", torch.float32),
            sequences=torch.cat(
                [torch.full((len(s.response_ids),), i) for i, s in enumerate(sequences)]
            ),
            old_logprobs=_flat(sequences, "old_logprobs", torch.float32)
            if all(s.old_logprobs is not None for s in sequences)
            else None,
        )
        real = sum(map(_width, sequences))
        shared = real - inputs["input_ids"].numel() if self._layout != "padded" else 0
        return MicroBatch(
            inputs=inputs,
            vision=self._vision(encoded, [s.image for s in written if s.image is not None]),
            rows=rows,
            columns=columns,
            tokens=tokens,
            weight=weight,
            real_tokens=real - shared,
            shared_tokens=shared,
        )

    def _check_placeholders(
        self, sequences: Sequence[TrainSequence], encoded: Mapping[bytes, EncodedImage]
    ) -> None:
        for index, sequence in enumerate(sequences):
            # The last token is only ever a target.
            known = np.concatenate([sequence.prompt_ids, sequence.response_ids[:-1]])
            found = int((known == self.image_token_id).sum())
            expected = encoded[sequence.image].placeholders if sequence.image is not None else 0
            if found != expected:
                raise ValueError(
                    f"sequence {index}: {found} image placeholders before its last "
                    f"token but {expected} visual features from its image; sampler and learner "
                    "must load the same processor, and end a response at a sampled placeholder"
                )

    def _padded(
        self, sequences: Sequence[TrainSequence], encoded: Mapping[bytes, EncodedImage]
    ) -> Laid:
        """A row each. The padding is on the right, where any token but the image's will do."""
        shape = (len(sequences), max(map(_width, sequences)))
        ids = torch.full(shape, int(self.image_token_id == 0), dtype=torch.long)
        is_image = torch.zeros(shape, dtype=torch.int32)
        rows, columns = [], []
        for row, s in enumerate(sequences):
            known = torch.from_numpy(np.concatenate([s.prompt_ids, s.response_ids[:-1]]))
            ids[row, : len(known)] = known
            is_image[row, : len(known)] = known == self.image_token_id
            rows.append(torch.full((len(s.response_ids),), row, dtype=torch.long))
            columns.append(torch.arange(len(s.response_ids)) + len(s.prompt_ids) - 1)
        inputs: dict[str, Any] = {"input_ids": ids}
        # Tensors that place image tokens (a grid, a size) go with every use of the image.
        inputs |= self._placing([encoded[s.image] for s in sequences if s.image is not None])
        if "mm_token_type_ids" in self._accepts:
            inputs["mm_token_type_ids"] = is_image
        return inputs, torch.cat(rows), torch.cat(columns), sequences

    def _packed(
        self, sequences: Sequence[TrainSequence], encoded: Mapping[bytes, EncodedImage]
    ) -> Laid:
        """End to end in one row, with the positions that each sequence has by itself."""
        from learner.packing import pack

        prompts = [(s.prompt_ids.tobytes(), s.image) for s in sequences]
        shared = self._layout == "shared_prefix"
        row = pack(
            [s.prompt_ids for s in sequences],
            [s.response_ids for s in sequences],
            prompts if shared else range(len(sequences)),
        )
        starts = [self._prompt_positions(s, encoded) for s in sequences]
        planes = torch.cat(
            [
                _go_on(starts[index], torch.from_numpy(row.place[row.sequence == index]))
                for index in dict.fromkeys(row.sequence.tolist())
            ],
            dim=1,
        )
        inputs = {
            "input_ids": torch.from_numpy(row.ids)[None],
            "position_ids": self._family.position_ids(planes[:, None]),
            "stretches": row.stretches,
        }
        columns = torch.from_numpy(row.columns)
        return inputs, torch.zeros_like(columns), columns, [sequences[i] for i in row.written]

    def _prompt_positions(
        self, sequence: TrainSequence, encoded: Mapping[bytes, EncodedImage]
    ) -> torch.Tensor:
        """int64 [planes, P], made once for each prompt of a batch."""
        key = (sequence.prompt_ids.tobytes(), sequence.image)
        if key not in self._placed:
            ids = torch.from_numpy(sequence.prompt_ids.astype(np.int64))[None]
            image = [encoded[sequence.image]] if sequence.image is not None else []
            self._placed[key] = self._positions(ids, self._placing(image))
        return self._placed[key]

    def _placing(self, images: Sequence[EncodedImage]) -> dict[str, torch.Tensor]:
        """The tensors that place the tokens of images, which are not for the tower alone."""
        names = [name for name in self.blank.inputs if name not in self._family.tower_only]
        return {n: torch.cat([image.inputs[n] for image in images]) for n in names if images}

    def _vision(self, encoded: Mapping[bytes, EncodedImage], shown: Sequence[bytes]) -> Vision:
        """What the tower reads for `encoded` (or one blank), and which image each use shows."""
        distinct = list(encoded.values()) or [self.blank]
        place = {image: index for index, image in enumerate(encoded)}
        heights = [len(image.inputs["pixel_values"]) for image in distinct]
        starts = np.cumsum([0, *heights])
        images = [place[image] for image in shown]
        rows = [np.arange(starts[i], starts[i + 1]) for i in images]
        return Vision(
            {n: torch.cat([image.inputs[n] for image in distinct]) for n in self.blank.inputs},
            torch.tensor(images, dtype=torch.long),
            torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *rows])),
        )


Laid = tuple[dict[str, Any], torch.Tensor, torch.Tensor, Sequence[TrainSequence]]
"""Inputs of the model, rows and columns of what predicts, and whose prompts there are, in order."""


def _width(sequence: TrainSequence) -> int:
    """Tokens that go through the model; the last one of a response is only a target."""
    return len(sequence.prompt_ids) + max(0, len(sequence.response_ids) - 1)


def _go_on(prompt: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Positions [planes, n] of tokens at `place` [n] of a sequence that begins with `prompt`.

    What follows a prompt is text, which counts on from the largest position.
    """
    length, following = prompt.shape[1], int(prompt.max()) + 1
    after = (following + place - length).expand(len(prompt), -1)
    within = prompt[:, place.clamp(max=length - 1)]
    return torch.where(place < length, within, after)


def _flat(sequences: Sequence[TrainSequence], name: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([getattr(s, name) for s in sequences])).to(dtype)


def demonstration(
    prompt_ids: np.ndarray, response_ids: np.ndarray, image: bytes | None, segments: np.ndarray
) -> TrainSequence:
    """A sequence for SFT: no sampler, no advantage."""
    zeros = np.zeros(len(response_ids), np.float32)
    return TrainSequence(prompt_ids, response_ids, image, segments, zeros, zeros)
