"""Between text and tokens: chat prompts, exact decoding with offsets, segments by token.

Both the sampler and the learner's SFT use these, so a demonstration and a rollout of the same
text are the same tokens. Nothing here imports an engine.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rollout.models import why_missing
from tasks.core import NO_SEGMENT, SEGMENTS, DataError, Segment


class ModelError(ValueError):
    """A checkpoint that cannot be used; the message names the folder and the remedy."""


def load_processor(path: str, field: str = "model.path") -> Any:
    """The Hugging Face processor of a checkpoint folder or hub name.

    Raises ModelError naming `field` and the folder when it holds none, or none that reads images.
    """
    _require(path, field)
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"{field}: {path}: no processor could be loaded ({str(error).splitlines()[0]}); a "
            "VLM folder holds preprocessor_config.json and its tokenizer beside the weights"
        ) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ModelError(
            f"{field}: {path}: has no image processor; Equipoise trains vision-language models"
        )
    return processor


def _require(path: str, field: str) -> None:
    if wrong := why_missing(path):
        raise ModelError(f"{field}: {path}: {wrong}")


def load_reader(path: str) -> Any:
    """What reads prompts for a frozen model: a VLM's processor, a text-only model's tokenizer.

    Raises ModelError when the checkpoint has no config, or not the reader its config asks for.
    """
    _require(path, "frozen model")
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path)
        if hasattr(config, "vision_config"):
            return load_processor(path, "frozen model")
        tokenizer = AutoTokenizer.from_pretrained(path)
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(
            f"frozen model: {path}: no tokenizer could be loaded ({str(error).splitlines()[0]}); a "
            "folder holds config.json and its tokenizer beside the weights"
        ) from error
    if not tokenizer.chat_template:
        raise ModelError(f"frozen model: {path}: has no chat template; take an instruct checkpoint")
    return tokenizer


def tokenizer_of(reader: Any) -> Any:
    """The tokenizer of a processor; a text-only model's reader is the tokenizer itself."""
    return getattr(reader, "tokenizer", reader)


def render_prompt(processor: Any, prompt: str, *, with_image: bool) -> str:
    """The chat-template text of a one-turn conversation, ending where the response begins.

    The image placeholder is not yet expanded to one token a visual feature. Raises DataError
    when the prompt holds the text of a special token: it would be read as one.
    `processor` may be a text-only model's tokenizer (see `load_reader`).
    """
    for special in special_tokens(tokenizer_of(processor)).values():
        if special in prompt:
            raise DataError(
                f"prompt: contains the special token {special!r}, which the tokenizer would not "
                "read as text; remove it from the prompt"
            )
    parts = [{"type": "image"}] if with_image else []
    parts.append({"type": "text", "text": prompt})
    # Templates of text-only models take a string.
    content = prompt if tokenizer_of(processor) is processor else parts
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return text


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text, adding nothing."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def encode_literal(tokenizer: Any, text: str) -> list[int]:
    """Token ids of text as plain characters: special tokens spelled out in it are not read."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]
    return ids


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Every special token by id, named in the tokenizer's config or only added to it."""
    added = tokenizer.added_tokens_decoder.items()
    return {index: token.content for index, token in added if token.special}


def placeholder_ids(tokenizer: Any) -> list[int]:
    """Ids of special tokens other than end-of-turn and padding: image placeholders and the like.

    A policy may sample one; a learner would then count an image that is not there. The sampler
    ends the response at such a token, so it is only ever a target and never an input.
    """
    keep = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    return sorted(set(special_tokens(tokenizer)) - keep)


class Decoder:
    """Decodes token ids to text and says which characters each token made.

    Works on bytes, so a character split over tokens and invalid UTF-8 (shown as U+FFFD) are
    placed exactly. Needs a byte-level BPE tokenizer (Qwen, InternVL, Llama 3 and most others).
    """

    def __init__(self, tokenizer: Any) -> None:
        self._special = set(special_tokens(tokenizer))
        self._tokenizer = tokenizer
        self._byte_of = _byte_level_alphabet()
        self._cache: dict[int, bytes] = {}

    def piece(self, token_id: int) -> bytes:
        """The bytes a token stands for; unknown ids (padding of the vocabulary) are empty."""
        known = self._cache.get(token_id)
        if known is None:
            token = self._tokenizer.convert_ids_to_tokens(token_id)
            if token is None:
                known = b""
            elif token_id in self._special or not all(c in self._byte_of for c in token):
                known = token.encode("utf-8", "replace")
            else:
                known = bytes(self._byte_of[c] for c in token)
            self._cache[token_id] = known
        return known

    def decode(self, ids: Sequence[int] | np.ndarray) -> tuple[str, np.ndarray]:
        """(text, int32 [T+1] character offsets): token i made text[offsets[i]:offsets[i+1]]."""
        stream = codecs.getincrementaldecoder("utf-8")("replace")
        parts: list[str] = []
        offsets = np.zeros(len(ids) + 1, np.int32)
        length = 0
        for index, token_id in enumerate(ids):
            part = stream.decode(self.piece(int(token_id)))
            parts.append(part)
            length += len(part)
            offsets[index + 1] = length
        rest = stream.decode(b"", final=True)
        if rest and len(ids):
            parts.append(rest)
            offsets[-1] += len(rest)
        return "".join(parts), offsets


def label_segments(
    offsets: np.ndarray, spans: Mapping[Segment, tuple[int, int]], shift: int = 0
) -> np.ndarray:
    """int8 [T]: the segment of each token, by where the token's text starts.

    Args:
        offsets: int [T+1], from `Decoder.decode`.
        spans: segment -> [start, end) in characters of the parsed text.
        shift: how many characters of the parsed text come before the decoded text (the length
            of a forced prefix).
    """
    starts = offsets[:-1] + shift
    segments = np.full(len(starts), NO_SEGMENT, np.int8)
    for index, segment in enumerate(SEGMENTS):
        if segment in spans:
            start, end = spans[segment]
            segments[(starts >= start) & (starts < end)] = index
    return segments


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE vocabularies, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in set(printable)]
    alphabet = {chr(b): b for b in printable}
    alphabet |= {chr(256 + i): b for i, b in enumerate(rest)}
    return alphabet
