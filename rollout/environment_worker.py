"""The process that environments run in: one call at a time, each with all it takes to answer.

    python -m rollout.environment_worker DESCRIPTOR

A call brings the turns of its episode so far, so a process that knows nothing of the episode (a new
one, after another episode's environment took the last one down) plays it again and answers.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from rollout.settings import EnvironmentConfig
from tasks.calls import CallForm
from tasks.core import DataError, Problem
from tasks.environments import (
    Environment,
    EnvironmentFailed,
    Observation,
    Role,
    load_environment,
)
from tasks.images import check_image
from tasks.memory import limit_memory
from tasks.returns import Replaced, Returns

MOST_TEXT = 20_000
"""Characters of one answer."""
MOST_BYTES = 64 * 2**20
"""Of the images of one answer, encoded."""
KEPT = 256
"""Episodes that a process has at hand; older ones are played again."""
SLACK_SECONDS = 5.0
"""After its deadline a process ends by itself, whether or not someone is there to end it."""


@dataclass(frozen=True)
class Settings:
    """What a process is told first."""

    name: str
    args: Mapping[str, Any]
    memory_gib: float
    calls: CallForm

    @classmethod
    def of(cls, config: EnvironmentConfig) -> Settings:
        """Those of a recipe's [environment]."""
        return cls(config.name, config.args, config.memory_gib, config.calls)


@dataclass(frozen=True)
class Call:
    """Answer the last of the turns of an episode; without turns, reset it."""

    episode: str
    problem: Problem
    seed: int
    turns: tuple[str, ...]
    seconds: float
    returns: Returns | None = None


class Episodes:
    """The environments that a process has at hand."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known: OrderedDict[str, tuple[Environment, int]] = OrderedDict()

    def answer(self, call: Call) -> Observation | None:
        """Raises EnvironmentFailed, and nothing else that an environment may raise."""
        made, done = self._known.pop(call.episode, (None, -1))
        answer: Any = None
        try:
            if made is None or done != len(call.turns) - 1 or not call.turns:
                told = self._settings
                make = partial(load_environment, told.name, told.args, told.calls)
                made, done = Replaced(make, call.returns) if call.returns else make(), 0
                answer = made.reset(call.problem, np.random.default_rng(call.seed))
            for turn in call.turns[done:]:
                answer = made.step(turn)
        except Exception as error:
            message = f"{type(error).__name__}: {error}".strip()
            raise EnvironmentFailed("exception", message.splitlines()[0][:300]) from error
        self._known[call.episode] = made, len(call.turns)
        if len(self._known) > KEPT:
            self._known.popitem(last=False)
        if answer is None and not call.turns:
            return None
        return checked(answer)


def checked(answer: Any) -> Observation:
    """An answer as the policy can be shown it. Raises EnvironmentFailed where it cannot."""
    if not isinstance(answer, Observation):
        raise EnvironmentFailed("unusable", f"not an Observation: {type(answer).__name__}")
    for text in (answer.text, answer.how, answer.tools):
        if not isinstance(text, str) or len(text) > MOST_TEXT:
            size = len(text) if isinstance(text, str) else type(text).__name__
            raise EnvironmentFailed(
                "unusable", f"text of at most {MOST_TEXT} characters, got {size}"
            )
    try:
        images, defects = tuple(answer.images), tuple(str(one)[:80] for one in answer.defects)
    except TypeError as error:
        raise EnvironmentFailed("unusable", f"images and defects are tuples: {error}") from error
    if not all(isinstance(image, bytes) for image in images):
        raise EnvironmentFailed("unusable", "images are encoded files, as bytes")
    if sum(map(len, images)) > MOST_BYTES:
        raise EnvironmentFailed("unusable", f"images of {sum(map(len, images))} bytes in all")
    try:
        for image in images:
            check_image(image, "image")
        reward = float(answer.reward)
    except (DataError, TypeError, ValueError) as error:
        raise EnvironmentFailed("unusable", str(error)) from error
    if not np.isfinite(reward):
        raise EnvironmentFailed("unusable", f"a reward of {reward}")
    # Half of a pair of surrogates is no text that a file could hold.
    text, how = (said.encode("utf-8", "replace").decode() for said in (answer.text, answer.how))
    role: Role = "tool" if answer.role == "tool" else "user"
    return Observation(text, images, reward, bool(answer.done), defects, how, answer.tools, role)


def serve(pipe: Connection) -> None:
    """Answer calls until nobody is there any more."""
    settings = pipe.recv()
    limit_memory(settings.memory_gib)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
    episodes = Episodes(settings)
    pipe.send("ready")
    while True:
        try:
            call = pipe.recv()
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_REAL, call.seconds + SLACK_SECONDS)
        try:
            reply: Any = episodes.answer(call)
        except EnvironmentFailed as error:
            reply = (error.kind, error.message)
        except MemoryError:
            reply = ("exception", "MemoryError")
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send(reply)


if __name__ == "__main__":
    # What an environment prints must not end up between the answers, nor in the sampler's output.
    os.dup2(2, 1)
    serve(Connection(int(sys.argv[1])))
