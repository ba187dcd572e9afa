"""Chat columns: one question and, where there is one, its response, however they are spelt.

A response may have several turns with answers between them: what a policy that calls a tool would
see. The images of an answer stand before its text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tasks.core import DataError

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant"}
ROLES |= {"gpt": "assistant", "model": "assistant", "tool": "user", "observation": "user"}
PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Chat:
    """One question of the user's, and what follows.

    Attributes:
        response: the last turn of what follows; "" where nothing does.
        earlier: the turns before it, each with the text that answers it and how many images.
        images: the image cells that stand in turns as parts, of all turns in their order.
    """

    question: str
    response: str = ""
    system: str = ""
    images: tuple[Any, ...] = ()
    earlier: tuple[tuple[str, str, int], ...] = ()


def as_chat(value: Any) -> list[dict[str, Any]] | None:
    """The turns of a cell that is a chat, or the JSON text of one; None for any other cell."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    turns = isinstance(value, list) and value and all(isinstance(v, dict) for v in value)
    if turns and all(("role" in turn or "from" in turn) for turn in value):
        return list(value)
    return None


def read_chat(turns: list[dict[str, Any]]) -> Chat:
    """The question of a chat and its response. Raises DataError: turns of another order."""
    said: list[tuple[str, str]] = []
    images: list[Any] = []
    for turn in turns:
        name = turn.get("role") or turn.get("from")
        role = ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise DataError(f"a turn of {name!r:.40}; wanted system, user or assistant")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        said.append((role, "".join(_texts(content, images))))
    order = [role for role, _ in said]
    system = order[:1] == ["system"]
    spoken, texts = order[system:], [text for _, text in said]
    turns_about = ["user", "assistant"] * (len(spoken) // 2)
    if spoken != ["user"] and (not spoken or spoken != turns_about):
        raise DataError(
            f"turns of {', '.join(order) or 'nobody'}; wanted one of the user's, a system turn "
            "before it or not, and behind it nothing or turns of the assistant's, the last of them "
            "at the end, with one of the user's or a tool's between two"
        )
    question, *later = texts[system:]
    if later[1:] and any(PLACEHOLDER in text for text in later[::2]):
        raise DataError(f"a turn of the assistant's holds {PLACEHOLDER}; it cannot show images")
    pairs = zip(later[:-1:2], later[1::2], strict=True)
    return Chat(
        question,
        later[-1] if later else "",
        texts[0] if system else "",
        tuple(images),
        tuple((turn, *_answer(text)) for turn, text in pairs),
    )


def _answer(text: str) -> tuple[str, int]:
    """(text, images before it) of what answers a turn."""
    count, rest = 0, text.strip()
    while rest.startswith(PLACEHOLDER):
        count, rest = count + 1, rest.removeprefix(PLACEHOLDER).strip()
    if PLACEHOLDER in rest:
        raise DataError(
            f"an answer to a turn has {PLACEHOLDER} behind text; put images before its text"
        )
    return rest, count


def _texts(content: Any, images: list[Any]) -> Iterator[str]:
    """The text of a turn; image parts are collected and leave a placeholder."""
    if isinstance(content, str):
        yield content
        return
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            yield part
        elif not isinstance(part, dict):
            raise DataError(f"a turn that is a {type(part).__name__}, not text")
        elif isinstance(part.get("text"), str):
            yield part["text"]
        else:
            named = (part.get(name) for name in ("image", "image_url", "url", "path"))
            cell = next((value for value in named if value), None)
            if isinstance(cell, dict) and "url" in cell:
                cell = cell["url"]
            if cell is not None:
                images.append(cell)
            elif part.get("type") != "image":
                raise DataError(f"a part of type {part.get('type')!r:.40}; wanted text or image")
            yield PLACEHOLDER
