"""What both built-in tasks hold: every property here is shown of Sudoku and of graph colouring."""

from __future__ import annotations

import hashlib
import json
import re
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.contract import check_task
from tasks.core import (
    READ,
    CanLeak,
    Draws,
    DrawsLate,
    HasPerceptionItems,
    HasVisionLabels,
    Task,
    TellsHeldOut,
)
from tasks.responses import HARMLESS
from tests.support.puzzles import SMALL, TASKS, TINY, draw, pixels, samples

every_task = pytest.mark.parametrize("name", TASKS)
SMALLEST: dict[str, dict[str, Any]] = {"sudoku": TINY, "graph_coloring": SMALL | {"vertices": 4}}

CONTRACT: list[tuple[str, dict[str, Any]]] = [
    ("sudoku", {"size": 4, "blanks": 3, "noise": 20}),
    ("sudoku", {"blanks": 40, "prompt": "brief"}),
    ("graph_coloring", {"vertices": 4, "canvas": 64, "noise": 10}),
    ("graph_coloring", {"vertices": 8, "chromatic": 3, "layout": "spring", "planar": "planar"}),
]


@pytest.mark.parametrize(("name", "knobs"), CONTRACT)
def test_they_keep_the_contract(name: str, knobs: dict[str, Any]) -> None:
    task = TASKS[name]
    assert check_task(task, task.spec(**knobs), problems=4) == []


@every_task
def test_they_have_every_ability(name: str) -> None:
    abilities = (CanLeak, Draws, DrawsLate, HasPerceptionItems, HasVisionLabels, TellsHeldOut)
    for ability in (Task, *abilities):
        assert isinstance(TASKS[name], ability)


@every_task
@pytest.mark.parametrize("style", ["terse", "verbose"])
def test_demonstrations_are_read_back_whole_and_right(name: str, style: Any) -> None:
    task = TASKS[name]
    for problem in samples(name):
        text = task.demonstrate(problem, style)
        parsed = task.parse(text)
        assert parsed.defects == ()
        assert task.score_perception(problem, parsed.perception) == (True, 1.0)
        assert task.check(problem, parsed.answer)
        assert task.consistent(problem, parsed.perception, parsed.answer)
        assert task.solve(problem, parsed.perception) == parsed.answer
        prefix = task.oracle_prefix(problem)
        assert text.startswith(prefix)
        assert task.parse(prefix).perception == parsed.perception
        assert not task.states_answer(problem, parsed.perception)
        if style == "verbose" and (name == "sudoku" or problem.knobs["vertices"] > 6):
            assert len(prefix) < 0.05 * len(text)  # perception is a sliver of it


@every_task
def test_a_row_becomes_the_same_problem(name: str) -> None:
    task = TASKS[name]
    for problem in samples(name)[::5]:
        row = task.from_row("Solve it.", problem.images[0], task.to_ground_truth(problem))
        assert (row.id, row.task, row.prompt, row.images[0]) == (
            problem.id, name, "Solve it.", problem.images[0],
        )  # fmt: skip
        assert (row.perception, row.truth) == (problem.perception, problem.truth)
        if problem.knobs.get("split_by") != "isomorphism":  # a row does not tell
            assert row.symmetry_key == problem.symmetry_key
        assert task.check(row, task.parse(task.demonstrate(row, "terse")).answer)


@every_task
def test_a_seed_repeats_and_moves_on(name: str) -> None:
    task, looks = TASKS[name], {"noise": 3, "jitter": 2, "ink": "random"}
    spec = task.spec(**SMALLEST[name] | looks)
    rng = np.random.default_rng(5)
    first, second = task.generate(rng, spec), task.generate(rng, spec)
    assert first == draw(task, 5, **spec.model_dump())
    assert first.id != second.id and re.fullmatch(f"{name}-[0-9a-f]{{16}}", first.id)
    assert task.spec(**json.loads(spec.model_dump_json())) == spec


PERCEPTION: dict[str, list[dict[str, Any]]] = {
    "sudoku": [
        {"cell_size": 20, "font_size": 14}, {"font_size": 10}, {"margin": 1}, {"jitter": 3},
        {"noise": 20.0}, {"contrast": 0.4}, {"rotation": 25.0}, {"ink": "random"},
        {"paper": "#ffeeaa"}, {"lines": "dashed"}, {"lines": "boxes"}, {"detail": 3},
    ],
    "graph_coloring": [
        {"canvas": 128}, {"layout": "spring"}, {"layout": "random", "crossings": "few"},
        {"line_width": 5.0}, {"node_size": 30.0}, {"label_size": 12}, {"label_size": 0},
        {"background": "random", "ink": "random", "node_fill": "random"},
        {"node_fill": "#00ff00"}, {"jitter": 3.0}, {"noise": 12.0}, {"contrast": 0.4},
    ],
}  # fmt: skip


