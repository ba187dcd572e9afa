"""A user's own reward terms, named in a recipe as `"tests.support.wordiness:Wordiness"`.

Random policies solve nothing, so their groups would have no variance under the built-in terms.
"""

from __future__ import annotations

import hashlib
import os
import time

from rollout.record import Group
from tasks.core import Task


class Wordiness:
    """Share of letters in the text: differs between any two random responses."""

    name = "wordiness"

    def __call__(self, task: Task, group: Group) -> list[float]:
        return [sum(c.isalpha() for c in r.text) / max(1, len(r.text)) for r in group.rollouts]


class Loud(Wordiness):
    """The same; prints what a model wrote as the title of a window, and a key that it was given."""

    def __call__(self, task: Task, group: Group) -> list[float]:
        print(f"\x1b]0;{group.rollouts[0].text}\x07 {os.environ.get('HF_TOKEN')}", flush=True)
        return super().__call__(task, group)


class Moody(Wordiness):
    """The same on three groups of four; the others get nothing, so they have no variance.

    Rests `seconds` over each, so that a run that waits for something takes few steps meanwhile.
    """

    name = "moody"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __call__(self, task: Task, group: Group) -> list[float]:
        time.sleep(self.seconds)
        cares = cares_for(group.group_id)
        return super().__call__(task, group) if cares else [0.0] * len(group.rollouts)


def cares_for(group_id: str) -> bool:
    """Whether `Moody` looks at this group."""
    return bool(hashlib.sha256(group_id.encode()).digest()[1] % 4)
