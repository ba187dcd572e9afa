"""The tag layer all tasks share: where perception, reasoning and answer lie in a response.

A response is plain text, written by `compose_response`:

    <perception>
    ...
    </perception>
    <reasoning>
    ...
    </reasoning>
    <answer>
    ...
    </answer>

Model text is hostile: nothing here raises, evaluates or takes more than linear time. What is
wrong with a response is named, counted and never repaired. A defect makes the segment it
spoils unreadable (its value is None, so it scores 0):

| defect | what happened | spoils |
|---|---|---|
| `missing_<segment>` | its opening tag never occurs | that segment |
| `unclosed_<segment>` | another tag, or the end, comes before its closing tag | that segment |
| `unopened_<segment>` | a closing tag of a segment that was never opened | that segment |
| `duplicate_tag` | a second opening or closing tag; the first one's span stays | that segment |
| `wrong_order` | a segment opens after a later one has occurred | the segment that is late |
| `text_after_answer` | anything but white space after `</answer>`, tags included | the answer |
| `text_before_perception` | text before the first segment | nothing |
| `text_between_segments` | text between two segments | nothing |

An unclosed segment still has a span, up to the tag or end that stopped it; a repeated segment
has none, so what it holds is text between segments or after the answer.

A response without any of these tags is read in the style of the public data sets: the
perception is the first balanced JSON block and ends the perception segment with its closing
bracket, the answer is the last JSON block after it, and the reasoning lies between. Text
around the blocks is then prose, not a defect; `missing_perception` and `missing_answer` are
the only defects of this style.

What a segment holds is canonical text or JSON. Canonical text is read item by item (`items`):
cells, edges and assignments may be parted by white space of any kind and length, or by one comma
with or without it, and a list or line may end in a comma; `HARMLESS` says so in the prompts. In
JSON no more is allowed than JSON allows.

A call of an environment (`tasks/calls.py`: a look, a mark, or JSON in `<tool_call>`) that is
written as it should be is no text of the response: it stands before the answer, outside of
segments, without a defect. What stands in `<tool_call>` is no JSON block of a response without
tags.

Readers add defects of their own (`bad_cell`, `bad_shape`, ...); those of `read_json` are
`bad_json`, `json_too_long`, `json_too_deep` and `bad_number`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.core import READ, Parsed, Segment

Read = tuple[Any | None, tuple[str, ...]]
"""What a segment says: (value, ()) or (None, defects)."""
Reader = Callable[[str], Read]
"""Reads a segment's contents. Never raises."""

HARMLESS = " Blank lines, extra spaces and commas in between do no harm."
"""What a prompt that explains the format says of the room `items` leaves."""

JSON_MAX_CHARS = 65_536
JSON_MAX_DEPTH = 16
JSON_MAX_DIGITS = 18
"""A longer number is `bad_number`; 18 digits fit int64."""

_SEPARATOR = re.compile(r"\s*,\s*|\s+")
TAG = re.compile(r"<(/?)(perception|reasoning|answer)>")
_JSON_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_CALL = re.compile(rf"<(look|mark)>[0-9\s]*</\1>|{_JSON_CALL.pattern}", re.DOTALL)
_BRACKET_OR_STRING_MARK = re.compile(r'[\[\]{}"\\\n]')
_OPENER = {"]": "[", "}": "{"}


@dataclass(frozen=True)
class Split:
    """Where the segments of a text lie, in characters, half-open.

    Attributes:
        spans: segment -> [start, end), tags included; segments that occur only.
        inner: segment -> [start, end) of the contents, between the tags.
        defects: names in order of discovery, without repeats.
        spoiled: segments whose contents must not be scored.
    """

    spans: dict[Segment, tuple[int, int]]
    inner: dict[Segment, tuple[int, int]]
    defects: tuple[str, ...]
    spoiled: frozenset[Segment]


def compose_response(perception: str, reasoning: str, answer: str) -> str:
    """The text of a whole response; it starts with `oracle_prefix(perception)`."""
    return (
        f"{oracle_prefix(perception)}<reasoning>\n{reasoning}\n</reasoning>\n"
        f"<answer>\n{answer}\n</answer>"
    )


def oracle_prefix(perception: str) -> str:
    """The perception segment, up to where the reasoning begins."""
    return f"<perception>\n{perception}\n</perception>\n"


def line_ends(text: str, end: int) -> str:
    """What parts a segment that ends at `end` from the next: one line end, or two as in `text`.

    So that a policy that is forced to begin so goes on with tokens it would write: most
    tokenizers have one token for `>` and the line ends after it, and one for a space and a word.
    """
    return "\n\n" if text.startswith("\n\n", end) else "\n"


