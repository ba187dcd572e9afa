"""Qwen3-VL: M-RoPE, images of any size, features of several depths of the tower (DeepStack)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from learner.families.base import (
    TINY_IMAGE,
    TINY_MERGE,
    TINY_PATCH,
    TINY_ROPE,
    MRopeFamily,
    Parts,
    TinyFamily,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_TOWER: Mapping[str, Any] = {
    "depth": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "patch_size": TINY_PATCH,
    "spatial_merge_size": TINY_MERGE,
    "out_hidden_size": 128,
}
"""A tiny vision tower of a Qwen model."""


class Qwen3VL(MRopeFamily, TinyFamily):
    """Qwen/Qwen3-VL-*B-Instruct."""

    model_type = "qwen3_vl"
    parts: ClassVar[Parts] = {
        "vision": ("model.visual.",),
        "merger": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
        "language": ("model.language_model.",),
        "head": ("lm_head.",),
    }
    image_tokens = QWEN_TOKENS
    placeholder = QWEN_PLACEHOLDER

    def tiny_processor(self, tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
        from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

        options = qwen_image_options()
        return Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessor(**options),
            tokenizer=tokenizer,
            video_processor=Qwen3VLVideoProcessor(**options),
            chat_template=template,
        )

    def tiny_model(self, text: dict[str, Any], token: Mapping[str, int]) -> PreTrainedModel:
        from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

        config = Qwen3VLConfig(
            text_config=text
            | {
                "rope_parameters": {
                    **TINY_ROPE,
                    "mrope_section": [6, 5, 5],
                    "mrope_interleaved": True,
                }
            },
            vision_config={
                **QWEN_TOWER,
                "num_position_embeddings": (TINY_IMAGE // TINY_PATCH) ** 2,
                "deepstack_visual_indexes": [0],
            },
            tie_word_embeddings=True,
            **qwen_token_ids(token),
        )
        model: PreTrainedModel = Qwen3VLForConditionalGeneration(config)
        return model


def qwen_image_options() -> dict[str, Any]:
    """Options of a tiny Qwen model's image and video processors."""
    smallest = (TINY_PATCH * TINY_MERGE) ** 2
    return {
        "size": {"shortest_edge": smallest, "longest_edge": 1024 * smallest},
        "patch_size": TINY_PATCH,
        "merge_size": TINY_MERGE,
        "temporal_patch_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }


def qwen_token_ids(token: Mapping[str, int]) -> dict[str, int]:
    """A Qwen config's fields for its special tokens."""
    return {
        "image_token_id": token["<|image_pad|>"],
        "video_token_id": token["<|video_pad|>"],
        "vision_start_token_id": token["<|vision_start|>"],
        "vision_end_token_id": token["<|vision_end|>"],
    }
