"""Model folders as other people leave them: a tiny model's, with another tokenizer or config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from learner.tiny import VOCAB_SIZE, _corpus
from rollout.tokens import Chat, ModelError, load_processor, load_reader

Habit = Callable[[Path], None]
"""Changes a folder in place."""


def with_habits(folder: Path, out: Path, *habits: Habit) -> Path:
    """A copy of a model's folder with habits, in order."""
    shutil.copytree(folder, out)
    for habit in habits:
        habit(out)
    return out


def change(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    found = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(found | fields), encoding="utf-8")


def several_ends(folder: Path) -> None:
    """The tokenizer's end is not the template's, and generation_config.json names more."""
    change(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    change(folder / "generation_config.json", eos_token_id=[0, 2], temperature=0.1, top_k=1)


def no_pad(folder: Path) -> None:
    """No padding token, as Llama's tokenizers have none."""
    change(folder / "tokenizer_config.json", pad_token=None)


def no_template(folder: Path) -> None:
    """A base checkpoint."""
    (folder / "chat_template.jinja").unlink()


def sentencepiece(folder: Path) -> None:
    """Spaces as U+2581, other bytes as `<0x0A>`, and a space before every text (Llama 2)."""
    processor = AutoProcessor.from_pretrained(folder)
    old = processor.tokenizer
    specials = [token.content for _, token in sorted(old.added_tokens_decoder.items())]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.train_from_iterator(
        (line for text in _corpus(0) for line in text.split("\n")),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[*specials, *bytes_],
            show_progress=False,
            limit_alphabet=60,
        ),
    )
    made = json.loads(bpe.to_str())
    made["added_tokens"] = [t for t in made["added_tokens"] if t["content"] not in bytes_]
    bpe = Tokenizer.from_str(json.dumps(made))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    names = ("eos_token", "pad_token", "extra_special_tokens", "model_max_length")
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, **{name: config[name] for name in names if name in config}
    )
    processor.tokenizer.chat_template = old.chat_template
    processor.save_pretrained(folder)


def assert_refused(model: Path, words: str) -> None:
    """By the loader of policies and by that of frozen models, in one line with the folder."""
    for load in (load_processor, load_reader):
        with pytest.raises(ModelError) as refusal:
            load(str(model))
        message = str(refusal.value)
        assert words in message and str(model) in message and "\n" not in message


def whole(chat: Chat, processor: object, said: list[tuple[str, list[str | None]]]) -> str:
    """A conversation that ends with a user's turn, as the template itself renders it."""
    messages = [
        {
            "role": role,
            "content": [
                {"type": "image"} if part is None else {"type": "text", "text": part}
                for part in parts
            ],
        }
        for role, parts in said
    ]
    found: str = processor.apply_chat_template(  # type: ignore[attr-defined]
        messages, add_generation_prompt=True, tokenize=False
    )
    return found