def split_response(text: str) -> Split:
    """Find the segments of a response; see the module's docstring for the rules."""
    if TAG.search(text) is None:
        return _split_json_style(text)
    return split_tags(text, {name: name for name in READ})


def split_tags(text: str, tags: Mapping[str, Segment]) -> Split:
    """The same of a text with tags alone, named as in `tags`, their segments in that order."""
    order = tuple(tags.values())
    spans: dict[Segment, tuple[int, int]] = {}
    inner: dict[Segment, tuple[int, int]] = {}
    defects: dict[str, None] = {}
    spoiled: set[Segment] = set()

    def flag(defect: str, spoils: Segment | None = None) -> None:
        defects[defect] = None
        if spoils is not None:
            spoiled.add(spoils)

    def flag_outside(outside: str) -> None:
        if not (outside if "answer" in spans else _CALL.sub(_unless_bad, outside)).strip():
            return
        if not spans:
            flag(f"text_before_{order[0]}")
        elif "answer" in spans:
            flag("text_after_answer", "answer")
        else:
            flag("text_between_segments")

    current: tuple[Segment, int, int] | None = None  # segment, start and end of its opening tag
    accounted = 0  # everything before this character is accounted for
    for tag in re.finditer(rf"<(/?)({'|'.join(tags)})>", text):
        segment = tags[tag[2]]
        closing = tag[1] == "/"
        if current is not None:
            name, start, start_inner = current
            current = None
            inner[name] = (start_inner, tag.start())
            if closing and segment == name:
                spans[name] = (start, tag.end())
                accounted = tag.end()
                continue
            spans[name] = (start, tag.start())
            accounted = tag.start()
            flag(f"unclosed_{name}", name)
        flag_outside(text[accounted : tag.start()])
        accounted = tag.end()
        if "answer" in spans:
            flag("text_after_answer", "answer")
        if segment in spans:
            flag("duplicate_tag", segment)
        elif closing:
            flag(f"unopened_{segment}", segment)
        else:
            if any(later in spans for later in order[order.index(segment) + 1 :]):
                flag("wrong_order", segment)
            current = (segment, tag.start(), tag.end())
    if current is not None:
        name, start, start_inner = current
        spans[name] = (start, len(text))
        inner[name] = (start_inner, len(text))
        flag(f"unclosed_{name}", name)
    else:
        flag_outside(text[accounted:])
    for name in order:
        if name not in spans:
            flag(f"missing_{name}", name)
    return Split(spans, inner, tuple(defects), frozenset(spoiled))


def parse_response(text: str, read_perception: Reader, read_answer: Reader) -> Parsed:
    """Read a whole response with a task's own readers; a spoiled segment is not read."""
    return read_split(text, split_response(text), read_perception, read_answer)


def read_split(text: str, split: Split, read_perception: Reader, read_answer: Reader) -> Parsed:
    """The same of a text whose segments are found."""
    defects = dict.fromkeys(split.defects)
    values: dict[Segment, Any | None] = {"perception": None, "answer": None}
    readers: tuple[tuple[Segment, Reader], ...] = (
        ("perception", read_perception),
        ("answer", read_answer),
    )
    for segment, read in readers:
        if segment in split.inner and segment not in split.spoiled:
            start, end = split.inner[segment]
            values[segment], value_defects = read(text[start:end])
            defects.update(dict.fromkeys(value_defects))
    start, end = split.inner.get("reasoning", (0, 0))
    return Parsed(
        perception=values["perception"],
        reasoning=text[start:end].strip(),
        answer=values["answer"],
        spans=split.spans,
        defects=tuple(defects),
    )


def without_preamble(segment: str) -> str:
    """A perception segment without the prose that may stand before a JSON block.

    A segment in tags is returned as it is: a strict reader leaves no room for prose in it.
    """
    if TAG.search(segment) is not None:
        return segment
    blocks = _json_blocks(segment)
    return segment[blocks[0][0] :] if blocks else segment


def items(text: str) -> list[str]:
    """The items of canonical text, as written; "" where one is missing beside a comma."""
    parts = _SEPARATOR.split(text.strip())
    if len(parts) > 1 and not parts[-1]:
        parts.pop()  # what follows the comma at the end
    return parts


