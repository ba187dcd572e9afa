"""From sequences to tensors: a micro-batch, padded or packed.

Shapes: B sequences, P prompt tokens, T response tokens, N of a micro-batch that are targets.
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
        runs: how many tokens stand for it, run by run: one, or one a tile.
    """

    inputs: dict[str, torch.Tensor]
    runs: tuple[int, ...]

    @property
    def placeholders(self) -> int:
        """How many tokens stand for it."""
        return sum(self.runs)


Laid = tuple[dict[str, Any], torch.Tensor, torch.Tensor, list[bytes]]
"""Inputs of the model, rows and columns of what predicts, and the images in the tokens' order."""


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
        placeholder_runs = [
            runs_of(ids == self.image_token_id) for ids in np.asarray(out["input_ids"])
        ]
        image_tensors = {
            name: value
            for name, value in out.items()
            if name in self._accepts
            and name not in ("input_ids", "attention_mask", "mm_token_type_ids")
        }
        parts = self._family.split_images(image_tensors, len(pictures))
        return [
            EncodedImage(part, tuple(runs.tolist()))
            for part, runs in zip(parts, placeholder_runs, strict=True)
        ]

    def forget(self) -> None:
        """Drop encoded images (after each update, so memory stays that of one batch)."""
        self._encoded.clear()
        self._placed.clear()

    def __call__(self, sequences: Sequence[TrainSequence], weight: float = 1.0) -> MicroBatch:
        """Lay out. Raises ValueError when a sequence's placeholders do not fit its images."""
        used = [image for s in sequences for image in s.images]
        encoded = dict(zip(used, self.encode_images(used), strict=True))
        self._check_placeholders(sequences, encoded)
        lay_out = self._padded if self._layout == "padded" else self._packed
        inputs, rows, columns, image_uses = lay_out(sequences, encoded)
        tokens = Tokens(
            ids=_flat(sequences, "response_ids", torch.long),
            segments=_flat(sequences, "segments", torch.int8),
            sampler_logprobs=_flat(sequences, "sampler_logprobs", torch.float32),
            advantages=_flat(sequences, "advantages", torch.float32),
            sequences=torch.cat(
                [torch.full((int(s.targets.sum()),), i) for i, s in enumerate(sequences)]
            ),
            old_logprobs=_flat(sequences, "old_logprobs", torch.float32)
            if all(s.old_logprobs is not None for s in sequences)
            else None,
        )
        real_tokens = sum(len(s.known) for s in sequences)
        shared = real_tokens - inputs["input_ids"].numel() if self._layout != "padded" else 0
        return MicroBatch(
            inputs=inputs,
            vision=self._vision(encoded, image_uses),
            rows=rows,
            columns=columns,
            tokens=tokens,
            weight=weight,
            real_tokens=real_tokens - shared,
            shared_tokens=shared,
        )

    def _check_placeholders(
        self, sequences: Sequence[TrainSequence], encoded: Mapping[bytes, EncodedImage]
    ) -> None:
        for index, sequence in enumerate(sequences):
            actual = np.cumsum(runs_of(sequence.known == self.image_token_id))
            runs = [run for image in sequence.images for run in encoded[image].runs]
            expected = np.cumsum(runs, dtype=int)
            # Templates may write two images with nothing between them: one run of both.
            if (
                actual[-1:].tolist() != expected[-1:].tolist()
                or not np.isin(actual, expected).all()
            ):
                raise ValueError(
                    f"sequence {index}: {actual[-1:].sum()} image placeholders before its last "
                    f"token but {sum(runs)} visual features from its images, or runs of them "
                    f"that end after {actual.tolist()} and {expected.tolist()}; sampler and "
                    "learner must load the same processor, and end a response at a sampled "
                    "placeholder"
                )

    def _padded(
        self, sequences: Sequence[TrainSequence], encoded: Mapping[bytes, EncodedImage]
    ) -> Laid:
        """A row each. The padding is on the right, where any token but the image's will do."""
        shape = (len(sequences), max(len(s.known) for s in sequences))
        ids = torch.full(shape, int(self.image_token_id == 0), dtype=torch.long)
        is_image = torch.zeros(shape, dtype=torch.int32)
        rows, columns = [], []
        for row, s in enumerate(sequences):
            known = torch.from_numpy(s.known)
            ids[row, : len(known)] = known
            is_image[row, : len(known)] = known == self.image_token_id
            predicted = torch.from_numpy(np.flatnonzero(s.targets))
            rows.append(torch.full_like(predicted, row))
            columns.append(predicted + len(s.prompt_ids) - 1)
        inputs: dict[str, Any] = {"input_ids": ids}
        image_uses = [image for s in sequences for image in s.images]
        # Tensors that place image tokens (a grid, a size) go with every use of the image.
        inputs |= self._placing([encoded[image] for image in image_uses])
        if "mm_token_type_ids" in self._accepts:
            inputs["mm_token_type_ids"] = is_image
        return inputs, torch.cat(rows), torch.cat(columns), image_uses

    def _packed(
        self, sequences: Sequence[TrainSequence], encoded: Mapping[bytes, EncodedImage]
    ) -> Laid:
        """End to end in one row, with the positions that each sequence has by itself."""
        from learner.packing import pack

        firsts = [self._prompt_images(s, encoded) for s in sequences]
        prompts = [
            (s.prompt_ids.tobytes(), s.images[:first])
            for s, first in zip(sequences, firsts, strict=True)
        ]
        shared = self._layout == "shared_prefix"
        row = pack(
            [s.prompt_ids for s in sequences],
            [s.response_ids for s in sequences],
            prompts if shared else range(len(sequences)),
        )
        starts = [self._start_positions(s, encoded) for s in sequences]
        planes = torch.cat(
            [
                _go_on(starts[index], torch.from_numpy(row.position[row.sequence == index]))
                for index in dict.fromkeys(row.sequence.tolist())
            ],
            dim=1,
        )
        inputs = {
            "input_ids": torch.from_numpy(row.ids)[None],
            "position_ids": self._family.position_ids(planes[:, None]),
            "stretches": row.stretches,
        }
        columns = torch.from_numpy(row.columns[np.concatenate([s.targets for s in sequences])])
        image_uses = [
            image
            for index, (s, first) in enumerate(zip(sequences, firsts, strict=True))
            for image in s.images[0 if index in row.with_prompt else first :]
        ]
        return inputs, torch.zeros_like(columns), columns, image_uses

    def _prompt_images(self, sequence: TrainSequence, encoded: Mapping[bytes, EncodedImage]) -> int:
        """How many of a sequence's images stand in its prompt; the others came with later turns."""
        ends = np.cumsum([encoded[image].placeholders for image in sequence.images])
        placeholders = (sequence.prompt_ids == self.image_token_id).sum()
        return int(np.searchsorted(ends, placeholders, side="right"))

    def _start_positions(
        self, sequence: TrainSequence, encoded: Mapping[bytes, EncodedImage]
    ) -> torch.Tensor:
        """int64 [planes, n] up to the last image, or of the prompt; each made once in a batch."""
        known = sequence.known.astype(np.int64)
        last = np.flatnonzero(known == self.image_token_id)[-1:]
        start = known[: max([len(sequence.prompt_ids), *(last + 1)])]
        key = (start.tobytes(), sequence.images)
        if key not in self._placed:
            placing = self._placing([encoded[image] for image in sequence.images])
            ids = torch.from_numpy(start)[None]
            self._placed[key] = self._family.positions(self._model, ids, placing)
        return self._placed[key]

    def _placing(self, images: Sequence[EncodedImage]) -> dict[str, torch.Tensor]:
        """The tensors that place the tokens of images, which are not for the tower alone."""
        names = [name for name in self.blank.inputs if name not in self._family.tower_only]
        return {n: torch.cat([image.inputs[n] for image in images]) for n in names if images}

    def _vision(self, encoded: Mapping[bytes, EncodedImage], image_uses: Sequence[bytes]) -> Vision:
        """What the tower reads for `encoded` (or one blank), and which image each use shows."""
        distinct = list(encoded.values()) or [self.blank]
        index_of = {image: index for index, image in enumerate(encoded)}
        heights = [len(image.inputs["pixel_values"]) for image in distinct]
        starts = np.cumsum([0, *heights])
        images = [index_of[image] for image in image_uses]
        rows = [np.arange(starts[i], starts[i + 1]) for i in images]
        return Vision(
            {n: torch.cat([image.inputs[n] for image in distinct]) for n in self.blank.inputs},
            torch.tensor(images, dtype=torch.long),
            torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *rows])),
        )


def runs_of(mask: np.ndarray) -> np.ndarray:
    """int64: how long each run of True in bool [T] is."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return edges[1::2] - edges[::2]


def _go_on(start: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Positions [planes, n] of tokens at `position` [n] of a sequence that begins at `start`.

    What follows it is text, which counts on from the largest position.
    """
    length, following = start.shape[1], int(start.max()) + 1
    after = (following + position - length).expand(len(start), -1)
    within = start[:, position.clamp(max=length - 1)]
    return torch.where(position < length, within, after)


def _flat(sequences: Sequence[TrainSequence], name: str, dtype: torch.dtype) -> torch.Tensor:
    values = np.concatenate([getattr(s, name)[s.targets] for s in sequences])
    return torch.from_numpy(values).to(dtype)
