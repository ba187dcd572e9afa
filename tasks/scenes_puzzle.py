"""Scenes and the questions about them, without words or pictures.

A scene is a tuple of rows of places; a place is (how many, of what), (0, "") where there is
nothing. A question is JSON: `{"ask": "sum", "kinds": [...], "signs": [1, -1, ...]}`,
`{"ask": "compare", "kinds": [...]}` or `{"ask": "walk", "start": kind or [row, column], "moves":
["right", ...]}`, rows and columns from 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks.scenes_knobs import MOST, ScenesSpec

Place = tuple[int, str]
Scene = tuple[tuple[Place, ...], ...]
Question = Mapping[str, Any]
NOTHING = "nothing"
EMPTY: Place = (0, "")
MOVES = {"right": (0, 1), "left": (0, -1), "up": (-1, 0), "down": (1, 0)}
TRIES = 200


def is_scene(value: Any) -> bool:
    """Whether a value has the form of a scene (what `parse` returns always has)."""
    return (
        isinstance(value, tuple)
        and len(value) > 0
        and all(isinstance(row, tuple) and len(row) == len(value[0]) > 0 for row in value)
        and all(
            isinstance(cell, tuple)
            and len(cell) == 2
            and type(cell[0]) is int
            and isinstance(cell[1], str)
            and (cell == EMPTY or (0 < cell[0] <= MOST and cell[1]))
            for row in value
            for cell in row
        )
    )


def shape(scene: Scene) -> tuple[int, int]:
    """(rows, columns)"""
    return len(scene), len(scene[0])


def count(scene: Scene, kind: str) -> int:
    """How many of a kind there are in all places."""
    return sum(n for row in scene for n, sort in row if sort == kind)


def spots(scene: Scene, kind: str) -> list[tuple[int, int]]:
    """(row, column) of each place with things of a kind."""
    return [(r, c) for r, row in enumerate(scene) for c, p in enumerate(row) if p[1] == kind]


def walked(scene: Scene, question: Question) -> list[tuple[int, int]] | None:
    """The places of a walk, first to last; None where it has no one start, or leaves the scene."""
    start = question["start"]
    if isinstance(start, str):
        starts = spots(scene, start)
        if len(starts) != 1:
            return None
        cell = starts[0]
    else:
        cell = (start[0], start[1])
    path = [cell]
    for move in question["moves"]:
        down, right = MOVES[move]
        path.append((path[-1][0] + down, path[-1][1] + right))
    rows, columns = shape(scene)
    return path if all(0 <= r < rows and 0 <= c < columns for r, c in path) else None


def answer_of(scene: Scene, question: Question) -> int | str | None:
    """A number, a kind or `NOTHING`; None where the scene leaves no one answer."""
    if question["ask"] == "sum":
        terms = zip(question["signs"], question["kinds"], strict=True)
        return sum(sign * count(scene, kind) for sign, kind in terms)
    if question["ask"] == "compare":
        counts = {kind: count(scene, kind) for kind in question["kinds"]}
        best = [kind for kind, n in counts.items() if n == max(counts.values())]
        return best[0] if len(best) == 1 else None
    path = walked(scene, question)
    return None if path is None else scene[path[-1][0]][path[-1][1]][1] or NOTHING


def draw_scene(rng: np.random.Generator, spec: ScenesSpec) -> Scene:
    """A scene whose kinds are `0`, `1`, ...: words come later, and change nothing."""
    cells = rng.permutation(spec.rows * spec.columns)[: spec.places]
    kinds = rng.permutation(
        [*range(spec.kinds), *rng.integers(spec.kinds, size=spec.places - spec.kinds)]
    )
    counts = rng.integers(1, spec.most + 1, size=spec.places)
    flat = [EMPTY] * (spec.rows * spec.columns)
    for cell, kind, n in zip(cells, kinds, counts, strict=True):
        flat[cell] = (int(n), str(kind))
    return tuple(tuple(flat[r * spec.columns :][: spec.columns]) for r in range(spec.rows))


def draw_puzzle(rng: np.random.Generator, spec: ScenesSpec) -> tuple[Scene, Question]:
    """A scene, and a question that it answers; raises ValueError where none is found."""
    for _ in range(TRIES):
        scene = draw_scene(rng, spec)
        asks = ["sum", "walk", *(["compare"] if spec.steps else [])]
        ask = str(rng.choice(asks)) if spec.ask == "any" else spec.ask
        question = _draw_question(rng, spec, scene, ask)
        if question is not None and answer_of(scene, question) not in (None, NOTHING):
            return scene, question
    raise ValueError(
        f"no scene of these knobs allows such a question in {TRIES} tries; lower steps, or raise "
        "most or places"
    )


def _draw_question(
    rng: np.random.Generator, spec: ScenesSpec, scene: Scene, ask: str
) -> Question | None:
    kinds = [str(kind) for kind in rng.permutation(spec.kinds)]
    if ask == "compare":
        return {"ask": ask, "kinds": kinds[: spec.steps + 1]}
    if ask == "sum":
        asked_kinds, total, signs = kinds[: spec.steps + 1], 0, list[int]()
        for kind in asked_kinds:  # never below nothing on the way
            n = count(scene, kind)
            signs.append(-1 if signs and n <= total and rng.integers(2) else 1)
            total += signs[-1] * n
        return {"ask": ask, "kinds": asked_kinds, "signs": signs}
    alone = [kind for kind in kinds if len(spots(scene, kind)) == 1]
    start: Any = alone[0] if alone and spec.steps else None
    if start is None:
        start = [int(rng.integers(spec.rows)), int(rng.integers(spec.columns))]
    moves: list[str] = []
    for _ in range(spec.steps):
        onward = [
            move
            for move in MOVES
            if walked(scene, {"start": start, "moves": [*moves, move]}) is not None
            # There and back again is no step.
            and not (moves and np.add(MOVES[move], MOVES[moves[-1]]).tolist() == [0, 0])
        ]
        if not onward:
            return None
        moves.append(str(rng.choice(onward)))
    return {"ask": ask, "start": start, "moves": moves}


def named(scene: Scene, question: Question, names: Sequence[str]) -> tuple[Scene, Question]:
    """Both with words for the kinds `0`, `1`, ..."""
    word = {str(index): name for index, name in enumerate(names)}
    worded = tuple(tuple((n, word[kind] if n else "") for n, kind in row) for row in scene)
    renamed = dict(question)
    if "kinds" in renamed:
        renamed["kinds"] = [word[kind] for kind in renamed["kinds"]]
    elif isinstance(renamed["start"], str):
        renamed["start"] = word[renamed["start"]]
    return worded, renamed
