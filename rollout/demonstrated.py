"""A response that is written down already, as the episode that sampling its turns would make."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from rollout.environment_worker import Call, Episodes, Settings
from rollout.episode import Budgets, Episode
from rollout.episodes import Answers, Asked, Written, run_episode
from rollout.settings import EnvironmentConfig
from rollout.tokens import Chat
from tasks.core import DataError, Problem
from tasks.environments import JsonCalls, Observation, load_environment
from tasks.images import check_image

MOST = 2**40
"""More than any budget."""


class _InProcess:
    """The environment of a recipe in the caller's own process, without a deadline."""

    spent = 0.0

    def __init__(self, config: EnvironmentConfig, problem: Problem, seed: int) -> None:
        self._episodes = Episodes(Settings.of(config))
        self._problem, self._seed = problem, seed
        self._turns: tuple[str, ...] = ()

    async def answer(self, text: str | None) -> Observation | None:
        self._turns += () if text is None else (text,)
        return self._episodes.answer(Call("", self._problem, self._seed, self._turns, 0.0))


class _Known:
    """Answers that are known; an environment only says what stands behind the prompt, if any."""

    spent = 0.0

    def __init__(self, opens: _InProcess | None, answers: Sequence[Observation]) -> None:
        self._opens, self._answers = opens, [*answers]

    async def answer(self, text: str | None) -> Observation | None:
        if text is None:
            return await self._opens.answer(None) if self._opens else None
        return self._answers.pop(0) if self._answers else None


def in_form(
    turns: Sequence[str], environment: EnvironmentConfig | None, problem: Problem, seed: int
) -> tuple[str, ...]:
    """A teacher's turns, their calls in tags, as the recipe has calls written.

    Raises DataError for a call that is none of the environment's tools'.
    """
    if environment is None or environment.calls == "tags" or not turns:
        return tuple(turns)
    try:
        made = load_environment(environment.name, environment.args, environment.calls)
        made.reset(problem, np.random.default_rng(seed))
        assert isinstance(made, JsonCalls)
        return tuple(map(made.written, turns))
    except ValueError as error:
        raise DataError(f"problem {problem.id}: its teacher's call: {error}") from error


def demonstrated(
    chat: Chat,
    problem: Problem,
    prompt: Callable[[Observation | None], tuple[list[int], list[int], tuple[bytes, ...]]],
    turns: Sequence[Sequence[int]],
    environment: EnvironmentConfig | None = None,
    seed: int = 0,
    answers: Sequence[Observation] | None = None,
) -> tuple[Asked, Episode]:
    """(the prompt, the episode) of turns given as tokens, each without its end.

    Args:
        prompt: from what the environment says behind the problem to a prompt's ids with a
            placeholder an image, the same expanded, and its images.
        environment: answers the turns, in this process, its randomness of `seed`. Of its budgets
            those hold that do not count the policy's tokens.
        answers: to each turn but the last, in its place.

    Raises DataError where a policy could not have written it so: a turn before the last calls
    nothing, the last one does, a budget is used up, the environment fails.
    """
    budgets = Budgets(MOST, MOST, MOST, MOST, MOST, float("inf"))
    asks: _InProcess | None = None
    if environment:
        budgets = Budgets.of(environment, MOST, MOST)
        asks = _InProcess(environment, problem, seed)
    answering: Answers = asks or _Known(None, ())
    if answers is not None:
        answering = _Known(asks, answers)
    left, sizes = [*turns], list[tuple[int, int]]()

    async def write(name: str, ids: Sequence[int], images: Sequence[bytes], room: int) -> Written:
        nonlocal sizes
        if not left:
            raise DataError("calls the environment in its last turn")
        said = [*left.pop(0), chat.end]
        sizes += [check_image(image, "image").size for image in images[len(sizes) :]]
        return Written(chat.expanded(ids, sizes), said, [0.0] * len(said), [0] * len(said))

    playing = run_episode(
        problem.id, chat, budgets, lambda said: Asked(*prompt(said)), write, answering
    )
    asked, episode, failure = asyncio.run(playing)
    if failure:
        raise DataError(f"cannot be shown: its environment failed: {failure}")
    if episode.end != "stop" or left:
        end = "the turn calls nothing" if episode.end == "stop" else episode.end
        raise DataError(f"ends with turn {len(episode.turns)} of {len(turns)}: {end}")
    return asked, episode
