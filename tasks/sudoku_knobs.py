"""The knobs of one Sudoku distribution: what makes seeing hard, what makes thinking hard."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from tasks.drawing import RANDOM, Colour
from tasks.fields import Section
from tasks.looking import SIDE

MAX_BLANKS = {4: 12, 9: 64}
"""A unique solution needs 4 clues on 4x4 and 17 on 9x9 (McGuire, Tugemann and Civario 2012)."""
MAX_IMAGE_SIDE = 2048


class SudokuSpec(Section):
    """The knobs of one Sudoku distribution."""

    size: Literal[4, 9] = 9
    blanks: int = Field(default=16, ge=1, description="empty cells; by default 16, on 4x4 8")
    technique: Literal["any", "naked_singles", "hidden_singles", "search"] = Field(
        default="any",
        description="the easiest that suffices; `search`: singles do not. 4x4 needs naked ones",
    )

    cell_size: int = Field(default=40, ge=4, le=200, description="pixels")
    font_size: int = Field(default=26, ge=6, le=200, description="pixels, up to cell_size * detail")
    margin: int = Field(default=6, ge=0, le=200, description="pixels around the grid")
    detail: int = Field(
        default=1,
        ge=1,
        le=8,
        description="cells and margin are drawn so many times as large, digits, shifts and noise "
        "are not: with model.max_pixels the square of the side without it, the policy reads "
        "digits of font_size / detail, and a look at 1/detail of the side shows every pixel",
    )
    jitter: int = Field(default=0, ge=0, le=50, description="largest shift of a digit, pixels")
    rotation: float = Field(default=0.0, ge=0.0, le=180.0, description="largest turn, degrees")
    noise: float = Field(default=0.0, ge=0.0, le=255.0, description="Gaussian sigma, of 255")
    contrast: float = Field(default=1.0, gt=0.0, le=1.0, description="1 is ink as given")
    ink: Colour = Field(default="#101010", description="#rrggbb, three ints, or random")
    paper: Colour = Field(default="#ffffff", description="#rrggbb, three ints, or random")
    lines: Literal["solid", "dashed", "boxes"] = "solid"
    glyphs: Literal["font", "handwritten"] = Field(
        default="font", description="handwritten: 1,797 real digits, some held out with the puzzles"
    )

    prompt: Literal["brief", "full"] = "full"

    @model_validator(mode="before")
    @classmethod
    def _blanks_for_size(cls, data: Any) -> Any:
        if isinstance(data, dict) and "blanks" not in data and data.get("size") == 4:
            return {**data, "blanks": 8}
        return data

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.blanks > MAX_BLANKS[self.size]:
            raise ValueError(
                f"blanks: {self.blanks} leave no unique solution on {self.size}x{self.size}; "
                f"set at most {MAX_BLANKS[self.size]}"
            )
        if self.size == 4 and self.technique in ("hidden_singles", "search"):
            raise ValueError(
                f"technique: {self.technique} does not occur on 4x4, where naked singles solve "
                'every puzzle; set technique to "any" or size to 9'
            )
        if self.detail > self.size:
            raise ValueError(
                f"detail: {self.detail} would show less than a cell in a look; set at most "
                f"{self.size}"
            )
        if self.font_size > self.cell:
            raise ValueError(
                f"font_size: {self.font_size} px does not fit cell_size {self.cell_size}"
                f"{self._times}; lower font_size or raise cell_size"
            )
        if 2 * self.jitter > self.cell:
            raise ValueError(
                f"jitter: {self.jitter} px would move digits into other cells; "
                f"set at most half of cell_size{self._times} ({self.cell // 2})"
            )
        if self.side > MAX_IMAGE_SIDE:
            raise ValueError(
                f"cell_size: the image would be {self.side} px wide; lower cell_size, margin or "
                f"detail to stay within {MAX_IMAGE_SIDE}"
            )
        if self.ink == self.paper != RANDOM:
            raise ValueError("ink: same as paper, nothing could be seen; choose another colour")
        return self

    @property
    def cell(self) -> int:
        """Width and height of a cell as it is drawn, pixels."""
        return self.cell_size * self.detail

    @property
    def border(self) -> int:
        """Around the grid as it is drawn, pixels."""
        return self.margin * self.detail

    @property
    def side(self) -> int:
        """Width and height of the picture, pixels."""
        return self.size * self.cell + 2 * self.border

    @property
    def _times(self) -> str:
        return f" * detail {self.detail}" if self.detail > 1 else ""


def parts_to_look_at(knobs: Mapping[str, Any]) -> list[tuple[int, int, int, int]]:
    """Boxes of whole cells, in reading order, that a picture of `detail` is seen whole in.

    Each is at most 1/detail of the grid's side, so that as many pixels as all of it, made smaller,
    show a box as it is drawn. None where `detail` is 1. Coordinates as in `tasks.looking`.
    """
    detail = knobs.get("detail", 1)
    if detail == 1:
        return []
    look = SudokuSpec.model_validate(knobs)
    count = -(-look.size // (look.size // detail))
    edges = [look.border + look.size * k // count * look.cell for k in range(count + 1)]
    across = [round(edge * SIDE / look.side) for edge in edges]
    return [
        (left, top, right, bottom)
        for top, bottom in pairwise(across)
        for left, right in pairwise(across)
    ]
