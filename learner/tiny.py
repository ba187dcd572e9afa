"""Tiny policies from the real config classes: the same code paths as a 4B model, in megabytes.

A tiny model is a random-initialised model of its family's own class (`learner.families`) with a
byte-level BPE tokenizer trained on demonstrations of the built-in tasks. The response tags stay
plain text: they are ordinary BPE pieces, never special tokens (a special tag would vanish when
decoded with `skip_special_tokens`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, set_seed

from learner.families import TINY
from learner.families.base import TINY_TOWER
from tasks.files import replacing
from tasks.load import load_task
from tasks.responses import HARMLESS

FAMILIES = tuple(TINY)

VOCAB_SIZE = 640

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

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}IMAGE_PLACEHOLDER"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny(family: str, out: Path, seed: int = 0) -> dict[str, int]:
    """Write a tiny checkpoint of `family` (see `FAMILIES`) to `out` and return its sizes.

    Deterministic in `seed`. Returns `{"parameters": n, "vision_parameters": n, "vocabulary": n}`,
    the second of the vision tower and its merger. Raises ValueError for an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"models make: no family {family!r}; choose one of {', '.join(FAMILIES)}")
    blueprint = TINY[family]
    set_seed(seed)
    tokenizer = _tokenizer(blueprint.image_tokens, blueprint.named_tokens, seed)
    template = _TEMPLATE.replace("IMAGE_PLACEHOLDER", blueprint.placeholder)
    processor: Any = blueprint.new_processor(tokenizer, template, TINY_TOWER)
    token = {text: int(tokenizer.convert_tokens_to_ids(text)) for text in blueprint.image_tokens}
    model = blueprint.new_model(_text_config(tokenizer), token, TINY_TOWER).to(torch.float32)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    with replacing(out) as fresh:
        processor.save_pretrained(fresh)
        model.save_pretrained(fresh)
    seeing = [
        p for n, p in model.named_parameters() if blueprint.part_of(n) in ("vision", "merger")
    ]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vision_parameters": sum(p.numel() for p in seeing),
        "vocabulary": len(processor.tokenizer),
    }


@cache
def _corpus(seed: int) -> tuple[str, ...]:
    """Prompts and demonstrations of the built-in tasks."""
    texts = []
    for index, (name, knobs) in enumerate(_CORPUS):
        task: Any = load_task(name)
        spec = task.spec(**knobs)
        rng = np.random.default_rng([seed, index])
        for _ in range(150):
            problem = task.generate(rng, spec)
            # The shipped policy's tokenizer was trained before prompts said this.
            texts += [problem.prompt.replace(HARMLESS, "")]
            texts += [task.demonstrate(problem, "terse"), task.demonstrate(problem, "verbose")]
    return tuple(texts)


def _tokenizer(
    image_tokens: tuple[str, ...], named_tokens: Mapping[str, str], seed: int
) -> PreTrainedTokenizerFast:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *image_tokens]
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
        extra_special_tokens=dict(named_tokens) or None,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def _text_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
