"""From a row of any layout to a problem: question, images, gold, and what else the row has."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tasks.checkers import CHECKERS, Gold
from tasks.checkers.reading import boxes
from tasks.core import DataError, Problem
from tasks.data_files import Row
from tasks.datasets import Example, Exchange, text_or_json
from tasks.image_cells import Beside, cell_images, shown
from tasks.images import content_hash
from tasks.placeholders import check_placed
from tasks.vqa.chat import Chat, as_chat, read_chat
from tasks.vqa.layouts import VERIFIERS, Layout

READING = 3
"""Raise it when rows are read differently: what was kept of them counts no more."""

_PLACEHOLDER = re.compile(r"<image(_\d+)?>")
_ANSWER_TAGS = re.compile(r"<answer>(.*?)</answer>", re.S)
_FOUR = re.compile(r"\[\s*(?:-?\d+(?:\.\d+)?\s*(?:,\s*)?){4}\]")


@dataclass
class RowReader:
    """Reads the rows of one file (`tasks.rows.Reader`).

    `task`: as a recipe's rows name it (`vqa/boxed`). `prompt`: what the policy is asked, with
    `{question}` in it and no placeholder of an image. `checker`: judges all rows; "" where the
    layout, or a column, says which.
    """

    layout: Layout
    beside: Beside
    task: str
    prompt: str
    checker: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Of all that is known of its rows beside the file's content."""
        parts = (self.layout, self.checker, sorted(self.options.items()))
        folders = [str(folder) for folder in self.beside.folders]
        return hashlib.sha256(repr((READING, parts, folders)).encode()).hexdigest()

    @property
    def asks(self) -> str:
        """How a question is put."""
        return f"{self.task}\n{self.prompt}"

    def column(self, field: str) -> str:
        """Where `query` and `image` come from."""
        named = {"query": self.layout.question, "image": ", ".join(self.layout.images)}
        return named.get(field, field)

    @property
    def picture_columns(self) -> frozenset[str]:
        """Whole columns of images."""
        return frozenset(self.layout.images)

    def split_of(self, row: Row) -> str:
        """What the layout's split column says."""
        return _text(row, self.layout.split)

    def touched(self) -> Mapping[str, list[int] | None]:
        """The files beside the data that were read, and paths where there is none."""
        return self.beside.touched

    def untouched(self, touched: Mapping[str, list[int] | None]) -> bool:
        """Whether they are still as they were."""
        return self.beside.untouched(touched)

    def read(self, row: Row, with_images: bool = True) -> Example:
        """The problem of a row. Raises DataError naming the column."""
        layout = self.layout
        if row.get("is_video") is True:
            raise DataError("is_video: a video; only images are read")
        chat = self._chat(row)
        images = self._images(row, chat) if with_images else ()
        images, earlier = _parted(images, chat, self.layout.question)
        names = self._checkers(row)
        # A set may have options in a column and ask for the value all the same (geometry3k).
        choices = _choices(row, layout.choices or ("choices" if names == ("choice",) else ""))
        golds = self._golds(row, chat, choices)
        checker, gold = self._checked(names, golds, choices)
        question = _with_choices(chat.question, choices)
        prompt = self.prompt.replace("{question}", question)
        if with_images:
            check_placed(question, images, layout.question)
        key = content_key(question, images) if with_images else ""
        problem = Problem(
            id=f"vqa-{key[:16]}",
            task=self.task,
            prompt=_unicode(prompt, layout.question),
            perception=_text(row, layout.perception),
            truth={
                "checker": checker,
                "answers": list(gold.answers),
                "choices": list(gold.choices),
                "options": dict(gold.options),
            },
            knobs={},
            symmetry_key=key,
            images=images,
            extra=self._extra(row, chat),
        )
        return Example(problem, chat.response or _text(row, layout.response), earlier)

    def _chat(self, row: Row) -> Chat:
        name = self.layout.question
        value = cell(row, name)
        turns = as_chat(value)
        if turns is not None:
            try:
                chat = read_chat(turns)
            except DataError as error:
                raise DataError(f"{name}: {error}") from error
        else:
            if isinstance(value, list) and value:  # several names of one thing
                value = value[0]
            if not isinstance(value, str):
                raise DataError(f"{name}: {shown(value)}; a question is text, or a chat")
            chat = Chat(value)
        if not _PLACEHOLDER.sub("", chat.question).strip():
            raise DataError(f"{name}: asks nothing")
        ask = self.layout.ask
        return Chat(ask.replace("{question}", chat.question)) if ask else chat

    def _images(self, row: Row, chat: Chat) -> tuple[bytes, ...]:
        pictures: tuple[bytes, ...] = ()
        for name in self.layout.images:
            try:
                pictures += cell_images(cell(row, name), self.beside)
            except DataError as error:
                raise DataError(f"{name}: {error}") from error
        if pictures or not chat.images:
            return pictures
        try:
            return cell_images(chat.images, self.beside)
        except DataError as error:
            raise DataError(f"{self.layout.question}: {error}") from error

    def _golds(self, row: Row, chat: Chat, choices: tuple[str, ...]) -> tuple[str, ...]:
        layout = self.layout
        if layout.index:
            at = cell(row, layout.index)
            if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < len(choices):
                raise DataError(f"{layout.index}: {shown(at)}; there are {len(choices)} choices")
            return (choices[at],)
        name = layout.answer or layout.question
        value = cell(row, name) if layout.answer else chat.response
        if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            answers = tuple(stripped(v) for v in value)
        else:
            answers = (stripped(_gold_text(value, name)),)
        golds = tuple(dict.fromkeys(_unicode(gold, name) for gold in answers if gold))
        if not golds:
            raise DataError(f"{name}: is empty; a row needs a right answer")
        return golds

    def _checkers(self, row: Row) -> tuple[str, ...]:
        """The checkers of a row, in order."""
        layout = self.layout
        if self.checker or not layout.checker_column:
            return (self.checker,) if self.checker else layout.checkers
        said = cell(row, layout.checker_column)
        name = VERIFIERS.get(str(said).lower(), str(said))
        if name not in CHECKERS:
            raise DataError(
                f"{layout.checker_column}: {shown(said)} names no checker; there are "
                f"{', '.join(CHECKERS)}"
            )
        return (name,)

    def _checked(
        self, names: tuple[str, ...], golds: tuple[str, ...], choices: tuple[str, ...]
    ) -> tuple[str, Gold]:
        """The first checker that can use the gold, and what it judges by."""
        layout = self.layout
        faults = []
        for name in names:
            if name == "box":
                golds = tuple(map(_boxes_alone, golds))
            own = self.options if self.options or name != layout.checkers[0] else layout.options
            gold = Gold(golds, choices, own)
            fault = CHECKERS[name].fault(gold)
            if fault is None:
                return name, gold
            faults.append(fault)
        raise DataError(f"{layout.answer or layout.question}: {faults[0]}")

    def _extra(self, row: Row, chat: Chat) -> dict[str, Any]:
        """Every column that is neither question, answer nor image; a system turn as `system`."""
        layout = self.layout
        taken = {layout.question, layout.answer, layout.perception, layout.response, *layout.images}
        extras = {n: _plain(v) for n, v in row.items() if n not in taken and not _is_bytes(v)}
        return extras | ({"system": chat.system} if chat.system else {})


