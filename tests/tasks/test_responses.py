"""The tag layer: spans, named defects, the public data sets' style, hostile text."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.core import READ
from tasks.load import load_task
from tasks.response_form import Form, form_of, oracle_prefix_in
from tasks.responses import (
    JSON_MAX_DEPTH,
    Split,
    compose_response,
    oracle_prefix,
    parse_response,
    read_json,
    split_response,
    without_preamble,
)

GRAPHS, SUDOKU = load_task("graph_coloring"), load_task("sudoku")
TAGS = [f"<{slash}{name}>" for name in READ for slash in ("", "/")]
GOOD = compose_response("p", "r", "a")


def read_any(text: str) -> tuple[str | None, tuple[str, ...]]:
    return text.strip(), ()


def pieces(text: str, split: Split) -> dict[str, str]:
    return {name: text[start:end] for name, (start, end) in split.inner.items()}


def test_a_composed_response_has_no_defect_and_spans_hold_their_tags() -> None:
    split = split_response(GOOD)
    assert split.defects == () and not split.spoiled
    assert pieces(GOOD, split) == {"perception": "\np\n", "reasoning": "\nr\n", "answer": "\na\n"}
    for name, (start, end) in split.spans.items():
        assert GOOD[start:end].startswith(f"<{name}>") and GOOD[start:end].endswith(f"</{name}>")
    assert GOOD.startswith(oracle_prefix("p"))
    parsed = parse_response(GOOD, read_any, read_any)
    assert (parsed.perception, parsed.reasoning, parsed.answer) == ("p", "r", "a")


P, R, A = "<perception>p</perception>", "<reasoning>r</reasoning>", "<answer>a</answer>"


@pytest.mark.parametrize(
    ("text", "defects", "perception", "answer"),
    [
        (P + R + A, set(), "p", "a"),
        ("hm " + P + R + A, {"text_before_perception"}, "p", "a"),
        (P + " so " + R + A, {"text_between_segments"}, "p", "a"),
        (P + R + A + ".", {"text_after_answer"}, "p", None),
        (P + R + A + " \n", set(), "p", "a"),
        ("<look>1 2 3 4</look><look>0</look>\n" + P + R + A, set(), "p", "a"),
        (P + "<mark>1 2</mark>" + R + "<look>1</look>" + A, set(), "p", "a"),
        ("hm <look>1 2 3 4</look>" + P + R + A, {"text_before_perception"}, "p", "a"),
        ("<look>1 2" + P + R + A, {"text_before_perception"}, "p", "a"),
        ("<look>one</look>" + P + R + A, {"text_before_perception"}, "p", "a"),
        (P + R + A + "<look>1 2 3 4</look>", {"text_after_answer"}, "p", None),
        (P + A, {"missing_reasoning"}, "p", "a"),
        (R + A, {"missing_perception"}, None, "a"),
        (P + R, {"missing_answer"}, "p", None),
        ("<perception>p" + R + A, {"unclosed_perception"}, None, "a"),
        (P + "<reasoning>r" + A, {"unclosed_reasoning"}, "p", "a"),
        (P + R + "<answer>a", {"unclosed_answer"}, "p", None),
        (P + P + R + A, {"duplicate_tag", "text_between_segments"}, None, "a"),
        (P + R + P + A, {"duplicate_tag", "text_between_segments"}, None, "a"),
        (P + R + A + A, {"duplicate_tag", "text_after_answer"}, "p", None),
        (R + P + A, {"wrong_order"}, None, "a"),
        (P + A + R, {"wrong_order", "text_after_answer"}, "p", None),
        (A + P + R, {"wrong_order", "text_after_answer"}, None, None),
        (P + "</reasoning>" + A, {"unopened_reasoning", "missing_reasoning"}, "p", "a"),
        (
            "p</perception>" + R + A,
            {"text_before_perception", "unopened_perception", "missing_perception"},
            None,
            "a",
        ),
        ("<perception>" + R, {"unclosed_perception", "missing_answer"}, None, None),
        ("<Perception>p</Perception>", {"missing_perception", "missing_answer"}, None, None),
    ],
)
def test_each_defect_has_its_name_and_spoils_what_the_table_says(
    text: str, defects: set[str], perception: str | None, answer: str | None
) -> None:
    parsed = parse_response(text, read_any, read_any)
    assert set(parsed.defects) == defects
    assert (parsed.perception, parsed.answer) == (perception, answer)


def test_an_unclosed_segment_keeps_a_span_up_to_the_next_tag_or_the_end() -> None:
    text = "<perception>seen" + R + "<answer>cut"
    split = split_response(text)
    assert pieces(text, split) == {"perception": "seen", "reasoning": "r", "answer": "cut"}
    assert split.spans["perception"] == (0, text.index("<reasoning>"))
    assert split.spans["answer"][1] == len(text)


def test_readers_defects_are_kept_and_spoiled_segments_are_not_read() -> None:
    read: list[str] = []

    def refuse(text: str) -> tuple[None, tuple[str, ...]]:
        read.append(text)
        return None, ("bad_cell",)

    parsed = parse_response(P + P + A, refuse, refuse)
    assert read == ["a"]
    assert parsed.defects == (
        "duplicate_tag",
        "text_between_segments",
        "missing_reasoning",
        "bad_cell",
    )


def test_without_tags_the_first_and_last_json_block_are_read() -> None:
    text = 'Grid: [[1, "]"], [2]]. Then {"x": [3]} and [unclosed [4] so {"answer": "}"} done'
    split = split_response(text)
    assert split.defects == ()
    got = pieces(text, split)
    assert json.loads(got["perception"]) == [[1, "]"], [2]]
    assert json.loads(got["answer"]) == {"answer": "}"}
    assert split.spans["perception"] == (0, text.index("]]") + 2)
    assert split.spans["reasoning"] == (split.spans["perception"][1], split.spans["answer"][0])

    assert split_response("[1] and no more").defects == ("missing_answer",)
    assert split_response("nothing").defects == ("missing_perception", "missing_answer")
    # A stray quote or a mismatched bracket hides nothing beyond its line.
    assert pieces("[1 } [2]", split_response("[1 } [2]"))["perception"] == "[2]"
    quoted = '[5" of\n[2] x [3]'
    assert pieces(quoted, split_response(quoted))["answer"] == "[3]"


BAD_JSON: dict[str, tuple[str, ...]] = {
    "bad_number": ("[" + "1" * 5000 + "]", "[1e999]", "[NaN]", "[-Infinity]"),
    "json_too_deep": (
        "[" * 50_000, "[" * (JSON_MAX_DEPTH + 1) + "]" * (JSON_MAX_DEPTH + 1), '{"a":' * 5000,
        '"' + "[" * 50_000,
    ),
    "json_too_long": ("[" + "1," * 50_000 + "1]",),
    "bad_json": ("[1, -]", "[1", "1", "", '{"a": 1, "a": 2}', "[1]\x00"),
}  # fmt: skip


@pytest.mark.parametrize("defect", BAD_JSON)
def test_json_limits(defect: str) -> None:
    for text in BAD_JSON[defect]:
        assert read_json(text) == (None, (defect,)), text[:40]


def test_json_at_its_limits_is_read() -> None:
    deep = "[" * JSON_MAX_DEPTH + "]" * JSON_MAX_DEPTH
    assert read_json(deep) == (json.loads(deep), ())
    text = '[123456789012345678, -1.5, "[[[[[[[[[[[[[[[[[[[[[", "\\"]", null]'
    assert read_json(text) == (json.loads(text), ())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60)
@given(value=st.lists(json_values, max_size=4))
def test_json_agrees_with_the_standard_library(value: list[object]) -> None:
    text = json.dumps(value)
    assert read_json(text) == (value, ())
    split = split_response(f"see {text} and [0]")
    if "<" not in text:
        assert pieces(f"see {text} and [0]", split)["perception"] == text


hostile = st.lists(
    st.sampled_from([*TAGS, "[", "]", "{", "}", '"', "\\", "\n", "1", "<", "\x00", "\ud800"])
    | st.text(max_size=5),
    max_size=25,
).map("".join)


@settings(max_examples=400)
@given(text=hostile)
@example(text="")
@example(text="<perception>")
@example(text="</answer><perception></perception>")
def test_any_text_splits_without_raising_into_ordered_disjoint_spans(text: str) -> None:
    split = split_response(text)
    assert set(split.spans) == set(split.inner)
    ends = 0
    for name, (start, end) in sorted(split.spans.items(), key=lambda item: item[1]):
        inner_start, inner_end = split.inner[name]
        assert ends <= start <= inner_start <= inner_end <= end <= len(text)
        ends = end
    assert len(set(split.defects)) == len(split.defects)
    tagless = not any(tag in text for tag in TAGS)
    for name in READ:
        if not (tagless and name == "reasoning"):
            assert (f"missing_{name}" in split.defects) == (name not in split.spans)
    if not split.defects and not tagless:
        assert list(split.spans) == list(READ)
    read_json(text)


def test_long_hostile_text_takes_linear_time() -> None:
    for unit in ("<perception>", "[", "{[}]", '[[1,"a\\"]'):
        text = "[" + unit * (300_000 // len(unit))
        start = time.process_time()
        parse_response(text, read_json, read_json)
        assert time.process_time() - start < 3.0, unit


@pytest.mark.parametrize("prose", ["", "I see: ", "a ] stray [ bracket\n", '"quoted [ "\n', "<b>"])
def test_the_preamble_of_a_json_perception_can_be_cut_off(prose: str) -> None:
    text = f"{prose}[[1, 2], [3, 4]] so [5]"
    start, end = split_response(text).spans["perception"]
    assert without_preamble(text[start:end]) == "[[1, 2], [3, 4]]"


def test_a_perception_in_tags_has_no_preamble() -> None:
    for segment in ("<perception>\nnot [1] this\n</perception>", "no block", ""):
        assert without_preamble(segment) == segment


@pytest.mark.parametrize(
    ("perception", "answer", "prefix"),
    [
        ("<perception>\n0-2 1-2\n</perception>\n", "<answer>0:A</answer>", None),
        (
            "<perception>\n0-2 1-2\n</perception>\n\n",
            "<answer>0:A</answer>",
            "<perception>\nP\n</perception>\n\n",
        ),
        ("I see [[0, 2], [1, 2]] and so ", '{"0": "A"}', "[[0, 1], [1, 2], [1, 10]]\n"),
        (
            'Edges:\n```json\n{"v": 3, "edges": [[0, 2]]}\n```\n',
            '{"0": "A"}',
            '```json\n{"edges": [[0, 1], [1, 2], [1, 10]]}\n',
        ),
        ("no idea\n", "0:A", None),
    ],
)
def test_the_oracle_writes_as_the_policy_does(
    perception: str, answer: str, prefix: str | None
) -> None:
    truth = json.dumps({"v": 11, "c": 2, "edges": [[1, 10], [1, 2], [0, 1]]})
    problem = GRAPHS.from_row("Color it.", b"", truth)
    form = form_of(GRAPHS, ["nothing", perception + "reasons\n" + answer])
    own = GRAPHS.oracle_prefix(problem)
    made = oracle_prefix_in(form, GRAPHS, problem)
    assert made == (own if prefix is None else prefix.replace("P", problem.perception))
    right = dict(GRAPHS.solve(problem, GRAPHS.parse(own).perception))
    written = " ".join(f"{v}:{c}" for v, c in right.items())
    said = (
        made
        + "so\n"
        + (
            json.dumps({str(v): c for v, c in right.items()})
            if form.json
            else f"<answer>{written}</answer>"
        )
    )
    parsed = GRAPHS.parse(said)
    assert GRAPHS.score_perception(problem, parsed.perception) == (True, 1.0)
    assert GRAPHS.check(problem, parsed.answer)


def test_the_form_is_that_of_most_responses_that_can_be_read() -> None:
    grid = [[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 0]]
    written = json.dumps(grid)
    tags = compose_response(written, "", written)
    assert form_of(SUDOKU, [tags, written + "\n\nso", written + "\n\nand", "", ""]) == Form(
        json=True, after="\n\n"
    )
    assert form_of(SUDOKU, [tags, tags, written]) == Form()
    problem = SUDOKU.from_row("Solve it.", b"", written)
    assert oracle_prefix_in(Form(json=True), SUDOKU, problem) == written + "\n"
    assert oracle_prefix_in(Form(json=True, key="grid"), SUDOKU, problem) == (
        SUDOKU.oracle_prefix(problem)
    )
