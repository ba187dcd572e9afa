"""Sudoku 4x4 and 9x9: the perception is the partly filled grid, the answer the full one.

What makes seeing hard (cell and font size, jitter, noise, contrast, rotation, colours, lines)
and what makes thinking hard (size, blanks, solving technique) are drawn from separate random
streams: with one seed, changing a knob of one kind leaves what the other kind governs as it was.

A grid is a tuple of rows of ints, 0 for a blank. Its canonical text has one row a line, cells
parted by one space and `-` for a blank. Cells may also be parted otherwise (`responses.items`) or
not at all, boxes by a gap in all rows that have no other (`53- -7- ---`) and by blank lines.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tasks.core import DataError, Parsed, Problem, Style
from tasks.figures import Figure
from tasks.responses import (
    HARMLESS,
    compose_response,
    items,
    oracle_prefix,
    parse_response,
    read_json,
)
from tasks.sudoku_figure import answered_grid, seen_grid
from tasks.sudoku_puzzle import Grid, draw_puzzle, flat, layout_of, symmetry_key, unique_solution
from tasks.sudoku_render import RANDOM, Lines, Look, render
from tasks.sudoku_teacher import terse_steps, verbose_steps

SIZES = (4, 9)
MAX_BLANKS = {4: 12, 9: 64}
"""A unique solution needs 4 clues on 4x4 and 17 on 9x9 (McGuire, Tugemann and Civario 2012)."""
MAX_IMAGE_SIDE = 2048


class SudokuSpec(BaseModel):
    """The knobs of one Sudoku distribution."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: Literal[4, 9] = 9
    blanks: int = Field(default=16, ge=1, description="empty cells; by default 16, on 4x4 8")
    technique: Literal["any", "naked_singles", "hidden_singles", "search"] = Field(
        default="any",
        description="the easiest that suffices; `search`: singles do not. 4x4 needs naked ones",
    )

    cell_size: int = Field(default=40, ge=10, le=200, description="pixels")
    font_size: int = Field(default=26, ge=6, le=200, description="pixels, up to cell_size")
    margin: int = Field(default=6, ge=0, le=200, description="pixels around the grid")
    jitter: int = Field(default=0, ge=0, le=50, description="largest shift of a digit, pixels")
    rotation: float = Field(default=0.0, ge=0.0, le=180.0, description="largest turn, degrees")
    noise: float = Field(default=0.0, ge=0.0, le=255.0, description="Gaussian sigma, of 255")
    contrast: float = Field(default=1.0, gt=0.0, le=1.0, description="1 is ink as given")
    ink: str = Field(default="#101010", description="#rrggbb, three ints, or random")
    paper: str = Field(default="#ffffff", description="#rrggbb, three ints, or random")
    lines: Lines = "solid"

    prompt: Literal["brief", "full"] = "full"

    @model_validator(mode="before")
    @classmethod
    def _blanks_for_size(cls, data: Any) -> Any:
        if isinstance(data, dict) and "blanks" not in data and data.get("size") == 4:
            return {**data, "blanks": 8}
        return data

    @field_validator("ink", "paper", mode="before")
    @classmethod
    def _colour_as_hex(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            if len(value) != 3 or not all(type(c) is int and 0 <= c <= 255 for c in value):
                raise ValueError("a colour needs three whole numbers from 0 to 255")
            return "#" + "".join(f"{c:02x}" for c in value)
        if isinstance(value, str) and value != RANDOM:
            value = value.lower()
            if re.fullmatch(r"#[0-9a-f]{6}", value) is None:
                raise ValueError('a colour is "#rrggbb", three numbers from 0 to 255, or "random"')
        return value

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
        if self.font_size > self.cell_size:
            raise ValueError(
                f"font_size: {self.font_size} px does not fit cell_size {self.cell_size}; "
                "lower font_size or raise cell_size"
            )
        if 2 * self.jitter > self.cell_size:
            raise ValueError(
                f"jitter: {self.jitter} px would move digits into other cells; "
                f"set at most half of cell_size ({self.cell_size // 2})"
            )
        side = self.look().side(self.size)
        if side > MAX_IMAGE_SIDE:
            raise ValueError(
                f"cell_size: the image would be {side} px wide; lower cell_size or "
                f"margin to stay within {MAX_IMAGE_SIDE}"
            )
        if self.ink == self.paper != RANDOM:
            raise ValueError("ink: same as paper, nothing could be seen; choose another colour")
        return self

    def look(self) -> Look:
        """The drawing settings."""
        return Look(
            cell_size=self.cell_size,
            font_size=self.font_size,
            margin=self.margin,
            jitter=self.jitter,
            rotation=self.rotation,
            noise=self.noise,
            contrast=self.contrast,
            ink=self.ink,
            paper=self.paper,
            lines=self.lines,
        )


class Sudoku:
    """The Sudoku task (see `tasks.core.Task`)."""

    name = "sudoku"
    spec: type[BaseModel] = SudokuSpec

    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        """Draw one problem with a unique solution.

        Raises:
            TypeError: `spec` is not a `SudokuSpec`.
            ValueError: blanks and technique were not met together in `GENERATE_TRIES` tries.
        """
        return self.begin(rng, spec)[1]()

    def begin(self, rng: np.random.Generator, spec: BaseModel) -> tuple[str, Callable[[], Problem]]:
        """The symmetry key of the puzzle, and what draws its picture (`tasks.core.DrawsLate`)."""
        if not isinstance(spec, SudokuSpec):
            raise TypeError(f"sudoku needs a SudokuSpec, not {type(spec).__name__}")
        puzzle_seed, picture_seed = (int(seed) for seed in rng.integers(2**63, size=2))
        puzzle, solution = draw_puzzle(
            np.random.default_rng(puzzle_seed), spec.size, spec.blanks, spec.technique
        )

        key = symmetry_key(puzzle)

        def finish() -> Problem:
            image = render(puzzle, spec.look(), np.random.default_rng(picture_seed))
            return _problem(
                task=self.name, prompt=_prompt(spec), image=image, puzzle=puzzle, solution=solution,
                knobs=spec.model_dump(), key=key,
            )  # fmt: skip

        return key, finish

    def parse(self, text: str) -> Parsed:
        """Read a response; both values are a `Grid`, or None with a named defect.

        Defects beside those of `tasks.responses`: `empty_perception`, `empty_answer`,
        `bad_cell` (not a digit of that size), `bad_shape`, `blank_in_answer`.
        """
        return parse_response(text, _read_perception, _read_answer)

    def check(self, problem: Problem, answer: Any) -> bool:
        """Whether `answer` is a full valid grid that keeps the true clues."""
        return _completes(problem.truth["puzzle"], answer)

    def score_perception(self, problem: Problem, perception: Any) -> tuple[bool, float]:
        """(same grid, share of all cells read right); (False, 0) for another shape."""
        size = problem.knobs["size"]
        if not _is_grid(perception, size):
            return False, 0.0
        truth = problem.truth["puzzle"]
        right = sum(
            seen == true
            for seen_row, true_row in zip(perception, truth, strict=True)
            for seen, true in zip(seen_row, true_row, strict=True)
        )
        return right == size * size, right / (size * size)

    def consistent(self, problem: Problem, perception: Any, answer: Any) -> bool:
        """Whether `answer` is a full valid grid that keeps the clues of `perception`."""
        return _is_grid(perception, problem.knobs["size"]) and _completes(perception, answer)

    def oracle_prefix(self, problem: Problem) -> str:
        """The perception segment holding `p*`."""
        return oracle_prefix(problem.perception)

    def solve(self, problem: Problem, perception: Any) -> Grid | None:
        """The one solution of a perceived grid of the problem's size.

        None where it has no solution or several, or where `SEARCH_NODES` do not settle it.
        """
        if not _is_grid(perception, problem.knobs["size"]):
            return None
        return unique_solution(perception)

    def demonstrate(self, problem: Problem, style: Style) -> str:
        """A whole correct response whose reasoning solves cell by cell.

        `terse` has one line a blank (`r1c2=3`) in solving order; `verbose` restates the grid,
        gives the reason of every step and checks every row, column and box.
        """
        puzzle, solution = problem.truth["puzzle"], problem.truth["solution"]
        explain = terse_steps if style == "terse" else verbose_steps
        return compose_response(problem.perception, explain(puzzle, solution), grid_text(solution))

    def vision_labels(self, problem: Problem) -> np.ndarray:
        """int64 [size*size]: the digit in each cell in reading order, 0 for a blank."""
        return np.asarray(problem.truth["puzzle"], dtype=np.int64).reshape(-1)

    def perception_items(self, perception: Grid) -> frozenset[tuple[int, int, int]]:
        """(row, column, value) of every cell; a blank is a claim too, of value 0."""
        return frozenset(
            (r, c, cell) for r, row in enumerate(perception) for c, cell in enumerate(row)
        )

    def states_answer(self, problem: Problem, perception: Grid) -> bool:
        """Whether the perceived grid has no blank left, right or wrong.

        No finer line can be drawn from one grid alone: one blank is enough for a puzzle
        (`blanks = 1`), so a grid with a blank may be an honest reading, and how many blanks the
        image has is a perception label. A grid with some blanks filled in therefore passes. It
        does not pass unnoticed: every filled cell contradicts those who saw it blank, so
        `group_agreement` in mode `soft` pays it less, cell by cell.
        """
        return all(cell for row in perception for cell in row)

    def draw_perception(self, problem: Problem, perception: Grid) -> Figure:
        """The grid that was read, misread cells marked."""
        return seen_grid(problem.truth["puzzle"], perception)

    def draw_answer(self, problem: Problem, perception: Grid | None, answer: Grid) -> Figure:
        """The grid that was filled in, repeats and changed clues marked."""
        return answered_grid(perception, answer)

    def held_out(self, spec: BaseModel) -> str:
        """What no training problem repeats."""
        return "puzzles up to symmetry (digits, rows, columns, boxes, transposing)"

    def from_row(self, query: str, image: bytes, ground_truth: str) -> Problem:
        """A problem from a row whose ground truth is the puzzle as a JSON list, 0 for a blank.

        Raises:
            DataError: `ground_truth` is not such a grid or has no unique solution.
        """
        puzzle, defects = _read_grid(ground_truth)
        if puzzle is None:
            raise DataError(
                f"ground_truth: not a Sudoku grid ({', '.join(defects) or 'empty'}); it must be "
                "a 9x9 or 4x4 JSON list of lists with 0 for a blank"
            )
        solution = unique_solution(puzzle)
        if solution is None:
            raise DataError(
                "ground_truth: this grid has no unique solution; it must be the puzzle shown in "
                "the image, so mend or drop the row"
            )
        blanks = sum(row.count(0) for row in puzzle)
        return _problem(
            task=self.name, prompt=query, image=image, puzzle=puzzle, solution=solution,
            knobs={"size": len(puzzle), "blanks": blanks}, key=symmetry_key(puzzle),
        )  # fmt: skip

    def to_ground_truth(self, problem: Problem) -> str:
        """The puzzle as a JSON list of rows, 0 for a blank."""
        return json.dumps(problem.truth["puzzle"])


def grid_text(grid: Sequence[Sequence[int]]) -> str:
    """A grid's canonical text."""
    return "\n".join(" ".join(str(cell) if cell else "-" for cell in row) for row in grid)


_CELL_VALUE: dict[str, int] = {"-": 0, **{str(digit): digit for digit in range(10)}}


def _read_perception(text: str) -> tuple[Grid | None, tuple[str, ...]]:
    if not text.strip():
        return None, ("empty_perception",)
    return _read_grid(text)


def _read_answer(text: str) -> tuple[Grid | None, tuple[str, ...]]:
    if not text.strip():
        return None, ("empty_answer",)
    grid, defects = _read_grid(text)
    if grid is not None and any(0 in row for row in grid):
        return None, ("blank_in_answer",)
    return grid, defects


def _read_grid(text: str) -> tuple[Grid | None, tuple[str, ...]]:
    """Rows of cells (`1 - 3 4`, `1-34` or `1- 34`) or a JSON list of lists; blank is `-` or 0."""
    text = text.strip()
    rows: list[Any]
    if text[:1] in ("[", "{"):
        value, defects = read_json(text)
        if defects:
            return None, defects
        if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
            return None, ("bad_shape",)
        rows = value
    else:
        lines = [line for line in text.split("\n") if not line.isspace() and line]
        rows = [_row(line, len(lines)) for line in lines]
    if len(rows) not in SIZES or any(len(row) != len(rows) for row in rows):
        return None, ("bad_shape",)
    grid = tuple(tuple(_read_cell(cell, len(rows)) for cell in row) for row in rows)
    if any(-1 in row for row in grid):
        return None, ("bad_cell",)
    return grid, ()


def _row(line: str, size: int) -> list[str]:
    """The cells of a line, of which each is one character: `12 34` cannot be two numbers."""
    cells = items(line)
    boxes = "," not in line and all(len(cell) ** 2 == size for cell in cells)
    return list("".join(cells)) if len(cells) == 1 or boxes else cells


def _read_cell(cell: Any, size: int) -> int:
    """A cell's value, or -1 where it is not one."""
    if type(cell) is str:
        cell = _CELL_VALUE.get(cell, -1)
    return cell if type(cell) is int and 0 <= cell <= size else -1


def _is_grid(value: Any, size: int) -> bool:
    """Whether a value has the form of a grid of that size (what `parse` returns always has)."""
    return (
        isinstance(value, tuple | list)
        and len(value) == size
        and all(isinstance(row, tuple | list) and len(row) == size for row in value)
        and all(type(cell) is int and 0 <= cell <= size for row in value for cell in row)
    )


def _completes(puzzle: Sequence[Sequence[int]], answer: Any) -> bool:
    """Whether `answer` is a full valid grid with every clue of `puzzle` in its place."""
    size = len(puzzle)
    if not _is_grid(answer, size):
        return False
    board, clues = flat(answer), flat(puzzle)
    if any(clue not in (0, digit) for clue, digit in zip(clues, board, strict=True)):
        return False
    full = set(range(1, size + 1))
    return all({board[cell] for cell in unit} == full for unit in layout_of(len(board)).units)


def _problem(
    *, task: str, prompt: str, image: bytes, puzzle: Grid, solution: Grid, knobs: dict[str, Any],
    key: str,
) -> Problem:  # fmt: skip
    perception = grid_text(puzzle)
    digest = hashlib.sha256(f"{Sudoku.name}\n{perception}\n".encode() + image).hexdigest()
    return Problem(
        id=f"sudoku-{digest[:16]}",
        task=task,
        prompt=prompt,
        image=image,
        perception=perception,
        truth={
            "puzzle": [list(row) for row in puzzle],
            "solution": [list(row) for row in solution],
        },
        knobs=knobs,
        symmetry_key=key,
    )


def _prompt(spec: SudokuSpec) -> str:
    n = spec.size
    if spec.prompt == "brief":
        return f"Solve the {n}x{n} Sudoku."
    side = {4: 2, 9: 3}[n]
    return (
        f"The image shows a {n}x{n} Sudoku. Fill every empty cell so that each row, each column "
        f"and each {side}x{side} box holds every digit from 1 to {n} exactly once.\n"
        "First write down the grid you see, one row a line, cells separated by spaces, with - "
        "(or 0) for an empty cell. Then reason step by step. Then write the completed grid in "
        f"the same form, without empty cells.{HARMLESS} Use exactly this layout and nothing "
        "outside it:\n"
        "<perception>\nthe grid in the image\n</perception>\n"
        "<reasoning>\nyour reasoning\n</reasoning>\n"
        "<answer>\nthe completed grid\n</answer>"
    )
