"""Graph colouring: read the edges off a picture, then colour with the fewest colours.

Perception is the edge list (canonical text: `0-1 0-3 1-2`), the answer one letter a vertex
(`0:a 1:b 2:c`). An answer is checked by constraint, so every optimal colouring is right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from math import comb
from string import ascii_lowercase
from typing import Any

import numpy as np
from pydantic import BaseModel

from tasks.core import DataError, Problem, Style
from tasks.figures import Figure
from tasks.graph_figure import answered_graph, seen_graph
from tasks.graph_knobs import MAX_VERTICES, GraphColoringSpec
from tasks.graph_layout import place, render
from tasks.graph_puzzle import (
    Edge,
    best_coloring,
    chromatic_number,
    draw_graph,
    is_proper,
    isomorphism_key,
    labelled_key,
)
from tasks.graph_teacher import terse_steps, verbose_steps
from tasks.looking import squares, written
from tasks.puzzle_task import PuzzleTask
from tasks.responses import HARMLESS, Read, compose_response, items, read_json

Edges = frozenset[Edge]
"""The perception value: unordered pairs, written with i < j."""
Coloring = tuple[tuple[int, str], ...]
"""The answer value: (vertex, letter), sorted by vertex, each vertex once."""

_NUMBER = "0|[1-9][0-9]{0,2}"
_EDGE = re.compile(f"({_NUMBER})-({_NUMBER})")
_ASSIGNMENT = re.compile(f"({_NUMBER}):([a-z])")


class GraphColoring(PuzzleTask):
    """The graph colouring task (see `tasks.core.Task`)."""

    name = "graph_coloring"
    spec = GraphColoringSpec
    kind = "graph_coloring"
    id_separator = "\0"
    stream_count = 3

    def draw(
        self, rngs: list[np.random.Generator], spec: GraphColoringSpec
    ) -> tuple[str, Callable[[], Problem]]:
        """A connected graph that meets the demands of the knobs."""
        graph_rng, place_rng, paint_rng = rngs
        n = spec.vertices
        edges = draw_graph(
            graph_rng, n, spec.edges, spec.drawn_density, spec.chromatic, spec.planar
        )
        key = (labelled_key if spec.split_by == "labelled" else isomorphism_key)(n, edges)

        def finish() -> Problem:
            image = render(paint_rng, place(place_rng, n, edges, spec), edges, spec)
            chromatic = chromatic_number(n, edges)
            return self._problem(_prompt(spec), image, n, chromatic, edges, spec.model_dump(), key)

        return key, finish

    def read_perception(self, text: str) -> Read:
        """`Edges` of `i-j` items in any order and orientation, a JSON list of pairs, or a JSON
        object with `edges` (and `v`, `c`).

        Defects: `bad_edge`, `self_loop`, `duplicate_edge` (in either orientation),
        `empty_perception`, those of `responses.read_json`. Any of them leaves the value None: an
        edge set would hide a repeat, which is misreading all the same. `responses.items` says how
        items may be parted; spaces may stand around `-` and `:`.
        """
        text = text.strip()
        if not text:
            return None, ("empty_perception",)
        pairs: list[tuple[int, int]] = []
        if text[0] in "[{":
            value, defects = read_json(text)
            if defects:
                return None, defects
            if isinstance(value, dict):
                sizes = [value.pop(name) for name in ("v", "c") if name in value]
                if set(value) != {"edges"} or any(type(size) is not int for size in sizes):
                    return None, ("bad_edge",)
                value = value["edges"]
            if not isinstance(value, list):
                return None, ("bad_edge",)
            for pair in value:
                two = isinstance(pair, list) and len(pair) == 2
                if not two or not all(type(v) is int and 0 <= v < 1000 for v in pair):
                    return None, ("bad_edge",)
                pairs.append((pair[0], pair[1]))
        else:
            for token in items(_closed_up(text, "-")):
                match = _EDGE.fullmatch(token)
                if match is None:
                    return None, ("bad_edge",)
                pairs.append((int(match[1]), int(match[2])))
        if not pairs:
            return None, ("empty_perception",)
        edges = frozenset((min(pair), max(pair)) for pair in pairs)
        found_defects = []
        if any(i == j for i, j in pairs):
            found_defects.append("self_loop")
        if len(edges) < len(pairs):
            found_defects.append("duplicate_edge")
        return (None if found_defects else edges), tuple(found_defects)

    def read_answer(self, text: str) -> Read:
        """A `Coloring` of `vertex:letter` items or a JSON object of letters by vertex.

        Defects: `bad_assignment`, `duplicate_vertex`, those of `responses.read_json`.
        """
        text = text.strip()
        colors: list[tuple[int, str]] = []
        if text.startswith(("[", "{")):
            value, defects = read_json(text)
            if defects:
                return None, defects
            if not isinstance(value, dict):
                return None, ("bad_assignment",)
            for vertex, letter in value.items():
                if not isinstance(letter, str) or not _ASSIGNMENT.fullmatch(f"{vertex}:{letter}"):
                    return None, ("bad_assignment",)
                colors.append((int(vertex), letter))
        else:
            for token in items(_closed_up(text, ":")):
                match = _ASSIGNMENT.fullmatch(token)
                if match is None:
                    return None, ("bad_assignment",)
                colors.append((int(match[1]), match[2]))
        if not colors:
            return None, ("bad_assignment",)
        if len({v for v, _ in colors}) < len(colors):
            return None, ("duplicate_vertex",)
        return tuple(sorted(colors)), ()

    def check(self, problem: Problem, answer: Any) -> bool:
        """Whether the answer colours every vertex, properly, with the fewest colours."""
        truth = problem.truth
        return _is_optimal(truth["v"], _true_edges(problem), answer, truth["c"])

    def score_perception(self, problem: Problem, perception: Any) -> tuple[bool, float]:
        """(the edge set is exactly right, F1 of its edges); (False, 0.0) if unreadable."""
        if perception is None:
            return False, 0.0
        true = _true_edges(problem)
        if not true and not perception:
            return True, 1.0
        f1 = 2 * len(true & perception) / (len(true) + len(perception))
        return true == perception, f1

    def consistent(self, problem: Problem, perception: Any, answer: Any) -> bool:
        """Whether the answer is an optimal colouring of the graph as perceived."""
        n = problem.truth["v"]
        if perception is None or answer is None or not _in_range(perception, n):
            return False
        return _is_optimal(n, perception, answer, chromatic_number(n, perception))

    def solve(self, problem: Problem, perception: Any) -> Coloring | None:
        """The lexicographically smallest optimal colouring of a perceived graph."""
        n = problem.truth["v"]
        if perception is None or not _in_range(perception, n):
            return None
        return _letters(best_coloring(n, frozenset(perception)))

    def demonstrate(self, problem: Problem, style: Style) -> str:
        """A right response; its steps never need to be taken back.

        Each vertex takes the first colour that its listed neighbours leave. Those are the
        earlier neighbours and, where the smallest optimal colouring looks ahead, a later
        neighbour for whom a colour is kept.
        """
        n, edges = problem.truth["v"], sorted(_true_edges(problem))
        colors = best_coloring(n, frozenset(edges))
        explain = terse_steps if style == "terse" else verbose_steps
        return compose_response(
            problem.perception,
            explain(n, edges, colors),
            " ".join(f"{v}:{letter}" for v, letter in _letters(colors)),
        )

    def calls(self, problem: Problem) -> tuple[str, ...]:
        """Looks that show every pixel of a picture of `detail`, part by part; else none."""
        return tuple(written("look", *box) for box in squares(problem.knobs.get("detail", 1)))

    def vision_labels(self, problem: Problem) -> np.ndarray:
        """int64 [v(v-1)/2]: 1 where an edge joins the pair, pairs in lexicographic order."""
        n = problem.truth["v"]
        edges = _true_edges(problem)
        return np.array([pair in edges for pair in combinations(range(n), 2)], dtype=np.int64)

    def perception_items(self, perception: Edges) -> frozenset[Edge]:
        """The edges, undirected: (i, j) with i < j."""
        return frozenset(perception)

    def states_answer(self, problem: Problem, perception: Edges) -> bool:
        """Never: a list of edges has no place for a colour."""
        return False

    def draw_perception(self, problem: Problem, perception: Edges) -> Figure:
        """The edges that were read beside the true ones."""
        return seen_graph(problem.truth["v"], _true_edges(problem), perception)

    def draw_answer(self, problem: Problem, perception: Edges | None, answer: Coloring) -> Figure:
        """The colours on the graph that was read, clashes marked."""
        return answered_graph(problem.truth["v"], perception, answer)

    def held_out(self, spec: BaseModel) -> str:
        """What no training problem repeats, by `split_by`."""
        if isinstance(spec, GraphColoringSpec) and spec.split_by == "labelled":
            return "graphs by their labelled edges; an isomorphic one may be in training"
        return "graphs up to isomorphism"

    def from_row(self, query: str, image: bytes, ground_truth: str) -> Problem:
        """A problem, told apart by labelled edges, from `{"v": 7, "c": 3, "edges": [[0, 1]]}`.

        Raises:
            DataError: naming the field of `ground_truth` that is wrong, and what it must be.
        """
        n, chromatic, edges = _read_truth(ground_truth)
        knobs = {"vertices": n, "edges": len(edges), "chromatic": chromatic}
        return self._problem(query, image, n, chromatic, edges, knobs, labelled_key(n, edges))

    def to_ground_truth(self, problem: Problem) -> str:
        """`{"v": 7, "c": 3, "edges": [[0, 1], ...]}`."""
        return json.dumps({name: problem.truth[name] for name in ("v", "c", "edges")})

    def _problem(
        self, prompt: str, image: bytes, n: int, chromatic: int, edges: Sequence[Edge],
        knobs: Mapping[str, Any], key: str,
    ) -> Problem:  # fmt: skip
        perception = " ".join(f"{i}-{j}" for i, j in edges)
        truth = {"v": n, "c": chromatic, "edges": [[i, j] for i, j in edges]}
        return self.problem(prompt, image, perception, truth, knobs, key)


def _prompt(spec: GraphColoringSpec) -> str:
    n = spec.vertices
    where = ""
    if spec.label_size == 0:
        where = " Vertex 0 is at the top, the others follow clockwise."
    if spec.prompt == "brief":
        return f"Graph of {n} vertices, 0 to {n - 1}.{where} Color it with the fewest colors."
    return (
        f"The image shows a connected graph of {n} vertices, numbered 0 to {n - 1}.{where} Color "
        "its vertices so that no edge joins two vertices of the same color, with as few colors "
        "as possible (first find the chromatic number).\n"
        "Reply in three parts. Between <perception> and </perception>: every edge of the graph "
        'once, as two vertex numbers joined by "-", separated by spaces, such as 0-1 0-2 1-3. '
        "Between <reasoning> and </reasoning>: your reasoning. Between <answer> and </answer>: "
        f"a color letter (a, b, c, ...) for every vertex, such as 0:a 1:b 2:b 3:a.{HARMLESS}"
    )


def _true_edges(problem: Problem) -> Edges:
    return frozenset((i, j) for i, j in problem.truth["edges"])


def _in_range(edges: Edges, n: int) -> bool:
    return all(0 <= i < j < n for i, j in edges)


def _is_optimal(n: int, edges: Iterable[Edge], answer: Any, chromatic: int) -> bool:
    if answer is None or [v for v, _ in answer] != list(range(n)):
        return False
    colors = [letter for _, letter in answer]
    return is_proper(colors, edges) and len(set(colors)) == chromatic


def _letters(colors: Sequence[int]) -> Coloring:
    return tuple((v, ascii_lowercase[c]) for v, c in enumerate(colors))


def _closed_up(text: str, mark: str) -> str:
    """`0 - 1` as `0-1`: without the spaces and tabs beside a mark, in linear time."""
    return mark.join(part.strip(" \t") for part in text.split(mark))


def _read_truth(ground_truth: str) -> tuple[int, int, tuple[Edge, ...]]:
    """(vertices, chromatic number, sorted edges) of a row, or `DataError`."""
    truth, defects = read_json(ground_truth)
    if defects or not isinstance(truth, dict):
        raise DataError('ground_truth: must be a JSON object {"v": .., "c": .., "edges": [..]}')
    for name in ("v", "c", "edges"):
        if name not in truth:
            raise DataError(f"ground_truth.{name}: missing; add it to the object")
    n, chromatic, edges = truth["v"], truth["c"], truth["edges"]
    if type(n) is not int or not 2 <= n <= MAX_VERTICES:
        raise DataError(f"ground_truth.v: {n!r:.40} must be an integer of 2 to {MAX_VERTICES}")
    if not isinstance(edges, list) or not edges:
        raise DataError("ground_truth.edges: must be a list of at least one pair [i, j]")
    if len(edges) > comb(n, 2):
        raise DataError(f"ground_truth.edges: {len(edges)} are too many for v={n}; remove repeats")
    for index, edge in enumerate(edges):
        if not (
            isinstance(edge, list)
            and len(edge) == 2
            and all(type(v) is int for v in edge)
            and 0 <= edge[0] < edge[1] < n
        ):
            raise DataError(
                f"ground_truth.edges[{index}]: {edge!r:.40} must be [i, j] with 0 <= i < j < {n}"
            )
    pairs = tuple(sorted((i, j) for i, j in edges))
    if len(set(pairs)) < len(pairs):
        raise DataError("ground_truth.edges: an edge occurs twice; remove the repeat")
    exact = chromatic_number(n, pairs)
    if type(chromatic) is not int or chromatic != exact:
        raise DataError(
            f"ground_truth.c: {chromatic!r:.40} is not the chromatic number of these edges; "
            f"it must be {exact}"
        )
    return n, chromatic, pairs
