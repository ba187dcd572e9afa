"""Sudoku as a puzzle: exact solving, the technique it takes, drawing at random.

A grid is a tuple of rows of ints, 0 for a blank. In here a board is a flat list of size*size
ints, and a set of digits is an int whose bit d-1 stands for digit d.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

import numpy as np

Grid = tuple[tuple[int, ...], ...]
Technique = Literal["naked_singles", "hidden_singles", "search"]

GENERATE_TRIES = 200
SEARCH_NODES = 20_000
"""Search gives up after so many nodes (under a second), as perceptions are model text."""


@dataclass(frozen=True)
class Layout:
    """Units are rows, then columns, then boxes.

    Attributes:
        size: cells of a unit.
        full: all digits, as a set.
        of: for each cell the numbers of its row, column and box among the units.
        units: for each unit its cells.
    """

    size: int
    full: int
    of: tuple[tuple[int, int, int], ...]
    units: tuple[tuple[int, ...], ...]


@cache
def layout_of(cell_count: int) -> Layout:
    """The layout of a board of 16 or 81 cells."""
    side = {16: 2, 81: 3}[cell_count]
    size = side * side
    of = tuple(
        (r, size + c, 2 * size + r // side * side + c // side)
        for r, c in product(range(size), repeat=2)
    )
    units = tuple(
        tuple(cell for cell in range(cell_count) if unit in of[cell]) for unit in range(3 * size)
    )
    return Layout(size, (1 << size) - 1, of, units)


def flat(grid: Sequence[Sequence[int]]) -> list[int]:
    """A grid as a board."""
    return [cell for row in grid for cell in row]


def as_grid(board: Sequence[int], size: int) -> Grid:
    """A board as a grid."""
    return tuple(tuple(board[start : start + size]) for start in range(0, size * size, size))


def _used_digits(cells: Sequence[int], layout: Layout) -> list[int] | None:
    """The set of digits placed in each unit; None where a digit is there twice."""
    used = [0] * len(layout.units)
    for cell, digit in enumerate(cells):
        if digit:
            for unit in layout.of[cell]:
                if used[unit] >> (digit - 1) & 1:
                    return None
                used[unit] |= 1 << (digit - 1)
    return used


def _toggle(used: list[int], units: Sequence[int], bit: int) -> None:
    for unit in units:
        used[unit] ^= bit


def candidates_of(cells: Sequence[int], cell: int) -> int:
    """The set of digits that a cell's row, column and box leave it."""
    layout = layout_of(len(cells))
    used = 0
    for unit in layout.of[cell]:
        for other in layout.units[unit]:
            if cells[other]:
                used |= 1 << (cells[other] - 1)
    return layout.full & ~used


def digits_of(mask: int) -> list[int]:
    """A set of digits as a list, in order."""
    return [digit for digit in range(1, mask.bit_length() + 1) if mask >> (digit - 1) & 1]


def unique_solution(puzzle: Sequence[Sequence[int]]) -> Grid | None:
    """The one solution, or None where there is none, several, or too much to search."""
    solutions = find_solutions(flat(puzzle), limit=2)
    return None if solutions is None or len(solutions) != 1 else as_grid(solutions[0], len(puzzle))


def find_solutions(board: Sequence[int], limit: int) -> list[list[int]] | None:
    """Up to `limit` solutions of a board; None where the search takes over `SEARCH_NODES`.

    Exact depth-first search on the cell with the fewest candidates (or a digit's only place).
    """
    layout = layout_of(len(board))
    of, full = layout.of, layout.full
    cells = list(board)
    used = _used_digits(cells, layout)
    if used is None:
        return []
    blanks = [cell for cell, digit in enumerate(cells) if not digit]
    solutions: list[list[int]] = []
    nodes = 0

    def descend() -> None:
        nonlocal nodes
        nodes += 1
        chosen, options, fewest = -1, 0, layout.size + 1
        candidates = [0] * len(cells)
        for cell in blanks:
            if cells[cell]:
                continue
            row, col, box = of[cell]
            open_ = full & ~(used[row] | used[col] | used[box])
            count = open_.bit_count()
            if count < fewest:
                chosen, options, fewest = cell, open_, count
                if count <= 1:
                    break
            candidates[cell] = open_
        if chosen < 0:
            solutions.append(list(cells))
            return
        if fewest > 1:
            for number, unit in enumerate(layout.units):
                once, twice = _places(unit, candidates)
                if once | used[number] != full:
                    return
                if only := once & ~twice:
                    options = only & -only
                    chosen = next(cell for cell in unit if candidates[cell] & options)
                    break
        while options and len(solutions) < limit and nodes <= SEARCH_NODES:
            bit = options & -options
            options ^= bit
            cells[chosen] = bit.bit_length()
            _toggle(used, of[chosen], bit)
            descend()
            cells[chosen] = 0
            _toggle(used, of[chosen], bit)

    descend()
    return None if nodes > SEARCH_NODES and len(solutions) < limit else solutions


def _places(unit: Sequence[int], candidates: Sequence[int]) -> tuple[int, int]:
    """The digits that have a place in a unit's blanks, and those that have several."""
    once = twice = 0
    for cell in unit:
        twice |= once & candidates[cell]
        once |= candidates[cell]
    return once, twice


