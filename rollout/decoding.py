"""Between token ids and text, exactly: encoding that adds nothing, decoding with offsets."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from rollout.models import ModelError


def encode(tokenizer: Any, text: str, literal: bool = False) -> list[int]:
    """Token ids of text, adding nothing; `literal`: special tokens spelled out are not read."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=literal)[
        "input_ids"
    ]
    return ids


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Every special token by id, named in the tokenizer's config or only added to it."""
    added = tokenizer.added_tokens_decoder.items()
    return {index: token.content for index, token in added if token.special}


class Decoder:
    """Decodes token ids to text and says which characters each token made.

    Works on bytes, so a character split over tokens and invalid UTF-8 (shown as U+FFFD) are
    placed exactly. Reads byte-level BPE (Qwen, InternVL, Llama 3 and most others) and
    SentencePiece's way to write spaces and bytes (LLaVA, Mistral, Gemma), whose tokenizers may
    put a space before a text; it stays, as a policy writes it too.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Raises ModelError where a sample text does not come back from the tokenizer's ids."""
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        whole = {index: token.content.encode("utf-8", "replace") for index, token in added}
        ids = encode(tokenizer, _SAMPLE, literal=True)
        unchanged = 0
        for self._bytes_of in (_byte_level, _sentencepiece):
            self._cache = dict(whole)
            text = self.decode(ids)[0]
            if text in (_SAMPLE, f" {_SAMPLE}"):
                return
            pairs = zip(text, _SAMPLE, strict=False)
            unchanged = max(
                unchanged, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            )
        raise ModelError(
            f"its tokenizer loses {_SAMPLE[unchanged:][:12]!r} of a sample text; take a "
            "checkpoint with a byte-level or byte-fallback tokenizer"
        )

    def piece(self, token_id: int) -> bytes:
        """The bytes a token stands for; unknown ids (padding of the vocabulary) are empty."""
        known = self._cache.get(token_id)
        if known is None:
            token = self._tokenizer.convert_ids_to_tokens(token_id)
            known = b"" if token is None else self._bytes_of(token)
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


def _byte_level(token: str) -> bytes:
    """The bytes of a token of byte-level BPE."""
    if all(c in _BYTE_OF for c in token):
        return bytes(_BYTE_OF[c] for c in token)
    return token.encode("utf-8", "replace")


def _sentencepiece(token: str) -> bytes:
    """The bytes of a token of SentencePiece, whose U+2581 is a space and `<0x0A>` a byte."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode("utf-8", "replace")


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE vocabularies, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in set(printable)]
    alphabet = {chr(b): b for b in printable}
    alphabet |= {chr(256 + i): b for i, b in enumerate(rest)}
    return alphabet


_BYTE_OF = _byte_level_alphabet()

_SAMPLE = (
    '<perception>\n1 - 3\n0-1  7\n\n</perception>\n{"a": [[0, 12]]}\tIt\'s é, ß, 漢字, 🙂. '
    "Two  blanks.\n\n<answer>\nr1c2=3\n</answer>"
)
"""What no tokenizer may change: tags, digits, white space, characters of one to four bytes."""
