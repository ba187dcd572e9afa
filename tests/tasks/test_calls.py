"""Where a turn calls."""

import pytest

from tasks.calls import call_span


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
