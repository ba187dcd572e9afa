"""Problems of both puzzles that tests share: small pictures, many kinds of puzzles."""

from __future__ import annotations

import io
import json
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from tasks.core import Generates, Problem
from tasks.graph_coloring import GraphColoring
from tasks.graph_puzzle import chromatic_number
from tasks.sudoku import Sudoku

SUDOKU, GRAPHS = Sudoku(), GraphColoring()
TASKS: dict[str, Any] = {"sudoku": SUDOKU, "graph_coloring": GRAPHS}
TINY: dict[str, Any] = {
    "size": 4, "cell_size": 16, "font_size": 12, "margin": 0, "prompt": "brief",
}  # fmt: skip
SMALL: dict[str, Any] = {"canvas": 64, "prompt": "brief"}


def draw(task: Generates, seed: int = 0, **knobs: Any) -> Problem:
    return task.generate(np.random.default_rng(seed), task.spec(**knobs))


def given_graph(n: int, edges: list[tuple[int, int]]) -> Problem:
    truth = {"v": n, "c": chromatic_number(n, edges), "edges": edges}
    return GRAPHS.from_row("", b"", json.dumps(truth))


@cache
def samples(name: str) -> tuple[Problem, ...]:
    """Problems of all sizes and techniques, and graphs that are seldom drawn."""
    if name == "sudoku":
        kinds = [(4, {"blanks": 8} | TINY), (2, {"blanks": 12} | TINY), (3, {"blanks": 30})]
        kinds.append((2, {"blanks": 54, "technique": "search"}))
        return tuple(draw(SUDOKU, seed, **knobs) for count, knobs in kinds for seed in range(count))
    kinds = [(15, {"vertices": n} | SMALL) for n in (4, 5, 6)]
    kinds += [(2, {"vertices": n, "canvas": 96, "density": d}) for n in (7, 9) for d in (0.2, 0.7)]
    wheel = [(0, i) for i in range(1, 6)] + [(1, 2), (2, 3), (3, 4), (4, 5), (1, 5)]
    return (
        *(draw(GRAPHS, seed, **knobs) for count, knobs in kinds for seed in range(count)),
        given_graph(6, [(0, 5), (1, 5)]),  # isolated vertices
        given_graph(6, wheel),
        given_graph(5, [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)]),
        given_graph(4, [(0, 2), (2, 3), (1, 3)]),  # looks ahead
    )


def pixels(problem: Problem) -> np.ndarray:
    """uint8 [height, width, 3]."""
    return np.asarray(Image.open(io.BytesIO(problem.images[0])).convert("RGB"))
