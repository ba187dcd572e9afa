"""Canonical text: harmless white space and commas change nothing, anything else is told apart."""

from __future__ import annotations

import re
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core import Problem, Task
from tasks.responses import compose_response
from tests.support.puzzles import GRAPHS, SMALL, SUDOKU, TINY, draw

KINDS: list[tuple[Task, dict[str, Any]]] = [
    (SUDOKU, TINY | {"blanks": 9}),
    (SUDOKU, {"blanks": 30}),
    (GRAPHS, SMALL | {"vertices": 6, "label_size": 0}),
    (GRAPHS, {"vertices": 12, "edges": 15, "canvas": 256}),
]
PROBLEMS = [(task, draw(task, seed, **knobs)) for task, knobs in KINDS for seed in range(3)]
Part = Literal["perception", "answer"]
PARTS: tuple[Part, ...] = ("perception", "answer")
GAPS = {
    "sudoku": (" ", "  ", "\t", ",", ", ", " , "),
    "graph_coloring": (" ", "\n", "\r\n", "\n\n", "\t", ",", ", ", " ,\n"),
}
ENDS = ("\n", "\r\n", " \n", ",\n", ", \r\n", "\n\n", "\n \t\n")


def canonical(task: Task, problem: Problem) -> dict[Part, str]:
    """The text of both segments of a demonstration."""
    text = task.demonstrate(problem, "terse")
    found = {part: re.search(f"<{part}>(.*)</{part}>", text, re.DOTALL) for part in PARTS}
    return {part: match[1].strip() for part, match in found.items() if match}


CANONICAL = {problem.id: canonical(task, problem) for task, problem in PROBLEMS}


def read(task: Task, problem: Problem, part: Part, text: str) -> tuple[Any, tuple[str, ...]]:
    """What a task reads in one segment of a demonstration, and the defects."""
    whole = CANONICAL[problem.id] | {part: text}
    parsed = task.parse(compose_response(whole["perception"], "", whole["answer"]))
    return getattr(parsed, part), parsed.defects


@settings(max_examples=150)
@given(data=st.data())
def test_harmless_white_space_and_commas_read_as_the_same(data: st.DataObject) -> None:
    task, problem = data.draw(st.sampled_from(PROBLEMS))
    part: Part = data.draw(st.sampled_from(PARTS))
    text = CANONICAL[problem.id][part]
    value, _ = read(task, problem, part, text)
    assert value is not None
    close = task.name == "sudoku" and data.draw(st.booleans())

    def loosened(found: re.Match[str]) -> str:
        if found[0] == "\n":
            return data.draw(st.sampled_from(ENDS))
        if found[0] == " ":
            return "" if close else data.draw(st.sampled_from(GAPS[task.name]))
        return data.draw(st.sampled_from(("", " ", "\t "))).join(("", found[0], ""))

    marks = "[ \n]" if task.name == "sudoku" else "[ \n]|(?<=[0-9])[-:]"
    loose = re.sub(marks, loosened, text)
    loose = data.draw(st.sampled_from(("", " ", "\r\n\n"))) + loose
    loose += data.draw(st.sampled_from(("", ",", " ,", " \r\n", ",\n\n")))
    found, defects = read(task, problem, part, loose)
    assert (found, defects) == (value, ()), repr(loose)


def test_boxes_may_stand_apart() -> None:
    task, problem = PROBLEMS[3]
    rows = problem.perception.replace(" ", "").split("\n")
    apart = ["  ".join((row[:3], row[3:6], row[6:])) for row in rows]
    blocks = "\n\n".join("\n".join(apart[i : i + 3]) for i in (0, 3, 6))
    one, two = (read(task, problem, "perception", t) for t in (blocks, problem.perception))
    assert one == two and one[0] is not None


@settings(max_examples=300)
@given(data=st.data())
def test_any_other_change_is_a_defect_or_another_value(data: st.DataObject) -> None:
    """One character added, left out or put for another never reads as what it was.

    If two changes in a hundred did, all of these would miss it with a chance of 0.2 %.
    """
    task, problem = data.draw(st.sampled_from(PROBLEMS))
    part: Part = data.draw(st.sampled_from(PARTS))
    text = CANONICAL[problem.id][part]
    at = data.draw(st.integers(0, len(text) - 1))
    new = data.draw(st.sampled_from("0123456789abz-:;|.()[]{}\"'_+*x٣１−"))
    how = data.draw(st.sampled_from(("add", "drop", "replace")))
    changed = text[:at] + ("" if how == "drop" else new) + text[at + (how != "add") :]
    blank = task.name == "sudoku" and {text[at], new} == {"-", "0"}
    if changed == text or (how == "replace" and blank):
        return  # both are a blank
    found, defects = read(task, problem, part, changed)
    assert found != read(task, problem, part, text)[0], repr(changed)
    assert found is not None or defects


@pytest.mark.parametrize("text", [" " * 200_000, "," * 200_000, " -" * 100_000, "0 " * 100_000])
@pytest.mark.parametrize("at", [0, -1])
def test_endless_separators_are_a_defect(at: int, text: str) -> None:
    task, problem = PROBLEMS[at]
    for part in PARTS:
        assert read(task, problem, part, f"0{text}1")[0] is None
