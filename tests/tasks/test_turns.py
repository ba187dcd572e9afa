"""Responses of several turns are read as what they say last; one turn is read as ever."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core import READ, Parsed
from tasks.load import load_task
from tasks.responses import compose_response, parse_response
from tasks.turns import read_turns, readings

SEEN, OTHER = "1 2 3 4\n" * 4, "4 3 2 1\n" * 4
LOOK = "<look>0 0 500 500</look>"


class Plain:
    """Perception and answer are what their segments hold, word by word."""

    name = "plain"

    def parse(self, text: str) -> Parsed:
        return parse_response(text, lambda s: (s.split(), ()), lambda s: (s.split(), ()))

    def check(self, problem: Any, answer: Any) -> bool:
        return True


def perception(what: str) -> str:
    return f"<perception>\n{what}\n</perception>\n"


def reasoning(what: str) -> str:
    return f"<reasoning>\n{what}\n</reasoning>\n"


def answer(what: str) -> str:
    return f"<answer>\n{what}\n</answer>"


def read(*turns: str) -> tuple[Any, str, Any, tuple[str, ...]]:
    found = read_turns(Plain(), turns)
    return found.perception, found.reasoning, found.answer, found.defects


def test_a_later_turn_takes_the_place_of_what_it_says_again() -> None:
    whole = compose_response("b", "so", "2")
    assert read(perception("a"), whole) == (["b"], "so", ["2"], ())
    # A new perception takes that of all that was said, whatever of it the later turn has.
    assert read(perception("a") + reasoning("as") + answer("1"), whole)[:3] == (["b"], "so", ["2"])
    late = read(perception("a") + reasoning("as"), perception("b") + answer("2"))
    assert late == (["b"], "", ["2"], ("missing_reasoning",))
    # Without one the perception stays, and thoughts and answers are the last.
    stays = read(perception("a") + reasoning("as"), reasoning("so"), answer("1"), answer("2"))
    assert stays == (["a"], "so", ["2"], ())
    assert read(perception("a"), reasoning("so") + answer("2")) == (["a"], "so", ["2"], ())
    assert [*readings(read_turns(Plain(), (perception("a"), perception("b"), whole)))] == [
        *(["a"], ["b"], ["b"])
    ]
    # A last reading that cannot be read is the last.
    assert read(whole, "<perception>\nc")[0] is None
    assert read(perception("a"), f"{LOOK}", reasoning("so") + answer("2"))[2] == ["2"]


def test_within_a_turn_nothing_is_given_away() -> None:
    twice = perception("a") + perception("b") + answer("1")
    assert read(twice) == (
        *(None, "", ["1"]),
        ("duplicate_tag", "text_between_segments", "missing_reasoning"),
    )
    assert read(twice, compose_response("c", "so", "2")) == (
        *(["c"], "so", ["2"]),
        ("duplicate_tag", "text_between_segments"),
    )
    for turns in ((reasoning("hm"), twice), (twice, reasoning("hm"))):
        assert "duplicate_tag" in read(*turns)[3] and read(*turns)[0] is None
    # What no turn closes is open over all of them, as it is in one.
    assert read("<perception>\na", "b\n</perception>\n")[0] == ["ab"]


def test_without_tags_a_later_turn_reads_again_where_it_has_both() -> None:
    task = load_task("graph_coloring")
    edges, more, solved = "[[1, 2]]", "[[1, 2], [2, 3]]", '{"1": "A", "2": "B"}'
    one, two = (task.parse(f"{seen}\nso\n{solved}") for seen in (edges, more))
    split = read_turns(task, (f"{edges}\n{LOOK}", f"so\n{solved}"))
    assert (split.perception, split.answer, split.earlier) == (one.perception, one.answer, ())
    again = read_turns(task, (f"{edges}\n{LOOK}", f"{more}\nso\n{solved}"))
    assert (again.perception, again.answer) == (two.perception, two.answer)
    assert readings(again) == [one.perception, two.perception]
    middle = read_turns(task, (f"{edges}\n{LOOK}", f"{edges} {LOOK}", f"{more}\nso\n{solved}"))
    assert readings(middle) == [one.perception, one.perception, two.perception]
    # A turn without tags of a response that has them says nothing of a segment.
    tagged = compose_response("1-2", "so", "1=A 2=B")
    hint = read_turns(task, (f"{edges} so {LOOK}", tagged))
    assert (hint.perception, hint.earlier) == (task.parse(tagged).perception, ())


PIECES = st.sampled_from(
    ["<perception>", "</perception>", "<reasoning>", "</reasoning>", "<answer>", "</answer>",
     "1 2", "[1, 2]", "\n", LOOK, "so", "{"]
)  # fmt: skip
TURNS = st.lists(st.lists(PIECES, max_size=8).map("".join), min_size=1, max_size=4)


@given(TURNS)
def test_whatever_turns_say_spans_are_of_the_text_and_apart(turns: list[str]) -> None:
    """And one turn, or turns that say nothing twice, are read as their text is."""
    task, text = Plain(), "".join(turns)
    found = read_turns(task, turns)
    if len(turns) == 1 or not found.earlier:
        plain = task.parse(text)
        assert replace(found, defects=()) == replace(plain, defects=())
        assert set(found.defects) == set(plain.defects)
    for taken in (found.spans.values(), [s for e in found.earlier for s in e.spans.values()]):
        assert all(0 <= start <= end <= len(text) for start, end in taken)
        for (a, b), (c, d) in itertools.combinations(taken, 2):
            assert b <= c or d <= a
    for one in found.earlier:
        for segment, (start, end) in one.spans.items():
            assert text[start:end].startswith(f"<{segment}>") or "<" not in text
    assert set(found.spans) <= set(READ)


@given(st.lists(st.sampled_from([perception("x"), reasoning("hm"), answer("0"), LOOK, "so"])))
def test_a_whole_last_turn_is_read_as_if_it_were_alone(before: list[str]) -> None:
    """Where the turns before have a whole segment each, or none: their loose text is a blemish."""
    whole = compose_response("b", "so", "2")
    alone, found = Plain().parse(whole), read_turns(Plain(), [*before, whole])
    assert (found.perception, found.reasoning, found.answer) == (
        alone.perception,
        alone.reasoning,
        alone.answer,
    )
    assert set(found.defects) <= {"text_before_perception"}


@pytest.mark.parametrize("name", ["sudoku", "graph_coloring"])
def test_no_turns_of_a_task_of_ours_raise(name: str) -> None:
    task = load_task(name)
    for turns in (("", ""), (SEEN, OTHER), ("<perception>" + SEEN, "</perception>"), ("{", "}")):
        read_turns(task, turns)
