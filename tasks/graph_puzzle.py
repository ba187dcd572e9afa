"""Graphs as puzzles: drawing them under constraints, colouring them exactly, telling them apart.

A graph is a vertex count `n` and edges `(i, j)` with `i < j < n`; a colouring is one colour
index a vertex. Everything is exact and meant for small graphs (up to 26 vertices).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import combinations, permutations, product
from math import comb
from typing import Literal

import networkx as nx
import numpy as np

Edge = tuple[int, int]
Planarity = Literal["any", "planar", "nonplanar"]

TRIES = 200
FREE_TRIES = 20
"""Tries before a clique or a K3,3 may be planted, so that easy demands stay unbiased."""
CLASS_DRAWS = 64
MOST_ALIKE = 10
"""Of the 2,016 pairs of so many draws: with more alike, there are fewer than some 200 classes."""
EXACT_ISOMORPHISM_MAX = 8
"""Largest vertex count whose isomorphism key is exact: 8! relabellings at the worst."""


def edge_bounds(n: int, chromatic: int | None, planar: Planarity) -> tuple[int, int]:
    """Fewest and most edges of a connected graph with these properties (necessary bounds).

    Fewest for chromatic number k: a k-clique with trees on it, k(k-1)/2 + n - k. Most: the
    Turán graph, Euler's 3n - 6 where planar (2n - 4 where bipartite too). A nonplanar graph
    holds a subdivided K5 or K3,3 (Kuratowski).

    Raises:
        ValueError: no graph at all can have these properties; the message says which knob to
            change.
    """
    low, high = n - 1, comb(n, 2)
    if chromatic is not None:
        if not (2 <= chromatic <= n):
            raise ValueError(
                f"chromatic: a connected graph of {n} vertices needs 2 to {n} colors, "
                f"not {chromatic}; change chromatic or vertices"
            )
        low = comb(chromatic, 2) + n - chromatic
        big, rest = divmod(n, chromatic)
        high = comb(n, 2) - rest * comb(big + 1, 2) - (chromatic - rest) * comb(big, 2)
    if planar == "planar":
        if chromatic is not None and chromatic > 4:
            raise ValueError(
                f"chromatic: a planar graph never needs {chromatic} colors (four suffice); "
                'set chromatic to 4 or less, or planar to "any"'
            )
        if n >= 3:
            high = min(high, 2 * n - 4 if chromatic == 2 else 3 * n - 6)
    if planar == "nonplanar":
        if n < 5 or (n == 5 and chromatic not in (None, 5)):
            raise ValueError(
                f"planar: no graph of {n} vertices with these properties is nonplanar; "
                "set vertices to 6 or more"
            )
        low = max(low, 10 if n == 5 else n + 3)
    if low > high:
        raise ValueError(
            f"no connected graph of {n} vertices has chromatic={chromatic} and planar={planar!r}; "
            "relax one of vertices, chromatic, planar"
        )
    return low, high


def draw_graph(
    rng: np.random.Generator,
    n: int,
    edges: int | None,
    density: float,
    chromatic: int | None,
    planar: Planarity,
) -> tuple[Edge, ...]:
    """Draw a connected labelled graph; every graph that meets the demands can come out.

    The number of edges is `edges`, or binomial with the given density, clipped to what the
    other demands allow. A random spanning tree is filled up with random edges; a demand on the
    chromatic number k is met by allowing only edges between k random classes.

    Raises:
        ValueError: the demands contradict each other, or `TRIES` draws did not meet them.
    """
    low, high = edge_bounds(n, chromatic, planar)
    for attempt in range(TRIES):
        count = edges
        if count is None:
            count = min(max(int(rng.binomial(comb(n, 2), density)), low), high)
        balance, clique, bipartite = (rng.random(3) < 0.5) & (attempt >= FREE_TRIES)
        classes = np.arange(n)
        if chromatic is not None:
            classes = np.arange(n) % chromatic
            if not balance:
                classes[chromatic:] = rng.integers(chromatic, size=n - chromatic)
            classes = rng.permutation(classes)
        planted: list[Edge] = []
        if clique and chromatic is not None:
            planted += _planted_clique(rng, classes)
        if bipartite and planar == "nonplanar":
            planted += _planted_k33(rng, classes)
        graph = _fill(rng, classes, planted, count, planar == "planar")
        if graph is None:
            continue
        if chromatic is not None and chromatic_number(n, graph) != chromatic:
            continue
        if planar == "nonplanar" and is_planar(n, graph):
            continue
        return graph
    raise ValueError(
        f"no connected graph found in {TRIES} tries with vertices={n}, edges={edges}, "
        f"density={density}, chromatic={chromatic}, planar={planar!r}; "
        f"relax one of them (such a graph has at least {low} and at most {high} edges)"
    )


@lru_cache(maxsize=256)
def has_many_classes(
    n: int, edges: int | None, density: float, chromatic: int | None, planar: Planarity
) -> bool:
    """Whether `draw_graph` brings some 200 graphs or more that are not isomorphic.

    Counted in draws: two draws from K classes are alike once in K times. False where drawing fails.
    """
    if planar == "planar" and n >= 12:
        return True  # there are at least the 551 trees of 12 vertices; drawing more takes seconds
    rng = np.random.default_rng(0)
    found: Counter[str] = Counter()
    alike = 0
    for _ in range(CLASS_DRAWS):
        try:
            key = isomorphism_key(n, draw_graph(rng, n, edges, density, chromatic, planar))
        except ValueError:
            return False
        alike += found[key]
        if alike > MOST_ALIKE:
            return False
        found[key] += 1
    return True


def graph_of(n: int, edges: Iterable[Edge]) -> nx.Graph:
    """As networkx has it."""
    graph = nx.empty_graph(n)
    graph.add_edges_from(edges)
    return graph


def is_planar(n: int, edges: Sequence[Edge]) -> bool:
    """Whether the graph can be drawn without crossings."""
    if n <= 4 or len(edges) < 9:
        return True
    if len(edges) > 3 * n - 6:
        return False
    planar: bool = nx.check_planarity(nx.Graph(list(edges)))[0]
    return planar


def chromatic_number(n: int, edges: Iterable[Edge]) -> int:
    """The fewest colours of a proper colouring; exact."""
    return max(best_coloring(n, frozenset(edges)), default=-1) + 1


@lru_cache(maxsize=4096)
def best_coloring(n: int, edges: frozenset[Edge]) -> tuple[int, ...]:
    """The lexicographically smallest colouring in vertex order with the fewest colours.

    First fit in vertex order is the smallest of all proper colourings, so it is the answer
    where it needs no colour too many; elsewhere DSATUR branch and bound (Brélaz 1979) decides
    which prefixes can be completed.
    """
    adjacency = _adjacency(n, edges)
    greedy = [-1] * n
    for v in range(n):
        taken = {greedy[u] for u in range(v) if adjacency[v] >> u & 1}
        greedy[v] = next(c for c in range(n) if c not in taken)
    k = len(max_clique(n, edges))
    while k < max(greedy, default=-1) + 1 and not _completable(adjacency, k, [-1] * n):
        k += 1
    if k >= max(greedy, default=-1) + 1:
        return tuple(greedy)
    colors = [-1] * n
    for v in range(n):
        for c in range(k):
            colors[v] = c
            if _completable(adjacency, k, colors):
                break
    return tuple(colors)


def is_proper(colors: Sequence[object], edges: Iterable[Edge]) -> bool:
    """Whether no edge joins two vertices of one colour."""
    return all(colors[i] != colors[j] for i, j in edges)


def max_clique(n: int, edges: Iterable[Edge]) -> tuple[int, ...]:
    """A largest set of mutually adjacent vertices, the lexicographically smallest of them."""
    cliques = (tuple(sorted(clique)) for clique in nx.find_cliques(graph_of(n, edges)))
    return min(cliques, key=lambda clique: (-len(clique), clique))


def odd_cycle(n: int, edges: Iterable[Edge]) -> tuple[int, ...] | None:
    """Vertices around a shortest odd cycle, or None in a bipartite graph."""
    adjacency = _adjacency(n, edges)
    best: tuple[int, ...] | None = None
    for root in range(n):
        parent, depth, order = {root: root}, {root: 0}, [root]
        for v in order:
            for u in range(n):
                if not adjacency[v] >> u & 1:
                    continue
                if u not in depth:
                    parent[u], depth[u] = v, depth[v] + 1
                    order.append(u)
                elif depth[u] == depth[v]:
                    left, right = [v], [u]
                    while left[-1] != right[-1]:
                        left.append(parent[left[-1]])
                        right.append(parent[right[-1]])
                    cycle = tuple(left + right[-2::-1])
                    if best is None or len(cycle) < len(best):
                        best = cycle
    return best


def labelled_key(n: int, edges: Iterable[Edge]) -> str:
    """Equal for two graphs exactly when they have the same edges on the same labels."""
    return "labelled-" + _digest((n, sorted(edges)))


def isomorphism_key(n: int, edges: Iterable[Edge]) -> str:
    """Equal for isomorphic graphs; up to 8 vertices, for no others.

    Up to `EXACT_ISOMORPHISM_MAX` vertices: the smallest adjacency code over all relabellings
    that respect colour refinement. Above: the refinement itself (one-dimensional
    Weisfeiler-Leman), which may give two different graphs the same key, never one graph two.
    """
    matrix = np.zeros((n, n), dtype=np.int64)
    for i, j in edges:
        matrix[i, j] = matrix[j, i] = 1
    colors, signature = _refine(matrix)
    if n > EXACT_ISOMORPHISM_MAX:
        return "isomorphism-" + _digest((n, signature))
    classes = [np.flatnonzero(np.array(colors) == color) for color in range(max(colors) + 1)]
    within = [_orders(len(members)) for members in classes]
    mixed = product(*(range(len(orders)) for orders in within))
    chosen = np.array(list(mixed))  # [relabellings, classes]
    orders = np.concatenate(
        [
            members[orders[at]]
            for members, orders, at in zip(classes, within, chosen.T, strict=True)
        ],
        axis=1,
    )  # [relabellings, vertices]
    rows, columns = np.triu_indices(n, 1)
    bits = matrix[orders[:, rows], orders[:, columns]]  # [relabellings, pairs]
    codes = bits @ (1 << np.arange(len(rows), dtype=np.int64))
    return "isomorphism-" + _digest((n, signature, int(codes.min())))


def _adjacency(n: int, edges: Iterable[Edge]) -> list[int]:
    """Neighbours of each vertex as a bit mask."""
    masks = [0] * n
    for i, j in edges:
        masks[i] |= 1 << j
        masks[j] |= 1 << i
    return masks


def _completable(adjacency: Sequence[int], k: int, colors: Sequence[int]) -> bool:
    """Whether a partial colouring (-1: none yet) extends to a proper one of k colours."""
    barred = [0] * len(adjacency)  # colours of coloured neighbours, as bits
    for v, c in enumerate(colors):
        if c >= 0:
            if barred[v] >> c & 1:
                return False
            _bar(barred, adjacency[v], c)
    todo = sum(1 << v for v, c in enumerate(colors) if c < 0)
    return _dsatur(adjacency, k, barred, todo, max(colors, default=-1) + 1)


def _dsatur(adjacency: Sequence[int], k: int, barred: list[int], todo: int, used: int) -> bool:
    if not todo:
        return True
    v = max(
        (v for v in range(len(adjacency)) if todo >> v & 1),
        key=lambda v: (barred[v].bit_count(), (adjacency[v] & todo).bit_count()),
    )
    for c in range(min(used + 1, k)):  # colours not used yet are interchangeable: try one
        if barred[v] >> c & 1:
            continue
        after = barred.copy()
        _bar(after, adjacency[v], c)
        if _dsatur(adjacency, k, after, todo & ~(1 << v), max(used, c + 1)):
            return True
    return False


def _bar(barred: list[int], neighbors: int, color: int) -> None:
    while neighbors:
        barred[(neighbors & -neighbors).bit_length() - 1] |= 1 << color
        neighbors &= neighbors - 1


def _planted_clique(rng: np.random.Generator, classes: np.ndarray) -> list[Edge]:
    """A clique with one vertex of each class."""
    chosen = [int(rng.choice(np.flatnonzero(classes == c))) for c in range(classes.max() + 1)]
    return list(combinations(sorted(chosen), 2))


def _planted_k33(rng: np.random.Generator, classes: np.ndarray) -> list[Edge]:
    """A K3,3 between two unions of classes, some edges subdivided; [] where these are small."""
    left_classes = rng.random(classes.max() + 1) < 0.5
    left, right = np.flatnonzero(left_classes[classes]), np.flatnonzero(~left_classes[classes])
    if min(len(left), len(right)) < 3:
        return []
    a, b = rng.permutation(left).tolist(), rng.permutation(right).tolist()
    edges = [(i, j) for i in a[:3] for j in b[:3]]
    for spare in a[3:] + b[3:]:
        i, j = edges[int(rng.integers(len(edges)))]
        if rng.random() < 0.5 and classes[spare] not in (classes[i], classes[j]):
            edges.remove((i, j))
            edges += [(i, spare), (spare, j)]
    return [(min(i, j), max(i, j)) for i, j in edges]


def _fill(
    rng: np.random.Generator, classes: np.ndarray, planted: list[Edge], count: int, planar: bool
) -> tuple[Edge, ...] | None:
    """A connected graph with `count` edges between classes, or None where this draw has none."""
    n = len(classes)
    label = classes.tolist()
    pairs = [(i, j) for i, j in combinations(range(n), 2) if label[i] != label[j]]
    order = [pairs[i] for i in rng.permutation(len(pairs))]
    parts = nx.utils.UnionFind(range(n))
    tree: list[Edge] = []
    for i, j in planted + order:
        if parts[i] != parts[j]:
            parts.union(i, j)
            tree.append((i, j))
    if len(tree) < n - 1:
        return None
    graph = list(dict.fromkeys(planted + tree))
    taken = set(graph)
    for edge in order:
        if len(graph) == count:
            break
        if edge not in taken and not (planar and not is_planar(n, [*graph, edge])):
            graph.append(edge)
    return tuple(sorted(graph)) if len(graph) == count else None


def _refine(matrix: np.ndarray) -> tuple[list[int], list[tuple[int, tuple[int, ...]]]]:
    """Stable colour refinement: (colour of each vertex, what the colours mean).

    Colours are ranks of sorted signatures, so both are independent of the labels.
    """
    n = len(matrix)
    colors = [0] * n
    count = 0
    while True:
        signatures = [
            (colors[v], tuple(sorted(colors[u] for u in np.flatnonzero(matrix[v]))))
            for v in range(n)
        ]
        ranks = {s: rank for rank, s in enumerate(sorted(set(signatures)))}
        colors = [ranks[s] for s in signatures]
        if len(ranks) == count:
            return colors, sorted(signatures)
        count = len(ranks)


@lru_cache(maxsize=EXACT_ISOMORPHISM_MAX)
def _orders(size: int) -> np.ndarray:
    """int64 [size!, size]: all orders of range(size)."""
    return np.array(list(permutations(range(size))))


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:24]
