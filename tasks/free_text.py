r"""The forms of a response whose perception and answer are free text.

| form | perception | reasoning | answer |
|---|---|---|---|
| `segments` | `<perception>` | `<reasoning>` | `<answer>` |
| `think_answer` | none | `<think>` | `<answer>` |
| `boxed` | none | all before the last box | in `\boxed{}` |

What is read is the text between the tags, stripped. Defects are those of `tasks.responses`, by
the same rules (without its style of public data sets: JSON is text here), and

| defect | what happened | spoils |
|---|---|---|
| `empty_perception`, `empty_answer` | nothing between the tags or braces | that segment |
| `too_long_perception`, `too_long_answer` | more than `MAX_CHARS` characters | that segment |
| `contradicting_answers` | boxes with different contents, wherever they stand | the answer |
| `unclosed_answer` | a box whose braces do not balance | the answer |

Never raises; linear time.
"""

from __future__ import annotations

from collections.abc import Mapping

from tasks.checkers.reading import boxes
from tasks.core import Parsed, Segment
from tasks.responses import Read, Reader, Split, read_split, split_tags

FORMS = ("segments", "think_answer", "boxed")
MAX_CHARS: Mapping[Segment, int] = {"perception": 20_000, "answer": 2_000}

_TAGS: Mapping[str, Mapping[str, Segment]] = {
    "segments": {"perception": "perception", "reasoning": "reasoning", "answer": "answer"},
    "think_answer": {"think": "reasoning", "answer": "answer"},
}
_INSTRUCTIONS = {
    "segments": (
        "First write down what you see in the image that matters for the question, then reason "
        "about it, then answer:\n<perception>\n...\n</perception>\n<reasoning>\n...\n</reasoning>\n"
        "<answer>\n...\n</answer>\nThe answer holds the final answer alone."
    ),
    "think_answer": (
        "First think, then answer:\n<think>\n...\n</think>\n<answer>\n...\n</answer>\n"
        "The answer holds the final answer alone."
    ),
    "boxed": r"Think step by step, then write the final answer, once, inside \boxed{}.",
}


def has_perception(form: str) -> bool:
    """Whether a response of this form has a perception segment."""
    return form == "segments"


def instructions(form: str) -> str:
    """What a prompt ends with, so that a model writes this form."""
    return _INSTRUCTIONS[form]


def parse_free(text: str, form: str) -> Parsed:
    """Read a response; perception and answer are stripped text, or None and a named defect."""
    split = _split_boxed(text) if form == "boxed" else split_tags(text, _TAGS[form])
    return read_split(text, split, _reader("perception"), _reader("answer"))


def _reader(segment: Segment) -> Reader:
    def read(text: str) -> Read:
        text = text.strip()
        if not text:
            return None, (f"empty_{segment}",)
        if len(text) > MAX_CHARS[segment]:
            return None, (f"too_long_{segment}",)
        return text, ()

    return read


def _split_boxed(text: str) -> Split:
    """The last box is the answer, to the end of the text; the reasoning is what stands before."""
    boxed = list(boxes(text))
    if not boxed:
        whole: dict[Segment, tuple[int, int]] = {"reasoning": (0, len(text))}
        return Split(whole, dict(whole), ("missing_answer",), frozenset(("answer",)))
    start, end, contents = boxed[-1]
    spans: dict[Segment, tuple[int, int]] = {"reasoning": (0, start), "answer": (start, len(text))}
    opening = text.index("{", start) + 1
    inner: dict[Segment, tuple[int, int]] = {
        "reasoning": (0, start),
        "answer": (opening, end if contents is None else end - 1),
    }
    defects = []
    if contents is None:
        defects.append("unclosed_answer")
    elif len({" ".join((content or "").split()) for _, _, content in boxed}) > 1:
        defects.append("contradicting_answers")
    return Split(spans, inner, tuple(defects), frozenset(("answer",) if defects else ()))
