"""Sudoku 4x4 and 9x9: the perception is the partly filled grid, the answer the full one.

A grid is a tuple of rows of ints, 0 for a blank. Its canonical text has one row a line, cells
parted by one space and `-` for a blank. Cells may also be parted otherwise (`responses.items`) or
not at all, boxes by a gap in all rows that have no other (`53- -7- ---`) and by blank lines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

from tasks.core import DataError, Problem, Style
from tasks.figures import Figure
from tasks.looking import written
from tasks.puzzle_task import PuzzleTask
from tasks.responses import HARMLESS, Read, compose_response, items, read_json
from tasks.splits import split_of_key
from tasks.sudoku_figure import answered_grid, seen_grid
from tasks.sudoku_knobs import SudokuSpec, parts_to_look_at
from tasks.sudoku_puzzle import Grid, draw_puzzle, flat, layout_of, unique_solution
from tasks.sudoku_render import render
from tasks.sudoku_symmetry import symmetry_key
from tasks.sudoku_teacher import terse_steps, verbose_steps

SIZES = (4, 9)


class Sudoku(PuzzleTask):
    """The Sudoku task (see `tasks.core.Task`)."""

    name = "sudoku"
    spec: type[BaseModel] = SudokuSpec
    kind = "sudoku"
    id_separator = "\n"
    stream_count = 2

    def draw(
        self, rngs: list[np.random.Generator], spec: SudokuSpec
    ) -> tuple[str, Callable[[], Problem]]:
        """A puzzle with a unique solution."""
        puzzle_rng, picture_rng = rngs
        puzzle, solution = draw_puzzle(puzzle_rng, spec.size, spec.blanks, spec.technique)
        key = symmetry_key(puzzle)
        return key, lambda: self._problem(
            _prompt(spec),
            render(puzzle, spec, picture_rng, split_of_key(self.name, key)),
            puzzle,
            solution,
            spec.model_dump(),
            key,
        )

    def read_perception(self, text: str) -> Read:
        """A `Grid`; defects `empty_perception`, `bad_cell` (no digit of that size), `bad_shape`."""
        return _read_grid(text) if text.strip() else (None, ("empty_perception",))

    def read_answer(self, text: str) -> Read:
        """A `Grid`; defects `empty_answer`, `blank_in_answer`, and those of a perception."""
        if not text.strip():
            return None, ("empty_answer",)
        grid, defects = _read_grid(text)
        return (None, ("blank_in_answer",)) if grid and 0 in flat(grid) else (grid, defects)

    def check(self, problem: Problem, answer: Any) -> bool:
        """Whether `answer` is a full valid grid that keeps the true clues."""
        return _completes(problem.truth["puzzle"], answer)

    def score_perception(self, problem: Problem, perception: Any) -> tuple[bool, float]:
        """(same grid, share of all cells read right); (False, 0) for another shape."""
        if not _is_grid(perception, problem.knobs["size"]):
            return False, 0.0
        truth = flat(problem.truth["puzzle"])
        right = sum(seen == true for seen, true in zip(flat(perception), truth, strict=True))
        return right == len(truth), right / len(truth)

    def consistent(self, problem: Problem, perception: Any, answer: Any) -> bool:
        """Whether `answer` is a full valid grid that keeps the clues of `perception`."""
        return _is_grid(perception, problem.knobs["size"]) and _completes(perception, answer)

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

    def calls(self, problem: Problem) -> tuple[str, ...]:
        """Looks that show every pixel of a picture of `detail`, part by part; else none."""
        return tuple(written("look", *box) for box in parts_to_look_at(problem.knobs))

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
        return 0 not in flat(perception)

    def draw_perception(self, problem: Problem, perception: Grid) -> Figure:
        """The grid that was read, misread cells marked."""
        return seen_grid(problem.truth["puzzle"], perception)

    def draw_answer(self, problem: Problem, perception: Grid | None, answer: Grid) -> Figure:
        """The grid that was filled in, repeats and changed clues marked."""
        return answered_grid(perception, answer)

    def held_out(self, spec: BaseModel) -> str:
        """What no training problem repeats."""
        told = "puzzles up to symmetry (digits, rows, columns, boxes, transposing)"
        if isinstance(spec, SudokuSpec) and spec.glyphs == "handwritten":
            told += ", and runs of handwritten digits (tasks/handwriting.py)"
        return told

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
        knobs = {"size": len(puzzle), "blanks": flat(puzzle).count(0)}
        return self._problem(query, image, puzzle, solution, knobs, symmetry_key(puzzle))

    def to_ground_truth(self, problem: Problem) -> str:
        """The puzzle as a JSON list of rows, 0 for a blank."""
        return json.dumps(problem.truth["puzzle"])

    def _problem(
        self, prompt: str, image: bytes, puzzle: Grid, solution: Grid, knobs: dict[str, Any],
        key: str,
    ) -> Problem:  # fmt: skip
        truth = {"puzzle": [list(row) for row in puzzle], "solution": [list(r) for r in solution]}
        return self.problem(prompt, image, grid_text(puzzle), truth, knobs, key)


def grid_text(grid: Sequence[Sequence[int]]) -> str:
    """A grid's canonical text."""
    return "\n".join(" ".join(str(cell) if cell else "-" for cell in row) for row in grid)


_CELL_VALUE: dict[str, int] = {"-": 0, **{str(digit): digit for digit in range(10)}}


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
    return (None, ("bad_cell",)) if -1 in flat(grid) else (grid, ())


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
        and all(type(cell) is int and 0 <= cell <= size for cell in flat(value))
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
