"""A graph as it was read or coloured, beside the image: errors marked."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.figures import Graph, Mark, named
from tasks.graph_puzzle import Edge


def seen_graph(n: int, true: frozenset[Edge], seen: frozenset[Edge]) -> Graph:
    """The perceived edges beside the true ones; what is missing and extra is marked and told."""
    outside = sorted(edge for edge in seen if edge[1] >= n)

    def mark(edge: Edge) -> Mark:
        return "missing" if edge not in seen else "right" if edge in true else "extra"

    edges = tuple((*edge, mark(edge)) for edge in sorted(true | (seen - set(outside))))
    parts = (
        ("Missing: ", [f"{i}-{j}" for i, j, how in edges if how == "missing"]),
        ("Not there: ", [f"{i}-{j}" for i, j, how in edges if how == "extra"]),
        ("Vertices that are not there: ", [f"{i}-{j}" for i, j in outside]),
    )
    text = [f"{len(true & seen)} of {len(true)} edges seen."]
    text += [named(found, before) for before, found in parts if found]
    return Graph(labels=tuple(map(str, range(n))), edges=edges, text=" ".join(text))


def answered_graph(
    n: int, seen: frozenset[Edge] | None, answer: Sequence[tuple[int, str]]
) -> Graph:
    """The answer's colours on the graph as *perceived*; edges of one colour are marked."""
    colors = {v: letter for v, letter in answer if v < n}

    def mark(i: int, j: int) -> Mark:
        return "clash" if colors.get(i) == colors.get(j) is not None else "right"

    edges = tuple((i, j, mark(i, j)) for i, j in sorted(seen or ()) if j < n)
    count = len(set(colors.values()))
    text = [
        f"{count} colours; no perception to hold them against."
        if seen is None
        else f"{count} colours on the graph it saw."
    ]
    clashes = [f"{i}-{j}" for i, j, how in edges if how == "clash"]
    bare = [str(v) for v in range(n) if v not in colors]
    text += [named(clashes, "Same colour at both ends: ")] if clashes else []
    text += [named(bare, "No colour: ")] if bare else []
    beyond = len(answer) - len(colors)
    text += [f"{beyond} vertices that are not there."] if beyond else []
    return Graph(
        labels=tuple(f"{v}:{colors.get(v, '?')}" for v in range(n)),
        colors=tuple(colors.get(v, "") for v in range(n)),
        edges=edges,
        text=" ".join(text),
    )
