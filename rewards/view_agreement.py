"""The term `view_agreement`: what is seen does not hang on how the picture was taken.

ConsistRoll (arXiv 2606.29812) and OT-GRPO (arXiv 2606.11918) have original and transformed views
in one group and pay where paired readings agree. Here the policy is asked again for its perception,
of another view of the same images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from rewards.settings import ARGUMENTS
from rewards.surrogates import Capped, expect_replies
from rollout.record import Group, SampleRequest, Sampling
from tasks.core import HasPerceptionItems, Problem, Task
from tasks.fields import Amount, Positive
from tasks.views import Change, another_view


@dataclass(config=ARGUMENTS)
class ViewAgreement(Capped):
    """How far the own perception is that of another view of the images: the mean over readings.

    With n readings q_1 ... q_n of the other view, r_i = (1/n) Σ_j s(p_i, q_j). Which reading a
    rollout is paired with would be chance: each is paired with all, which is what a random pairing
    gives on average, with less noise. s is in [0, 1] (`agreement`). A reading that cannot be read
    agrees with nobody; a problem without images gives 0 throughout.

    It asks for no truth: what is misread the same way in both views is paid, and so is a
    perception that says nothing of the image. It tells a steady eye, not a right one.

    Args:
        changes: what makes the other view, see `tasks.views`. `margin` is not among the default
            ones, since charts and screens have text at their edges. Where a perception holds
            coordinates in pixels, leave out `scale` too.
        readings: n.
        temperature: of the readings; the policy's own is 1 where the recipe does not say otherwise.
        max_tokens: of a reading; it has to reach the end of the perception.
    """

    name = "view_agreement"
    model = ""
    changes: Annotated[tuple[Change, ...], Field(strict=False, min_length=1)] = (
        "scale",
        "colour",
        "encode",
    )
    readings: Positive = 4
    temperature: Amount = 1.0
    max_tokens: Positive = 256

    def ask(self, task: Task, group: Group, other: Problem | None) -> list[SampleRequest]:
        """One request for all readings; none where nothing could be earned by them."""
        problem = group.problem
        if not self._asks(group):
            return []
        seed = int.from_bytes(hashlib.sha256(group.group_id.encode()).digest()[:8])
        images = tuple(
            another_view(image, seed + index, self.changes)
            for index, image in enumerate(problem.images)
        )
        return [
            SampleRequest(
                group_id=f"{group.group_id}/{self.name}",
                problem=replace(problem, images=images),
                n=self.readings,
                sampling=Sampling(temperature=self.temperature, max_tokens=self.max_tokens),
            )
        ]

    def score(self, task: Task, group: Group, replies: Sequence[Group | np.ndarray]) -> list[float]:
        """float [G] in [0, 1]."""
        expect_replies(self.name, int(self._asks(group)), replies)
        if not replies:
            return [0.0] * len(group.rollouts)
        (reply,) = replies
        if not isinstance(reply, Group) or len(reply.rollouts) != self.readings:
            raise ValueError(f"{self.name}: expected a group of {self.readings} as a reply")
        others = [rollout.parsed.perception for rollout in reply.rollouts]
        return [
            sum(agreement(task, self.readable(rollout), q) for q in others) / self.readings
            for rollout in group.rollouts
        ]

    def _asks(self, group: Group) -> bool:
        return bool(group.problem.images) and any(
            self.readable(r) is not None for r in group.rollouts
        )


def agreement(task: Task, one: Any | None, other: Any | None) -> float:
    """How far two perceptions say the same, in [0, 1]; None, one that is unreadable, says nothing.

    By the task's items (`HasPerceptionItems`) it is their F1, 2|A∩B| / (|A| + |B|); of two texts
    the same over words in order, 2·LCS / (words of both), without regard to case, and 0 where one
    is empty; of anything else 1 where they are equal.
    """
    if one is None or other is None:
        return 0.0
    if isinstance(task, HasPerceptionItems):
        return _f1(task.perception_items(one), task.perception_items(other))
    if isinstance(one, str) and isinstance(other, str):
        from rapidfuzz.distance import Indel

        words, others = one.casefold().split(), other.casefold().split()
        both = bool(words and others)
        return float(Indel.normalized_similarity(words, others)) if both else 0.0
    return float(one == other)


def _f1(items: frozenset[Hashable], others: frozenset[Hashable]) -> float:
    size = len(items) + len(others)
    return 2 * len(items & others) / size if size else 1.0
