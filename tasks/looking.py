"""Two environments that let a policy look again: `zoom` into a picture, `mark` a box on it.

A turn calls by a tag at its end, as plain text: `<look>x0 y0 x1 y1</look>`, or
`<mark>x0 y0 x1 y1</mark>`, or for a point `<mark>x y</mark>`. Coordinates are whole numbers from 0
to 1000 across and down the picture as it is shown, whatever its size. Where a problem has several
pictures the picture's number comes first, from 1 in the order of the prompt. A turn without the tag
is the last one.

A call is read strictly and never repaired. What is wrong with it is named, and the policy is told
in one line: `unclosed_call`, `unopened_call`, `several_calls`, `text_after_call`, `bad_number`,
`wrong_count`, `out_of_range`, `empty_box`, `no_picture`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw

from tasks.calls import SAID, Tool, enclosed, in_tags
from tasks.core import Problem
from tasks.drawing import to_png
from tasks.environments import DONE, Observation
from tasks.images import check_image
from tasks.placeholders import as_shown

SIDE = 1000
"""Coordinates go from 0 to this along either side."""
PLACES_TRIED = 64
"""At random, before a wrong place is taken from a corner."""
_SAID = SAID | {
    "bad_number": f"whole numbers from 0 to {SIDE}, parted by spaces",
    "wrong_count": "not as many numbers as a call has",
    "out_of_range": f"numbers from 0 to {SIDE}",
    "empty_box": "x0 < x1 and y0 < y1",
    "no_picture": "no picture of that number",
}


@dataclass(frozen=True)
class Call:
    """A call as it was read: the picture's place from 0, and two or four numbers."""

    picture: int
    numbers: tuple[int, ...]


def written(tag: str, *numbers: int) -> str:
    """A call as `read_call` reads it."""
    return f"<{tag}>{' '.join(map(str, numbers))}</{tag}>"


def squares(count: int) -> list[tuple[int, int, int, int]]:
    """`count` by `count` boxes that a picture is seen whole in, in reading order; of one none."""
    edges = [*pairwise(round(SIDE * k / count) for k in range(count + 1))] if count > 1 else []
    return [(left, top, right, bottom) for top, bottom in edges for left, right in edges]


def read_call(text: str, tag: str, pictures: int, counts: tuple[int, ...]) -> Call | str | None:
    """The call that ends a turn, the name of what is wrong with it, or None where there is none.

    `counts`: how many numbers it may have, the picture's own not counted.
    """
    found = enclosed(text, tag)
    if found is None or isinstance(found, str):
        return found
    words = found[1].split()
    if not all(re.fullmatch(r"[0-9]{1,4}", word) for word in words):
        return "bad_number"
    picture, numbers = 1, [int(word) for word in words]
    if pictures > 1:
        picture, numbers = (numbers or [0])[0], numbers[1:]
    if len(numbers) not in counts:
        return "wrong_count"
    if not 1 <= picture <= pictures:
        return "no_picture"
    if max(numbers) > SIDE:
        return "out_of_range"
    if len(numbers) == 4 and not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
        return "empty_box"
    return Call(picture - 1, tuple(numbers))


@dataclass
class _Pictures:
    """The problem's pictures, and what a turn's call says of them."""

    pictures: list[Image.Image] = field(default_factory=list, init=False)
    _rng: np.random.Generator = field(default_factory=np.random.default_rng, init=False)

    tell: bool = field(default=True, kw_only=True)
    tag: ClassVar[str]
    counts: ClassVar[tuple[int, ...]] = (4,)
    told: ClassVar[str]
    says: ClassVar[str]
    at: ClassVar[str] = "x0, y0, x1, y1"

    def reset(self, problem: Problem, rng: np.random.Generator) -> Observation | None:
        """How to call, where the policy is to be told; raises DataError for a bad picture."""
        self._rng = rng
        shown = as_shown(problem.prompt, problem.images)
        self.pictures = [check_image(i, f"image of problem {problem.id}") for i in shown]
        if not self.tell:
            return None
        number = "the picture's number, then " if len(self.pictures) > 1 else ""
        return Observation(
            how=f"{self.told.format(number=number)} Numbers go from 0 to {SIDE} across and down. "
            "One call a turn; a turn without one is the last."
        )

    def step(self, text: str) -> Observation:
        """A picture, or one line of what was wrong with the call."""
        call = read_call(text, self.tag, len(self.pictures), self.counts)
        if call is None:
            return DONE
        if isinstance(call, str):
            said = f"The call was not understood: {_SAID[call]}."
            return Observation(said, defects=(call,))
        return Observation(images=(to_png(self.answer(self.pictures[call.picture], call)),))

    def elsewhere(self, text: str) -> tuple[bytes, ...]:
        """The picture had the call pointed at another place (`tasks.environments`)."""
        call = read_call(text, self.tag, len(self.pictures), self.counts)
        if not isinstance(call, Call):
            return ()
        picture = self.pictures[call.picture]
        least = self.least(picture, call)
        across, down = least * SIDE / picture.width, least * SIDE / picture.height
        there = replace(call, numbers=_moved(call.numbers, (across, down), self._rng))
        return (to_png(self.answer(picture, there)),)

    def tools(self) -> tuple[Tool, ...]:
        """The one tool, as it is called in JSON."""
        number = {"type": "integer", "description": "number of the picture, from 1"}
        numbers = {
            "type": "array",
            "items": {"type": "integer"},
            "minItems": min(self.counts),
            "maxItems": max(self.counts),
            "description": f"{self.at}, from 0 to {SIDE} across and down the picture",
        }
        first = {"picture": number} if len(self.pictures) > 1 else {}
        return (Tool(self.tag, self.says, first | {"at": numbers}),)

    def answer(self, picture: Image.Image, call: Call) -> Image.Image:
        raise NotImplementedError

    def least(self, picture: Image.Image, call: Call) -> float:
        """Pixels across and down that what a call points at has at least."""
        raise NotImplementedError


