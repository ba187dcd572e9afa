"""How a turn calls an environment: as tags, or as the JSON of chat templates' tools.

| form | a call |
|---|---|
| `tags` | `<look>0 0 500 500</look>` |
| `json` | `<tool_call>{"name": "look", "arguments": {"at": [0, 0, 500, 500]}}</tool_call>` |

An environment reads tags. In the JSON form each call is written in tags before it is asked, so one
environment serves both; what it must say for that are its `Tool`s. A call of that form is read
strictly: what is wrong with it is named (`SAID`), and the policy is told in one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tasks.responses import json_call

CallForm = Literal["tags", "json"]

SAID = {
    "unclosed_call": "the tag is not closed",
    "unopened_call": "the tag is not opened",
    "several_calls": "one call a turn",
    "text_after_call": "nothing may follow the call",
    "other_form": "write a call as JSON in <tool_call>",
    "bad_json": "not a JSON object",
    "json_too_long": "too long",
    "json_too_deep": "too many brackets within each other",
    "bad_number": "a number is too long",
    "bad_call": 'write {"name": ..., "arguments": {...}}',
    "no_such_tool": "no tool of that name",
    "bad_arguments": "other arguments than the tool takes",
}
"""Defects of a call, and what the policy is told of them."""

_ANY_TAG = re.compile(r"<(/?)(\w{1,40})>")
_NO_CALLS = ("perception", "reasoning", "answer", "think")


@dataclass(frozen=True)
class Tool:
    """What may be called: `<name>` and the words of the arguments, in the order of `parameters`.

    Attributes:
        name: of the tag.
        says: what it does, for the policy.
        parameters: argument -> its JSON schema, all required: an `integer`, a `number`, a `string`
            (with `enum` or any without `<`), or an `array` of these (`items`, `minItems`,
            `maxItems`).
    """

    name: str
    says: str
    parameters: Mapping[str, Mapping[str, Any]]

    def schema(self) -> dict[str, Any]:
        """As chat templates take it in `tools`."""
        of_all = {"type": "object", "properties": self.parameters, "required": [*self.parameters]}
        function = {"name": self.name, "description": self.says, "parameters": of_all}
        return {"type": "function", "function": function}


def as_prompt(tools: str) -> str:
    """Schemas (a JSON list) as text of a prompt, for a chat template that knows no tools."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in json.loads(tools))
    return (
        f"You may call these functions, one a turn:\n<tools>\n{lines}\n</tools>\nTo call, end your "
        'turn with\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call>\nA turn without a call is the last."
    )


def call_span(turn: str) -> tuple[int, int] | None:
    """[start, end) in characters of what a turn calls with, be it written well or badly: `act`.

    From the first opening tag that no segment's tag follows, to the end of the turn, white space
    there left out; None where there is no such tag.
    """
    start = None
    for tag in _ANY_TAG.finditer(turn):
        if tag[2] in _NO_CALLS:
            start = None
        elif start is None and not tag[1]:
            start = tag.start()
    return None if start is None else (start, len(turn.rstrip()))


def enclosed(text: str, tag: str) -> tuple[str, str] | str | None:
    """(the text before a tag that ends a turn, what it holds); a defect; None without the tag."""
    opened, closed = f"<{tag}>", f"</{tag}>"
    if opened not in text and closed not in text:
        return None
    head, _, rest = text.partition(opened)
    inside, end, after = rest.partition(closed)
    if opened not in text or closed in head:
        return "unopened_call"
    if not end:
        return "unclosed_call"
    if opened in inside or opened in after or closed in after:
        return "several_calls"
    if after.strip():
        return "text_after_call"
    return head, inside


def in_tags(turn: str, tools: Sequence[Tool]) -> tuple[str, str]:
    """(a turn of the JSON form with its call in tags, ""); ("", the name of its defect)."""
    found = enclosed(turn, "tool_call")
    if isinstance(found, str):
        return "", found
    head, inside = found or (turn, None)
    if any(f"<{slash}{tool.name}>" in head for tool in tools for slash in ("", "/")):
        return "", "other_form"
    if inside is None:
        return turn, ""
    call = json_call(inside)
    if isinstance(call, str):
        return "", call
    name, arguments = call
    tool = next((tool for tool in tools if tool.name == name), None)
    if tool is None:
        return "", "no_such_tool"
    words = [_words(arguments.get(key), schema) for key, schema in tool.parameters.items()]
    if arguments.keys() != tool.parameters.keys() or None in words:
        return "", "bad_arguments"
    inner = " ".join(word for of_one in words for word in of_one or ())
    return f"{head}<{name}>{inner}</{name}>", ""


def in_json(turn: str, tools: Sequence[Tool]) -> str:
    """A turn whose call is written in tags, as a teacher writes it, in the JSON form.

    Raises ValueError where that call is none of the tools', or does not fill their parameters.
    """
    for tool in tools:
        found = enclosed(turn, tool.name)
        if found is None:
            continue
        if isinstance(found, str):
            raise ValueError(f"{found}: {turn[:200]!r}")
        left, arguments = found[1].split(), dict[str, Any]()
        for key, schema in tool.parameters.items():
            last = len(arguments) + 1 == len(tool.parameters)
            taken = len(left) if last else schema.get("minItems", 1)
            words, left = left[:taken], left[taken:]
            if schema["type"] == "array":
                arguments[key] = [_value(word, schema["items"]) for word in words]
            else:
                arguments[key] = _value(" ".join(words), schema)
        call = json.dumps({"name": tool.name, "arguments": arguments}, ensure_ascii=False)
        written = f"{found[0]}<tool_call>\n{call}\n</tool_call>"
        if (defect := in_tags(written, tools)[1]) or left:
            raise ValueError(f"{defect or 'bad_arguments'}: {turn[:200]!r}")
        return written
    raise ValueError(f"calls none of {', '.join(tool.name for tool in tools)}: {turn[:200]!r}")


def _words(value: Any, schema: Mapping[str, Any]) -> list[str] | None:
    """An argument as words; None where it is not of its schema."""
    kind = schema["type"]
    if kind == "array" and isinstance(value, list):
        least, most = schema.get("minItems", 0), schema.get("maxItems", len(value))
        parts = [_words(item, schema["items"]) for item in value]
        if not least <= len(value) <= most or None in parts:
            return None
        return [word for part in parts for word in part or ()]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and (kind == "number" or (kind == "integer" and isinstance(value, int))):
        return [str(value)]
    if kind == "string" and isinstance(value, str) and "<" not in value:
        return [value] if value in schema.get("enum", (value,)) else None
    return None


def _value(word: str, schema: Mapping[str, Any]) -> Any:
    return {"integer": int, "number": float}.get(schema["type"], str)(word)
