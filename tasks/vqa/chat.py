"""Chat columns: one question and, where there is one, its response, however they are spelt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tasks.core import DataError

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant"}
ROLES |= {"gpt": "assistant", "model": "assistant"}
PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Chat:
    """One turn of the user's, with the image cells that stand in it as parts, and what follows."""

    question: str
    response: str = ""
    system: str = ""
    images: tuple[Any, ...] = ()


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
    """The one question of a chat. Raises DataError: another order of turns than one exchange."""
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
    if order[system:] not in (["user"], ["user", "assistant"]):
        raise DataError(
            f"turns of {', '.join(order) or 'nobody'}; wanted one of the user's, a system turn "
            "before it or not, and a response behind it or not"
        )
    texts = [text for _, text in said]
    response = texts[-1] if order[-1] == "assistant" else ""
    return Chat(texts[system], response, texts[0] if system else "", tuple(images))


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
