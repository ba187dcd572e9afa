"""Groups that surrogates are asked about, and scripted models that answer what they ask.

A toy tokenizer makes one token a character, its code point.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rollout.record import Group, Rollout, SampleRequest, ScoreRequest
from rollout.tokens import label_segments
from tasks.core import Problem, Task
from tasks.graph_coloring import GraphColoring, GraphColoringSpec
from tasks.responses import compose_response
from tasks.sudoku import Sudoku, SudokuSpec, grid_text
from tasks.sudoku_puzzle import Grid
from tests.support.toys import rollout as toy_rollout

SUDOKU, GRAPHS = Sudoku(), GraphColoring()
TINY = SudokuSpec(size=4, cell_size=16, font_size=12, margin=0, prompt="brief")
PUZZLES = [SUDOKU.generate(np.random.default_rng(seed), TINY) for seed in range(6)]
SMALL = GraphColoringSpec(vertices=5, canvas=64, prompt="brief")
DRAWINGS = [GRAPHS.generate(np.random.default_rng(seed), SMALL) for seed in range(6)]
TASK_OF: dict[str, Task] = {SUDOKU.name: SUDOKU, GRAPHS.name: GRAPHS}


def rollout_of(task: Task, text: str, index: int = 0, prefix: str = "") -> Rollout:
    parsed = task.parse(prefix + text)
    segments = label_segments(np.arange(len(text) + 1), parsed.spans, shift=len(prefix))
    ids = np.array([ord(c) for c in text], dtype=np.int32)
    return toy_rollout(f"g-{index}", text, parsed, ids, segments, prefix=prefix)


def group_of(problem: Problem, *texts: str) -> Group:
    task = TASK_OF[problem.task]
    return Group("g", problem, tuple(rollout_of(task, t, i) for i, t in enumerate(texts)))


def says(perception: str, answer: str = "x", reasoning: str = "so") -> str:
    return compose_response(perception, reasoning, answer)


def changed(grid: Sequence[Sequence[int]], *cells: tuple[int, int, int]) -> Grid:
    rows = [list(row) for row in grid]
    for r, c, value in cells:
        rows[r][c] = value
    return tuple(map(tuple, rows))


def perception_length(text: str) -> int:
    return text.index("</perception>") + len("</perception>")


# A puzzle, its solution, and the same puzzle with one blank filled in, one clue misread, one missed
PUZZLE = PUZZLES[0]
TRUE: Grid = changed(PUZZLE.truth["puzzle"])
SOLUTION: Grid = changed(PUZZLE.truth["solution"])
BLANKS = [(r, c) for r in range(4) for c in range(4) if not TRUE[r][c]]
CLUES = [(r, c) for r in range(4) for c in range(4) if TRUE[r][c]]
FILLED = changed(TRUE, (*BLANKS[0], SOLUTION[BLANKS[0][0]][BLANKS[0][1]]))
MISREAD = changed(TRUE, (*CLUES[0], TRUE[CLUES[0][0]][CLUES[0][1]] % 4 + 1))


def random_group(rng: np.random.Generator) -> Group:
    """One to eight rollouts that see right, a little wrong, nothing, or write the answer."""
    sudoku = bool(rng.integers(2))
    problem = (PUZZLES if sudoku else DRAWINGS)[rng.integers(6)]
    texts = []
    for _ in range(rng.integers(1, 9)):
        kind = rng.choice(["true", "true", "noisy", "noisy", "none", "leak"])
        if kind == "none":
            text = str(rng.choice(["", "no idea", "<perception>\n1 2\n</perception>", "[[["]))
        elif sudoku:
            grid = problem.truth["solution" if kind == "leak" else "puzzle"]
            if kind == "noisy":
                r, c, v = rng.integers(4), rng.integers(4), rng.integers(5)
                grid = changed(grid, (int(r), int(c), int(v)))
            text = says(grid_text(grid), grid_text(problem.truth["solution"]))
        else:
            edges = [tuple(e) for e in problem.truth["edges"]]
            if kind == "noisy":
                edges = [e for e in edges if rng.random() < 0.8] or edges[:1]
            answer = GRAPHS.solve(problem, frozenset(edges))
            assert answer is not None
            text = says(
                " ".join(f"{i}-{j}" for i, j in edges), " ".join(f"{v}:{a}" for v, a in answer)
            )
        texts.append(text)
    return group_of(problem, *texts)


@functools.cache
def random_groups() -> tuple[Group, ...]:
    rng = np.random.default_rng(1)
    return tuple(random_group(rng) for _ in range(1000))


def answered(requests: Sequence[SampleRequest], reply: Callable[[Any], str]) -> list[Group]:
    """What a sampler makes of requests, the text by a scripted model."""
    made = []
    for request in requests:
        task = TASK_OF[request.problem.task]
        made.append(
            Group(
                request.group_id,
                request.problem,
                (rollout_of(task, reply(request), prefix=request.prefix),),
            )
        )
    return made


def reason(request: SampleRequest) -> str:
    """A model that reasons without a flaw, and has but the prefix to go by."""
    task = TASK_OF[request.problem.task]
    answer = task.solve(request.problem, task.parse(request.prefix).perception)
    if answer is None:
        return "<reasoning>\nno way\n</reasoning>\n"
    if task is SUDOKU:
        return f"<reasoning>\n</reasoning>\n<answer>\n{grid_text(answer)}\n</answer>"
    return f"<reasoning>\n</reasoning>\n<answer>{' '.join(f'{v}:{a}' for v, a in answer)}</answer>"


HOSTILE = (
    "", "<perception>", "</perception>" * 500, "<perception>" * 500, "[" * 5000, "[[0]]" * 500,
    "<perception>\n1 2\n</perception>\n<answer>1 2</answer>", '{"edges": [[0, 1]], "c": 9}',
    "<perception>0-1 1-999</perception><answer>0:a</answer>", "<perception>\x00\ud83d</perception>",
    "<perception>999-998</perception>", "<perception>" + "9" * 9999 + "</perception>",
    "<perception>" + "\n".join("- - - -" for _ in range(4)) + "</perception>",
    "<perception>" + "\n".join("- " * 9 for _ in range(9)) + "</perception>",
    "<perception>" + "\n".join("1 1 1 -" for _ in range(4)) + "</perception>",
    '<perception>{"edges": [[0, 1]], "v": 99999, "c": 1}</perception><answer>{"0": "a"}</answer>',
)  # fmt: skip


def toy_logprobs(request: ScoreRequest) -> np.ndarray:
    """float32 [T], decided by the image and the tokens up to each one."""
    digest = hashlib.sha256(b"".join(request.images) or b"none")
    values = []
    for token in request.response_ids.tolist():
        digest.update(str(token).encode())
        values.append(-digest.digest()[0] / 64)
    return np.array(values, np.float32)
