"""Demonstrations that look: the tokens and images that sampling the same turns makes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest

from cluster.recipe.context import Context, TokenCounts
from learner.policy import Policy
from learner.sft import DemonstrationStream, Demonstrator, Source, calls_of
from rollout.demonstrated import in_form
from rollout.episode import Budgets, drift
from rollout.episodes import Asked, Written, converse
from rollout.prompts import Prompts
from rollout.record import Rollout, SampleRequest, Sampling
from rollout.settings import EnvironmentConfig
from rollout.tokens import Chat, load_processor
from tasks.core import ACT, ENVIRONMENT, NO_SEGMENT, DataError, Problem
from tasks.datasets import Example, Exchange
from tasks.environments import DONE, Observation, load_environment
from tasks.images import check_image
from tests.support.puzzles import SUDOKU as TASK
from tests.support.puzzles import draw

KNOBS: dict[str, Any] = {"size": 4, "cell_size": 16, "font_size": 12, "margin": 0, "detail": 2}
ZOOM = EnvironmentConfig(name="zoom", turns=5, images=4, image_tokens=4000)
JSON = ZOOM.model_copy(update={"calls": "json"})


class Silent:
    """Says what it was told to say, and without that once something of its own."""

    def __init__(self, told: Sequence[Observation] = ()) -> None:
        self.told = [*(told or (Observation("Well <image> seen."), DONE))]

    def reset(self, problem: Problem, rng: np.random.Generator) -> Observation | None:
        return None

    def step(self, text: str) -> Observation:
        return self.told.pop(0)


class Hinting(Silent):
    """Shows a picture and a text behind the problem as well."""

    def reset(self, problem: Problem, rng: np.random.Generator) -> Observation:
        return Observation(f"Draw {rng.integers(10**9)}. <|im_end|>", problem.images)


class Broken:
    def reset(self, problem: Problem, rng: np.random.Generator) -> None:
        return None

    def step(self, text: str) -> Observation:
        raise RuntimeError("no\nway")


HINTING = EnvironmentConfig(name=f"{__name__}:Hinting")


class Here:
    """The recipe's environment, called as it is."""

    spent = 0.0

    def __init__(self, config: EnvironmentConfig, problem: Problem, seed: int) -> None:
        self.made, self.problem = load_environment(config.name, config.args, config.calls), problem
        self.rng = np.random.default_rng(seed)

    async def answer(self, text: str | None) -> Observation | None:
        return self.made.reset(self.problem, self.rng) if text is None else self.made.step(text)


def sampled(
    processor: Any, problem: Problem, turns: Sequence[str], config: EnvironmentConfig, seed: int
) -> Rollout:
    """What a sampler makes of a policy that writes these turns."""
    chat = Chat(processor)
    prompts = Prompts(chat, processor, "scripted")

    def expanded(ids: Sequence[int], images: Sequence[bytes]) -> list[int]:
        return chat.expanded(ids, [check_image(image, "image").size for image in images])

    def prompt(opening: Observation | None) -> Asked:
        ids, images = prompts.asked(problem, problem.images, "", opening)
        return Asked(ids, expanded(ids, images), images)

    async def write(turn: str, ids: Sequence[int], images: Sequence[bytes], room: int) -> Written:
        said = [*chat.text(turns[int(turn.rpartition("/")[2])]), chat.end]
        return Written(expanded(ids, images), said, [-1.0] * len(said), [3] * len(said))

    request = SampleRequest("g", problem, 1, Sampling())
    budgets = Budgets.of(config, 10_000, 10_000)
    environment = partial(Here, config, problem)
    group = converse(
        chat, request, TASK, budgets, prompt, write, lambda _: environment(seed), "scripted"
    )
    return asyncio.run(group).rollouts[0]


@pytest.mark.parametrize("config", [ZOOM, JSON, HINTING], ids=["zoom", "json", "own"])
@pytest.mark.parametrize("seed", [0, 5])
def test_a_demonstration_is_the_episode_of_a_policy_that_writes_it(
    loaded: tuple[Policy, Any], config: EnvironmentConfig, seed: int
) -> None:
    _, processor = loaded
    problem = draw(TASK, seed, **KNOBS)
    calls = calls_of(TASK, problem) if config is not HINTING else ("<look>0 0 9 9</look>",)
    calls = in_form(calls, config, problem, seed)
    assert all(('{"name": "look"' in call) == (config is JSON) for call in calls)
    last = TASK.demonstrate(problem, "terse")
    rollout = sampled(processor, problem, [*calls, last], config, seed)
    assert rollout.finish_reason == "stop" and len(rollout.turns) == len(calls) + 1
    made = Demonstrator(processor, environment=config)
    found = made.sequence(TASK, problem, last, calls=calls, seed=seed)
    if config is not HINTING:
        whole = made.of(TASK, Example(problem, last), blind=False, calls=True, seed=seed)
        assert whole.response_ids.tolist() == found.response_ids.tolist()
    if config is JSON:
        shown = Chat(processor).decoder.decode(found.prompt_ids)[0]
        assert "<tool_call>" in shown and "<look>" not in shown
    assert found.prompt_ids.tolist() == rollout.prompt_ids.tolist()
    assert found.response_ids.tolist() == rollout.response_ids.tolist()
    assert found.segments.tolist() == rollout.segments.tolist()
    assert found.images == rollout.images and len(found.images) == len(calls) + 1
    sizes = [check_image(image, "image").size for image in found.images]
    assert drift(Chat(processor), found.prompt_ids, found.response_ids, sizes) == ""


