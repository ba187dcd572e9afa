"""The reasoning of a graph colouring demonstration: a terse and a verbose chain of thought."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase

from tasks.graph_puzzle import Edge, max_clique, odd_cycle


def terse_steps(n: int, edges: Sequence[Edge], colors: Sequence[int]) -> str:
    """A line a vertex: `2: 0a 1b -> c`."""
    lines = []
    for v in range(n):
        named = [f" {u}{ascii_lowercase[colors[u]]}" for u in _blockers(edges, colors, v)]
        lines.append(f"{v}:{''.join(named)} -> {ascii_lowercase[colors[v]]}")
    return "\n".join(lines)


def verbose_steps(n: int, edges: Sequence[Edge], colors: Sequence[int]) -> str:
    """Why the chromatic number is what it is, each choice with its reason, and a check."""
    letter = [ascii_lowercase[c] for c in colors]
    k = max(colors) + 1
    parts = [
        f"First I look for a lower bound on the number of colors. {_lower_bound(n, edges, k)} "
        f"So at least {k} colors are needed, and I try to manage with exactly {k}: "
        f"{', '.join(ascii_lowercase[:k])}. I go through the vertices in order and give each one "
        "the first color that its neighbors leave free."
    ]
    for v in range(n):
        neighbors = sorted({i + j - v for i, j in edges if v in (i, j)})
        named = _blockers(edges, colors, v)
        earlier = [u for u in named if u < v]
        text = f"Vertex {v} is joined to {_listing(neighbors or ['no other'])}. "
        if earlier:
            held = [f"vertex {u} has color {letter[u]}" for u in earlier]
            text += f"Of these, {_listing(held)}. "
        elif neighbors:
            text += "None of these has a color yet. "
        for u in named[len(earlier) :]:
            text += (
                f"Color {letter[u]} would be free here, but I keep it for vertex {u}, to which "
                f"it is joined: taking it now would leave no way to finish with {k} colors. "
            )
        barred = sorted({letter[u] for u in named})
        if barred:
            text += f"This rules out {_listing(barred)}, so the first color left is {letter[v]}. "
        parts.append(f"{text}I give vertex {v} the color {letter[v]}.")
    checks = [f"edge {i}-{j} joins {letter[i]} and {letter[j]}" for i, j in edges]
    parts.append(
        f"Finally I check every edge: {'; '.join(checks)}. No edge joins two vertices of the same "
        f"color, all {n} vertices are colored, and {k} colors are used, which is the smallest "
        "number possible."
    )
    return "\n\n".join(parts)


def _blockers(edges: Sequence[Edge], colors: Sequence[int], v: int) -> list[int]:
    """Neighbours to name for v: earlier ones, then later ones that keep a smaller colour."""
    neighbors = sorted({i + j - v for i, j in edges if v in (i, j)})
    named = [u for u in neighbors if u < v]
    for u in neighbors:
        if u > v and colors[u] < colors[v] and colors[u] not in {colors[w] for w in named}:
            named.append(u)
    return named


def _lower_bound(n: int, edges: Sequence[Edge], k: int) -> str:
    clique = max_clique(n, edges)
    if len(clique) == k:
        kind = "an edge" if k == 2 else "a triangle" if k == 3 else f"a clique of {k} vertices"
        return (
            f"Vertices {_listing(clique)} are all joined to each other and form {kind}, so no two "
            "of them can share a color."
        )
    cycle = odd_cycle(n, edges)
    if k == 3 and cycle is not None:
        walk = " - ".join(str(v) for v in (*cycle, cycle[0]))
        return (
            f"Walking {walk} goes around a cycle of {len(cycle)} vertices. Two colors would have "
            "to alternate along it, which an odd number of vertices does not allow."
        )
    return (
        f"The largest set of vertices that are all joined to each other has {len(clique)} of them "
        f"({_listing(clique)}), but trying every way to color the graph with {k - 1} colors ends "
        "with two neighbors of the same color."
    )


def _listing(items: Sequence[object]) -> str:
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
