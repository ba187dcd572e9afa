"""What answers a policy between its turns: the protocol, and how a recipe names one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from tasks.core import Problem
from tasks.load import import_named

BUILT_IN = {"zoom": "tasks.looking:Zoom", "mark": "tasks.looking:Mark"}


@dataclass(frozen=True)
class Observation:
    """What an environment says to a turn of the policy.

    Attributes:
        text: what the policy reads; characters, never control tokens.
        images: encoded images that it is shown before the text, in order.
        reward: what the turn earned, of the reward term `environment`.
        done: the response ends with the turn; nothing more is shown.
        defects: what was wrong with the turn's call, by name.
    """

    text: str = ""
    images: tuple[bytes, ...] = field(default=(), repr=False)
    reward: float = 0.0
    done: bool = False
    defects: tuple[str, ...] = ()


DONE = Observation(done=True)
"""Of a turn that calls nothing."""


FailureKind = Literal["exception", "deadline", "died", "unusable"]
"""How an environment fails: it raises; its answer takes too long; its process ends; its answer is
no `Observation`, holds what is no image, or is too large."""


class EnvironmentFailed(RuntimeError):
    """An environment gave no answer; `str` of it is "kind: message"."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message


def opened(parts: Sequence[Any], opening: Observation | None) -> list[Any]:
    """A prompt's parts with what an environment says behind them: its images, then its text.

    Parts are texts, and whatever stands for images.
    """
    if opening is None or not (opening.images or opening.text):
        return [*parts]
    if opening.images or not (parts and isinstance(parts[-1], str)):
        return [*parts, *opening.images, *([opening.text] if opening.text else [])]
    return [*parts[:-1], f"{parts[-1]}\n\n{opening.text}"]


@runtime_checkable
class Environment(Protocol):
    """One episode: made anew for each response, with the arguments of the recipe.

    It runs in a process beside the sampler and may keep what it likes between steps. What it
    answers hangs on the problem, the generator and the turns before alone: where its process was
    lost, by another episode's fault say, the episode is played again in a new one.
    """

    def reset(self, problem: Problem, rng: np.random.Generator) -> Observation | None:
        """What the policy is told after the problem's prompt, or nothing."""

    def step(self, text: str) -> Observation:
        """The answer to a turn. `text` is a model's and may be anything."""


@runtime_checkable
class LooksElsewhere(Protocol):
    """An environment whose calls point at a place, so that a wrong one can be shown."""

    def elsewhere(self, text: str) -> tuple[bytes, ...]:
        """The pictures of the last step, had its turn `text` pointed at another place."""


def load_environment(name: str, arguments: Mapping[str, Any] | None = None) -> Environment:
    """Make the environment that `name` stands for: `"zoom"`, `"mark"` or `"module:Class"`.

    Raises ValueError, in one line: an unknown name, a class that is absent, that does not take the
    arguments, or that lacks a method.
    """
    what, given = f'environment "{name}"', dict(arguments or {})
    target = BUILT_IN.get(name, name)
    if ":" not in target:
        raise ValueError(
            f"no {what}; the built-in ones are {', '.join(BUILT_IN)}, and one of your own is named "
            '"module:Class"'
        )
    try:
        made = import_named(what, target)(**given)
    except (TypeError, ValueError) as error:
        if str(error).startswith(what):
            raise
        raise ValueError(f"{what}: args {given}: {error}") from error
    if not isinstance(made, Environment):
        raise ValueError(f"{what}: lacks reset or step; see tasks/environments.py")
    return made