def test_only_what_the_teacher_wrote_is_a_target(loaded: tuple[Policy, Any]) -> None:
    _, processor = loaded
    chat, problem = Chat(processor), draw(TASK, 2, **KNOBS)
    calls, last = calls_of(TASK, problem), TASK.demonstrate(problem, "terse")
    found = Demonstrator(processor, environment=ZOOM).sequence(TASK, problem, last, calls=calls)
    turns = [[*chat.text(turn), chat.end] for turn in (*calls, last)]
    assert found.response_ids[found.targets].tolist() == [i for turn in turns for i in turn]
    assert not (found.response_ids[found.targets] == chat.image_token).any()
    # A call is `act`; the end of a turn is of no segment.
    own = found.segments[found.targets]
    before = sum(map(len, turns[:-1]))
    of_calls = [i for turn in turns[:-1] for i in [*[ACT] * (len(turn) - 1), NO_SEGMENT]]
    assert own[:before].tolist() == of_calls and own[-1] == NO_SEGMENT
    assert set(own[before:].tolist()) == {0, 1, 2, NO_SEGMENT}
    plain = Demonstrator(processor).sequence(TASK, problem, last)
    assert own[before:].tolist() == plain.segments.tolist()
    shown = found.segments == ENVIRONMENT
    assert (found.response_ids[shown] == chat.image_token).any()


@pytest.mark.parametrize("config", [None, HINTING], ids=["alone", "opened"])
def test_a_chat_of_several_turns_is_the_episode_that_it_tells(
    loaded: tuple[Policy, Any], config: EnvironmentConfig | None
) -> None:
    """Answered by the file; what an environment says behind the problem is said all the same."""
    _, processor = loaded
    problem, last = draw(TASK, 4, **KNOBS), TASK.demonstrate(draw(TASK, 4, **KNOBS), "terse")
    crop = draw(TASK, 9, **KNOBS | {"detail": 1}).images
    told = (Observation("So?", (*problem.images, *crop)), Observation("Now.", crop), DONE)
    seen = TASK.oracle_prefix(problem).replace("4", "3")  # a first reading, which is taken back
    turns = (f"{seen}<look>0 0 9 9</look>", "<mark>1 2</mark>")
    earlier = [Exchange(t, o.text, o.images) for t, o in zip(turns, told, strict=False)]
    example = Example(problem, last, tuple(earlier))
    writer = Demonstrator(processor, environment=config)
    found = writer.of(TASK, example, blind=False, calls=True, seed=3)
    opens = HINTING if config else EnvironmentConfig(name=f"{__name__}:Silent")
    opens = opens.model_copy(update={"args": {"told": told}})
    rollout = sampled(processor, problem, [*turns, last], opens, 3)
    assert found.prompt_ids.tolist() == rollout.prompt_ids.tolist()
    assert found.response_ids.tolist() == rollout.response_ids.tolist()
    assert found.segments.tolist() == rollout.segments.tolist()
    assert found.images == rollout.images and len(found.images) == 4 + (config is HINTING)
    assert (found.segments == 0).sum() > 1.8 * (
        Demonstrator(processor).sequence(TASK, problem, last).segments == 0
    ).sum()
    # Preflight counts the same tokens of it: it fits exactly, and not in one less.
    later = [check_image(image, "x").size for e in example.earlier for image in e.images]
    counts = TokenCounts(prompt=len(found.prompt_ids))
    assert Context(processor, len(found), 8).response_lack(counts, example, later) is None
    assert Context(processor, len(found) - 1, 8).response_lack(counts, example, later)
    blind = writer.of(TASK, example, blind=True, calls=True)
    assert not blind.images and (blind.segments != ENVIRONMENT).all()


@pytest.mark.parametrize(
    ("calls", "config", "words"),
    [
        (("<look>0 0 9 9</look>",) * 5, ZOOM, "ends with turn 5 of 6: turn_budget"),
        (("<look>0 0 9 9</look>",) * 2, ZOOM.model_copy(update={"images": 1}), "image_budget"),
        (("I look.",), ZOOM, "ends with turn 1 of 2: the turn calls nothing"),
        ((), HINTING, "calls the environment in its last turn"),
        ((), EnvironmentConfig(name=f"{__name__}:Broken"), "failed: exception: RuntimeError: no"),
    ],
)
def test_turns_that_the_environment_takes_otherwise_are_refused(
    tiny_models: dict[str, Any], calls: tuple[str, ...], config: EnvironmentConfig, words: str
) -> None:
    processor = _processor(tiny_models)
    problem = draw(TASK, 2, **KNOBS)
    made = Demonstrator(processor, untagged=True, environment=config)
    last = TASK.demonstrate(problem, "terse") if "I look." not in calls else "I see."
    with pytest.raises(DataError, match=f"problem {problem.id}: response .*{words}"):
        made.sequence(TASK, problem, last, calls=calls)


def test_a_share_of_the_demonstrations_looks_where_there_is_something_to_look_for(
    tiny_models: dict[str, Any],
) -> None:
    fine, plain = (TASK.spec(**KNOBS | {"detail": detail}) for detail in (2, 1))
    sources = [Source(TASK, 1.0, "terse", fine), Source(TASK, 1.0, "terse", plain)]
    writer = partial(Demonstrator, _processor(tiny_models), False, ZOOM)

    def counts(share: float, blind: float = 0.0) -> list[int]:
        stream = DemonstrationStream(sources, writer, 40, 3, 0, blind, share)
        return [len(sequence.images) for batch in islice(stream, 1) for sequence in batch]

    everywhere, half = counts(1.0), counts(0.5)
    assert set(everywhere) == {1, 5} and set(counts(0.0)) == {1}
    assert 0 < half.count(5) < everywhere.count(5)
    assert set(counts(1.0, blind=1.0)) == {0}


def _processor(tiny_models: dict[str, Any]) -> Any:
    return load_processor(str(tiny_models["qwen3_vl"]))
