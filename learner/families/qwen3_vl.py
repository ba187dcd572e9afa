"""Qwen3-VL: M-RoPE, images of any size, features of several depths of the tower (DeepStack)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learner.families.base import MRopeFamily, NewFamily, Tower


class Qwen(MRopeFamily, NewFamily):
    """What Qwen's families have in common.

    Attributes:
        kind: how the names of its classes in transformers begin.
        video: the class of its video processor.
    """

    image_tokens = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    kind: str
    video: str

    def new_processor(self, tokenizer: Any, template: str, tower: Tower) -> Any:
        import transformers

        smallest = (tower.patch * tower.merge) ** 2
        options: dict[str, Any] = {
            "size": {"shortest_edge": smallest, "longest_edge": 1024 * smallest},
            "patch_size": tower.patch,
            "merge_size": tower.merge,
            "temporal_patch_size": 2,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
        return getattr(transformers, f"{self.kind}Processor")(
            image_processor=transformers.Qwen2VLImageProcessor(**options),
            tokenizer=tokenizer,
            video_processor=getattr(transformers, self.video)(**options),
            chat_template=template,
        )

    def new_of(
        self,
        text: dict[str, Any],
        token: Mapping[str, int],
        tower: Tower,
        rope: Mapping[str, Any],
        fields: Mapping[str, Any],
    ) -> Any:
        """A model with these fields of its own for positions and vision tower."""
        import transformers

        config = getattr(transformers, f"{self.kind}Config")(
            text_config=text | {"rope_parameters": {**text["rope_parameters"], **rope}},
            vision_config={
                "depth": tower.layers,
                "hidden_size": tower.hidden,
                "intermediate_size": tower.inner,
                "num_heads": tower.heads,
                "patch_size": tower.patch,
                "spatial_merge_size": tower.merge,
                "out_hidden_size": text["hidden_size"],
                **fields,
            },
            tie_word_embeddings=text["tie_word_embeddings"],
            image_token_id=token["<|image_pad|>"],
            video_token_id=token["<|video_pad|>"],
            vision_start_token_id=token["<|vision_start|>"],
            vision_end_token_id=token["<|vision_end|>"],
        )
        return getattr(transformers, f"{self.kind}ForConditionalGeneration")(config)


class Qwen3VL(Qwen):
    """Qwen/Qwen3-VL-*B-Instruct."""

    model_type = "qwen3_vl"
    kind, video = "Qwen3VL", "Qwen3VLVideoProcessor"

    def new_model(self, text: dict[str, Any], token: Mapping[str, int], tower: Tower) -> Any:
        rope = {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
        positions = (tower.image // tower.patch) ** 2
        fields = {"num_position_embeddings": positions, "deepstack_visual_indexes": [0]}
        return self.new_of(text, token, tower, rope, fields)
