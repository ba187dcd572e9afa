"""Responses in free text: three forms, named defects, hostile text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core import READ
from tasks.free_text import FORMS, MAX_CHARS, has_perception, instructions, parse_free
from tasks.responses import compose_response

WRITTEN = {
    "segments": compose_response("{p}", "{r}", "{a}"),
    "think_answer": "<think>\n{r}\n</think>\n<answer>\n{a}\n</answer>",
    "boxed": "{r} So it is \\boxed{{{a}}}.",
}
SAFE = st.text(alphabet="ab1 .\n[]$", min_size=1, max_size=20).map(str.strip).filter(bool)


@pytest.mark.parametrize("form", FORMS)
@given(perception=SAFE, reasoning=SAFE, answer=SAFE)
def test_what_is_written_is_read_back(
    form: str, perception: str, reasoning: str, answer: str
) -> None:
    parsed = parse_free(WRITTEN[form].format(p=perception, r=reasoning, a=answer), form)
    assert parsed.defects == ()
    assert parsed.answer == answer
    assert parsed.perception == (perception if has_perception(form) else None)
    assert parsed.reasoning.startswith(reasoning)
    assert set(parsed.spans) == set(READ if has_perception(form) else READ[1:])


@pytest.mark.parametrize(
    ("form", "text", "answer", "defects"),
    [
        ("segments", "", None, {"missing_perception", "missing_reasoning", "missing_answer"}),
        ("segments", '[1, 2] so ["x"]', None,
         {"text_before_perception", "missing_perception", "missing_reasoning", "missing_answer"}),
        ("segments", "<perception> </perception><reasoning></reasoning><answer>5</answer>", "5",
         {"empty_perception"}),
        ("segments", "<perception>p</perception><reasoning>r</reasoning><answer> </answer>", None,
         {"empty_answer"}),
        ("think_answer", "<think>r</think><answer>5</answer>", "5", set()),
        ("think_answer", "r</think><answer>5</answer>", "5",
         {"text_before_reasoning", "unopened_reasoning", "missing_reasoning"}),
        ("think_answer", "<think>r</think> so <answer>5</answer>", "5", {"text_between_segments"}),
        ("think_answer", "<think>r</think><answer>5</answer> or 7", None, {"text_after_answer"}),
        ("think_answer", "<think>r</think><answer>5</answer><answer>7</answer>", None,
         {"text_after_answer", "duplicate_tag"}),
        ("think_answer", "<think>r<answer>5</answer>", "5", {"unclosed_reasoning"}),
        ("think_answer", "<answer>5</answer><think>r</think>", None,
         {"text_after_answer", "wrong_order"}),
        ("think_answer", "<think>r</think>5", None, {"text_between_segments", "missing_answer"}),
        ("boxed", "so \\boxed{5}", "5", set()),
        ("boxed", "\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", set()),
        ("boxed", "\\boxed{\\{1, 2\\}}", "\\{1, 2\\}", set()),
        ("boxed", "\\boxed{5}, that is \\boxed{ 5 }", "5", set()),
        ("boxed", "\\boxed{5} or \\boxed{7}", None, {"contradicting_answers"}),
        ("boxed", "\\boxed{5", None, {"unclosed_answer"}),
        ("boxed", "\\boxed{5} and \\boxed{5", None, {"unclosed_answer"}),
        ("boxed", "\\boxed{}", None, {"empty_answer"}),
        ("boxed", "5", None, {"missing_answer"}),
        ("boxed", "", None, {"missing_answer"}),
        ("boxed", f"\\boxed{{{'9' * 5000}}}", None, {"too_long_answer"}),
    ],
)  # fmt: skip
def test_defects_have_names(form: str, text: str, answer: str | None, defects: set[str]) -> None:
    parsed = parse_free(text, form)
    assert (parsed.answer, set(parsed.defects)) == (answer, defects)


PIECES = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "<perception>", "</perception>", "\\boxed{",
     "}", "{", "\\", "5", " ", "\n", "\0", "\ud800", "<reasoning>", "</reasoning>"]
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@given(pieces=st.lists(PIECES, max_size=14))
def test_any_text_is_read_and_what_is_missing_is_named(form: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    parsed = parse_free(text, form)
    assert (parsed.answer is None) <= bool(parsed.defects)
    assert parsed.answer is None or (parsed.answer and parsed.answer in text)
    ends = [parsed.spans[name] for name in READ if name in parsed.spans]
    assert all(0 <= start <= end <= len(text) for start, end in ends)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "piece", ["\\boxed{", "\\boxed{}", "{", "<think>", "</answer>", "<answer>5"]
)
def test_a_megabyte_takes_a_moment(form: str, piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    start = time.process_time()
    assert parse_free(text, form).answer is None
    assert time.process_time() - start < 5
    assert max(MAX_CHARS.values()) < 1_000_000


@pytest.mark.parametrize("form", FORMS)
def test_instructions_name_what_is_read(form: str) -> None:
    wanted = {"segments": "<perception>", "think_answer": "<think>", "boxed": "\\boxed{}"}[form]
    assert wanted in instructions(form)
