"""A Sudoku grid as it was read or filled in, beside the image: errors marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import isqrt

from tasks.figures import Cell, Grid, named
from tasks.sudoku_puzzle import flat, layout_of

Rows = Sequence[Sequence[int]]


def seen_grid(true: Rows, seen: Rows) -> Grid:
    """The perceived grid; what was misread is marked and told."""
    size = len(seen)
    if len(true) != size:
        text = f"A {size}×{size} grid; the image shows {len(true)}×{len(true)}."
        return _grid(size, [Cell(v=_digit(saw)) for saw in flat(seen)], text)
    cells, wrong = [], []
    for at, (saw, real) in enumerate(zip(flat(seen), flat(true), strict=True)):
        if saw == real:
            cells.append(Cell(v=_digit(saw)))
            continue
        cells.append(Cell(v=_digit(saw), bad=True, true=_digit(real) or "–"))
        wrong.append(f"{_place(at, size)}: saw {saw or 'a blank'}, is {real or 'a blank'}")
    right = f"{size * size - len(wrong)} of {size * size} cells right. {named(wrong, 'Wrong: ')}"
    return _grid(size, cells, right.strip())


def answered_grid(seen: Rows | None, answer: Rows) -> Grid:
    """The answer; repeated digits and changes to what was *perceived* are marked."""
    size, board = len(answer), flat(answer)
    own = flat(seen) if seen is not None and len(seen) == size else [0] * len(board)
    twice = {
        cell
        for unit in layout_of(len(board)).units
        for digit, count in Counter(board[cell] for cell in unit).items()
        for cell in unit
        if count > 1 and board[cell] == digit
    }
    changed = {cell for cell, clue in enumerate(own) if clue not in (0, board[cell])}
    words = [_place(cell, size) for cell in sorted(twice)]
    text = named(words, "Digits repeated in a row, column or box: ") or "No repeats."
    if seen is None or len(seen) != size:
        text += " No perception of this size to hold it against."
    elif changed:
        text += f" {len(changed)} clues it read are changed."
    else:
        text += " Keeps every clue it read."
    cells = [
        Cell(v=_digit(digit), bad=cell in twice | changed, given=own[cell] > 0)
        for cell, digit in enumerate(board)
    ]
    return _grid(size, cells, text)


def _grid(size: int, cells: Sequence[Cell], text: str) -> Grid:
    rows = tuple(tuple(cells[start : start + size]) for start in range(0, size * size, size))
    return Grid(box=isqrt(size), cells=rows, text=text)


def _digit(value: int) -> str:
    return str(value) if value else ""


def _place(cell: int, size: int) -> str:
    return f"row {cell // size + 1} column {cell % size + 1}"
