"""Figures of what a model saw and answered, to stand beside the image in a report. Pure data.

A task that draws (`tasks.core.Draws`) returns a `Grid`, a `Graph` or a `Words`; the report's page
draws it, and escapes all its text. Every figure says in `text` what it marks. The values come from
the task's parser and are hostile only as far as it lets them be.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tasks.fields import Positive, Section

Mark = Literal["right", "missing", "extra", "clash", "plain"]

MOST_NAMED = 6
"""Wrong cells or edges that a text names; the rest are counted."""
MOST_WORDS = 300


class Figure(Section):
    """What all figures have: words for what is drawn, for those who cannot see it too."""

    text: str

    def as_json(self) -> dict[str, Any]:
        """What the page's script reads: `kind` and the fields that are set."""
        kind = type(self).__name__.lower()
        return {"kind": kind, **self.model_dump(mode="json", exclude_defaults=True)}


class Cell(Section):
    """A cell of a `Grid`: what was written, whether it is wrong, and what it should be."""

    v: str
    bad: bool = False
    given: bool = False
    """Copied from the perception, so that it looks different from what was filled in."""
    true: str = ""


class Grid(Figure):
    """Cells row by row, with a thick line after every `box` of them."""

    box: Positive
    cells: Annotated[tuple[tuple[Cell, ...], ...], Field(max_length=32)]


class Graph(Figure):
    """Vertices on a circle, the first at the top; edges as (vertex, vertex, mark).

    `colors`: one word a vertex, "" for none; equal words are painted alike.
    """

    labels: Annotated[tuple[str, ...], Field(max_length=64)]
    edges: tuple[tuple[int, int, Mark], ...]
    colors: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _ends_are_there(self) -> Graph:
        if any(not 0 <= v < len(self.labels) for i, j, _ in self.edges for v in (i, j)):
            raise ValueError("edges: each joins two vertices, numbered from 0 in `labels`")
        if self.colors is not None and len(self.colors) != len(self.labels):
            raise ValueError("colors: one a vertex")
        return self


class Words(Figure):
    """Pieces of text, each right, missing, extra, or plain where nothing says what is right."""

    rows: tuple[tuple[Mark, str], ...]


def compared_words(true: str, answered: str) -> Words:
    """Word by word: which words of the true perception were seen, missed or made up."""
    old, new = true.split()[:MOST_WORDS], answered.split()[:MOST_WORDS]
    rows: list[tuple[Mark, str]] = []
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for operation, a, b, c, d in matcher.get_opcodes():
        if operation == "equal":
            rows.append(("right", " ".join(new[c:d])))
            continue
        rows += [("missing", " ".join(old[a:b]))] if b > a else []
        rows += [("extra", " ".join(new[c:d]))] if d > c else []
    missing, made_up = (
        sum(len(text.split()) for mark, text in rows if mark == mark_counted)
        for mark_counted in ("missing", "extra")
    )
    text = f"{missing} words of the true perception missing, {made_up} that are not in it"
    text = text if missing or made_up else "As it is."
    if max(len(true.split()), len(answered.split())) > MOST_WORDS:
        text += f" Compared are the first {MOST_WORDS} words of each."
    return Words(rows=tuple(rows), text=text)


def plain_words(answered: str) -> Words:
    """Text that there is no label to compare with."""
    text = "Nobody has said what there is to see, so nothing is marked."
    return Words(rows=(("plain", answered),), text=text)


def named(names: Sequence[str], before: str = "") -> str:
    """`before` and the first few things; "" where there are none."""
    if not names:
        return ""
    between = "; " if any(" " in name for name in names) else ", "
    remainder = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{before}{between.join(names[:MOST_NAMED])}{remainder}."
