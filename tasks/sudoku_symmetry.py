"""Which Sudoku puzzles are one puzzle up to symmetry, told by a key."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from itertools import permutations, product

import numpy as np


def symmetry_key(puzzle: Sequence[Sequence[int]]) -> str:
    """Equal for puzzles that are one puzzle up to the symmetries of Sudoku.

    The group: relabelling digits, transposing, permuting rows within a band and columns within
    a stack, permuting bands and stacks. On 4x4 the key is the hash of an exact canonical form,
    so it is equal for no other puzzles. On 9x9 it is a hash of Weisfeiler-Lehman colours of
    cells, lines, boxes and digits: equal throughout the group, and different puzzles
    could in principle share it, which keeps splits disjoint all the same.
    """
    board = np.asarray(puzzle, dtype=np.int64).reshape(-1)
    if board.size == 16:
        return f"sudoku4-{_canonical_4x4(board):x}"
    return f"sudoku9-{_refined_colours_9x9(board)}"


@cache
def _symmetries_4x4() -> np.ndarray:
    """int64 [128, 16]: every cell permutation of the group, as indices into a board."""
    cells = np.arange(16).reshape(4, 4)
    lines = [order for order in permutations(range(4)) if order[0] // 2 == order[1] // 2]
    return np.array(
        [
            turned[np.ix_(rows, columns)].reshape(-1)
            for turned in (cells, cells.T)
            for rows, columns in product(lines, repeat=2)
        ]
    )


def _canonical_4x4(board: np.ndarray) -> int:
    """Least member of the board's orbit (digits named by first occurrence), in base 5."""
    orbit = board[_symmetries_4x4()]  # [128, 16]
    first = np.full((orbit.shape[0], 5), -1)  # where each digit first occurs
    for digit in range(1, 5):
        there = orbit == digit
        first[:, digit] = np.where(there.any(axis=1), there.argmax(axis=1), 16)
    # A stable sort gives digits that do not occur the last names, which are not used.
    names = first.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    renamed = np.take_along_axis(names, orbit, axis=1)
    return int((renamed @ (5 ** np.arange(15, -1, -1, dtype=np.int64))).min())


_WL_ROUNDS = 8


def _refined_colours_9x9(board: np.ndarray) -> str:
    """Weisfeiler-Lehman colours of the incidence structure, as a hash of their multisets.

    Rows and columns are one kind of node, so transposing changes nothing; sums of mixed
    colours stand for multisets, so neither does any order.
    """
    row, col = np.divmod(np.arange(81), 9)
    box = row // 3 * 3 + col // 3
    clue = board > 0
    cells = np.where(clue, np.uint64(2), np.uint64(1))
    for _ in range(_WL_ROUNDS):
        mixed = _mix(cells)
        # Lines meet boxes in threes, which is what tells bands and stacks.
        row_thirds = mixed.reshape(9, 3, 3).sum(axis=2)  # [row, stack]
        col_thirds = mixed.reshape(3, 3, 9).sum(axis=1).T  # [column, band]
        rows = _mix(row_thirds).sum(axis=1)
        cols = _mix(col_thirds).sum(axis=1)
        bands = _mix(rows).reshape(3, 3).sum(axis=1)
        stacks = _mix(cols).reshape(3, 3).sum(axis=1)
        boxes = mixed.reshape(3, 3, 3, 3).sum(axis=(1, 3)).reshape(9)
        digits = np.zeros(10, dtype=np.uint64)
        np.add.at(digits, board, mixed)
        digits[0] = 0
        across = _mix(rows[row] ^ _mix(row_thirds)[row, col // 3] ^ _mix(bands)[row // 3])
        down = _mix(cols[col] ^ _mix(col_thirds)[col, row // 3] ^ _mix(stacks)[col // 3])
        cells = _mix(
            _mix(cells) ^ _mix(across + down) ^ _mix(_mix(boxes[box])) ^ _mix(digits[board] + clue)
        )
    return hashlib.sha256(np.sort(cells).astype("<u8").tobytes()).hexdigest()[:24]


def _mix(values: np.ndarray) -> np.ndarray:
    """uint64 to uint64, element by element: the finaliser of SplitMix64 (Steele et al. 2014)."""
    mixed = np.asarray(values, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
