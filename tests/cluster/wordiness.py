"""A user's own reward term, named in a recipe as `"tests.cluster.wordiness:Wordiness"`.

Random policies solve nothing, so their groups would have no variance under the built-in terms.
"""

from __future__ import annotations

from rollout.record import Group
from tasks.core import Task


class Wordiness:
    """Share of letters in the text: differs between any two random responses."""

    name = "wordiness"

    def __call__(self, task: Task, group: Group) -> list[float]:
        return [sum(c.isalpha() for c in r.text) / max(1, len(r.text)) for r in group.rollouts]
