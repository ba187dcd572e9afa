"""Graph colouring: exactness of the puzzle, legibility of the picture, strictness of the reader."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from itertools import combinations, product
from math import comb
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from tasks.core import (
    SEGMENTS,
    CanLeak,
    DataError,
    HasPerceptionItems,
    HasVisionLabels,
    Parsed,
    Problem,
    Task,
)
from tasks.graph_coloring import GraphColoring, GraphColoringSpec
from tasks.graph_layout import count_crossings, place
from tasks.graph_puzzle import (
    chromatic_number,
    draw_graph,
)
from tasks.responses import compose_response
from tasks.splits import SPLITS, Split, draw_problem

TASK = GraphColoring()
SMALL: dict[str, Any] = {"canvas": 64, "prompt": "brief"}

Edges = frozenset[tuple[int, int]]


def problem(seed: int = 0, **knobs: Any) -> Problem:
    return TASK.generate(np.random.default_rng(seed), GraphColoringSpec(**knobs))


def given_graph(n: int, edges: list[tuple[int, int]]) -> Problem:
    truth = {"v": n, "c": chromatic_number(n, edges), "edges": edges}
    return TASK.from_row("", b"", json.dumps(truth))


def read(perception: str, answer: str = "0:a") -> Parsed:
    return TASK.parse(compose_response(perception, "", answer))


# The puzzle


@pytest.mark.parametrize(
    ("knobs", "field"),
    [
        ({"vertices": 5, "edges": 3}, "edges"),
        ({"vertices": 5, "edges": 11}, "edges"),
        ({"vertices": 6, "edges": 13, "planar": "planar"}, "edges"),
        ({"vertices": 6, "edges": 10, "chromatic": 2}, "edges"),
        ({"vertices": 4, "chromatic": 5}, "chromatic"),
        ({"vertices": 6, "chromatic": 5, "planar": "planar"}, "chromatic"),
        ({"vertices": 4, "planar": "nonplanar"}, "planar"),
        ({"edges": 5, "density": 0.5}, "density"),
        ({"label_size": 0, "layout": "random"}, "label_size"),
        ({"label_size": 0, "jitter": 2}, "label_size"),
        ({"vertices": 26, "canvas": 64}, "canvas"),
        ({"ink": "#ffffff"}, "ink"),
        ({"ink": "red"}, "ink"),
        ({"vertices": 27}, "vertices"),
        ({"vertex": 5}, "vertex"),
        ({"contrast": 0}, "contrast"),
        ({"noise": float("nan")}, "noise"),
    ],
)
def test_impossible_knobs_are_refused_by_name(knobs: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=rf"\b{field}\b"):
        GraphColoringSpec(**knobs)


def test_what_cannot_be_drawn_ends_in_a_remedy() -> None:
    # The one nonplanar graph of 6 vertices and 9 edges is K3,3, which 2 colors do.
    with pytest.raises(ValueError, match="relax one"):
        problem(vertices=6, edges=9, chromatic=3, planar="nonplanar")
    with pytest.raises(ValueError, match="larger canvas"):
        problem(vertices=9, density=1.0, canvas=64, node_size=12)


# The picture


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("L"), dtype=np.float64)


def test_edges_can_be_read_off_a_tiny_picture() -> None:
    for seed in range(40):
        spec = GraphColoringSpec(vertices=4 + seed % 4, **SMALL)
        made = TASK.generate(np.random.default_rng(seed), spec)
        n, look, grey = spec.vertices, spec, pixels(made.image)
        assert grey.shape == (64, 64)
        angles = 2 * np.pi * np.arange(n) / n
        at = 32 + look.radius * np.stack([np.sin(angles), -np.cos(angles)], axis=1)
        seen = set()
        for i, j in combinations(range(n), 2):
            inside = look.diameter / np.linalg.norm(at[i] - at[j]) / 2 + 0.05
            points = at[i] + np.linspace(inside, 1 - inside, 64)[:, None] * (at[j] - at[i])
            columns, rows = np.floor(points).astype(int).T
            if grey[rows, columns].max() < 170:
                seen.add((i, j))
        assert seen == {tuple(edge) for edge in made.truth["edges"]}


def distance_to_segment(p: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    return min(float(np.linalg.norm(p - (a + t * (b - a)))) for t in np.linspace(0, 1, 201))


@pytest.mark.parametrize("layout", ["circle", "spring", "random"])
@pytest.mark.parametrize("crossings", ["any", "few", "many"])
def test_placements_are_legible(layout: str, crossings: str) -> None:
    spec = GraphColoringSpec(
        vertices=8, density=0.4, layout=layout, crossings=crossings, jitter=4, canvas=320
    )
    look = spec
    for seed in range(2):
        rng = np.random.default_rng(seed)
        edges = draw_graph(rng, 8, None, 0.4, None, "any")
        at = place(rng, 8, edges, look)
        assert (at >= look.diameter / 2).all() and (at <= 320 - look.diameter / 2).all()
        for u, v in combinations(range(8), 2):
            assert np.linalg.norm(at[u] - at[v]) > look.diameter
        for (i, j), v in product(edges, range(8)):
            if v not in (i, j):
                assert distance_to_segment(at[v], at[i], at[j]) > look.diameter / 2


@pytest.mark.parametrize("layout", ["circle", "spring", "random"])
def test_crossings_knob_orders_the_drawings(layout: str) -> None:
    def crossings(wish: str) -> int:
        look = GraphColoringSpec(vertices=7, layout=layout, crossings=wish)
        total = 0
        for seed in range(3):
            edges = draw_graph(np.random.default_rng(seed), 7, 11, 0.5, None, "planar")
            total += count_crossings(place(np.random.default_rng(seed), 7, edges, look), edges)
        return total

    few, any_, many = crossings("few"), crossings("any"), crossings("many")
    assert few <= any_ <= many and few < many
    if layout == "random":
        assert few <= 1  # these graphs are planar


def test_crossings_of_known_drawings() -> None:
    square = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    assert count_crossings(square, [(0, 2), (1, 3)]) == 1
    assert count_crossings(square, [(0, 1), (2, 3), (0, 3), (1, 2)]) == 0
    assert count_crossings(square, [(0, 1)]) == 0
    for n in (5, 6, 7):
        angles = 2 * np.pi * np.arange(n) / n
        at = np.stack([np.sin(angles), np.cos(angles)], axis=1)
        assert count_crossings(at, list(combinations(range(n), 2))) == comb(n, 4)


@pytest.mark.parametrize(
    "perception",
    [
        {"canvas": 128},
        {"layout": "spring"},
        {"layout": "random", "crossings": "few"},
        {"line_width": 5.0},
        {"node_size": 30.0},
        {"label_size": 12},
        {"label_size": 0},
        {"background": "random", "ink": "random", "node_fill": "random"},
        {"node_fill": "#00ff00"},
        {"jitter": 3.0},
        {"noise": 12.0},
        {"contrast": 0.4},
    ],
)
def test_perception_knobs_change_the_picture_only(perception: dict[str, Any]) -> None:
    plain, other = (
        problem(7, vertices=6, canvas=192),
        problem(7, **({"vertices": 6, "canvas": 192} | perception)),
    )
    assert plain.image != other.image and plain.id != other.id
    assert plain.truth == other.truth and plain.perception == other.perception
    assert plain.symmetry_key == other.symmetry_key


def test_reasoning_knobs_leave_the_drawing_alone() -> None:
    dressed: dict[str, Any] = {
        "vertices": 6,
        "canvas": 192,
        "background": "random",
        "ink": "random",
        "jitter": 3,
        "noise": 5,
    }
    one, other = problem(3, edges=6, **dressed), problem(3, edges=9, chromatic=3, **dressed)
    assert one.truth != other.truth
    corner = np.s_[:8, :8]  # no vertex or edge gets there
    a, b = (np.asarray(Image.open(io.BytesIO(p.image)))[corner] for p in (one, other))
    assert (a == b).all()
    looks = [GraphColoringSpec(edges=edges, **dressed) for edges in (6, 9)]
    at = [
        place(np.random.default_rng(0), 6, [(i, j) for i, j in p.truth["edges"]], look)
        for p, look in zip((one, other), looks, strict=True)
    ]
    assert np.allclose(at[0], at[1])


def test_random_colors_stay_legible() -> None:
    for seed in range(20):
        made = problem(seed, background="random", ink="random", node_fill="random", canvas=64)
        grey = pixels(made.image)
        assert grey.max() - grey.min() > 40


def test_contrast_fades_and_noise_has_its_sigma() -> None:
    full, faded, noisy = (
        pixels(problem(1, canvas=256, background="#808080", **k).image)
        for k in ({}, {"contrast": 0.25}, {"noise": 10.0})
    )
    assert np.allclose(faded - 128, 0.25 * (full - 128), atol=1.5)
    rgb_sigma = np.asarray(
        Image.open(io.BytesIO(problem(1, canvas=256, background="#808080", noise=10.0).image)),
        dtype=np.float64,
    )[:20, :20].std()
    assert 9 < rgb_sigma < 11 and not np.allclose(noisy, full)


def test_generation_repeats_and_moves_on() -> None:
    rng = np.random.default_rng(5)
    spec = GraphColoringSpec(layout="spring", noise=3, background="random", **SMALL)
    first, second = TASK.generate(rng, spec), TASK.generate(rng, spec)
    assert first == problem(5, **spec.model_dump())
    assert first.id != second.id
    assert re.fullmatch("graph_coloring-[0-9a-f]{16}", first.id)


# The task


def test_it_is_a_task() -> None:
    assert isinstance(TASK, Task) and isinstance(TASK, HasVisionLabels)


@pytest.mark.parametrize("prompt", ["brief", "full"])
@pytest.mark.parametrize("label_size", [None, 0])
def test_prompts_tell_what_the_picture_cannot(prompt: str, label_size: int | None) -> None:
    text = problem(vertices=6, prompt=prompt, label_size=label_size).prompt
    assert "6 vertices" in text and "0 to 5" in text
    assert ("clockwise" in text) == (label_size == 0)
    assert ("<perception>" in text) == (prompt == "full")


def test_prompt_says_nothing_of_the_graph() -> None:
    prompts = {problem(s, vertices=6, canvas=96, density=s / 9).prompt for s in range(10)}
    assert len(prompts) == 1


def problems() -> list[Problem]:
    made = [problem(s, vertices=n, **SMALL) for n in (4, 5, 6) for s in range(25)]
    made += [problem(s, vertices=9, canvas=96, density=0.1 + s / 12) for s in range(10)]
    made += [
        given_graph(6, [(0, 5), (1, 5)]),  # isolated vertices
        given_graph(6, [(0, i) for i in range(1, 6)] + [(1, 2), (2, 3), (3, 4), (4, 5), (1, 5)]),
        given_graph(5, [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)]),
        given_graph(4, [(0, 2), (2, 3), (1, 3)]),  # looks ahead
    ]
    return made


@pytest.mark.parametrize("style", ["terse", "verbose"])
def test_demonstrations_parse_and_are_right(style: Any) -> None:
    for made in problems():
        text = TASK.demonstrate(made, style)
        parsed = TASK.parse(text)
        assert parsed.defects == ()
        assert TASK.score_perception(made, parsed.perception) == (True, 1.0)
        assert TASK.check(made, parsed.answer)
        assert TASK.consistent(made, parsed.perception, parsed.answer)
        assert parsed.answer == TASK.solve(made, parsed.perception)
        assert text.startswith(TASK.oracle_prefix(made))
        assert TASK.parse(TASK.oracle_prefix(made)).perception == parsed.perception


def test_terse_steps_take_the_first_color_left() -> None:
    ahead = 0
    for made in problems():
        parsed = TASK.parse(TASK.demonstrate(made, "terse"))
        colors = dict(parsed.answer)
        assert list(colors) == list(range(made.truth["v"]))
        for v, line in enumerate(parsed.reasoning.splitlines()):
            assert re.fullmatch(r"\d+:( \d+[a-z])* -> [a-z]", line)
            named = [(int(u), c) for u, c in re.findall(r" (\d+)([a-z])", line)]
            assert int(line.split(":")[0]) == v and line[-1] == colors[v]
            assert all((min(u, v), max(u, v)) in parsed.perception for u, _ in named)
            assert all(colors[u] == c for u, c in named)
            near = {i + j - v for i, j in parsed.perception if v in (i, j)}
            assert {u for u in near if u < v} <= {u for u, _ in named}
            assert line[-1] == min(set("abcdefghij") - {c for _, c in named})
            ahead += any(u > v for u, _ in named)
    assert ahead > 0


def test_verbose_demonstrations_make_perception_a_sliver() -> None:
    for n in (5, 7, 9):
        for seed in range(10):
            made = problem(seed, vertices=n, canvas=96)
            text = TASK.demonstrate(made, "verbose")
            assert len(made.perception) < 0.05 * len(text)
            prefix = TASK.oracle_prefix(made)
            assert len(prefix) < 0.05 * len(text)


def test_check_accepts_exactly_the_optimal_colorings() -> None:
    made = given_graph(5, [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4), (0, 2)])
    edges, k = made.truth["edges"], made.truth["c"]
    for letters in product("abcz", repeat=5):
        right = all(letters[i] != letters[j] for i, j in edges) and len(set(letters)) == k
        assert TASK.check(made, tuple(enumerate(letters))) == right
    assert not TASK.check(made, None)
    full = TASK.solve(made, frozenset((i, j) for i, j in edges))
    assert full is not None and TASK.check(made, full)
    assert not TASK.check(made, full[:-1])
    assert not TASK.check(made, (*full, (5, "a")))
    assert not TASK.check(made, (*full[:-1], (7, "a")))


def test_perception_score_is_exact_match_and_f1() -> None:
    made = given_graph(4, [(0, 1), (0, 2), (1, 2), (2, 3)])
    true = frozenset((i, j) for i, j in made.truth["edges"])
    assert TASK.score_perception(made, true) == (True, 1.0)
    assert TASK.score_perception(made, true - {(2, 3)}) == (False, pytest.approx(6 / 7))
    assert TASK.score_perception(made, true | {(0, 3)}) == (False, pytest.approx(8 / 9))
    assert TASK.score_perception(made, frozenset({(0, 3), (9, 12)})) == (False, 0.0)
    assert TASK.score_perception(made, None) == (False, 0.0)
    none = replace(made, truth={"v": 2, "c": 1, "edges": []})
    assert TASK.score_perception(none, frozenset()) == (True, 1.0)


def test_consistency_is_about_the_perceived_graph() -> None:
    made = given_graph(4, [(0, 1), (0, 2), (1, 2), (2, 3)])
    path = frozenset({(0, 1), (1, 2), (2, 3)})
    two = ((0, "a"), (1, "b"), (2, "a"), (3, "b"))
    three = ((0, "a"), (1, "b"), (2, "c"), (3, "a"))
    assert TASK.consistent(made, path, two) and not TASK.check(made, two)
    assert TASK.check(made, three) and not TASK.consistent(made, path, three)  # a color too many
    assert not TASK.consistent(made, path | {(0, 2)}, two)
    assert not TASK.consistent(made, path | {(3, 4)}, two)
    assert not TASK.consistent(made, None, two) and not TASK.consistent(made, path, None)
    assert TASK.solve(made, path | {(3, 4)}) is None and TASK.solve(made, None) is None
    hidden = replace(made, truth={"v": 4, "c": 99, "edges": [[0, 3]]})
    assert TASK.solve(hidden, path) == TASK.solve(made, path) == two
    assert TASK.consistent(hidden, path, two)


def test_vision_labels_are_the_adjacency_bits() -> None:
    made = given_graph(4, [(0, 1), (1, 3), (2, 3)])
    labels = TASK.vision_labels(made)
    assert labels.dtype == np.int64 and labels.tolist() == [1, 0, 0, 0, 1, 1]


def test_split_by_chooses_the_key() -> None:
    by_label, by_class = (
        {problem(s, vertices=4, split_by=how, **SMALL).symmetry_key for s in range(120)}
        for how in ("labelled", "isomorphism")
    )
    assert 20 < len(by_label) <= 38 and len(by_class) <= 6


@pytest.mark.parametrize(
    "knobs",
    [
        {"vertices": 5},
        {"vertices": 6},
        {"vertices": 7},
        {"vertices": 7, "edges": 6},
        {"vertices": 7, "chromatic": 3, "planar": "planar"},
        {"vertices": 7, "chromatic": 2},
        {"vertices": 7, "density": 0.95},
    ],
)
def test_by_default_isomorphic_graphs_are_held_out_where_there_are_200_of_them(
    knobs: dict[str, Any],
) -> None:
    spec = GraphColoringSpec(**knobs)
    edges, chromatic, planar = spec.edges, spec.chromatic, spec.planar == "planar"
    classes = sum(
        len(graph) == spec.vertices
        and nx.is_connected(graph)
        and edges in (None, graph.size())
        and chromatic in (None, chromatic_number(len(graph), graph.edges))
        and not (planar and not nx.check_planarity(graph)[0])
        for graph in nx.graph_atlas_g()[1:]
    )
    if spec.split_by == "isomorphism":
        assert classes >= 200
    else:
        assert classes < 600 or knobs.get("density")  # dense ones are all there, but not drawn
    assert GraphColoringSpec(**spec.model_dump()) == spec  # the recipe's word stays
    assert ("may be in training" in TASK.held_out(spec)) == (spec.split_by == "labelled")


def test_no_held_out_graph_is_isomorphic_to_a_training_graph_by_default() -> None:
    sides: dict[Split, list[nx.Graph]] = {
        split: [
            nx.Graph(
                draw_problem(TASK, GraphColoringSpec(**SMALL, vertices=7), split, 0, i).truth[
                    "edges"
                ]
            )
            for i in range(60)
        ]
        for split in SPLITS
    }
    assert not any(nx.is_isomorphic(a, b) for a, b in product(*sides.values()))


# The reader


@pytest.mark.parametrize(
    "text",
    [
        "0-1 0-2 1-2",
        "1-2,2-0 ,\n1-0",
        "[[0,1],[2,0],[1,2]]",
        '{"v": 3, "c": 3, "edges": [[0, 1], [0, 2], [1, 2]]}',
        '{"edges": [[0, 1], [0, 2], [1, 2]]}',
    ],
)
def test_edge_lists_in_every_notation(text: str) -> None:
    parsed = read(text)
    assert parsed.perception == frozenset({(0, 1), (0, 2), (1, 2)}) and parsed.defects == ()


@pytest.mark.parametrize(
    ("text", "defects"),
    [
        ("", ["empty_perception"]),
        ("[]", ["empty_perception"]),
        ('{"edges": []}', ["empty_perception"]),
        ("0-1 1-0", ["duplicate_edge"]),
        ("[[0,1],[0,1]]", ["duplicate_edge"]),
        ("0-1 2-2", ["self_loop"]),
        ("2-2 0-1 2-2", ["self_loop", "duplicate_edge"]),
        ("0-1, ,0-2", ["bad_edge"]),
        (",0-1 0-2", ["bad_edge"]),
        ("0-1 0-2,,", ["bad_edge"]),
        ("0-1 0 -\n2", ["bad_edge"]),
        ("0-1 0_2", ["bad_edge"]),
        ("01-2", ["bad_edge"]),
        ("-1-2", ["bad_edge"]),
        ("0-1-2", ["bad_edge"]),
        ("0-١", ["bad_edge"]),
        ("0-" + "9" * 5000, ["bad_edge"]),
        ("[[0,1,2]]", ["bad_edge"]),
        ("[[0,true]]", ["bad_edge"]),
        ("[[0,1.0]]", ["bad_edge"]),
        ('[["0","1"]]', ["bad_edge"]),
        ("[[-1,1]]", ["bad_edge"]),
        ("[0,1]", ["bad_edge"]),
        ('{"edges": [[0,1]], "x": 1}', ["bad_edge"]),
        ('{"edges": [[0,1]], "v": []}', ["bad_edge"]),
        ('{"edges": 3}', ["bad_edge"]),
        ('{"v": 3}', ["bad_edge"]),
        ("[[0,1]", ["bad_json"]),
        ("[" * 3000 + "]" * 3000, ["json_too_deep"]),
    ],
)
def test_edge_list_defects(text: str, defects: list[str]) -> None:
    parsed = read(text)
    assert parsed.perception is None and list(parsed.defects) == defects


@pytest.mark.parametrize("text", ["0:a 1:b 2:c", "2:c,1:b\n0:a", '{"0": "a", "2": "c", "1": "b"}'])
def test_colorings_in_every_notation(text: str) -> None:
    parsed = read("0-1", text)
    assert parsed.answer == ((0, "a"), (1, "b"), (2, "c")) and parsed.defects == ()
    assert hash(parsed.answer) is not None


@pytest.mark.parametrize(
    ("text", "defect"),
    [
        ("", "bad_assignment"),
        ("{}", "bad_assignment"),
        ('["a", "b"]', "bad_assignment"),
        ("0:A", "bad_assignment"),
        ("0:aa", "bad_assignment"),
        ("0:\na", "bad_assignment"),
        ("0=a", "bad_assignment"),
        ("00:a", "bad_assignment"),
        ("0:a 1:b and 2:c", "bad_assignment"),
        ('{"0": 1}', "bad_assignment"),
        ('{"0": ""}', "bad_assignment"),
        ('{"0": ["a"]}', "bad_assignment"),
        ('{"x": "a"}', "bad_assignment"),
        ("0:a 1:b 0:a", "duplicate_vertex"),
        ('{"0": "a", "0": "b"}', "bad_json"),
    ],
)
def test_coloring_defects(text: str, defect: str) -> None:
    parsed = read("0-1", text)
    assert parsed.answer is None and parsed.defects == (defect,)
    assert parsed.perception == frozenset({(0, 1)})  # the other segment is not spoiled


def test_public_style_is_read() -> None:
    text = 'The graph is [[0, 1], [1, 2]]. Two colors do: {"0": "a", "1": "b", "2": "a"}'
    parsed = TASK.parse(text)
    assert parsed.perception == frozenset({(0, 1), (1, 2)})
    assert parsed.answer == ((0, "a"), (1, "b"), (2, "a")) and parsed.defects == ()


TAGS = [f"<{slash}{name}>" for name in SEGMENTS for slash in ("", "/")]
TOKENS = [
    "0-1",
    "1-0",
    "2-2",
    " ",
    ",",
    "\n",
    "0:a",
    "1:b",
    "[",
    "]",
    "{",
    "}",
    '"edges"',
    ":",
    '"',
]
HOSTILE = ["9" * 400, "-", "\x00", "\ud800", "١", "null", "1e999", "NaN"]
PIECES = st.sampled_from([*TAGS, *TOKENS, *HOSTILE])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join)))
@example("<perception>" + "[" * 100_000)
@example("<perception>" + "0-1 " * 50_000 + "</perception>")
@example("<answer>" + " " * 200_000 + ",</answer>")
def test_any_text_is_parsed_and_scored(text: str) -> None:
    made = SCORED
    parsed = TASK.parse(text)
    exact, graded = TASK.score_perception(made, parsed.perception)
    assert 0 <= graded <= 1 and exact == (graded == 1)
    solved = TASK.solve(made, parsed.perception)
    if solved is not None:
        assert TASK.consistent(made, parsed.perception, solved)
    TASK.consistent(made, parsed.perception, parsed.answer)
    if TASK.check(made, parsed.answer):
        assert parsed.answer is not None


SCORED = problem(vertices=4, **SMALL)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sets(st.tuples(st.integers(0, 25), st.integers(0, 25)), min_size=1), st.randoms())
def test_edge_sets_survive_being_written(pairs: set[tuple[int, int]], random: Any) -> None:
    edges = frozenset((min(p), max(p)) for p in pairs if p[0] != p[1])
    written = [f"{i}-{j}" if random.random() < 0.5 else f"{j}-{i}" for i, j in edges]
    random.shuffle(written)
    assert read(" ".join(written)).perception == (edges or None)


# Rows of public data sets


def test_a_row_becomes_the_same_problem() -> None:
    made = problem(2, vertices=6, canvas=96)
    assert json.loads(TASK.to_ground_truth(made)) == made.truth
    row = TASK.from_row(made.prompt, made.image, TASK.to_ground_truth(made))
    assert (row.id, row.perception, row.truth) == (made.id, made.perception, made.truth)
    assert row.symmetry_key == made.symmetry_key and row.image == made.image
    assert TASK.check(row, TASK.parse(TASK.demonstrate(made, "terse")).answer)


@pytest.mark.parametrize(
    ("truth", "field"),
    [
        ("{", "ground_truth:"),
        ("[1]", "ground_truth:"),
        ('{"v": 3, "c": 2}', "ground_truth.edges: missing"),
        ('{"v": "3", "c": 2, "edges": [[0,1]]}', "ground_truth.v"),
        ('{"v": 27, "c": 2, "edges": [[0,1]]}', "ground_truth.v"),
        ('{"v": true, "c": 2, "edges": [[0,1]]}', "ground_truth.v"),
        ('{"v": 3, "c": 1, "edges": []}', "ground_truth.edges"),
        ('{"v": 3, "c": 2, "edges": "0-1"}', "ground_truth.edges"),
        ('{"v": 3, "c": 2, "edges": [[0,1],[1,0]]}', "ground_truth.edges[1]"),
        ('{"v": 3, "c": 2, "edges": [[0,3]]}', "ground_truth.edges[0]"),
        ('{"v": 3, "c": 2, "edges": [[1,1]]}', "ground_truth.edges[0]"),
        ('{"v": 3, "c": 2, "edges": [[0,1,2]]}', "ground_truth.edges[0]"),
        ('{"v": 3, "c": 2, "edges": [[0,1],[0,1]]}', "ground_truth.edges"),
        ('{"v": 2, "c": 2, "edges": [[0,1],[0,1]]}', "ground_truth.edges"),
        ('{"v": 3, "c": 2, "edges": [[0,1],[0,2],[1,2]]}', "ground_truth.c"),
        ('{"v": 3, "c": 4, "edges": [[0,1],[0,2],[1,2]]}', "must be 3"),
        ('{"v": ' + "[" * 5000, "ground_truth:"),
    ],
)
def test_bad_rows_are_named(truth: str, field: str) -> None:
    with pytest.raises(DataError, match=re.escape(field)):
        TASK.from_row("q", b"", truth)


def test_items_are_undirected_edges_and_no_edge_list_states_a_coloring() -> None:
    assert isinstance(TASK, HasPerceptionItems) and isinstance(TASK, CanLeak)
    seen = read("1-0 2-1").perception
    assert TASK.perception_items(seen) == TASK.perception_items(read("0-1 1-2").perception)
    assert TASK.perception_items(seen) == {(0, 1), (1, 2)}
    made = problem(0, **SMALL)
    for perception in (seen, TASK.parse(TASK.oracle_prefix(made)).perception):
        assert TASK.states_answer(made, perception) is False
