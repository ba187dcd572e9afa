"""Where question, images and answer are in the data sets that people train on.

Names with a dot are of a struct's field (`reward_model.ground_truth`). What a recipe's `columns`
says goes before what is known here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tasks.core import DataError

ROLES = ("question", "images", "answer", "choices", "perception", "response", "split")
"""What `columns` may name: a column, or several for `images`."""

Columns = Mapping[str, str | Sequence[str]]

_IMAGES = ("images", "image", "image_bytes", "image_path")


@dataclass(frozen=True)
class Layout:
    """Columns by what they are; "" for what a layout lacks.

    Attributes:
        answer: the gold; "" where it is the response that ends a chat.
        index: column of the number, from 0, of the right one among the choices.
        checkers: in order; the first that can use a row's gold judges it.
        options: of the checker.
        ask: a question in words of ours, where the column holds what is asked for alone.
    """

    question: str
    answer: str = ""
    images: tuple[str, ...] = ()
    choices: str = ""
    perception: str = ""
    response: str = ""
    split: str = ""
    index: str = ""
    checkers: tuple[str, ...] = ("expression",)
    checker_column: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    ask: str = ""


_BOX = "Where is this in the image: {question}? Answer with its box [x1, y1, x2, y2] in pixels."
_POINT = "Where in the image is this: {question}? Answer with a point [x, y], each from 0 to 1."

LAYOUTS = (
    Layout("question", choices="answers", index="correct_answer_idx", checkers=("choice",)),
    Layout("prompt", "answer", choices="choices", checkers=("choice",)),
    Layout("question", "answer", choices="choices", checkers=("choice",)),
    Layout(
        "extra_info.question",
        "reward_model.ground_truth",
        checker_column="reward_model.verifier",
        checkers=("expression", "text"),
    ),
    Layout(
        "prompt",
        "reward_model.ground_truth",
        checker_column="reward_model.verifier",
        checkers=("expression", "text"),
    ),
    Layout("instruction", "bbox", checkers=("point",), ask=_POINT),
    Layout("captions", "bbox", split="split", checkers=("box",), ask=_BOX),
    Layout("question", "answers", checkers=("text",), options={"threshold": 0.5}),
    Layout("text", "label", checkers=("choice",)),
    Layout("problem", "answer"),
    Layout("problem", "solution", checkers=("box", "expression", "text")),
    Layout("question", "answer", checkers=("expression", "text")),
    Layout("query", "ground_truth", checkers=("expression", "text")),
    Layout("prompt", "answer"),
    Layout("message", "answer"),
    Layout("messages", "answer"),
    Layout("conversations", "answer"),
    Layout("conversations", checkers=("box", "expression", "text")),
    Layout("messages", checkers=("box", "expression", "text")),
)
"""The first of which a file has all columns is the one."""

CHART_QA = {"type", "question", "answer", "image"}
"""Columns whose numbers are right within 5 %, as people score that set."""

VERIFIERS = {
    "math": "expression",
    "mathverify": "expression",
    "math_verify": "expression",
    "mathruler": "expression",
    "rule": "expression",
    "mcq": "choice",
    "multiple_choice": "choice",
    "detection": "box",
    "grounding": "box",
    "iou": "box",
}
"""What a row's own column may call a checker, beside its name."""


def names_in(rows: Iterable[Any]) -> tuple[str, ...]:
    """The columns of rows, and the fields of those that are structs."""
    columns: dict[str, None] = {}
    for row in rows:
        for name, value in row.items() if isinstance(row, dict) else ():
            columns[name] = None
            if isinstance(value, dict):
                columns |= dict.fromkeys(f"{name}.{inner}" for inner in value)
    return tuple(columns)


def layout_of(names: Sequence[str], columns: Columns, checker_column: str = "") -> Layout:
    """How a file with these columns is laid out, by the recipe's word and what is known.

    `checker_column`: where each row names its checker, if the recipe says so.

    Raises DataError: an unknown role or column, or columns that tell no question or answer.
    """
    assigned: dict[str, str | Sequence[str]] = {}
    for role, column in columns.items():
        if role not in ROLES:
            raise DataError(
                f"columns: no {role!r}{_meant(role, ROLES)}; there are {_listed(ROLES)}"
            )
        for name in (column,) if isinstance(column, str) else column:
            if name not in names:
                raise DataError(
                    f"columns.{role}: no column {name!r}{_meant(name, names)}; "
                    f"there are {_listed(names)}"
                )
        assigned[role] = column
    known = _known(names, assigned)
    pictures = assigned.get("images")
    if pictures is None:
        numbered = sorted(
            (n for n in names if re.fullmatch(r"image_\d+", n)), key=lambda n: int(n[6:])
        )
        pictures = next(([n] for n in _IMAGES if n in names), numbered)
    text = {role: str(assigned[role]) for role in assigned if role != "images"}
    if "answer" in text:
        text["index"] = ""
    several = (pictures,) if isinstance(pictures, str) else tuple(pictures)
    if checker_column:
        text["checker_column"] = checker_column
    return replace(known, images=several, **text)  # type: ignore[arg-type]


def _known(names: Sequence[str], assigned: Columns) -> Layout:
    known = Layout("", checkers=("choice",) if "choices" in assigned else ("expression", "text"))
    if not {"question", "answer"} <= set(assigned):
        fitting = (layout for layout in LAYOUTS if set(_needed(layout, assigned)) <= set(names))
        maybe = next(fitting, None)
        if maybe is None:
            missing = " and ".join(sorted({"question", "answer"} - set(assigned)))
            raise DataError(
                f"columns: which is the {missing}? there are {_listed(names)}; say so by "
                'columns = { question = "...", images = "...", answer = "..." }'
            )
        known = maybe
    if set(names) >= CHART_QA:
        known = replace(known, checkers=("number",), options={"tolerance": 0.05})
    if known.checker_column not in names:
        known = replace(known, checker_column="")
    usual = {role: role for role in ("perception", "response") if role in names}
    return replace(known, **usual)  # type: ignore[arg-type]


def _needed(layout: Layout, assigned: Columns) -> list[str]:
    roles = ("question", "answer", "choices", "index")
    return [name for role in roles if role not in assigned and (name := getattr(layout, role))]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _meant(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
