"""What a model saw and answered, as figures to draw beside the image. Pure.

A figure is plain data that the page's script draws: a grid, a graph, or a comparison of texts
for a task that is not one of ours. Every figure says in `text` what it marks. The values come
from the task's parser and are hostile only as far as it lets them be.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Figure = dict[str, Any]
MOST_NAMED = 6
"""Wrong cells or edges that a text names; the rest are counted."""
MOST_WORDS = 300


def perception_figure(task: str, truth: Mapping[str, Any], perception: Any) -> Figure | None:
    """What was seen with its errors marked, or None for another task or nothing to draw.

    `task` as a recipe names it, `truth` as the problem holds it, `perception` as the task's own
    parser gave it.
    """
    if perception is None:
        return None
    if task == "sudoku":
        return _seen_grid(truth["puzzle"], perception)
    if task == "graph_coloring":
        return _seen_graph(truth["v"], {(i, j) for i, j in truth["edges"]}, perception)
    return None


def answer_figure(
    task: str, truth: Mapping[str, Any], perception: Any, answer: Any
) -> Figure | None:
    """The answer with what is wrong in it for the *own* perception, or None as above."""
    if answer is None:
        return None
    if task == "sudoku":
        return _answered_grid(perception, answer)
    if task == "graph_coloring":
        return _answered_graph(truth["v"], perception, answer)
    return None


def text_figure(true: str, seen: str) -> Figure:
    """Word by word: which words of the true perception were seen, missed or made up."""
    old, new = true.split()[:MOST_WORDS], seen.split()[:MOST_WORDS]
    rows: list[list[str]] = []
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for _, a, b, c, d in matcher.get_opcodes():
        if old[a:b] == new[c:d]:
            rows.append(["right", " ".join(new[c:d])])
            continue
        rows += [["missing", " ".join(old[a:b])]] if b > a else []
        rows += [["extra", " ".join(new[c:d])]] if d > c else []
    missed = sum(len(text.split()) for mark, text in rows if mark == "missing")
    made_up = sum(len(text.split()) for mark, text in rows if mark == "extra")
    text = f"{missed} words of the true perception missing, {made_up} that are not in it"
    return {"kind": "words", "rows": rows, "text": text if missed or made_up else "As it is."}


def _seen_grid(true: Sequence[Sequence[int]], seen: Sequence[Sequence[int]]) -> Figure:
    size = len(seen)
    if len(true) != size:
        cells = [[{"v": _digit(v)} for v in row] for row in seen]
        return _grid(cells, f"A {size}×{size} grid; the image shows {len(true)}×{len(true)}.")
    cells, wrong = [], []
    for r, (seen_row, true_row) in enumerate(zip(seen, true, strict=True), 1):
        cells.append([])
        for c, (saw, real) in enumerate(zip(seen_row, true_row, strict=True), 1):
            cell: dict[str, Any] = {"v": _digit(saw)}
            if saw != real:
                cell |= {"bad": True, "true": _digit(real) or "–"}
                wrong.append(f"row {r} column {c}: saw {saw or 'a blank'}, is {real or 'a blank'}")
            cells[-1].append(cell)
    right = size * size - len(wrong)
    return _grid(cells, f"{right} of {size * size} cells right. {_named(wrong, 'Wrong: ')}".strip())


def _answered_grid(seen: Sequence[Sequence[int]] | None, answer: Sequence[Sequence[int]]) -> Figure:
    size = len(answer)
    side = math.isqrt(size)
    own = seen if seen is not None and len(seen) == size else None
    at = {(r, c): answer[r][c] for r in range(size) for c in range(size)}
    units = [
        [key for key in at if where(key) == place]
        for where in (
            lambda key: key[0],
            lambda key: key[1],
            lambda key: key[0] // side * side + key[1] // side,
        )
        for place in range(size)
    ]
    twice = {
        key
        for unit in units
        for digit, n in Counter(at[k] for k in unit).items()
        if n > 1
        for key in unit
        if at[key] == digit
    }
    clues = {key for key in at if own and own[key[0]][key[1]]}
    changed = {key for key in clues if own and own[key[0]][key[1]] != at[key]}
    cells = [
        [
            {"v": _digit(at[r, c])}
            | ({"given": True} if (r, c) in clues else {})
            | ({"bad": True} if (r, c) in twice | changed else {})
            for c in range(size)
        ]
        for r in range(size)
    ]
    words = [f"row {r + 1} column {c + 1}" for r, c in sorted(twice)]
    text = f"Digits repeated in a row, column or box: {_named(words)}" if words else "No repeats."
    if own is None:
        text += " No perception of this size to hold it against."
    elif changed:
        text += f" {len(changed)} clues it read are changed."
    else:
        text += " Keeps every clue it read."
    return _grid(cells, text)


def _grid(cells: list[list[dict[str, Any]]], text: str) -> Figure:
    return {"kind": "grid", "box": math.isqrt(len(cells)), "cells": cells, "text": text}


def _digit(value: int) -> str:
    return str(value) if value else ""


def _seen_graph(n: int, true: set[tuple[int, int]], seen: frozenset[tuple[int, int]]) -> Figure:
    outside = sorted(edge for edge in seen if edge[1] >= n)
    edges = [
        [i, j, "right" if (i, j) in true & seen else "missing" if (i, j) in true else "extra"]
        for i, j in sorted(true | (seen - set(outside)))
    ]
    missing = [f"{i}-{j}" for i, j, mark in edges if mark == "missing"]
    extra = [f"{i}-{j}" for i, j, mark in edges if mark == "extra"]
    text = f"{len(true & seen)} of {len(true)} edges seen."
    text += f" Missing: {_named(missing)}" if missing else ""
    text += f" Not there: {_named(extra)}" if extra else ""
    if outside:
        text += f" Vertices that are not there: {_named([f'{i}-{j}' for i, j in outside])}"
    return {"kind": "graph", "labels": [str(v) for v in range(n)], "edges": edges, "text": text}


def _answered_graph(
    n: int, seen: frozenset[tuple[int, int]] | None, answer: Sequence[tuple[int, str]]
) -> Figure:
    colors = {v: letter for v, letter in answer if v < n}
    edges = [
        [i, j, "clash" if colors.get(i) == colors.get(j) is not None else "right"]
        for i, j in sorted(seen or ())
        if j < n
    ]
    clashes = [f"{i}-{j}" for i, j, mark in edges if mark == "clash"]
    bare = [str(v) for v in range(n) if v not in colors]
    text = f"{len(set(colors.values()))} colours on the graph it saw."
    if seen is None:
        text = f"{len(set(colors.values()))} colours; no perception to hold them against."
    text += f" Same colour at both ends: {_named(clashes)}" if clashes else ""
    text += f" No colour: {_named(bare)}" if bare else ""
    beyond = len(answer) - len(colors)
    text += f" {beyond} vertices that are not there." if beyond else ""
    labels = [f"{v}:{colors.get(v, '?')}" for v in range(n)]
    return {
        "kind": "graph",
        "labels": labels,
        "colors": [colors.get(v, "") for v in range(n)],
        "edges": edges,
        "text": text,
    }


def _named(things: Sequence[str], before: str = "") -> str:
    if not things:
        return ""
    more = f" and {len(things) - MOST_NAMED} more" if len(things) > MOST_NAMED else ""
    return (
        before
        + ("; " if any(" " in t for t in things) else ", ").join(things[:MOST_NAMED])
        + more
        + "."
    )
