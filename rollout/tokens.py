"""Between text and tokens: chat prompts, exact decoding with offsets, segments by token.

Both the sampler and the learner's SFT use these, so a demonstration and a rollout of the same
text are the same tokens. Nothing here imports an engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from rollout.decoding import Decoder, encode, special_tokens
from rollout.models import (
    NO_TEMPLATE,
    NOT_ITS_CODE,
    ModelError,
    first_line,
    json_beside,
    require_model,
    token_ids,
)
from rollout.settings import ModelConfig
from rollout.template import Template, between
from tasks.calls import as_prompt
from tasks.core import NO_SEGMENT, SEGMENTS, DataError, Segment
from tasks.environments import Observation, Role, opened


def load_processor(path: str, field: str = "model.path", reading: ModelConfig | None = None) -> Any:
    """The Hugging Face processor of a checkpoint folder, hub name or pinned URI.

    `reading` says how images and prompts are read (`min_pixels`, `max_pixels`, `system_prompt`);
    the processor carries it wherever it goes, so sampler, learner and SFT read alike.

    Raises ModelError naming `field` and the folder when it holds none, none that reads images, or
    one that `Chat` cannot use or that cannot be told so.
    """
    place = require_model(path, field)
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(place, **NOT_ITS_CODE)
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
    if reading:
        _bound_pixels(processor, path, reading)
        processor.system_prompt = reading.system_prompt
    return _usable(processor, field, path)


def _bound_pixels(processor: Any, path: str, reading: ModelConfig) -> None:
    """Set the area that images are scaled to. Of others `size` is an edge, or tiles are cut."""
    images = processor.image_processor
    limits_set = [name for name in ("min_pixels", "max_pixels") if getattr(reading, name)]
    if not limits_set:
        return
    if pixel_limits(processor) is None:
        raise ModelError(
            f"model.{limits_set[0]}: {path}: a {type(images).__name__} knows no limit of pixels; "
            "leave it out, or set the size of images in the folder's preprocessor_config.json"
        )
    least = reading.min_pixels or images.size["shortest_edge"]
    most = reading.max_pixels or images.size["longest_edge"]
    if least > most:
        raise ModelError(
            f"model.{limits_set[0]}: {path}: its own limits are {images.size['shortest_edge']} to "
            f"{images.size['longest_edge']} pixels; set both min_pixels and max_pixels"
        )
    images.size = type(images.size)(shortest_edge=least, longest_edge=most)


def pixel_limits(processor: Any) -> dict[str, int] | None:
    """The least and the most pixels that a processor scales images to, as its `size` names them.

    None for one that scales to an edge or cuts tiles, and for a text-only model's reader.
    """
    images: Any = getattr(processor, "image_processor", None)
    if "max_pixels" not in getattr(getattr(images, "valid_kwargs", None), "__annotations__", ()):
        return None
    return {edge: images.size[edge] for edge in ("shortest_edge", "longest_edge")}


def load_reader(path: str, field: str = "frozen model") -> Any:
    """What reads prompts for a frozen model: a VLM's processor, a text-only model's tokenizer.

    Raises ModelError when the checkpoint has no config, not the reader its config asks for, or one
    that `Chat` cannot use.
    """
    place = require_model(path, field)
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(place, **NOT_ITS_CODE)
        if hasattr(config, "vision_config"):
            return load_processor(path, field)
        tokenizer = AutoTokenizer.from_pretrained(place, **NOT_ITS_CODE)
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


class Chat:
    """How one checkpoint writes a conversation in tokens, and what ends a turn of it.

    Text of data is characters, never control tokens: the chat template is rendered around a mark
    and the text put in the mark's place, so no template sees, changes or obeys it.

    Attributes:
        tokenizer: see `tokenizer_of`.
        decoder: from its tokens back to text.
        image_token: the id that stands for an image; None for a text-only model.
        system: the text that a conversation begins with, before the user's turn, or nothing.
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
        self.system: list[str] = []
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
        self._template = Template(reader, self.tokenizer, self.image_token)
        self._template.frame(0, (True,))
        self.end, self.ends = self._find_ends(config)
        specials = set(special_tokens(self.tokenizer))
        self.placeholders = sorted(specials - self.ends - {self.tokenizer.pad_token_id})
        if self.image_token is not None and self.image_token not in self.placeholders:
            self.placeholders.append(self.image_token)  # not special, or also the padding
        added = set(self.tokenizer.added_tokens_decoder)
        self._control = specials | (self.ends & added) | {self.image_token}
        self._check_vocabulary(config)
        if prompt := getattr(reader, "system_prompt", ""):
            self._instruct(prompt)
        if shows and self.image_token not in self.image_block((64, 64)):
            raise ModelError("its processor makes no image tokens of an image")

    def prompt(self, parts: Sequence[Any], tools: str = "") -> list[int]:
        """Ids of a conversation of one user's turn, ending where the response begins.

        `parts`: what the user says in order, each a text or anything else for an image (see
        `tasks.placeholders`), which becomes one `image_token`, not yet expanded. `tools`: schemas
        as a JSON list, told by the chat template, or where it knows none in words. Raises DataError
        where the tokenizer cannot read a text as characters, ModelError where the chat template
        does not write such a turn.
        """
        if tools and not self._template.writes(tools, len(self.system)):
            parts, tools = opened(parts, Observation(as_prompt(tools))), ""
        return self._turn_ids(self.system, parts or [""], tools=tools)

    def turn(self, parts: Sequence[Any], last: int, role: Role = "user") -> list[int]:
        """Ids that the template puts between a response and the next one of the conversation.

        They close the response, as far as `last`, its last token, does not; say `parts` as a user,
        or as a tool where the template knows tools and writes these parts in its answer (several
        leave images out of it); and end where the next response begins. They do not depend on what
        was said before, which a template may drop or write otherwise: that stays the tokens that
        were read and sampled. Raises as `prompt`.
        """
        said = parts or [""]
        if role == "tool" and not self._template.answers(_kinds(said)):
            role = "user"
        ids = self._turn_ids([], said, True, role)
        return ids[1 + ids.index(self.end) :] if last == self.end in ids else ids

    def _turn_ids(
        self,
        system_texts: Sequence[str],
        parts: Sequence[Any],
        later: bool = False,
        role: Role = "user",
        tools: str = "",
    ) -> list[int]:
        """Ids of a user's turn, after what the system said or after a response."""
        frame = self._template.frame(len(system_texts), _kinds(parts), later, role, tools)
        turn_texts = [*system_texts, *(part for part in parts if isinstance(part, str))]
        texts = [cut(text) for cut, text in zip(frame.cuts, turn_texts, strict=True)]
        ids = encode(self.tokenizer, between(frame.around, texts))
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
        encoded = self._reader(images=[image], text=[token], add_special_tokens=False)
        return [int(index) for index in encoded["input_ids"][0]]

    def _controls(self, ids: Iterable[int]) -> list[int]:
        return [index for index in ids if index in self._control]

    def _instruct(self, prompt: str) -> None:
        """Begin every conversation with this; some templates take it as a string only."""
        self.system = [prompt]
        try:
            self._template.frame(1, (True,))
        except ModelError:
            self._template.plain = (*self._template.plain, "system")
            try:
                self._template.frame(1, (True,))
            except ModelError as error:
                raise ModelError(
                    f"model.system_prompt: no place for it: {error}, or leave it empty"
                ) from error

    def _find_ends(self, config: Mapping[str, Any]) -> tuple[int, frozenset[int]]:
        tokenizer = self.tokenizer
        added = set(tokenizer.added_tokens_decoder)
        closing = self._template.closing()
        template = [index for index in encode(tokenizer, closing) if index in added][:1]
        tokenizer_end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        declared = token_ids(json_beside(tokenizer, "generation_config.json").get("eos_token_id"))
        # Configs repeat their class's defaults, so there only a control token is believed.
        for part in (config, config.get("text_config") or {}):
            declared += [index for index in token_ids(part.get("eos_token_id")) if index in added]
        ends = template + tokenizer_end + declared
        if not ends:
            raise ModelError(
                "nothing ends a response: no end-of-turn token in its chat template, no eos_token, "
                "no eos_token_id in generation_config.json; set one"
            )
        return ends[0], frozenset(ends)

    def _check_vocabulary(self, config: Mapping[str, Any]) -> None:
        size = {**config, **(config.get("text_config") or {})}.get("vocab_size")
        plain, with_image = ["a"], [None, "a"]
        prompts = [
            self.prompt(parts)
            for parts in (plain, with_image)[: 1 + (self.image_token is not None)]
        ]
        last = max(self.end, *itertools.chain(*prompts))
        if size is not None and last >= size:
            token = self.tokenizer.convert_ids_to_tokens(last)
            raise ModelError(
                f"its tokenizer's {token!r} is token {last}, and its model knows {size}; resize "
                "the model's embeddings, or take the tokenizer that belongs to it"
            )


def _kinds(parts: Sequence[Any]) -> tuple[bool, ...]:
    return tuple(isinstance(part, str) for part in parts)


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
