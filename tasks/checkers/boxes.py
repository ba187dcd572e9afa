"""The checkers `box` and `point`: places in the image, in whatever unit the gold is in.

A box is `[x1, y1, x2, y2]`, corners in that order. It may be written as JSON, alone, in a list or
in objects (`bbox`, `bbox_2d`, `box`), or as four numbers. A gold with several boxes is a set, all
of which are to be found; several golds are alternatives.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tasks.checkers.gold import Checker, Gold, number_option, option_fault
from tasks.checkers.reading import tidy
from tasks.responses import read_json

MAX_BOXES = 64
Box = tuple[float, float, float, float]

_BOX_KEYS = ("bbox_2d", "bbox", "box")
_POINT_KEYS = ("point_2d", "point")
_NUMBER = r"\s*(-?\d{1,9}(?:\.\d{0,9})?)\s*"
_LONG = re.compile(r"\b\d{1,9}(?:\.\d{1,20})?e-\d\d?\b|\b\d{1,9}\.\d{10,20}\b", re.I)
"""As computers write shares of an image: 0.016666666666666666, 5.2e-05."""
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.S)
_MARKS = re.compile(r"<\|?/?(?:box|point)(?:_start|_end)?\|?>")


class BoxChecker(Checker):
    """See the module's docstring."""

    name = "box"

    def right(self, answer: str, gold: Gold) -> bool:
        """As many boxes as the gold, matched one to one, each with IoU >= `threshold` (0.5)."""
        answered = _boxes(answer)
        threshold = number_option(gold, "threshold", 0.5)
        return any(
            len(answered) == len(true) > 0 and bool((matched(answered, true) >= threshold).all())
            for true in map(_boxes, gold.answers)
        )

    def fault(self, gold: Gold) -> str | None:
        """A gold that is no box."""
        for true in gold.answers:
            if not _boxes(true):
                return f"answer {true[:40]!r}: not [x1, y1, x2, y2] with x1 < x2 and y1 < y2"
        return option_fault(gold, threshold=1.0) if gold.answers else "answer: none"


class PointChecker(Checker):
    """A point `(x, y)` is right inside the gold's box, its edges included; see the module's."""

    name = "point"

    def right(self, answer: str, gold: Gold) -> bool:
        """Whether one point is given, and it lies in a gold box."""
        points = _coordinates(answer, 2, _POINT_KEYS)
        if len(points) != 1:
            return False
        x, y = points[0]
        return any(
            left <= x <= right and top <= y <= bottom
            for true in gold.answers
            for left, top, right, bottom in _boxes(true)
        )

    def fault(self, gold: Gold) -> str | None:
        """A gold that is no box."""
        box_fault = BoxChecker().fault(Gold(gold.answers))
        return box_fault or option_fault(gold)


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes with x1 < x2 and y1 < y2."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (_area(one) + _area(other) - shared)


def matched(answered: Sequence[Box], true: Sequence[Box]) -> np.ndarray:
    """float64 [min(N, M)]: IoU of the pairs of the one-to-one matching with the largest sum."""
    from scipy.optimize import linear_sum_assignment  # half a second, for who has boxes only

    table = np.array([[iou(one, other) for other in true] for one in answered])
    return table[linear_sum_assignment(table, maximize=True)]


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _boxes(text: str) -> list[Box]:
    """The boxes a text gives; [] where it gives anything else, or one is empty."""
    corners = [(a, b, c, d) for a, b, c, d in _coordinates(text, 4, _BOX_KEYS)]
    return corners if all(a < c and b < d for a, b, c, d in corners) else []


def _coordinates(text: str, size: int, keys: Sequence[str]) -> list[tuple[float, ...]]:
    """Tuples of `size` numbers, at most `MAX_BOXES`; [] where the text is anything else."""
    text = _LONG.sub(lambda long: f"{float(long[0]):.9f}", tidy(text) or "")
    text = _MARKS.sub("", text).strip()
    if (fence := _FENCE.fullmatch(text)) is not None:
        text = fence[1]
    value, defects = read_json(text)
    if defects:
        row = r"[,\s)(\]\[]".join([_NUMBER] * size)
        pairs = r"\s*,?\s*".join([rf"\({_NUMBER},{_NUMBER}\)"] * (size // 2))
        numbers = re.fullmatch(rf"[(\[]?{row}[)\]]?", text) or re.fullmatch(pairs, text)
        value = [float(n) for n in numbers.groups()] if numbers is not None else None
    if isinstance(value, dict) or (isinstance(value, list) and value and _is_number(value[0])):
        value = [value]
    if not isinstance(value, list) or len(value) > MAX_BOXES:
        return []
    parsed = [_one(item, size, keys) for item in value]
    return [item for item in parsed if item] if all(parsed) else []


def _one(item: Any, size: int, keys: Sequence[str]) -> tuple[float, ...]:
    if isinstance(item, dict):
        named_values = [item[key] for key in keys if key in item]
        item = named_values[0] if len(named_values) == 1 else None
    if isinstance(item, list) and len(item) == size and all(map(_is_number, item)):
        return tuple(float(number) for number in item)
    return ()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