def _parted(
    images: tuple[bytes, ...], chat: Chat, name: str
) -> tuple[tuple[bytes, ...], tuple[Exchange, ...]]:
    """The question's own images, and the exchanges before the response with theirs.

    Without images, which were not asked for, those of the exchanges are empty.
    """
    later = sum(count for _, _, count in chat.earlier)
    if not images:
        images = (b"",) * later
    elif later > len(images):
        raise DataError(
            f"{name}: answers to turns show {later} images, and there are {len(images)}"
        )
    own = len(images) - later
    exchanges, at = [], own
    for turn, text, count in chat.earlier:
        exchanges.append(
            Exchange(_unicode(turn, name), _unicode(text, name), images[at : at + count])
        )
        at += count
    return images[:own], tuple(exchanges)


def content_key(question: str, images: tuple[bytes, ...]) -> str:
    """Equal for two problems with the same images and question, spaces and placeholders aside."""
    parts = [
        " ".join(_PLACEHOLDER.sub(" ", question).split()),
        *(content_hash(image) for image in images),
    ]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "replace")).hexdigest()


def cell(row: Row, name: str) -> Any:
    """A value by its column, or by struct and field (`reward_model.ground_truth`)."""
    if name in row or "." not in name:
        return row.get(name)
    outer, _, inner = name.partition(".")
    value = row.get(outer)
    return value.get(inner) if isinstance(value, dict) else None


def stripped(gold: str) -> str:
    r"""A gold without `<answer>` tags or `\boxed{}` around it, as some data sets write it.

    Raises DataError for several that differ.
    """
    for kind, candidates in (
        ("<answer>", [inner.strip() for inner in _ANSWER_TAGS.findall(gold)]),
        (r"\boxed", [inner for _, _, inner in boxes(gold) if inner is not None]),
    ):
        if len(set(candidates)) > 1:
            raise DataError(f"answer: holds several {kind} that differ; keep the right one")
        gold = candidates[0] if candidates else gold
    return gold.strip()


def _boxes_alone(gold: str) -> str:
    """Boxes without the names that a set has for their fields, as JSON; any other text as it is."""
    numbers = _FOUR.findall(gold) if gold.startswith(("[", "{")) and "'" in gold else []
    return f"[{', '.join(numbers)}]" if numbers else gold


def _gold_text(value: Any, name: str) -> str:
    if value is None:
        raise DataError(f"{name}: is missing; a row needs a right answer")
    return text_or_json(value, name)


def _choices(row: Row, name: str) -> tuple[str, ...]:
    value = cell(row, name) if name else None
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            value = json.loads(value)
    if value is None:
        return ()
    if isinstance(value, dict):  # letter -> text
        value = [value[letter] for letter in sorted(value) if value[letter] is not None]
    if not isinstance(value, list) or not all(isinstance(v, str | int | float) for v in value):
        raise DataError(f"{name}: {shown(value)}; choices are a list of texts")
    return tuple(str(v) for v in value)


def _with_choices(question: str, choices: tuple[str, ...]) -> str:
    """The question with its choices by letter, unless it has them all in it."""
    if all(choice in question for choice in choices):
        return question
    lines = [f"({chr(ord('A') + at)}) {choice}" for at, choice in enumerate(choices)]
    return "\n".join([question.rstrip(), *lines])


def _text(row: Row, name: str) -> str:
    value = cell(row, name) if name else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{name}: {shown(value)}; wanted text")
    return _unicode(value, name)


def _unicode(text: str, name: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{name}: is not Unicode text ({error.reason})") from error
    return text


def _is_bytes(value: Any) -> bool:
    """Whether a cell is an image or other bytes, in a struct or list of such too."""
    if isinstance(value, list):
        return any(_is_bytes(v) for v in value[:1])
    return isinstance(value, bytes) or (isinstance(value, dict) and _is_bytes(value.get("bytes")))


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: times and the like as text, numbers that are none as null."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not _is_bytes(v)}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value if not _is_bytes(v)]
    return str(value)
