"""Other pictures in place of those that an environment returns: does a policy use what it is shown?

Texts, rewards and the end stay the environment's own, and what it says before the first turn too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from tasks.core import Problem
from tasks.environments import Environment, LooksElsewhere, Observation
from tasks.images import blank_like

Shows = Literal["blank", "other", "elsewhere"]
"""`blank`: a canvas of its size; `other`: what the same turns bring on another problem;
`elsewhere`: the same picture at a wrong place (`LooksElsewhere`)."""


@dataclass(frozen=True)
class Returns:
    """What is returned in place of a picture; `other`: the problem of `other`."""

    kind: Shows
    other: Problem | None = None


class Replaced:
    """An environment whose pictures are replaced; as many as there were, else blank ones."""

    def __init__(self, make: Callable[[], Environment], returns: Returns) -> None:
        self._own, self._returns = make(), returns
        self._twin = make() if returns.other is not None else None

    def reset(self, problem: Problem, rng: np.random.Generator) -> Observation | None:
        if self._twin is not None and self._returns.other is not None:
            self._twin.reset(self._returns.other, rng.spawn(1)[0])
        return self._own.reset(problem, rng)

    def step(self, text: str) -> Any:
        """May be anything, as what the environment itself answers."""
        answer: Any = self._own.step(text)
        # At each turn, for the twin may hold a state too.
        twin: Any = self._twin.step(text) if self._twin is not None else None
        if not isinstance(answer, Observation) or not answer.images:
            return answer
        images: tuple[bytes, ...] = ()
        if isinstance(twin, Observation):
            images = twin.images
        elif self._returns.kind == "elsewhere" and isinstance(self._own, LooksElsewhere):
            images = self._own.elsewhere(text)
        if len(images) != len(answer.images):
            images = tuple(map(blank_like, answer.images))
        return replace(answer, images=images)
