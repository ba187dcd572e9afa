"""A response of several turns, read as what it says last.

A policy that looks again may write down again what it sees, and think and answer anew. What a later
turn says of a segment takes the place of what earlier turns said of it: that is passed over, as if
it were white space. A new perception takes the place of all that the turns before it said. Within a
turn all is as strict as in a response of one: a segment that is there twice is a defect, also of a
turn that no longer counts.

Turns without any tag of a response that has tags have no segments. In a response without tags a
later turn reads again where it has a perception and an answer; a single block there is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from tasks.core import Parsed, Segment, Task
from tasks.responses import TAG


def read_turns(task: Task, turns: Sequence[str]) -> Parsed:
    """What a response says whose turns, end to end, are its text. Never raises.

    Spans are characters of the whole text; what was passed over is `Parsed.earlier`.
    """
    text = "".join(turns)
    if len(turns) < 2:
        return task.parse(text)
    tagged = TAG.search(text) is not None
    starts = [0, *accumulate(map(len, turns))]
    later: set[Segment] = set()
    earlier: list[Parsed] = []
    defects: list[str] = []
    for place in reversed(range(len(turns))):
        if tagged and TAG.search(turns[place]) is None:
            continue
        said = task.parse(turns[place])
        if not (tagged or not place or "answer" in said.spans or "perception" in later):
            continue
        spans = {s: (starts[place] + a, starts[place] + b) for s, (a, b) in said.spans.items()}
        again = "perception" in later
        over = {s: at for s, at in spans.items() if s in later or again}
        whole = [(starts[place], starts[place + 1])] if again else []
        for start, end in whole or over.values():
            text = text[:start] + " " * (end - start) + text[end:]
        if again:  # of a turn alone something is mostly missing
            defects = [name for name in said.defects if not name.startswith("missing_")] + defects
        if over:
            earlier.insert(0, replace(said, spans=over))
        later |= spans.keys()
    found = task.parse(text)
    told = tuple(dict.fromkeys([*defects, *found.defects]))
    return replace(found, defects=told, earlier=tuple(earlier))


def readings(parsed: Parsed) -> list[Any | None]:
    """The perceptions of a response in order, None where one cannot be read; the last counts."""
    before = [said.perception for said in parsed.earlier if "perception" in said.spans]
    return [*before, parsed.perception]
