"""InternVL as transformers has it (checkpoints named `-HF`): tiles of one size, plain positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from learner.families.base import (
    TINY_IMAGE,
    TINY_MERGE,
    TINY_ROPE,
    TINY_TOKENS,
    TINY_TOWER,
    Family,
    Parts,
    TinyFamily,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin


class InternVL(Family, TinyFamily):
    """OpenGVLab/InternVL3_5-*B-HF."""

    model_type = "internvl"
    parts: ClassVar[Parts] = {
        "vision": ("model.vision_tower.",),
        "merger": ("model.multi_modal_projector.",),
        "language": ("model.language_model.",),
        "head": ("lm_head.",),
    }
    named_tokens: ClassVar[Mapping[str, str]] = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    image_tokens = tuple(named_tokens.values())
    placeholder = "<IMG_CONTEXT>\n"

    def tiny_processor(self, tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
        from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

        size = {"height": TINY_IMAGE, "width": TINY_IMAGE}
        return InternVLProcessor(
            image_processor=GotOcr2ImageProcessor(
                size=size, crop_to_patches=False, min_patches=1, max_patches=1
            ),
            tokenizer=tokenizer,
            video_processor=InternVLVideoProcessor(size=size),
            image_seq_length=TINY_TOKENS,
            chat_template=template,
        )

    def tiny_model(self, text: dict[str, Any], token: Mapping[str, int]) -> PreTrainedModel:
        from transformers import InternVLConfig, InternVLForConditionalGeneration

        config = InternVLConfig(
            text_config=text | {"model_type": "qwen3", "rope_parameters": {**TINY_ROPE}},
            vision_config={**TINY_TOWER, "use_qk_norm": False},
            image_token_id=token["<IMG_CONTEXT>"],
            image_seq_length=TINY_TOKENS,
            downsample_ratio=1 / TINY_MERGE,
            tie_word_embeddings=True,
        )
        model: PreTrainedModel = InternVLForConditionalGeneration(config)
        return model
