"""From sequences to tensors: a micro-batch, padded or packed.

Shapes: B sequences, P prompt tokens, T response tokens, N response tokens of a micro-batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from learner.batch import Layout, MicroBatch, Tokens, TrainSequence, Vision
from learner.policy import Policy
from tasks.images import check_image


@dataclass(frozen=True)
class EncodedImage:
    """One image as the checkpoint's processor made it.

    Attributes:
        inputs: the model's image tensors.
        placeholders: how many prompt tokens stand for it.
    """

    inputs: dict[str, torch.Tensor]
    placeholders: int


Laid = tuple[dict[str, Any], torch.Tensor, torch.Tensor, Sequence[TrainSequence]]
"""Inputs of the model, rows and columns of what predicts, and whose prompts there are, in order."""


class Collator:
    """Builds micro-batches for a policy: what its family needs, what its forward pass accepts.

    Images are encoded by the checkpoint's own processor, once per distinct image of a batch.
    """

    def __init__(self, policy: Policy, processor: Any, layout: Layout = "padded"):
        """For packed layouts the policy's attention is told to keep to the sequences of a row.

        Raises ModelError where it cannot.
        """
        model: Any = policy.model
        if layout != "padded":
            from learner.packing import attend_within_stretches

            attend_within_stretches(model)
        self._processor, self._model, self._layout = processor, model, layout
        self._family = policy.family
        self._accepts = set(inspect.signature(model.forward).parameters)
        self.image_token_id: int = model.config.image_token_id
        self._image_token = processor.tokenizer.convert_ids_to_tokens(self.image_token_id)
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
        """Lay out. Raises ValueError when a prompt's placeholders do not fit its images."""
        shown = _shown(sequences)
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
            vision=self._vision(encoded, _shown(written)),
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
            expected = sum(encoded[image].placeholders for image in sequence.images)
            if found != expected:
                raise ValueError(
                    f"sequence {index}: {found} image placeholders before its last "
                    f"token but {expected} visual features from its images; sampler and learner "
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
        inputs |= self._placing([encoded[image] for image in _shown(sequences)])
        if "mm_token_type_ids" in self._accepts:
            inputs["mm_token_type_ids"] = is_image
        return inputs, torch.cat(rows), torch.cat(columns), sequences

    def _packed(
        self, sequences: Sequence[TrainSequence], encoded: Mapping[bytes, EncodedImage]
    ) -> Laid:
        """End to end in one row, with the positions that each sequence has by itself."""
        from learner.packing import pack

        prompts = [(s.prompt_ids.tobytes(), s.images) for s in sequences]
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
        key = (sequence.prompt_ids.tobytes(), sequence.images)
        if key not in self._placed:
            ids = torch.from_numpy(sequence.prompt_ids.astype(np.int64))[None]
            placing = self._placing([encoded[image] for image in sequence.images])
            self._placed[key] = self._family.positions(self._model, ids, placing)
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


def _shown(sequences: Iterable[TrainSequence]) -> list[bytes]:
    """The images of sequences, one for each place where one stands."""
    return [image for sequence in sequences for image in sequence.images]


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
