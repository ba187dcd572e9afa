"""What a checkpoint's chat template writes around texts, which it never sees."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateError

from rollout.decoding import encode
from rollout.models import ModelError, first_line
from tasks.calls import Tool
from tasks.environments import Role


class Frame(NamedTuple):
    """Ids that begin a prompt, text around a user's texts, how white space of each is cut."""

    start: list[int]
    around: list[str]
    cuts: list[Callable[[str], str]]


def between(around: Sequence[str], texts: Sequence[str]) -> str:
    """Each of the texts between two of those around them."""
    return around[0] + "".join(map("".join, zip(texts, around[1:], strict=True)))


class Template:
    """The chat template of a processor, or of a text-only model's tokenizer.

    Attributes:
        plain: the roles whose words it takes as a string only.
        frame: `_make_frame`, remembered.
    """

    def __init__(self, reader: Any, tokenizer: Any, image_token: int | None) -> None:
        self._reader, self.tokenizer, self.image_token = reader, tokenizer, image_token
        self.plain: tuple[str, ...] = ()
        self.frame = lru_cache(maxsize=256)(self._make_frame)

    def closing(self) -> str:
        """What the template writes behind a response that ends a conversation."""
        try:
            _, mark, closing = self._render(*_ANSWERED).rpartition(_RESPONSE_MARK)
        except ModelError:  # some take an assistant's words as a string only
            self.plain = ("assistant",)
            _, mark, closing = self._render(*_ANSWERED).rpartition(_RESPONSE_MARK)
        if not mark:
            raise ModelError("its chat template leaves an assistant's text out; mend it")
        return closing

    def writes(self, tools: str, system_count: int = 0) -> bool:
        """Whether the chat template tells of tools, to be called in `<tool_call>` (Hermes)."""
        try:
            frame = self.frame(system_count, (True,), tools=tools)
        except ModelError:
            return False
        names = [f'"{tool["function"]["name"]}"' for tool in json.loads(tools)]
        return all(word in "".join(frame.around) for word in ("<tool_call>", *names))

    def answers(self, kinds: tuple[bool, ...]) -> bool:
        """Whether it knows tools, and writes these parts in what one answers."""
        try:
            return self.writes(_PROBE) and bool(self.frame(0, kinds, True, "tool"))
        except ModelError:
            return False

    def _start(self, head: str) -> list[int]:
        """What the tokenizer begins a text with, where a VLM's template leaves that to it."""
        first = self.tokenizer.bos_token_id
        if first is None or self.image_token is None or head.startswith(self.tokenizer.bos_token):
            return []
        return [first] if self.tokenizer("a")["input_ids"][0] == first else []

    def _render(self, *turns: tuple[str, Sequence[str | None]], tools: str = "") -> str:
        """The chat template's text of what each role says, turn by turn; None is an image."""
        messages: list[dict[str, Any]] = []
        for role, parts in turns:
            # Templates of text-only models take a string.
            alone = self._reader is self.tokenizer or role in self.plain
            content = [
                {"type": "image"} if part is None else {"type": "text", "text": part}
                for part in parts
            ]
            if content:
                messages.append({"role": role, "content": parts[0] if alone else content})
        try:
            rendered: str = self._reader.apply_chat_template(
                messages,
                add_generation_prompt=turns[-1][0] != "assistant",
                tokenize=False,
                **({"tools": json.loads(tools)} if tools else {}),
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ModelError(f"its chat template fails ({first_line(error)}); mend it") from error
        return rendered

    def _make_frame(
        self,
        system_count: int,
        kinds: tuple[bool, ...],
        later: bool = False,
        role: Role = "user",
        tools: str = "",
    ) -> Frame:
        """How the template writes a user's or a tool's turn of these parts (True is a text), after
        `system_count` texts of the system; of a later turn what follows the response before it."""
        marks = [*[_MARK] * system_count, *(_MARK if text else None for text in kinds)]

        def rendered(marks: Sequence[str | None]) -> str:
            turns = ("system", marks[:system_count]), (role, marks[system_count:])
            if not later:
                return self._render(*turns, tools=tools)
            _, mark, text = self._render(*_ANSWERED, *turns).rpartition(_RESPONSE_MARK)
            if not mark:
                raise ModelError("its chat template leaves an earlier response out; mend it")
            return text

        around = rendered(marks).split(_MARK)
        padded, cuts = f" \n{_MARK}\n ", list[Callable[[str], str]]()
        for at in (at for at, part in enumerate(marks) if part):
            probe = rendered([*marks[:at], padded, *marks[at + 1 :]])
            for cut in (str, str.strip, str.lstrip, str.rstrip):
                texts = [_MARK] * marks.count(_MARK)
                texts[len(cuts)] = cut(padded)
                if len(around) == len(texts) + 1 and probe == between(around, texts):
                    cuts.append(cut)
                    break
            else:
                raise ModelError(
                    "its chat template does not write a user's text once, as it is; mend it"
                )
        ids = itertools.chain.from_iterable(encode(self.tokenizer, text) for text in around)
        placeholders, images = [*ids].count(self.image_token or -1), kinds.count(False)
        if placeholders != images:
            token = self.tokenizer.convert_ids_to_tokens(self.image_token)
            raise ModelError(
                f"its chat template writes {placeholders} image placeholders ({token!r}) for "
                f"{images} images; take the template that belongs to the checkpoint"
            )
        return Frame([] if later else self._start(around[0]), around, cuts)


_MARK, _RESPONSE_MARK = "sphinxofblackquartz", "judgemyvowpacked"
"""Texts that occur in no chat template, of a user and of a model."""
_ANSWERED = ("user", ["a"]), ("assistant", [_RESPONSE_MARK])
_PROBE = json.dumps([Tool("probe", "", {}).schema()])