def technique_needed(puzzle: Sequence[Sequence[int]]) -> Technique:
    """The easiest technique that solves the puzzle alone; `search` where singles do not."""
    board = flat(puzzle)
    if _singles_solve(board, hidden=False):
        return "naked_singles"
    return "hidden_singles" if _singles_solve(board, hidden=True) else "search"


@dataclass(frozen=True)
class Step:
    """One digit placed: the only one for its cell, or in `unit` the only place for the digit.

    `candidates` is what the cell could hold before the step, one bit a digit.
    """

    cell: int
    digit: int
    candidates: int
    unit: int | None


def singles(cells: list[int], hidden: bool) -> Iterator[Step]:
    """Fill `cells` in place by singles, first in reading order, until none is left.

    A hidden single is looked for only where no naked one is left. Also stops where a cell has
    no candidate. Does nothing where a digit is twice in a unit.
    """
    layout = layout_of(len(cells))
    used = _used_digits(cells, layout)
    if used is None:
        return
    blanks = [cell for cell, digit in enumerate(cells) if not digit]
    while blanks:
        candidates = [0] * len(cells)
        step: Step | None = None
        for cell in blanks:
            row, col, box = layout.of[cell]
            open_ = layout.full & ~(used[row] | used[col] | used[box])
            candidates[cell] = open_
            if not open_:
                return
            if not open_ & (open_ - 1):
                step = Step(cell, open_.bit_length(), open_, None)
                break
        if step is None and hidden:
            step = _first_hidden_single(candidates, layout)
        if step is None:
            return
        cells[step.cell] = step.digit
        _toggle(used, layout.of[step.cell], 1 << (step.digit - 1))
        blanks.remove(step.cell)
        yield step


def _first_hidden_single(candidates: Sequence[int], layout: Layout) -> Step | None:
    """A digit with one place in a unit; `candidates` has those of each blank, else 0."""
    for number, unit in enumerate(layout.units):
        once, twice = _places(unit, candidates)
        if only := once & ~twice:
            bit = only & -only
            cell = next(cell for cell in unit if candidates[cell] & bit)
            return Step(cell, bit.bit_length(), candidates[cell], number)
    return None


def _singles_solve(board: Sequence[int], hidden: bool) -> bool:
    cells = list(board)
    for _ in singles(cells, hidden):
        pass
    return 0 not in cells


def draw_puzzle(
    rng: np.random.Generator, size: int, blanks: int, technique: str
) -> tuple[Grid, Grid]:
    """(puzzle, solution): cells cleared one by one in random order while the rule holds.

    Raises:
        ValueError: blanks and technique were not met together in `GENERATE_TRIES` tries.
    """
    for _ in range(GENERATE_TRIES):
        solution = _random_solution(rng, size)
        puzzle = list(solution)
        left = blanks
        for cell in rng.permutation(size * size).tolist():
            if not left:
                break
            if _can_clear(puzzle, cell, technique):
                puzzle[cell] = 0
                left -= 1
        grid = as_grid(puzzle, size)
        if not left and (technique == "any" or technique_needed(grid) == technique):
            return grid, as_grid(solution, size)
    raise ValueError(
        f"sudoku: no {size}x{size} puzzle with blanks={blanks} and technique={technique!r} in "
        f"{GENERATE_TRIES} tries; "
        + (
            "lower blanks"
            if technique in ("any", "naked_singles")
            else 'change blanks (harder techniques need more blanks) or set technique to "any"'
        )
    )


def _can_clear(puzzle: list[int], cell: int, technique: str) -> bool:
    """Whether the puzzle stays solvable (uniquely, or by the singles named) without the cell.

    Singles are sound and clearing never helps them, so cells refused once stay refused.
    """
    trial = list(puzzle)
    trial[cell] = 0
    others = [digit for digit in digits_of(candidates_of(trial, cell)) if digit != puzzle[cell]]
    if not others:
        return True
    if technique in ("naked_singles", "hidden_singles"):
        return _singles_solve(trial, hidden=technique == "hidden_singles")
    for other in others:
        trial[cell] = other
        if find_solutions(trial, limit=1) != []:
            return False
    return True


@cache
def _all_4x4_solutions() -> list[list[int]]:
    solutions = find_solutions([0] * 16, limit=288)
    assert solutions is not None
    return solutions


def _random_solution(rng: np.random.Generator, size: int) -> list[int]:
    """A full grid; uniform on 4x4, on 9x9 a shuffled completion of three random boxes."""
    if size == 4:
        grids = _all_4x4_solutions()
        return grids[int(rng.integers(len(grids)))]
    board = np.zeros((9, 9), dtype=np.int64)
    for corner in (0, 3, 6):
        board[corner : corner + 3, corner : corner + 3] = (rng.permutation(9) + 1).reshape(3, 3)
    solutions = find_solutions(board.reshape(-1).tolist(), limit=1)
    assert solutions  # three boxes on the diagonal share no unit, so they can always be completed
    lines = [_shuffled_lines(rng) for _ in range(2)]
    shuffled: list[int] = (
        np.asarray(solutions[0]).reshape(9, 9)[np.ix_(*lines)].reshape(-1).tolist()
    )
    return shuffled


def _shuffled_lines(rng: np.random.Generator) -> np.ndarray:
    """int64 [9]: lines permuted within bands and bands permuted."""
    return np.concatenate([3 * band + rng.permutation(3) for band in rng.permutation(3)])
