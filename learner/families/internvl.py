"""InternVL as transformers has it (checkpoints named `-HF`): tiles of one size, plain positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from learner.families.base import Family, NewFamily, Tower


class InternVL(Family, NewFamily):
    """OpenGVLab/InternVL3_5-*B-HF."""

    model_type = "internvl"
    languages = ("qwen2", "qwen3")
    named_tokens: ClassVar[Mapping[str, str]] = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    image_tokens = tuple(named_tokens.values())
    placeholder = "<IMG_CONTEXT>\n"

    def new_processor(self, tokenizer: Any, template: str, tower: Tower) -> Any:
        import transformers

        size = {"height": tower.image, "width": tower.image}
        return transformers.InternVLProcessor(
            image_processor=transformers.GotOcr2ImageProcessor(
                size=size, crop_to_patches=False, min_patches=1, max_patches=1
            ),
            tokenizer=tokenizer,
            video_processor=transformers.InternVLVideoProcessor(size=size),
            image_seq_length=tower.tokens,
            chat_template=template,
        )

    def new_model(self, text: dict[str, Any], token: Mapping[str, int], tower: Tower) -> Any:
        import transformers

        config = transformers.InternVLConfig(
            text_config={"model_type": "qwen3", **text},
            vision_config={"use_qk_norm": False, **tower.config()},
            image_token_id=token["<IMG_CONTEXT>"],
            image_seq_length=tower.tokens,
            downsample_ratio=1 / tower.merge,
            tie_word_embeddings=text["tie_word_embeddings"],
        )
        return transformers.InternVLForConditionalGeneration(config)
