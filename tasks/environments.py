"""What answers a policy between its turns: the protocol, and how a recipe names one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from tasks.calls import SAID, CallForm, Tool, in_json, in_tags
from tasks.core import Problem
from tasks.load import import_named

Role = Literal["user", "tool"]
"""Who says in the chat what an environment does."""

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
        how: of `reset`: how calls are written in tags, behind `text`. Where the recipe has them as
            JSON the `tools` of the environment are told in its place.
        tools: their schemas, as a JSON list; `role`: who says it in the chat. Both are set by
            `JsonCalls`.
    """

    text: str = ""
    images: tuple[bytes, ...] = field(default=(), repr=False)
    reward: float = 0.0
    done: bool = False
    defects: tuple[str, ...] = ()
    how: str = ""
    tools: str = ""
    role: Role = "user"


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
    said = "\n\n".join(filter(None, (opening.text, opening.how))) if opening else ""
    if opening is None or not (opening.images or said):
        return [*parts]
    if opening.images or not (parts and isinstance(parts[-1], str)):
        return [*parts, *opening.images, *([said] if said else [])]
    return [*parts[:-1], f"{parts[-1]}\n\n{said}"]


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


@runtime_checkable
class HasTools(Protocol):
    """An environment that can be called in the JSON form too."""

    def tools(self) -> Sequence[Tool]:
        """What may be called, once it was reset."""


class JsonCalls:
    """An environment that is called in the JSON form (`tasks.calls`)."""

    def __init__(self, made: Environment) -> None:
        """Raises ValueError for an environment without tools."""
        if not isinstance(made, HasTools):
            raise ValueError('says no tools, which calls = "json" needs (tasks/environments.py)')
        self._made: Any = made
        self._tools: tuple[Tool, ...] = ()

    def reset(self, problem: Problem, rng: np.random.Generator) -> Any:
        """What the environment itself says, its tools in place of how to write tags."""
        opening = self._made.reset(problem, rng)
        self._tools = tuple(self._made.tools())
        if not isinstance(opening, Observation) or not opening.how:
            return opening
        told = json.dumps([tool.schema() for tool in self._tools], ensure_ascii=False)
        return replace(opening, how="", tools=told)

    def step(self, text: str) -> Any:
        """The environment's answer to the same call in tags, as a tool's."""
        turn, defect = in_tags(text, self._tools)
        if defect:
            said = f"The call was not understood: {SAID[defect]}."
            return Observation(said, defects=(defect,), role="tool")
        answer = self._made.step(turn)
        called = turn != text and isinstance(answer, Observation) and answer != DONE
        return replace(answer, role="tool") if called else answer

    def written(self, turn: str) -> str:
        """A teacher's call in this form; raises ValueError where it is none of the tools'."""
        return in_json(turn, self._tools)


class JsonPointing(JsonCalls):
    """One whose calls point at a place (`LooksElsewhere`)."""

    def elsewhere(self, text: str) -> tuple[bytes, ...]:
        pictures: tuple[bytes, ...] = self._made.elsewhere(in_tags(text, self._tools)[0])
        return pictures


def load_environment(
    name: str, arguments: Mapping[str, Any] | None = None, calls: CallForm = "tags"
) -> Environment:
    """Make the environment that `name` stands for: `"zoom"`, `"mark"` or `"module:Class"`.

    `calls`: the form in which a policy writes them.

    Raises ValueError, in one line: an unknown name, a class that is absent, that does not take the
    arguments, that lacks a method, or says no tools to be called as JSON.
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
    if calls == "tags":
        return made
    try:
        return (JsonPointing if isinstance(made, LooksElsewhere) else JsonCalls)(made)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
