"""Qwen3-VL: M-RoPE, images of any size, features of several depths of the tower (DeepStack)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learner.families.base import (
    TINY_IMAGE,
    TINY_MERGE,
    TINY_PATCH,
    TINY_ROPE,
    MRopeFamily,
    TinyFamily,
)


class Qwen(MRopeFamily, TinyFamily):
    """What Qwen's families have in common.

    Attributes:
        tiny_kind: how the names of its classes in transformers begin.
        tiny_video: the class of its video processor.
    """

    image_tokens = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    tiny_kind: str
    tiny_video: str

    def tiny_processor(self, tokenizer: Any, template: str) -> Any:
        import transformers

        smallest = (TINY_PATCH * TINY_MERGE) ** 2
        options: dict[str, Any] = {
            "size": {"shortest_edge": smallest, "longest_edge": 1024 * smallest},
            "patch_size": TINY_PATCH,
            "merge_size": TINY_MERGE,
            "temporal_patch_size": 2,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
        return getattr(transformers, f"{self.tiny_kind}Processor")(
            image_processor=transformers.Qwen2VLImageProcessor(**options),
            tokenizer=tokenizer,
            video_processor=getattr(transformers, self.tiny_video)(**options),
            chat_template=template,
        )

    def tiny_of(
        self, text: dict[str, Any], token: Mapping[str, int], rope: Any, tower: dict[str, Any]
    ) -> Any:
        """A model with these fields of its own for positions and vision tower."""
        import transformers

        config = getattr(transformers, f"{self.tiny_kind}Config")(
            text_config=text | {"rope_parameters": {**TINY_ROPE, **rope}},
            vision_config={
                "depth": 2,
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_heads": 4,
                "patch_size": TINY_PATCH,
                "spatial_merge_size": TINY_MERGE,
                "out_hidden_size": 128,
                **tower,
            },
            tie_word_embeddings=True,
            image_token_id=token["<|image_pad|>"],
            video_token_id=token["<|video_pad|>"],
            vision_start_token_id=token["<|vision_start|>"],
            vision_end_token_id=token["<|vision_end|>"],
        )
        return getattr(transformers, f"{self.tiny_kind}ForConditionalGeneration")(config)


class Qwen3VL(Qwen):
    """Qwen/Qwen3-VL-*B-Instruct."""

    model_type = "qwen3_vl"
    tiny_kind, tiny_video = "Qwen3VL", "Qwen3VLVideoProcessor"

    def tiny_model(self, text: dict[str, Any], token: Mapping[str, int]) -> Any:
        rope = {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
        positions = (TINY_IMAGE // TINY_PATCH) ** 2
        tower = {"num_position_embeddings": positions, "deepstack_visual_indexes": [0]}
        return self.tiny_of(text, token, rope, tower)
