"""Between text and tokens: chat prompts, exact decoding with offsets, segments by token.

Both the sampler and the learner's SFT use these, so a demonstration and a rollout of the same
text are the same tokens. Nothing here imports an engine.
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from PIL import Image

from rollout.models import (
    NO_TEMPLATE,
    ModelError,
    first_line,
    json_beside,
    require_model,
    token_ids,
)
from tasks.core import NO_SEGMENT, SEGMENTS, DataError, Segment


def load_processor(path: str, field: str = "model.path") -> Any:
    """The Hugging Face processor of a checkpoint folder or hub name.

    Raises ModelError naming `field` and the folder when it holds none, none that reads images, or
    one that `Chat` cannot use.
    """
    require_model(path, field)
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path)
    except Exception as error:  # tokenizers raises no narrower one
        raise ModelError(
            f"{field}: {path}: no processor could be loaded ({first_line(error)}); a "
            "VLM folder holds preprocessor_config.json and its tokenizer beside the weights"
        ) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ModelError(
            f"{field}: {path}: has no image processor; Equipoise trains vision-language models"
        )
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    return _usable(processor, field, path)


def load_reader(path: str, field: str = "frozen model") -> Any:
    """What reads prompts for a frozen model: a VLM's processor, a text-only model's tokenizer.

    Raises ModelError when the checkpoint has no config, not the reader its config asks for, or one
    that `Chat` cannot use.
    """
    require_model(path, field)
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path)
        if hasattr(config, "vision_config"):
            return load_processor(path, field)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{field}: {path}: no tokenizer could be loaded ({first_line(error)}); a "
            "folder holds config.json and its tokenizer beside the weights"
        ) from error
    return _usable(tokenizer, field, path)


def _usable(reader: Any, field: str, path: str) -> Any:
    """The reader, if a conversation can be written with it."""
    try:
        Chat(reader)
    except ModelError as error:
        raise ModelError(f"{field}: {path}: {error}") from error
    return reader


def tokenizer_of(reader: Any) -> Any:
    """The tokenizer of a processor; a text-only model's reader is the tokenizer itself."""
    return getattr(reader, "tokenizer", reader)


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


