"""The form in which a policy writes its perceptions, so that an oracle prefix can be in it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tasks.core import Problem, ScoresPerception, Task
from tasks.responses import TAG, line_ends, read_json, without_preamble


@dataclass(frozen=True)
class Form:
    """How a policy writes a perception: in tags, or as JSON in the public data sets' style.

    Attributes:
        json: whether it is a JSON block without tags.
        key: where the block is an object, under which key the perception is.
        fence: what opens a block of code around it.
        after: the line ends after it.
    """

    json: bool = False
    key: str = ""
    fence: str = ""
    after: str = "\n"


def form_of(task: Task, responses: Iterable[str]) -> Form:
    """The form of most responses whose perception can be read; tags where there is none."""
    forms = Counter(form for text in responses if (form := _form(task, text)) is not None)
    return forms.most_common(1)[0][0] if forms else Form()


def oracle_prefix_in(form: Form, task: ScoresPerception, problem: Problem) -> str:
    """`task.oracle_prefix(problem)` in a policy's form.

    As the task has it where that cannot be: it would not read the same `p*` from it.
    """
    standard = task.oracle_prefix(problem)
    if form == Form():
        return standard
    true = task.parse(standard).perception
    prefix = standard.rstrip("\n") + form.after if TAG.search(standard) is not None else standard
    if form.json and true is not None:
        try:
            value = _as_json(true)
            text = json.dumps({form.key: value} if form.key else value)
        except TypeError:  # a task's own class
            return standard
        prefix = form.fence + text + form.after
    return prefix if task.parse(prefix).perception == true else standard


def _form(task: Task, text: str) -> Form | None:
    parsed = task.parse(text)
    if parsed.perception is None or "perception" not in parsed.spans:
        return None
    start, end = parsed.spans["perception"]
    after, block = line_ends(text, end), without_preamble(text[start:end])
    value, _ = read_json(block)
    if value is None:
        return Form(after=after)
    before = text[: end - len(block)]
    fence = re.search(r"```[a-z]*\n$", before)
    keys = [
        key
        for key, inner in (value.items() if isinstance(value, dict) else ())
        if task.parse(json.dumps({key: inner})).perception == parsed.perception
    ]
    return Form(True, keys[0] if keys else "", fence[0] if fence else "", after)


def _as_json(value: Any) -> Any:
    """A perception's tuples and sets as lists, the sets in order."""
    if isinstance(value, set | frozenset):
        return [_as_json(item) for item in sorted(value)]
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value
