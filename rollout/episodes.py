"""A group whose responses have several turns: the policy and its environments, turn about.

Nothing here knows the engine: `Write` is what it makes of a prompt. Each episode goes at its own
pace, so an engine has the others to work on while an environment thinks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from rollout.episode import Budgets, Episode
from rollout.record import Group, Rollout, SampleRequest, as_turns
from rollout.tokens import Chat
from tasks.core import DataError, Task
from tasks.environments import DONE, EnvironmentFailed, Observation
from tasks.turns import read_turns


class Answers(Protocol):
    """The environment of one episode.

    spent: seconds that it took for all its answers.
    """

    spent: float

    async def answer(self, text: str | None) -> Observation | None:
        """To a turn; to None what it says behind the prompt. Raises EnvironmentFailed."""


class Written(NamedTuple):
    """What an engine made of a prompt: the prompt as it read it, and what it sampled."""

    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    versions: list[int]


class Asked(NamedTuple):
    """A prompt with a placeholder an image; the same expanded; the images it shows."""

    asked: list[int]
    prompt_ids: list[int]
    images: tuple[bytes, ...]


Write = Callable[[str, Sequence[int], Sequence[bytes], int], Awaitable[Written]]
"""(name of the turn, prompt, its images, most tokens) -> what was written."""


class EpisodeError(ValueError):
    """An engine that does not fit the chat, or a prompt that leaves no room."""


async def converse(
    chat: Chat,
    request: SampleRequest,
    task: Task,
    budgets: Budgets,
    prompt: Callable[[Observation | None], Asked],
    write: Write,
    environments: Callable[[int], Answers],
    sampler: str,
) -> Group:
    """Sample `request.n` episodes of one problem.

    Raises what `prompt` and `write` raise, and EpisodeError; never for what an environment does.
    """
    start = time.perf_counter()

    async def one(index: int) -> Rollout:
        asked, episode, failure = await run_episode(
            f"{request.group_id}/{index}", chat, budgets, prompt, write, environments(index)
        )
        seconds = time.perf_counter() - start
        return _rollout(request, task, index, asked, episode, failure, seconds, sampler)

    running = [asyncio.ensure_future(one(index)) for index in range(request.n)]
    try:
        return Group(request.group_id, request.problem, tuple(await asyncio.gather(*running)))
    finally:
        for each in running:
            each.cancel()


async def run_episode(
    name: str,
    chat: Chat,
    budgets: Budgets,
    prompt: Callable[[Observation | None], Asked],
    write: Write,
    environment: Answers,
) -> tuple[Asked, Episode, str]:
    """(its prompt, an episode that is over, how the environment failed or "")."""
    opening, failure = None, ""
    try:
        opening = await environment.answer(None)
    except EnvironmentFailed as error:
        failure = str(error)
    asked = prompt(opening)
    episode = Episode(chat, budgets, asked.asked, len(asked.prompt_ids), asked.images)
    episode.seconds = environment.spent
    if not episode.room:
        raise EpisodeError(
            f"a prompt of {len(asked.prompt_ids)} tokens leaves no room in model.max_model_len = "
            f"{budgets.context}; raise it"
        )
    while episode.end is None:
        turn = f"{name}/{len(episode.turns)}"
        found = await write(turn, episode.asked, episode.images, episode.room)
        if found.prompt_ids != [*asked.prompt_ids, *episode.ids]:
            raise EpisodeError(
                "the engine read other tokens than those of the turns before; sampler and engine "
                "must load the same processor"
            )
        text = episode.said(found.ids, found.logprobs, found.versions)
        if episode.end is None and failure:
            episode.end = "environment"
        if episode.end is not None:
            break
        try:
            observation = await environment.answer(text)
            episode.seconds = environment.spent
            episode.told(observation or DONE)
        except EnvironmentFailed as error:
            failure, episode.end = str(error), "environment"
        except DataError as error:  # control tokens that this tokenizer reads in any text
            failure, episode.end = f"unusable: its text {error}", "environment"
    return asked, episode, failure


def _rollout(
    request: SampleRequest,
    task: Task,
    index: int,
    asked: Asked,
    episode: Episode,
    failure: str,
    seconds: float,
    sampler: str,
) -> Rollout:
    text, offsets, _ = episode.read()
    parsed = read_turns(task, as_turns(request.prefix, text, episode.turns))
    return Rollout(
        rollout_id=f"{request.group_id}/{index}",
        group_id=request.group_id,
        kind=request.kind,
        view=request.view,
        prompt_ids=np.asarray(asked.prompt_ids, np.int32),
        response_ids=np.asarray(episode.ids, np.int32),
        images=tuple(episode.images),
        logprobs=np.asarray(episode.logprobs, np.float32),
        versions=np.asarray(episode.versions, np.int32),
        segments=episode.labelled(parsed, offsets, len(request.prefix)),
        prefix=request.prefix,
        text=text,
        parsed=parsed,
        finish_reason=episode.end or "abort",
        seconds=seconds,
        sampler=sampler,
        turns=tuple(episode.turns),
        failure=failure,
    )