class Chat:
    """How one checkpoint writes a conversation in tokens, and what ends a turn of it.

    Text of data is characters, never control tokens: the chat template is rendered around a mark
    and the text put in the mark's place, so no template sees, changes or obeys it.

    Attributes:
        tokenizer: see `tokenizer_of`.
        decoder: from its tokens back to text.
        image_token: the id that stands for an image; None for a text-only model.
        end: what the template closes an assistant's turn with; SFT teaches it.
        ends: every id that ends a response: `end`, the tokenizer's own end, and those that the
            folder's generation_config.json and config.json name.
        placeholders: the other special tokens but padding: images and the like. A policy may
            sample one; a learner would then count an image that is not there. A response stops
            at such a token, so it is only ever a target and never an input.
    """

    def __init__(self, reader: Any) -> None:
        """Of a processor or a text-only model's tokenizer; raises ModelError naming no folder."""
        self._reader, self.tokenizer = reader, tokenizer_of(reader)
        if not reader.chat_template:
            raise ModelError(NO_TEMPLATE)
        self.decoder = Decoder(self.tokenizer)
        shows = reader is not self.tokenizer
        config = json_beside(self.tokenizer, "config.json")
        named = config.get("image_token_id", config.get("image_token_index"))
        self.image_token: int | None = getattr(reader, "image_token_id", named) if shows else None
        if shows and (self.image_token is None or named not in (None, self.image_token)):
            raise ModelError(
                f"its processor's image token is {self.image_token}, its config.json's {named}; "
                "take both from one checkpoint"
            )
        self.image_block = lru_cache(maxsize=256)(self._make_image_block)
        self._frame = lru_cache(maxsize=256)(self._make_frame)
        self._frame((True,))
        self.end, self.ends = self._find_ends(config)
        specials = set(special_tokens(self.tokenizer))
        self.placeholders = sorted(specials - self.ends - {self.tokenizer.pad_token_id})
        if self.image_token is not None and self.image_token not in self.placeholders:
            self.placeholders.append(self.image_token)  # not special, or also the padding
        added = set(self.tokenizer.added_tokens_decoder)
        self._control = specials | (self.ends & added) | {self.image_token}
        self._check_vocabulary(config)
        if shows and self.image_token not in self.image_block((64, 64)):
            raise ModelError("its processor makes no image tokens of an image")

    def prompt(self, parts: Sequence[Any]) -> list[int]:
        """Ids of a one-turn conversation, ending where the response begins.

        `parts`: what the user says in order, each a text or anything else for an image (see
        `tasks.placeholders`), which becomes one `image_token`, not yet expanded. Raises DataError
        where the tokenizer cannot read a text as characters, ModelError where the chat template
        does not write such a turn.
        """
        parts = parts or [""]
        frame = self._frame(tuple(isinstance(part, str) for part in parts))
        said = (part for part in parts if isinstance(part, str))
        texts = [cut(text) for cut, text in zip(frame.cuts, said, strict=True)]
        ids = encode(self.tokenizer, _between(frame.around, texts))
        around = [encode(self.tokenizer, text) for text in frame.around]
        if self._controls(ids) != self._controls(itertools.chain(*around)):
            ids = [*around[0]]
            for text, after in zip(texts, around[1:], strict=True):
                ids += self.text(text) + after
        return [*frame.start, *ids]

    def text(self, text: str) -> list[int]:
        """Ids of text as characters; raises DataError where the tokenizer cannot read it so."""
        ids = encode(self.tokenizer, text, literal=True)
        if controls := self._controls(ids):
            token = self.tokenizer.convert_ids_to_tokens(controls[0])
            raise DataError(
                f"holds {token!r}, which this model's tokenizer reads as a control token "
                "and never as text; remove it"
            )
        return ids

    def expanded(self, ids: Sequence[int], sizes: Iterable[tuple[int, int]]) -> list[int]:
        """A prompt's ids with as many placeholders as its images take, by width and height."""
        blocks = map(self.image_block, sizes)
        return [
            i for token in ids for i in (next(blocks) if token == self.image_token else [token])
        ]

    def _make_image_block(self, size: tuple[int, int]) -> list[int]:
        token = self.tokenizer.convert_ids_to_tokens(self.image_token)
        image = Image.new("RGB", size)
        made = self._reader(images=[image], text=[token], add_special_tokens=False)
        return [int(index) for index in made["input_ids"][0]]

    def _controls(self, ids: Iterable[int]) -> list[int]:
        return [index for index in ids if index in self._control]

    def _start(self, head: str) -> list[int]:
        """What the tokenizer begins a text with, where a VLM's template leaves that to it."""
        first = self.tokenizer.bos_token_id
        if first is None or self.image_token is None or head.startswith(self.tokenizer.bos_token):
            return []
        return [first] if self.tokenizer("a")["input_ids"][0] == first else []

    def _render(self, said: Mapping[str, Sequence[str | None]], plain: Sequence[str] = ()) -> str:
        """The chat template's text of what each role says, one turn each; None is an image."""
        messages: list[dict[str, Any]] = []
        for role, parts in said.items():
            # Templates of text-only models take a string.
            alone = self._reader is self.tokenizer or role in plain
            content = [
                {"type": "image"} if part is None else {"type": "text", "text": part}
                for part in parts
            ]
            messages.append({"role": role, "content": parts[0] if alone else content})
        try:
            rendered: str = self._reader.apply_chat_template(
                messages, add_generation_prompt="assistant" not in said, tokenize=False
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ModelError(f"its chat template fails ({first_line(error)}); mend it") from error
        return rendered

    def _make_frame(self, kinds: tuple[bool, ...]) -> _Frame:
        """How the template writes a user's turn of these parts; True is a text."""
        said = [_MARK if text else None for text in kinds]
        around = self._render({"user": said}).split(_MARK)
        padded, cuts = f" \n{_MARK}\n ", list[Callable[[str], str]]()
        for at in (at for at, text in enumerate(kinds) if text):
            found = self._render({"user": [*said[:at], padded, *said[at + 1 :]]})
            for cut in (str, str.strip, str.lstrip, str.rstrip):
                texts = [_MARK] * kinds.count(True)
                texts[len(cuts)] = cut(padded)
                if len(around) == len(texts) + 1 and found == _between(around, texts):
                    cuts.append(cut)
                    break
            else:
                raise ModelError(
                    "its chat template does not write a user's text once, as it is; mend it"
                )
        ids = itertools.chain.from_iterable(encode(self.tokenizer, text) for text in around)
        written, images = list(ids).count(self.image_token), kinds.count(False)
        if self.image_token is not None and written != images:
            token = self.tokenizer.convert_ids_to_tokens(self.image_token)
            raise ModelError(
                f"its chat template writes {written} image placeholders ({token!r}) for "
                f"{images} images; take the template that belongs to the checkpoint"
            )
        return _Frame(self._start(around[0]), around, cuts)

    def _find_ends(self, config: Mapping[str, Any]) -> tuple[int, frozenset[int]]:
        tokenizer = self.tokenizer
        added = set(tokenizer.added_tokens_decoder)
        said = {"user": ["a"], "assistant": [_MARK]}
        try:
            _, mark, closing = self._render(said).rpartition(_MARK)
        except ModelError:  # some take an assistant's words as a string only
            _, mark, closing = self._render(said, ("assistant",)).rpartition(_MARK)
        if not mark:
            raise ModelError("its chat template leaves an assistant's text out; mend it")
        template = [index for index in encode(tokenizer, closing) if index in added][:1]
        own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        declared = token_ids(json_beside(tokenizer, "generation_config.json").get("eos_token_id"))
        # Configs repeat their class's defaults, so there only a control token is believed.
        for part in (config, config.get("text_config") or {}):
            declared += [index for index in token_ids(part.get("eos_token_id")) if index in added]
        ends = template + own + declared
        if not ends:
            raise ModelError(
                "nothing ends a response: no end-of-turn token in its chat template, no eos_token, "
                "no eos_token_id in generation_config.json; set one"
            )
        return ends[0], frozenset(ends)

    def _check_vocabulary(self, config: Mapping[str, Any]) -> None:
        size = {**config, **(config.get("text_config") or {})}.get("vocab_size")
        plain, shown = ["a"], [None, "a"]
        seen = [self.prompt(said) for said in (plain, shown)[: 1 + (self.image_token is not None)]]
        last = max(self.end, *itertools.chain(*seen))
        if size is not None and last >= size:
            token = self.tokenizer.convert_ids_to_tokens(last)
            raise ModelError(
                f"its tokenizer's {token!r} is token {last}, and its model knows {size}; resize "
                "the model's embeddings, or take the tokenizer that belongs to it"
            )


class _Frame(NamedTuple):
    """Ids that begin a prompt, text around a user's texts, how white space of each is cut."""

    start: list[int]
    around: list[str]
    cuts: list[Callable[[str], str]]


def _between(around: Sequence[str], texts: Sequence[str]) -> str:
    """Each of the texts between two of those around them."""
    return around[0] + "".join(map("".join, zip(texts, around[1:], strict=True)))


_MARK = "sphinxofblackquartz"
"""Text that occurs in no chat template."""


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
        same = 0
        for self._bytes_of in (_byte_level, _sentencepiece):
            self._cache = dict(whole)
            text = self.decode(ids)[0]
            if text in (_SAMPLE, f" {_SAMPLE}"):
                return
            pairs = zip(text, _SAMPLE, strict=False)
            same = max(
                same, sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            )
        raise ModelError(
            f"its tokenizer loses {_SAMPLE[same:][:12]!r} of a sample text; take a "
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