@dataclass
class Zoom(_Pictures):
    """The box as a picture of its own, cut out of the original and enlarged.

    A box that is too small, or too long for its width, grows about its middle within the picture.

    Args:
        smallest: pixels of the original that either side of a crop has at least.
        aspect: at most so many times as long as wide.
        side: pixels of the returned picture's longer side; a crop is never made smaller than it is.
        tell: say behind the problem how to call; a policy that was taught need not be told.
    """

    smallest: int = 16
    aspect: float = 4.0
    side: int = 128

    tag: ClassVar[str] = "look"
    told: ClassVar[str] = (
        "To see a part of the picture larger, end your turn with <look>{number}x0 y0 x1 y1</look>."
    )
    says: ClassVar[str] = "See a part of the picture larger. One call a turn."

    def __post_init__(self) -> None:
        if self.smallest < 1 or self.aspect < 1 or not self.smallest <= self.side <= 4096:
            raise ValueError("needs smallest >= 1, aspect >= 1, and side from smallest to 4096")

    def answer(self, picture: Image.Image, call: Call) -> Image.Image:
        width, height = picture.size
        x0, y0, x1, y1 = call.numbers
        least = self.least(picture, call)
        left, right = _grown(x0 * width / SIDE, x1 * width / SIDE, least, width)
        top, bottom = _grown(y0 * height / SIDE, y1 * height / SIDE, least, height)
        crop = picture.crop((left, top, right, bottom))
        scale = max(1.0, self.side / max(crop.size))
        size = [max(1, round(side * scale)) for side in crop.size]
        return crop.resize((size[0], size[1]), Image.Resampling.BICUBIC)

    def least(self, picture: Image.Image, call: Call) -> float:
        x0, y0, x1, y1 = call.numbers
        across, down = (x1 - x0) * picture.width / SIDE, (y1 - y0) * picture.height / SIDE
        return max(self.smallest, max(across, down) / self.aspect)


@dataclass
class Mark(_Pictures):
    """The whole picture with the box, or a cross at the point, drawn on it.

    Args:
        colour: of the lines, `#rrggbb`.
        width: of the lines, in pixels.
        tell: as of `Zoom`.
    """

    colour: str = "#ff00ff"
    width: int = 2

    tag: ClassVar[str] = "mark"
    told: ClassVar[str] = (
        "To mark a box or a point on the picture and see it, end your turn with "
        "<mark>{number}x0 y0 x1 y1</mark> or <mark>{number}x y</mark>."
    )
    says: ClassVar[str] = "Mark a box or a point on the picture and see it. One call a turn."
    at: ClassVar[str] = "x0, y0, x1, y1 of a box, or x, y of a point"
    counts: ClassVar[tuple[int, ...]] = (2, 4)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", self.colour) or not 1 <= self.width <= 64:
            raise ValueError('needs a colour "#rrggbb" and a width from 1 to 64')

    def answer(self, picture: Image.Image, call: Call) -> Image.Image:
        marked = picture.copy()
        draw = ImageDraw.Draw(marked)
        sides = (picture.width - 1, picture.height - 1)
        at = [n * sides[i % 2] / SIDE for i, n in enumerate(call.numbers)]
        if len(at) == 4:
            draw.rectangle(at, outline=self.colour, width=self.width)
            return marked
        (x, y), arm = at, 4 * self.width
        draw.line((x - arm, y, x + arm, y), fill=self.colour, width=self.width)
        draw.line((x, y - arm, x, y + arm), fill=self.colour, width=self.width)
        return marked

    def least(self, picture: Image.Image, call: Call) -> float:
        return 8.0 * self.width


def _grown(start: float, end: float, least: float, side: int) -> tuple[int, int]:
    """Whole pixels [start, end) of a side, at least `least` of them where there are as many."""
    length = min(side, max(1, round(max(end - start, least))))
    first = min(max(0, round((start + end - length) / 2)), side - length)
    return first, first + length


def _moved(
    numbers: tuple[int, ...], least: tuple[float, float], rng: np.random.Generator
) -> tuple[int, ...]:
    """A box or a point of the same size elsewhere: drawn among the places that do not touch it.

    Each takes `least` across and down. Where no place is free, as far off as there is room for.
    """
    start, size = numbers[:2], tuple(b - a for a, b in zip(numbers, numbers[2:], strict=False))
    size = size or (0, 0)

    def taken(corner: Sequence[int]) -> list[tuple[int, int]]:
        sides = zip(corner, size, least, strict=True)
        return [_grown(at, at + long, most, SIDE) for at, long, most in sides]

    here = taken(start)
    for _ in range(PLACES_TRIED):
        corner = [int(rng.integers(SIDE - long + 1)) for long in size]
        if any(a[0] >= b[1] or a[1] <= b[0] for a, b in zip(taken(corner), here, strict=True)):
            break
    else:
        corner = [0 if 2 * a + s > SIDE else SIDE - s for a, s in zip(start, size, strict=True)]
    ends = [a + s for a, s in zip(corner, size, strict=True)]
    return (*corner, *ends)[: len(numbers)]


def pointed_at(turn: str, pictures: int) -> Call | None:
    """Where a turn's call points, be it a look or a mark, in tags or as JSON."""
    made = Zoom(), Mark()
    for each in made:
        each.pictures = [Image.new("1", (1, 1))] * pictures
    tools = [tool for each in made for tool in each.tools()]
    text = in_tags(turn, tools)[0] or turn
    calls = (read_call(text, each.tag, pictures, each.counts) for each in made)
    return next((call for call in calls if isinstance(call, Call)), None)
