"""Tiny policies from the real config classes: the same code paths as a 4B model, in megabytes.

A tiny model is a random-initialised `Qwen3VLForConditionalGeneration` or
`InternVLForConditionalGeneration` with a byte-level BPE tokenizer trained on demonstrations
of the built-in tasks. The response tags stay plain text: they are ordinary BPE pieces, never
special tokens (a special tag would vanish when decoded with `skip_special_tokens`).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    set_seed,
)

from tasks.load import load_task

Family = Literal["qwen3_vl", "internvl"]
FAMILIES: tuple[Family, ...] = ("qwen3_vl", "internvl")

VOCAB_SIZE = 640
IMAGE_SIZE = 64
PATCH_SIZE = 8
MERGE = 2
"""A 64x64 image makes (64 / 8 / 2)^2 = 16 visual tokens: one a cell of a 4x4 Sudoku."""

# A tag with its newline, a cell name and a grid cell are each one piece, so that one token is
# one thing to say; the rest splits as in the usual byte-level pattern.
_PIECES = Regex(r"</?[a-z]+>\n?|r\dc\d| ?[0-9\-]| ?[A-Za-z]+|\n| +|[^\sA-Za-z0-9]")

# What is said does not depend on how it is drawn, so the pictures are as small as they go.
_SUDOKU = {"size": 4, "cell_size": 16, "font_size": 12, "margin": 0}
_CORPUS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sudoku", _SUDOKU | {"blanks": 8, "prompt": "brief"}),
    ("sudoku", _SUDOKU | {"blanks": 6, "prompt": "full"}),
    ("graph_coloring", {"canvas": 96, "vertices": 5, "prompt": "brief"}),
    ("graph_coloring", {"canvas": 96, "vertices": 7, "prompt": "full"}),
)

_QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}IMAGE_PLACEHOLDER"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_IMAGE_PLACEHOLDER: dict[Family, str] = {
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>\n",
}


def make_tiny(family: Family, out: Path, seed: int = 0) -> dict[str, int]:
    """Write a tiny checkpoint of `family` to `out` and return its sizes.

    Deterministic in `seed`. Returns `{"parameters": n, "vision_parameters": n, "vocabulary": n}`.
    Raises ValueError for an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"models make: no family {family!r}; choose one of {', '.join(FAMILIES)}")
    set_seed(seed)
    processor = _processor(family, _tokenizer(family, seed))
    model = _model(family, processor)
    out.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(out)
    model.save_pretrained(out)
    vision = sum(p.numel() for name, p in model.named_parameters() if "vis" in name)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vision_parameters": vision,
        "vocabulary": len(processor.tokenizer),
    }


@cache
def _corpus(seed: int) -> tuple[str, ...]:
    """Prompts and demonstrations of the built-in tasks."""
    texts = []
    for index, (name, knobs) in enumerate(_CORPUS):
        task = load_task(name)
        spec = task.spec(**knobs)
        rng = np.random.default_rng([seed, index])
        for _ in range(150):
            problem = task.generate(rng, spec)
            texts += [problem.prompt]
            texts += [task.demonstrate(problem, "terse"), task.demonstrate(problem, "verbose")]
    return tuple(texts)


def _tokenizer(family: Family, seed: int) -> PreTrainedTokenizerFast:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    extra: dict[str, str] = {}
    if family == "qwen3_vl":
        specials += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    else:
        extra = {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
        specials += list(extra.values())
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PIECES, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        _corpus(seed),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=specials,
        extra_special_tokens=extra or None,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def _processor(family: Family, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    template = _QWEN_TEMPLATE.replace("IMAGE_PLACEHOLDER", _IMAGE_PLACEHOLDER[family])
    if family == "qwen3_vl":
        from transformers import Qwen2VLImageProcessor, Qwen3VLVideoProcessor

        smallest = (PATCH_SIZE * MERGE) ** 2
        size = {"shortest_edge": smallest, "longest_edge": 1024 * smallest}
        shape = {"patch_size": PATCH_SIZE, "merge_size": MERGE, "temporal_patch_size": 2}
        mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        return Qwen3VLProcessor(
            image_processor=Qwen2VLImageProcessor(size=size, **shape, **mean),
            tokenizer=tokenizer,
            video_processor=Qwen3VLVideoProcessor(size=size, **shape, **mean),
            chat_template=template,
        )
    from transformers import GotOcr2ImageProcessor, InternVLVideoProcessor

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size=size, crop_to_patches=False, min_patches=1, max_patches=1
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE // MERGE) ** 2,
        chat_template=template,
    )


def _model(family: Family, processor: ProcessorMixin) -> PreTrainedModel:
    tokenizer: PreTrainedTokenizerFast = processor.tokenizer

    def token(text: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(text))

    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model: PreTrainedModel
    if family == "qwen3_vl":
        config = Qwen3VLConfig(
            text_config=text
            | {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [6, 5, 5],
                    "mrope_interleaved": True,
                }
            },
            vision_config={
                "depth": 2,
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_heads": 4,
                "patch_size": PATCH_SIZE,
                "spatial_merge_size": MERGE,
                "out_hidden_size": 128,
                "num_position_embeddings": (IMAGE_SIZE // PATCH_SIZE) ** 2,
                "deepstack_visual_indexes": [0],
            },
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
            tie_word_embeddings=True,
        )
        model = Qwen3VLForConditionalGeneration(config)
    else:
        config_internvl = InternVLConfig(
            text_config=text
            | {
                "model_type": "qwen3",
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            vision_config={
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": IMAGE_SIZE,
                "patch_size": PATCH_SIZE,
                "use_qk_norm": False,
            },
            image_token_id=token("<IMG_CONTEXT>"),
            image_seq_length=(IMAGE_SIZE // PATCH_SIZE // MERGE) ** 2,
            downsample_ratio=1 / MERGE,
            tie_word_embeddings=True,
        )
        model = InternVLForConditionalGeneration(config_internvl)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model.to(torch.float32)
