"""Qwen2.5-VL: M-RoPE, images of any size, a tower that attends within windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from learner.families.base import TINY_MERGE, TINY_PATCH, TINY_ROPE, MRopeFamily, Parts, TinyFamily
from learner.families.qwen3_vl import (
    QWEN_PLACEHOLDER,
    QWEN_TOKENS,
    QWEN_TOWER,
    qwen_image_options,
    qwen_token_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin


class Qwen25VL(MRopeFamily, TinyFamily):
    """Qwen/Qwen2.5-VL-*B-Instruct."""

    model_type = "qwen2_5_vl"
    parts: ClassVar[Parts] = {
        "vision": ("model.visual.",),
        "merger": ("model.visual.merger.",),
        "language": ("model.language_model.",),
        "head": ("lm_head.",),
    }
    image_tokens = QWEN_TOKENS
    placeholder = QWEN_PLACEHOLDER

    def tiny_processor(self, tokenizer: PreTrainedTokenizerFast, template: str) -> ProcessorMixin:
        from transformers import (
            Qwen2_5_VLProcessor,
            Qwen2VLImageProcessor,
            Qwen2VLVideoProcessor,
        )

        options = qwen_image_options()
        return Qwen2_5_VLProcessor(
            image_processor=Qwen2VLImageProcessor(**options),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(**options),
            chat_template=template,
        )

    def tiny_model(self, text: dict[str, Any], token: Mapping[str, int]) -> PreTrainedModel:
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        # This family's config has no head_dim of its own: it is hidden_size over heads.
        config = Qwen2_5_VLConfig(
            text_config={name: value for name, value in text.items() if name != "head_dim"}
            | {
                "rope_parameters": {
                    **TINY_ROPE,
                    "mrope_section": [4, 6, 6],
                }
            },
            vision_config={
                **QWEN_TOWER,
                # Four windows in a 64x64 image; the last block sees across them.
                "window_size": 2 * TINY_PATCH * TINY_MERGE,
                "fullatt_block_indexes": [1],
            },
            tie_word_embeddings=True,
            **qwen_token_ids(token),
        )
        model: PreTrainedModel = Qwen2_5_VLForConditionalGeneration(config)
        return model
