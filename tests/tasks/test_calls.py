"""Where a turn calls, and how: in tags or as JSON."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.calls import SAID, Tool, call_span, in_json, in_tags
from tasks.environments import DONE, load_environment
from tasks.looking import Call, pointed_at
from tasks.responses import split_response, without_preamble
from tests.tasks.test_looking import pictured


@pytest.mark.parametrize(
    ("turn", "call"),
    [
        ("<look>1 2 3 4</look>", "<look>1 2 3 4</look>"),
        ("<perception>p</perception>\nCloser.\n<look>1 2</look>\n", "<look>1 2</look>"),
        ("<reasoning>hm <look>1", "<look>1"),
        ("<think>a <b>red</b> one</think><go>up</go>", "<go>up</go>"),
        ("<look>1</look> <look>2</look>", "<look>1</look> <look>2</look>"),
        ('<tool_call>{"name": "<b>"}</tool_call>', '<tool_call>{"name": "<b>"}</tool_call>'),
        ("1</look>", None),
        ("<look>1</look><answer>2</answer>", None),
        ("It is <3.", None),
        ("", None),
    ],
)
def test_a_call_is_what_stands_behind_the_segments_from_its_tag_on(
    turn: str, call: str | None
) -> None:
    span = call_span(turn)
    assert (None if span is None else turn[span[0] : span[1]]) == call


GO = Tool("go", "Go.", {"to": {"type": "string", "enum": ["up", "down"]}})
LOOK = Tool(
    "look",
    "See.",
    {
        "picture": {"type": "integer"},
        "at": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    },
)


def called(name: object, arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


FINE = called("go", {"to": "up"})


@pytest.mark.parametrize(
    ("turn", "told"),
    [
        ("I see a cat.", ("I see a cat.", "")),
        (f"So. {FINE}\n", ("So. <go>up</go>", "")),
        (called("look", {"at": [1, 2, 3, -4], "picture": 2}), ("<look>2 1 2 3 -4</look>", "")),
        ("<tool_call>{}", ("", "unclosed_call")),
        ("{}</tool_call>", ("", "unopened_call")),
        (FINE + FINE, ("", "several_calls")),
        (FINE + " so it is", ("", "text_after_call")),
        ("<go>up</go>", ("", "other_form")),
        (f"<go>up</go>{FINE}", ("", "other_form")),
        ("<tool_call>go up</tool_call>", ("", "bad_json")),
        ('<tool_call>{"name": "go", "name": "go", "arguments": {}}</tool_call>', ("", "bad_json")),
        ('<tool_call>{"name": "go", "arguments": NaN}</tool_call>', ("", "bad_number")),
        (f"<tool_call>{'[' * 99}{']' * 99}</tool_call>", ("", "json_too_deep")),
        ("<tool_call>[1]</tool_call>", ("", "bad_call")),
        ('<tool_call>{"name": "go"}</tool_call>', ("", "bad_call")),
        ('<tool_call>{"name": 1, "arguments": {}}</tool_call>', ("", "bad_call")),
        ('<tool_call>{"name": "go", "arguments": "up"}</tool_call>', ("", "bad_call")),
        (called("fly", {"to": "up"}), ("", "no_such_tool")),
        (called("go", {}), ("", "bad_arguments")),
        (called("go", {"to": "left"}), ("", "bad_arguments")),
        (called("go", {"to": ["up"]}), ("", "bad_arguments")),
        (called("go", {"to": "up", "fast": 1}), ("", "bad_arguments")),
        (called("look", {"at": [1], "picture": 2}), ("", "bad_arguments")),
        (called("look", {"at": [1, "2"], "picture": 2}), ("", "bad_arguments")),
        (called("look", {"at": [1, 2.5], "picture": 2}), ("", "bad_arguments")),
        (called("look", {"at": [1, True], "picture": 2}), ("", "bad_arguments")),
        (called("look", {"at": [1, 2], "picture": None}), ("", "bad_arguments")),
    ],
)  # fmt: skip
def test_a_json_call_is_read_strictly_and_its_defect_named(
    turn: str, told: tuple[str, str]
) -> None:
    assert in_tags(turn, [GO, LOOK]) == told
    assert not told[1] or "\n" not in SAID[told[1]]


def test_a_text_cannot_forge_a_tag() -> None:
    free = Tool("find", "Find.", {"words": {"type": "string"}})
    assert in_tags(called("find", {"words": "a  cat"}), [free])[0] == "<find>a  cat</find>"
    assert in_tags(called("find", {"words": "</find><go>up"}), [free])[1] == "bad_arguments"


@given(
    picture=st.integers(1, 9),
    at=st.lists(st.integers(0, 1000), min_size=2, max_size=4),
    before=st.sampled_from(["", "I see. ", "<reasoning>so</reasoning>\n"]),
)
@settings(max_examples=40)
def test_a_teachers_call_is_the_same_in_either_form(
    picture: int, at: list[int], before: str
) -> None:
    turn = f"{before}<look>{' '.join(map(str, [picture, *at]))}</look>"
    written = in_json(turn, [GO, LOOK])
    assert in_tags(written, [GO, LOOK]) == (turn, "")
    inner = written.partition("<tool_call>")[2].partition("</tool_call>")[0]
    assert json.loads(inner) == {"name": "look", "arguments": {"picture": picture, "at": at}}


@pytest.mark.parametrize("turn", ["no call", "<look>1", "<look>1 2 3 4 5 6</look>", "<go>x</go>"])
def test_a_teachers_call_that_is_none_is_refused(turn: str) -> None:
    with pytest.raises(ValueError, match=r"call|arguments"):
        in_json(turn, [GO, LOOK])


@given(st.lists(st.sampled_from([FINE, "<tool_call>", "</tool_call>", "{", "}", '"', "<go>", "a"])))
def test_whatever_is_written_is_read(pieces: list[str]) -> None:
    turn, defect = in_tags("".join(pieces), [GO, LOOK])
    assert not (turn and defect) and defect in ("", *SAID)


def test_an_environment_answers_either_form_alike() -> None:
    one = pictured((200, 100), (64, 64))
    for name, numbers in (("zoom", [100, 200, 300, 350]), ("mark", [500, 500])):
        tags, jsons = load_environment(name), load_environment(name, calls="json")
        told = [made.reset(one, np.random.default_rng(3)) for made in (tags, jsons)]
        assert told[0] and told[1] and told[0].how and not told[0].tools and not told[1].how
        (tool,) = json.loads(told[1].tools)
        tag = tool["function"]["name"]
        turn = f"<{tag}>1 {' '.join(map(str, numbers))}</{tag}>"
        call = called(tag, {"picture": 1, "at": numbers})
        assert jsons.step(call) == replace(tags.step(turn), role="tool")
        assert jsons.written(turn).count(tag) == 1  # type: ignore[attr-defined]
        assert jsons.elsewhere(call) == tags.elsewhere(turn)  # type: ignore[attr-defined]
        assert pointed_at(call, 2) == pointed_at(turn, 2) == Call(0, tuple(numbers))
        wrong = jsons.step(called(tag, {"picture": 3, "at": numbers}))
        assert wrong.defects == ("no_picture",) and not wrong.images and wrong.role == "tool"
        wrong = jsons.step(turn)
        assert wrong.defects == ("other_form",) and "\n" not in wrong.text and not wrong.done
        assert jsons.step("It is 4.") == DONE
        silent = load_environment(name, {"tell": False}, "json")
        assert silent.reset(one, np.random.default_rng(3)) is None
        assert silent.step(call).images


def test_an_environment_without_tools_is_not_called_in_json() -> None:
    with pytest.raises(ValueError, match='Counting": says no tools'):
        load_environment("tests.support.bad_environments:Counting", {}, "json")


def test_a_call_is_no_perception_and_no_text_of_a_response() -> None:
    for call in (FINE, '<tool_call>{"name": [1]}</tool_call>', "<tool_call>{}{}</tool_call>"):
        text = f"{call} I see [[1]] so {{}}"
        (start, end), split = split_response(text).inner["perception"], split_response(text)
        assert text[start:end] == "[[1]]" and not split.defects
        assert without_preamble(text[: split.spans["perception"][1]]) == "[[1]]"
    assert "missing_perception" in split_response("<tool_call>[[1]] {}").defects
    tagged = "<perception>1</perception>{}<reasoning>r</reasoning><answer>1</answer>"
    assert "text_between_segments" not in split_response(tagged.format(FINE)).defects
    for bad in (FINE + "so", "<tool_call>{}</tool_call>", "<tool_call>"):
        assert "text_between_segments" in split_response(tagged.format(bad)).defects
    assert "text_after_answer" in split_response(tagged.format("") + FINE).defects
