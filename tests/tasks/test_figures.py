"""Figures of what was seen and answered: their marks agree with what the task itself says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.core import Draws
from tasks.figures import Graph, Grid, compared_words, plain_words
from tests.support.puzzles import GRAPHS, SMALL, SUDOKU, TINY, draw

GRID, GRAPH = draw(SUDOKU, 1, **TINY, blanks=6), draw(GRAPHS, 2, **SMALL)

digits = st.integers(0, 4)
grids = st.lists(st.lists(digits, min_size=4, max_size=4), min_size=4, max_size=4)


@settings(max_examples=60)
@given(seen=grids, answer=grids, exact=st.booleans())
def test_marks_of_a_grid_agree_with_the_task(
    seen: list[list[int]], answer: list[list[int]], exact: bool
) -> None:
    problem, task = GRID, SUDOKU
    truth = problem.truth
    seen = truth["puzzle"] if exact else seen
    figure = task.draw_perception(problem, seen)  # type: ignore[arg-type]
    assert isinstance(task, Draws) and isinstance(figure, Grid)
    bad = sum(cell.bad for row in figure.cells for cell in row)
    assert bad == round(16 * (1 - task.score_perception(problem, seen)[1]))
    assert figure.text.startswith(f"{16 - bad} of 16 cells right.")
    told = figure.as_json()
    assert (told["kind"], told["box"], len(told["cells"])) == ("grid", 2, 4)
    assert sum("bad" in cell for row in told["cells"] for cell in row) == bad
    filled = truth["solution"] if exact else [[max(1, v) for v in row] for row in answer]
    answered = task.draw_answer(problem, seen, filled)  # type: ignore[arg-type]
    assert isinstance(answered, Grid)
    clean = not any(cell.bad for row in answered.cells for cell in row)
    assert clean == task.consistent(problem, seen, filled)
    assert [[cell.given for cell in row] for row in answered.cells] == [
        [digit > 0 for digit in row] for row in seen
    ]


pairs = st.tuples(st.integers(0, 7), st.integers(0, 7)).filter(lambda p: p[0] < p[1])


@settings(max_examples=60)
@given(seen=st.frozensets(pairs, min_size=1), letters=st.text("abc", min_size=0, max_size=7))
def test_marks_of_a_graph_agree_with_the_task(seen: frozenset[Any], letters: str) -> None:
    problem, task = GRAPH, GRAPHS
    n, true = problem.truth["v"], {(i, j) for i, j in problem.truth["edges"]}
    figure = task.draw_perception(problem, seen)
    assert isinstance(task, Draws) and isinstance(figure, Graph)
    by_mark: dict[str, set[Any]] = {"right": set(), "missing": set(), "extra": set()}
    for i, j, mark in figure.edges:
        by_mark[mark].add((i, j))
    inside = {edge for edge in seen if edge[1] < n}
    assert by_mark == {
        "right": true & seen, "missing": true - seen, "extra": inside - true,
    }  # fmt: skip
    exact = task.score_perception(problem, seen)[0]
    assert exact == (not by_mark["missing"] and seen == by_mark["right"])
    assert "colors" not in figure.as_json()
    answer = tuple(enumerate(letters))
    answered = task.draw_answer(problem, seen, answer)
    assert isinstance(answered, Graph)
    clash = any(mark == "clash" for _, _, mark in answered.edges)
    colors = dict(answer)
    assert clash == any(
        i in colors and colors[i] == colors.get(j) for i, j in inside if max(i, j) < n
    )
    if task.consistent(problem, seen, answer):
        assert not clash


def test_a_text_comparison_keeps_every_word() -> None:
    rows = compared_words("a b c d", "a x c").rows
    assert " ".join(t for mark, t in rows if mark != "extra") == "a b c d"
    assert " ".join(t for mark, t in rows if mark != "missing") == "a x c"


def test_a_figure_that_the_page_could_not_draw_is_refused() -> None:
    for edges, colors in (((0, 2, "right"), None), ((0, 1, "wrong"), None), ((0, 1, "right"), ())):
        with pytest.raises(ValidationError):
            Graph(labels=("0", "1"), edges=(edges,), colors=colors, text="")  # type: ignore[arg-type]


def test_long_texts_are_cut_with_a_word_and_text_without_a_label_is_plain() -> None:
    long = " ".join(f"w{i}" for i in range(400))
    assert compared_words(long, long).text == "As it is. Compared are the first 300 words of each."
    assert compared_words("a", "a").text == "As it is."
    shown = plain_words("<b>12</b>").as_json()
    assert shown["rows"] == [["plain", "<b>12</b>"]] and "Nobody has said" in shown["text"]