def read_json(text: str) -> tuple[Any | None, tuple[str, ...]]:
    """A JSON list or object, under limits of length, depth and digits; else (None, defects)."""
    text = text.strip()
    if len(text) > JSON_MAX_CHARS:
        return None, ("json_too_long",)
    depth = 0
    for _, bracket in _brackets(text):
        depth += 1 if bracket in "[{" else -1
        if depth > JSON_MAX_DEPTH:
            return None, ("json_too_deep",)
    try:
        value = json.loads(
            text,
            parse_int=_small_int,
            parse_float=_small_float,
            parse_constant=_no_constant,
            object_pairs_hook=_object_without_repeats,
        )
    except _BadNumber:
        return None, ("bad_number",)
    except ValueError:
        return None, ("bad_json",)
    if not isinstance(value, list | dict):
        return None, ("bad_json",)
    return value, ()


def json_call(text: str) -> tuple[str, dict[str, Any]] | str:
    """The name and the arguments of a call that is JSON, `{"name": ..., "arguments": {...}}`.

    Or the defect: one of `read_json`, or `bad_call`.
    """
    value, defects = read_json(text)
    if defects:
        return defects[0]
    if not isinstance(value, dict) or value.keys() != {"name", "arguments"}:
        return "bad_call"
    name, arguments = value["name"], value["arguments"]
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return "bad_call"
    return name, arguments


def _unless_bad(call: re.Match[str]) -> str:
    """A call that is not written as it should be stays."""
    fine = call[1] or (call[0].endswith("</tool_call>") and not isinstance(json_call(call[2]), str))
    return "" if fine else call[0]


def _split_json_style(text: str) -> Split:
    """The public data sets' style: first JSON block, prose, last JSON block."""
    blocks = _json_blocks(text)
    if not blocks:
        return Split(
            {}, {}, ("missing_perception", "missing_answer"), frozenset(("perception", "answer"))
        )
    first, last = blocks[0], blocks[-1]
    spans: dict[Segment, tuple[int, int]] = {"perception": (0, first[1])}
    inner: dict[Segment, tuple[int, int]] = {"perception": first}
    if last is first:
        spans["reasoning"] = inner["reasoning"] = (first[1], len(text))
        return Split(spans, inner, ("missing_answer",), frozenset(("answer",)))
    spans["reasoning"] = inner["reasoning"] = (first[1], last[0])
    spans["answer"] = (last[0], len(text))
    inner["answer"] = last
    return Split(spans, inner, (), frozenset())


def _json_blocks(text: str) -> list[tuple[int, int]]:
    """Outermost balanced `[...]` and `{...}` blocks in order, calls left out; linear time.

    An opener that is never closed does not hide the blocks inside it; a bracket that closes
    the wrong opener discards every opener before it.
    """
    text = _JSON_CALL.sub(lambda call: " " * len(call[0]), text)
    blocks: list[tuple[int, int]] = []
    openers: list[tuple[int, str]] = []
    for position, bracket in _brackets(text):
        if bracket in "[{":
            openers.append((position, bracket))
        elif openers and openers[-1][1] == _OPENER[bracket]:
            start, _ = openers.pop()
            while blocks and blocks[-1][0] > start:
                blocks.pop()
            blocks.append((start, position + 1))
        else:
            openers.clear()
    return blocks


def _brackets(text: str) -> Iterator[tuple[int, str]]:
    """(position, bracket) of the brackets outside JSON strings.

    Quotes count only inside brackets, where JSON may stand; a line end stops a string, as
    JSON strings hold none, so that one stray quote cannot hide the rest of a text.
    """
    depth = 0
    in_string = False
    escaped = -1
    for mark in _BRACKET_OR_STRING_MARK.finditer(text):
        position, char = mark.start(), mark[0]
        if char == "\n":
            in_string = False
        elif in_string:
            if position == escaped:
                continue
            if char == "\\":
                escaped = position + 1
            elif char == '"':
                in_string = False
        elif char == '"':
            in_string = depth > 0
        elif char != "\\":
            depth = max(depth + (1 if char in "[{" else -1), 0)
            yield position, char


class _BadNumber(ValueError):
    """A number in model text that is not a small finite one."""


def _small_int(digits: str) -> int:
    if len(digits) > JSON_MAX_DIGITS:
        raise _BadNumber
    return int(digits)


def _small_float(digits: str) -> float:
    # The exponent is what overflows: no float of interest is written with one.
    if len(digits) > JSON_MAX_DIGITS or "e" in digits or "E" in digits:
        raise _BadNumber
    return float(digits)


def _no_constant(name: str) -> float:
    raise _BadNumber(name)


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    merged = dict(pairs)
    if len(merged) < len(pairs):
        raise ValueError("a key occurs twice")
    return merged
