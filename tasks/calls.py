"""Where in a turn a call stands: its tokens are of the segment `act`."""

from __future__ import annotations

import re

_ANY_TAG = re.compile(r"<(/?)(\w{1,40})>")
_NO_CALLS = ("perception", "reasoning", "answer", "think")


def call_span(turn: str) -> tuple[int, int] | None:
    """[start, end) in characters of what a turn calls with, be it written well or badly.

    From the first opening tag that no segment's tag follows, to the end of the turn, white space
    there left out; None where there is no such tag.
    """
    start = None
    for tag in _ANY_TAG.finditer(turn):
        if tag[2] in _NO_CALLS:
            start = None
        elif start is None and not tag[1]:
            start = tag.start()
    return None if start is None else (start, len(turn.rstrip()))
