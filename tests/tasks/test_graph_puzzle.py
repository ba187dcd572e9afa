"""Graphs as puzzles: exact colouring, drawing at random, keys, against independent methods."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import networkx as nx
import numpy as np
import pytest

from tasks.graph_coloring import GraphColoringSpec
from tasks.graph_puzzle import (
    best_coloring,
    chromatic_number,
    draw_graph,
    graph_of,
    isomorphism_key,
    labelled_key,
    max_clique,
    odd_cycle,
)

Edges = frozenset[tuple[int, int]]


def random_graph(rng: np.random.Generator, n: int) -> Edges:
    density = rng.uniform(0.1, 0.95)
    return frozenset(e for e in combinations(range(n), 2) if rng.random() < density)


def first_by_brute_force(n: int, edges: Edges) -> tuple[int, ...]:
    """Of all colourings: fewest colours, then lexicographically first."""
    proper = (c for c in product(range(n), repeat=n) if all(c[i] != c[j] for i, j in edges))
    return min(proper, key=lambda c: (len(set(c)), c))


def chromatic_by_inclusion_exclusion(n: int, edges: Edges) -> int:
    """Fewest k for which independent sets cover all vertices (Björklund et al. 2009)."""
    near = [sum(1 << u for u in range(n) if (min(u, v), max(u, v)) in edges) for v in range(n)]
    independent = [1] * (1 << n)  # subsets without an edge, of each vertex set
    for s in range(1, 1 << n):
        v = s.bit_length() - 1
        rest = s & ~(1 << v)
        independent[s] = independent[rest] + independent[rest & ~near[v]]
    for k in range(1, n + 1):
        if sum((-1) ** (n - s.bit_count()) * independent[s] ** k for s in range(1 << n)) > 0:
            return k
    raise AssertionError


def test_best_coloring_is_the_first_of_all_optimal_colorings() -> None:
    rng = np.random.default_rng(0)
    for n, count in ((1, 1), (2, 4), (3, 8), (4, 40), (5, 30), (6, 4)):
        for _ in range(count):
            edges = random_graph(rng, n)
            assert best_coloring(n, edges) == first_by_brute_force(n, edges)


def test_chromatic_number_agrees_with_another_method() -> None:
    rng = np.random.default_rng(1)
    for n in (5, 6, 7, 8, 9):
        for _ in range(25):
            edges = random_graph(rng, n)
            assert chromatic_number(n, edges) == chromatic_by_inclusion_exclusion(n, edges)


@pytest.mark.parametrize(
    ("graph", "chromatic"),
    [
        (nx.cycle_graph(9), 3),
        (nx.wheel_graph(6), 4),  # odd wheel: 4 colours without a 4-clique
        (nx.mycielski_graph(4), 4),  # Grötzsch: 4 colours without a triangle
        (nx.mycielski_graph(5), 5),
        (nx.petersen_graph(), 3),
        (nx.complete_graph(26), 26),
        (nx.complete_bipartite_graph(13, 13), 2),
        (nx.empty_graph(3), 1),
    ],
)
def test_chromatic_number_of_known_graphs(graph: nx.Graph, chromatic: int) -> None:
    edges = [(min(e), max(e)) for e in graph.edges]
    assert chromatic_number(len(graph), edges) == chromatic


def test_reasons_for_the_lower_bound_hold() -> None:
    rng = np.random.default_rng(2)
    for _ in range(60):
        n = int(rng.integers(2, 9))
        edges = random_graph(rng, n)
        clique = max_clique(n, edges)
        assert all(pair in edges for pair in combinations(clique, 2))
        assert not any(
            all(pair in edges for pair in combinations(bigger, 2))
            for bigger in combinations(range(n), len(clique) + 1)
        )
        cycle = odd_cycle(n, edges)
        assert (cycle is None) == (chromatic_number(n, edges) <= 2)
        if cycle is not None:
            steps = zip(cycle, (*cycle[1:], cycle[0]), strict=True)
            assert len(cycle) % 2 and len(set(cycle)) == len(cycle)
            assert all((min(step), max(step)) in edges for step in steps)


@pytest.mark.parametrize(
    "knobs",
    [
        {"vertices": 4, "density": 0.0},
        {"vertices": 7, "edges": 10, "chromatic": 3},
        {"vertices": 9, "density": 0.5, "chromatic": 4, "planar": "planar"},
        {"vertices": 9, "edges": 21, "planar": "planar"},
        {"vertices": 6, "edges": 9, "chromatic": 2, "planar": "nonplanar"},
        {"vertices": 7, "edges": 10, "chromatic": 3, "planar": "nonplanar"},
        {"vertices": 5, "planar": "nonplanar"},
        {"vertices": 8, "edges": 28, "chromatic": 8},
        {"vertices": 9, "edges": 14, "chromatic": 2},
        {"vertices": 26, "edges": 169, "chromatic": 2, "canvas": 1024},
    ],
)
def test_reasoning_knobs_are_honoured(knobs: dict[str, Any]) -> None:
    spec = GraphColoringSpec(**knobs)
    n = spec.vertices
    for seed in range(6):
        density = 0.5 if spec.density is None else spec.density
        rng = np.random.default_rng(seed)
        edges = draw_graph(rng, n, spec.edges, density, spec.chromatic, spec.planar)
        assert list(edges) == sorted(set(edges)) and all(0 <= i < j < n for i, j in edges)
        graph = graph_of(n, edges)
        assert nx.is_connected(graph)
        if spec.edges is not None:
            assert len(edges) == spec.edges
        if spec.chromatic is not None:
            assert chromatic_number(n, edges) == spec.chromatic
        if spec.planar != "any":
            assert nx.check_planarity(graph)[0] == (spec.planar == "planar")


def test_density_moves_the_number_of_edges() -> None:
    means = []
    for density in (0.0, 0.3, 0.6, 1.0):
        rng = np.random.default_rng(0)
        drawn = [draw_graph(rng, 8, None, density, None, "any") for _ in range(40)]
        means.append(np.mean([len(edges) for edges in drawn]))
    assert means[0] == 7 and means[3] == 28
    assert np.allclose(means[1:3], [0.3 * 28, 0.6 * 28], atol=1.5)


def test_symmetry_keys() -> None:
    rng = np.random.default_rng(4)
    for n in (4, 6, 7, 8, 9, 12):
        edges = draw_graph(rng, n, None, 0.5, None, "any")
        for _ in range(4):
            to = rng.permutation(n)
            moved = sorted((int(min(to[i], to[j])), int(max(to[i], to[j]))) for i, j in edges)
            assert isomorphism_key(n, edges) == isomorphism_key(n, moved)
            same = list(moved) == list(edges)
            assert (labelled_key(n, edges) == labelled_key(n, moved)) == same
    # Two 2-regular graphs that refinement alone cannot tell apart.
    hexagon = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (0, 5)]
    triangles = [(0, 1), (1, 2), (0, 2), (3, 4), (4, 5), (3, 5)]
    assert isomorphism_key(6, hexagon) != isomorphism_key(6, triangles)


@pytest.mark.parametrize(("n", "labelled", "classes"), [(3, 4, 2), (4, 38, 6), (5, 728, 21)])
def test_keys_count_the_connected_graphs(n: int, labelled: int, classes: int) -> None:
    pairs = list(combinations(range(n), 2))
    graphs = [
        [p for p, keep in zip(pairs, bits, strict=True) if keep]
        for bits in product((0, 1), repeat=len(pairs))
    ]
    connected = [edges for edges in graphs if nx.is_connected(graph_of(n, edges))]
    assert len({labelled_key(n, edges) for edges in connected}) == labelled
    assert len({isomorphism_key(n, edges) for edges in connected}) == classes
