"""Texts in many scripts, and the tokenizer and chat template of a tiny language model."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = [
    "The grid has 3 rows, isn't it?\n\tYes:  4x4.",
    "Überstraße, déjà vu, ñandú",
    "Привет, мир! Γειά σου κόσμε.",
    "漢字とかな、中文。 한국어",
    "שלום עולם مرحبا بالعالم",
    "🙂🚲🍎 a+b=π·r²",
]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


SCRIPTS = (
    (0x41, 0x7A), (0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x621, 0x64A),
    (0x905, 0x939), (0xE01, 0xE30), (0x3041, 0x30FE), (0x4E00, 0x9FBF), (0xAC00, 0xD7A3),
    (0x2200, 0x22FF), (0x1F300, 0x1F64F),
)  # fmt: skip
"""First and last of each: Latin, Greek, Cyrillic, Hebrew, Arabic, Devanagari, Thai, kana, Chinese
characters, Hangul, signs of mathematics, emoji."""
BETWEEN = (" ", " ", " ", "  ", "\t", ", ", ".\n", "?\n\n", " = ", "-", "<perception>", "12 ", "0")


def tiny_bpe() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS * 4, trainer)
    return bpe


def lines(count: int, seed: int = 0) -> Iterator[str]:
    """Words of one script or of several, between them white space, signs, digits and tags."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        found = []
        for script in rng.integers(len(SCRIPTS), size=rng.integers(1, 6)):
            first, last = SCRIPTS[script]
            word = rng.integers(first, last + 1, size=rng.integers(1, 9))
            found += ["".join(map(chr, word)), BETWEEN[rng.integers(len(BETWEEN))]]
        yield unicodedata.normalize("NFC", "".join(found))  # as Qwen's tokenizers read text
