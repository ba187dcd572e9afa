"""Idefics3 and SmolVLM: an image as a grid of tiles and the whole of it, plain positions.

SmolVLM's first release is of this `model_type`. SmolVLM2 calls the same layout `smolvlm`; its
processor needs the package num2words, which is not among the pinned ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from learner.families.base import Family, NewFamily, Tower


class Idefics3(Family, NewFamily):
    """HuggingFaceTB/SmolVLM-*-Instruct and HuggingFaceM4/Idefics3-8B-Llama3."""

    model_type = "idefics3"
    languages = ("llama",)
    tower_only = frozenset({"pixel_values", "pixel_attention_mask"})
    image_tokens = (
        "<fake_token_around_image>",
        "<image>",
        "<end_of_utterance>",
        "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
    )
    placeholder = "<image>"

    def split_images(
        self, image_tensors: Mapping[str, torch.Tensor], count: int
    ) -> list[dict[str, Any]]:
        # [images, tiles, ...]: images of several sizes could be stacked only with blank tiles.
        images = super().split_images(image_tensors, count)
        return [{name: value[0] for name, value in image.items()} for image in images]

    def image_features(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> Any:
        # All tiles as those of one sequence; the features are again a row a tile.
        return super().image_features(model, {n: value[None] for n, value in inputs.items()})

    def new_processor(self, tokenizer: Any, template: str, tower: Tower) -> Any:
        import transformers

        # As large as a tile, so an image is one; a larger `size` makes more of it.
        return transformers.Idefics3Processor(
            image_processor=transformers.Idefics3ImageProcessor(
                size={"longest_edge": tower.image}, max_image_size={"longest_edge": tower.image}
            ),
            tokenizer=tokenizer,
            image_seq_len=tower.tokens,
            chat_template=template,
        )

    def new_model(self, text: dict[str, Any], token: Mapping[str, int], tower: Tower) -> Any:
        import transformers

        config = transformers.Idefics3Config(
            text_config=text | {"model_type": "llama"},
            vision_config=tower.config(),
            image_token_id=token["<image>"],
            pad_token_id=text["pad_token_id"],
            scale_factor=tower.merge,
            tie_word_embeddings=text["tie_word_embeddings"],
        )
        return transformers.Idefics3ForConditionalGeneration(config)


class SmolVLM(Idefics3):
    """HuggingFaceTB/SmolVLM2-*-Instruct."""

    model_type = "smolvlm"