@every_task
def test_perception_knobs_change_the_picture_and_not_the_puzzle(name: str) -> None:
    task = TASKS[name]
    base: dict[str, Any] = {"size": 4} if name == "sudoku" else {"vertices": 6, "canvas": 192}
    plain = draw(task, 7, **base)
    for knobs in PERCEPTION[name]:
        other, spec = draw(task, 7, **base | knobs), task.spec(**base | knobs)
        assert (other.truth, other.perception) == (plain.truth, plain.perception), knobs
        assert other.symmetry_key == plain.symmetry_key, knobs
        assert other.images[0] != plain.images[0] and other.id != plain.id, knobs
        side = spec.side if name == "sudoku" else spec.canvas
        assert pixels(other).shape == (side, side, 3), knobs


@pytest.mark.parametrize(
    ("name", "knobs", "said"),
    [
        ("sudoku", {"blanks": 65}, "at most 64"),
        ("sudoku", {"size": 4, "blanks": 13}, "at most 12"),
        ("sudoku", {"size": 4, "technique": "search"}, "does not occur on 4x4"),
        ("sudoku", {"font_size": 41}, "lower font_size"),
        ("sudoku", {"jitter": 21}, "half of cell_size"),
        ("sudoku", {"cell_size": 200, "margin": 200}, "within 2048"),
        ("sudoku", {"detail": 7}, "within 2048"),
        ("sudoku", {"size": 4, "detail": 5}, "less than a cell"),
        ("sudoku", {"detail": 2, "font_size": 81}, "cell_size 40 \\* detail 2"),
        ("sudoku", {"ink": "#ffffff"}, "same as paper"),
        ("sudoku", {"ink": "blue"}, "#rrggbb"),
        ("sudoku", {"ink": [0, 0, 256]}, "three whole numbers"),
        ("sudoku", {"contrast": 0}, "greater than 0"),
        ("sudoku", {"nosie": 3}, "Extra inputs"),
        ("graph_coloring", {"vertices": 5, "edges": 3}, "edges: 3 is impossible"),
        ("graph_coloring", {"vertices": 5, "edges": 11}, "edges: 11 is impossible"),
        ("graph_coloring", {"vertices": 6, "edges": 13, "planar": "planar"}, "edges: 13 is"),
        ("graph_coloring", {"vertices": 6, "edges": 10, "chromatic": 2}, "edges: 10 is"),
        ("graph_coloring", {"vertices": 4, "chromatic": 5}, "chromatic: "),
        ("graph_coloring", {"vertices": 6, "chromatic": 5, "planar": "planar"}, "chromatic: "),
        ("graph_coloring", {"vertices": 4, "planar": "nonplanar"}, "planar: "),
        ("graph_coloring", {"edges": 5, "density": 0.5}, "density: "),
        ("graph_coloring", {"label_size": 0, "layout": "random"}, "label_size: 0"),
        ("graph_coloring", {"label_size": 0, "jitter": 2}, "label_size: 0"),
        ("graph_coloring", {"vertices": 26, "canvas": 64}, "canvas: 64 px"),
        ("graph_coloring", {"ink": "#ffffff"}, "ink: "),
        ("graph_coloring", {"ink": "red"}, r"ink\n.*#rrggbb"),
        ("graph_coloring", {"vertices": 27}, r"vertices\n"),
        ("graph_coloring", {"vertex": 5}, r"vertex\n"),
        ("graph_coloring", {"contrast": 0}, r"contrast\n"),
        ("graph_coloring", {"noise": float("nan")}, r"noise\n"),
    ],
)
def test_impossible_knobs_are_refused_by_name(name: str, knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TASKS[name].spec(**knobs)


@every_task
def test_what_cannot_be_drawn_says_what_to_change(name: str) -> None:
    impossible: list[tuple[dict[str, Any], str]] = {
        "sudoku": [
            ({"blanks": 1, "technique": "search"}, "blanks=1 and technique='search'.*change blanks")
        ],
        "graph_coloring": [
            # The one nonplanar graph of 6 vertices and 9 edges is K3,3, which 2 colors do.
            ({"vertices": 6, "edges": 9, "chromatic": 3, "planar": "nonplanar"}, "relax one"),
            ({"vertices": 9, "density": 1.0, "canvas": 64, "node_size": 12}, "larger canvas"),
        ],
    }[name]  # type: ignore[assignment]
    for knobs, said in impossible:
        with pytest.raises(ValueError, match=said):
            draw(TASKS[name], **knobs)
    with pytest.raises(TypeError, match="needs a"):
        other = next(task for task in TASKS.values() if task.name != name)
        TASKS[name].generate(np.random.default_rng(0), other.spec())


@every_task
def test_a_prompt_says_nothing_of_the_puzzle_and_the_full_one_all_of_the_format(name: str) -> None:
    varied: list[dict[str, Any]] = [
        {"blanks": 4 + s} if name == "sudoku" else {"density": s / 9} for s in range(5)
    ]
    for prompt in ("brief", "full"):
        knobs = SMALLEST[name] | {"prompt": prompt}
        texts = {draw(TASKS[name], s, **knobs | more).prompt for s, more in enumerate(varied)}
        (text,) = texts
        for told in (HARMLESS, *(f"<{segment}>" for segment in READ)):
            assert (told in text) == (prompt == "full")


# Changing one of these changes the problems of all runs and data sets of old. Pixels are not in
# it: they are the libraries' business.
RECORDED: list[tuple[str, dict[str, Any], str]] = [
    ("sudoku", TINY | {"blanks": 8, "noise": 9}, "bf79072db9d8"),
    ("sudoku", {"blanks": 45, "technique": "hidden_singles"}, "449e2cece32a"),
    ("sudoku", {"blanks": 53, "technique": "search"}, "a731e56cc1f2"),
    ("graph_coloring", SMALL | {"vertices": 6, "label_size": 0}, "324696d1cc86"),
    ("graph_coloring", SMALL | {"vertices": 6, "split_by": "isomorphism"}, "83aa64efda9a"),
    (
        "graph_coloring",
        {"vertices": 9, "chromatic": 4, "planar": "planar", "density": 0.5},
        "365f0c8ba545",
    ),
    (
        "graph_coloring",
        {"vertices": 8, "chromatic": 3, "edges": 9, "layout": "random"},
        "1bde836ed439",
    ),
]


@pytest.mark.parametrize(("name", "knobs", "recorded"), RECORDED)
def test_a_seeds_problems_stay(name: str, knobs: dict[str, Any], recorded: str) -> None:
    task = TASKS[name]
    digest = hashlib.sha256()
    rng, spec = np.random.default_rng(7), task.spec(**knobs)
    for _ in range(4):
        made = task.generate(rng, spec)
        facts = (made.prompt, made.perception, made.symmetry_key, task.to_ground_truth(made))
        told = (task.demonstrate(made, "terse"), task.demonstrate(made, "verbose"))
        digest.update("\n".join((*facts, *told)).encode())
    assert digest.hexdigest()[:12] == recorded


# Hostile text

TAGS = [f"<{slash}{name}>" for name in READ for slash in ("", "/")]
TOKENS = ["0-1", "1-0", "2-2", " ", ",", "\n", "0:a", "1:b", "[", "]", "{", "}", '"edges"', ":"]
TOKENS += ['"', "1 2 3 4\n", "- - 1 2\n", "1234\n"]
HOSTILE = ["9" * 400, "-", "\x00", "\ud800", "١", "null", "1e999", "NaN"]
PIECES = st.sampled_from([*TAGS, *TOKENS, *HOSTILE])
SCORED = {name: draw(task, **SMALLEST[name]) for name, task in TASKS.items()}
RIGHT = {name: TASKS[name].demonstrate(problem, "terse") for name, problem in SCORED.items()}


@settings(max_examples=300)
@given(
    st.sampled_from(list(TASKS)),
    st.text(st.characters(codec=None)) | st.lists(PIECES, max_size=40).map("".join),
    st.integers(0, 200),
    st.integers(0, 30),
)
@example("graph_coloring", "<perception>" + "0-1 " * 50_000 + "</perception>", 0, 0)
@example("graph_coloring", "<answer>" + " " * 200_000 + ",</answer>", 0, 0)
def test_any_text_is_parsed_and_scored(name: str, text: str, at: int, spoilt: int) -> None:
    task, problem, right = TASKS[name], SCORED[name], RIGHT[name]
    for hostile in (
        text,
        f"<perception>{text}</perception><answer>{text}</answer>",
        right[:at] + text + right[at + spoilt :],
        right[:at],
    ):
        parsed = task.parse(hostile)
        seen, answer = parsed.perception, parsed.answer
        exact, graded = task.score_perception(problem, seen)
        assert 0 <= graded <= 1 and exact == (graded == 1)
        assert parsed.defects or (seen is not None and answer is not None)
        solved = task.solve(problem, seen)
        assert solved is None or task.consistent(problem, seen, solved)
        task.consistent(problem, seen, answer)
        assert not task.check(problem, answer) or answer is not None


@every_task
def test_long_hostile_text_is_read_in_time(name: str) -> None:
    for unit in ("1\n", "-", "[[1,", "0-1 ", "0:a,", "<perception>"):
        text = unit * (200_000 // len(unit))
        start = time.process_time()
        TASKS[name].parse(f"<perception>{text}</perception><answer>{text}</answer>")
        TASKS[name].parse(f"<perception>{text}")
        assert time.process_time() - start < 6, unit
