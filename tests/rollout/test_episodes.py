"""The loop of an episode, without an engine: whatever an environment does, it comes to an end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rollout.episode import Budgets
from rollout.episodes import Asked, EpisodeError, Written, converse
from rollout.record import Group, SampleRequest, Sampling
from rollout.tokens import Chat, load_processor
from tasks.core import ENVIRONMENT, SEGMENTS
from tasks.drawing import to_png
from tasks.environments import DONE, EnvironmentFailed, Observation, opened
from tasks.load import load_task
from tasks.turns import readings
from tests.support.live_engine import TASK
from tests.support.samples import problem

BUDGETS = Budgets(turns=3, tokens=12, images=9, image_tokens=900, context=900, seconds=99.0)
PICTURE = to_png(Image.new("RGB", (64, 64)))


@pytest.fixture(scope="module")
def chat(tiny_models: dict[str, Path]) -> Chat:
    return Chat(load_processor(str(tiny_models["qwen3_vl"])))


class Scripted:
    """Answers, or failures, in order; the first is the reset's."""

    def __init__(self, *answers: Any) -> None:
        self.answers = [*answers]
        self.heard: list[str | None] = []
        self.spent = 0.0

    async def answer(self, text: str | None) -> Observation | None:
        self.heard.append(text)
        self.spent += 4.0
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def conversed(
    chat: Chat,
    *scripts: Scripted,
    engine_reads: int = 0,
    texts: Sequence[str] = (),
    **changed: Any,
) -> Group:
    """A group whose engine ends each turn at its second token, or says `texts`, a turn each."""
    asked_for = SampleRequest("g", replace(problem(0), images=()), len(scripts), Sampling())

    def prompt(opening: Observation | None) -> Asked:
        parts = opened(["What?"], opening)
        images = tuple(part for part in parts if isinstance(part, bytes))
        ids = chat.prompt(parts)
        return Asked(ids, chat.expanded(ids, [(64, 64)] * len(images)), images)

    async def write(turn: str, ids: Sequence[int], images: Sequence[bytes], room: int) -> Written:
        read = chat.expanded(ids, [(64, 64)] * len(images))
        text = chat.text(texts[int(turn[-1])]) if texts else [300 + int(turn[-1])]
        said = [*text, chat.end][:room]
        return Written([*read, *[7] * engine_reads], said, [-0.5] * len(said), [4] * len(said))

    work = converse(
        chat,
        asked_for,
        load_task("sudoku") if texts else TASK,
        replace(BUDGETS, **changed),
        prompt,
        write,
        scripts.__getitem__,
        "sampler-0",
    )
    return asyncio.run(work)


def test_a_group_holds_what_each_environment_said(chat: Chat) -> None:
    seen = Observation("So?", (PICTURE,), reward=0.5, defects=("odd",))
    told = Scripted(Observation("Look.", (PICTURE,)), seen, DONE)
    silent = Scripted(None, DONE)
    one, other = conversed(chat, told, silent).rollouts
    assert one.finish_reason == other.finish_reason == "stop"
    assert [(t.called, t.said, t.images, t.reward, t.defects) for t in one.turns] == [
        (True, "So?", 1, 0.5, ("odd",)),
        (False, "", 0, 0.0, ()),
    ]
    assert one.text == "".join(turn.text for turn in one.turns)
    assert told.heard == [None, *(turn.text for turn in one.turns)]
    assert len(one.images) == 2 and not other.images and len(other.turns) == 1
    written = one.response_ids[one.sampled].tolist()
    assert written == [300, chat.end, 301, chat.end]
    assert (one.segments == ENVIRONMENT).sum() == len(one.response_ids) - 4
    assert (one.logprobs[one.sampled] == np.float32(-0.5)).all() and (one.versions == 4).all()


def test_a_perception_of_an_earlier_turn_is_a_segment_and_what_is_read_is_the_last(
    chat: Chat,
) -> None:
    """All tokens that say what was seen are credited as such."""
    task = load_task("sudoku")
    seen, again = (task.demonstrate(problem(i), "terse") for i in (0, 1))  # type: ignore[attr-defined]
    first = seen.partition("<reasoning>")[0]
    texts = [first, "<look>1 2 3 4</look>", again]
    (found,) = conversed(
        chat, Scripted(None, *[Observation("So?")] * 2, DONE), texts=texts, tokens=900, turns=4
    ).rollouts
    assert found.text == "".join(texts)
    assert not found.parsed.defects
    assert found.parsed.perception == task.parse(again).perception
    assert readings(found.parsed)[0] == task.parse(seen).perception
    written = found.segments[found.sampled]
    told = chat.decoder.decode(found.response_ids[found.sampled].tolist())[0]
    pieces = {name: "" for name in SEGMENTS}
    for segment, token in zip(written, found.response_ids[found.sampled].tolist(), strict=True):
        if segment >= 0:
            pieces[SEGMENTS[segment]] += chat.decoder.decode([token])[0]
    assert pieces["perception"].count("<perception>") == 2 and "<look>" in told
    assert pieces["act"] == "<look>1 2 3 4</look>"
    assert pieces["perception"].replace("\n", "") == (
        first + again.partition("<reasoning>")[0]
    ).replace("\n", "")
    assert pieces["answer"].startswith("<answer>") and pieces["answer"].endswith("</answer>")


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_a_failure_ends_the_episode_where_it_is(chat: Chat, turns: int) -> None:
    seen = Observation("So?", (PICTURE,))
    answers = [*[None, seen][:turns], EnvironmentFailed("died", "gone"), None]
    bad, good = conversed(chat, Scripted(*answers), Scripted(None, seen, seen, seen)).rollouts
    assert (bad.finish_reason, bad.failure) == ("environment", "died: gone")
    assert len(bad.turns) == max(1, turns) and bad.response_ids[-1] == chat.end
    assert (good.finish_reason, good.failure) == ("turn_budget", "")
    assert len(good.turns) == 3 and good.turns[-1].called and not good.turns[-1].images


def test_the_time_that_an_environment_takes_is_a_budget(chat: Chat) -> None:
    seen = Observation("So?")
    (found,) = conversed(chat, Scripted(None, seen, seen), seconds=11.0).rollouts
    assert found.finish_reason == "time_budget" and len(found.turns) == 2


def test_a_policy_that_has_no_token_left_is_not_asked_again(chat: Chat) -> None:
    (found,) = conversed(chat, Scripted(None, Observation("So?")), tokens=1).rollouts
    assert found.finish_reason == "length" and len(found.turns) == 1


def test_an_engine_that_reads_other_tokens_is_refused(chat: Chat) -> None:
    with pytest.raises(EpisodeError, match="other tokens"):
        conversed(chat, Scripted(None, DONE), engine_reads=1)


def test_a_prompt_without_room_is_refused(chat: Chat) -> None:
    with pytest.raises(EpisodeError, match=r"no room in model\.max_model_len = 60"):
        conversed(chat, Scripted(Observation("a " * 99), DONE), context=60)
