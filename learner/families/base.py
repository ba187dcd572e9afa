"""What a family of models does its own way, and what fits all that do not.

A family is found by the checkpoint's `model_type` (`learner.families.family_of`). The defaults here
are those of models that count positions 0, 1, 2, ... and whose image features are one tensor for
the rows of `pixel_values`, or a list with one tensor an image.

Names of parameters are those of the Hugging Face model (`policy.model`), such as
`model.visual.blocks.0.attn.qkv.weight`. Shapes: L tokens of a sequence, B sequences.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch

from rollout.tokens import ModelError

Part = Literal["vision", "merger", "language", "head"]
PARTS: tuple[Part, ...] = get_args(Part)
Parts = Mapping[Part, tuple[str, ...]]


@dataclass(frozen=True)
class Tower:
    """A vision tower by its sizes.

    Attributes:
        hidden, inner, layers, heads: of its transformer; `inner` is the width of an MLP.
        image: pixels of a side of what it sees.
        patch: pixels of a side of a patch.
        merge: this many patches by as many become one token of the language model.
        fields: what else a config says of it.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    image: int
    patch: int
    merge: int
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of the language model, for an image of `image` by `image` pixels."""
        return (self.image // self.patch // self.merge) ** 2

    @property
    def fault(self) -> str:
        """Which sizes do not go together, in words; empty where all do."""
        if self.hidden % self.heads:
            return f"{self.hidden} features are not divided by {self.heads} heads"
        if self.image % (self.patch * self.merge):
            return (
                f"{self.image} pixels are not a whole number of {self.merge} patches of "
                f"{self.patch} pixels"
            )
        return ""

    def config(self) -> dict[str, Any]:
        """In the names of most configs."""
        return {
            **self.fields,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "image_size": self.image,
            "patch_size": self.patch,
        }


TINY_TOWER = Tower(hidden=128, inner=256, layers=2, heads=4, image=64, patch=8, merge=2)
"""Of a 64x64 image it makes 16 tokens, one a cell of a 4x4 Sudoku."""


class Family:
    """A family of models.

    Attributes:
        model_type: as in the checkpoint's `config.json`; empty for the defaults.
        parts: the prefixes of the names of each part's parameters, those of transformers' own
            models if a family has no others. `merger` is what brings
            features of the vision tower to the language model; where it lies within the tower,
            the longer prefix counts. A head tied to the embedding has no parameter of its own.
        tower_only: the processor's image tensors that nothing but the vision tower reads.
        planes: how many numbers say where a token is.
    """

    model_type = ""
    parts: ClassVar[Parts] = {
        "vision": ("model.vision_tower.", "model.vision_model.", "model.visual."),
        "merger": (
            "model.multi_modal_projector.",
            "model.connector.",
            "model.visual.merger.",
            "model.visual.deepstack_merger_list.",
        ),
        "language": ("model.language_model.", "model.text_model."),
        "head": ("lm_head.",),
    }
    tower_only: frozenset[str] = frozenset({"pixel_values"})
    planes = 1

    def part_of(self, name: str) -> Part:
        """The part that a parameter belongs to, by its longest prefix.

        Raises ModelError naming the parameter when no prefix fits.
        """
        fits = [
            (len(prefix), part)
            for part, prefixes in self.parts.items()
            for prefix in prefixes
            if name.startswith(prefix)
        ]
        if not fits:
            raise ModelError(
                f"parameter {name}: belongs to no known part of a model "
                f"({', '.join(PARTS)}); its family needs a file in learner/families that names them"
            )
        return max(fits)[1]

    def lacks(self, model: Any) -> list[str]:
        """What the learner needs and `model` (of transformers) does not have, in words."""
        body = getattr(model, "model", None)
        accepted = inspect.signature(body.forward).parameters if body is not None else {}
        need = {
            "get_image_features": hasattr(body, "get_image_features"),
            "image features computed beforehand (mm_encoder_outputs)": (
                "mm_encoder_outputs" in accepted
            ),
            "causal attention within an image (it takes token_type_ids)": (
                "token_type_ids" not in accepted
            ),
            "an output layer lm_head": hasattr(model, "lm_head"),
            "config.image_token_id": hasattr(model.config, "image_token_id"),
        }
        return [name for name, present in need.items() if not present]

    def split_images(
        self, image_tensors: Mapping[str, torch.Tensor], count: int
    ) -> list[dict[str, Any]]:
        """The processor's image tensors of `count` images of one size, image by image."""
        parts = {name: value.chunk(count) for name, value in image_tensors.items()}
        return [{name: chunks[i] for name, chunks in parts.items()} for i in range(count)]

    def image_features(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> Any:
        """What the vision tower and merger make of images that are laid end to end."""
        return model.model.get_image_features(**inputs, return_dict=True)

    def lay_out(self, features: Any, images: Sequence[int], rows: torch.Tensor) -> Any:
        """Features of distinct images, repeated and ordered as the sequences use them.

        `images` are the distinct images in order of use, `rows` the same in rows of
        `pixel_values`. Changes `features` in place and returns it. Raises ModelError for features
        that are counted otherwise.
        """

        def pick(value: Any) -> Any:
            tiles = isinstance(value, torch.Tensor)
            expected = 1 + (int(rows.max()) if tiles else max(images))  # each image is used
            if len(value) != expected:
                kind = "rows of pixel_values" if tiles else "images"
                raise ModelError(
                    f"image features: {len(value)} for {expected} {kind}; the model's family needs "
                    "a file in learner/families that says how they are laid out"
                )
            if tiles:  # [rows of pixel_values, tokens, hidden]
                return value[rows]
            return tuple(value[i] for i in images)  # a tensor an image

        features.pooler_output = pick(features.pooler_output)
        levels = getattr(features, "deepstack_features", None)
        if levels is not None:
            features.deepstack_features = [pick(level) for level in levels]
        return features

    def total(self, features: Any) -> torch.Tensor:
        """The sum of everything `lay_out` would lay out."""
        parts = [features.pooler_output, *(getattr(features, "deepstack_features", None) or [])]
        tensors = [
            t for part in parts for t in ([part] if isinstance(part, torch.Tensor) else part)
        ]
        return torch.stack([t.sum() for t in tensors]).sum()

    def positions(
        self, model: Any, input_ids: torch.Tensor, images: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """int64 [planes, L]: where each token of one sequence is, as the model itself would count.

        Args:
            model: the Hugging Face model (`policy.model`).
            input_ids: int64 [1, L], image placeholders expanded, no padding.
            images: the image tensors of the sequence that are not `tower_only`, such as
                `image_grid_thw` [images, 3]; empty for a sequence of text.
        """
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]

    def position_ids(self, planes: torch.Tensor) -> torch.Tensor:
        """The model's argument `position_ids` for positions [planes, B, L] of B sequences."""
        return planes[0]


class MRopeFamily(Family):
    """Positions in three planes, time, height and width (M-RoPE, 2409.12191 §2.1).

    Before a packed row, transformers wants a fourth plane in front of them that counts the
    tokens of each sequence from 0: it builds the mask from that one, `position_ids` [4, B, L].
    """

    planes = 3

    def lacks(self, model: Any) -> list[str]:
        missing = super().lacks(model)
        of = getattr(getattr(model, "model", None), "get_rope_index", None)
        if of is None or "mm_token_type_ids" not in inspect.signature(of).parameters:
            missing.append("positions from token types (get_rope_index with mm_token_type_ids)")
        return missing

    def positions(
        self, model: Any, input_ids: torch.Tensor, images: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        if not images:
            return super().positions(model, input_ids, images).expand(3, -1)
        rope_index, _ = model.model.get_rope_index(
            input_ids, (input_ids == model.config.image_token_id).int(), **images
        )
        planes: torch.Tensor = rope_index[:, 0]
        return planes

    def position_ids(self, planes: torch.Tensor) -> torch.Tensor:
        return planes


class NewFamily(ABC):
    """How a new model of a family is made from its own config class.

    `learner.tiny` makes tiny ones, `learner.graft` those around a language model.

    Attributes:
        languages: by `model_type`, the language models that it is grafted onto.
        image_tokens: special tokens beside those of the chat.
        named_tokens: those that the tokenizer must know by a name, as the processor asks for them.
        placeholder: what the chat template writes for an image.
    """

    languages: tuple[str, ...] = ()
    image_tokens: tuple[str, ...]
    named_tokens: ClassVar[Mapping[str, str]] = {}
    placeholder: str

    @abstractmethod
    def new_processor(self, tokenizer: Any, template: str, tower: Tower) -> Any:
        """The family's processor, for images as large as the tower sees them."""

    @abstractmethod
    def new_model(self, text: dict[str, Any], token: Mapping[str, int], tower: Tower) -> Any:
        """A model with random weights.

        Args:
            text: the language model's config, or the fields that all of them have.
            token: id of each special token.
            tower: sizes of the vision tower.
        """
