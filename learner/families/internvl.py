"""InternVL as transformers has it (checkpoints named `-HF`): tiles of one size, plain positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from learner.families.base import (
    TINY_IMAGE,
    TINY_MERGE,
    TINY_ROPE,
    TINY_TOKENS,
    TINY_TOWER,
    Family,
    TinyFamily,
)


class InternVL(Family, TinyFamily):
    """OpenGVLab/InternVL3_5-*B-HF."""

    model_type = "internvl"
    named_tokens: ClassVar[Mapping[str, str]] = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    image_tokens = tuple(named_tokens.values())
    placeholder = "<IMG_CONTEXT>\n"

    def tiny_processor(self, tokenizer: Any, template: str) -> Any:
        import transformers

        size = {"height": TINY_IMAGE, "width": TINY_IMAGE}
        return transformers.InternVLProcessor(
            image_processor=transformers.GotOcr2ImageProcessor(
                size=size, crop_to_patches=False, min_patches=1, max_patches=1
            ),
            tokenizer=tokenizer,
            video_processor=transformers.InternVLVideoProcessor(size=size),
            image_seq_length=TINY_TOKENS,
            chat_template=template,
        )

    def tiny_model(self, text: dict[str, Any], token: Mapping[str, int]) -> Any:
        import transformers

        config = transformers.InternVLConfig(
            text_config=text | {"model_type": "qwen3", "rope_parameters": {**TINY_ROPE}},
            vision_config={**TINY_TOWER, "use_qk_norm": False},
            image_token_id=token["<IMG_CONTEXT>"],
            image_seq_length=TINY_TOKENS,
            downsample_ratio=1 / TINY_MERGE,
            tie_word_embeddings=True,
        )
        return transformers.InternVLForConditionalGeneration(config)
