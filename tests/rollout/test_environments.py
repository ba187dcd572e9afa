"""Environments in processes: what one does to itself is a typed failure, and of no other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import pytest

from rollout.environments import EnvironmentPool
from rollout.settings import EnvironmentConfig
from tasks.core import Problem
from tasks.environments import EnvironmentFailed, Observation
from tasks.images import blank_like
from tasks.returns import Returns
from tests.support.samples import problem as drawn

NAME = "tests.support.bad_environments:Counting"


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvironmentPool]:
    made = EnvironmentPool(EnvironmentConfig(name=NAME, workers=1, step_seconds=60.0))
    yield made
    made.close()


def problem() -> Problem:
    return drawn(0)


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        return await work()

    return asyncio.run(main())


def words(answer: Observation | None) -> list[str]:
    assert answer is not None
    return answer.text.split()


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("raises", "exception", "KeyError: 'no such room\\nand more'"),
        ("dies", "died", "its process ended (exit code 3)"),
        ("eats", "exception", "Unable to allocate"),
        ("text", "unusable", "text of at most 20000 characters, got 1000000"),
        ("broken", "unusable", "image"),
        ("huge", "unusable", "100"),
        ("reward", "unusable", "a reward of nan"),
        ("other", "unusable", "not an Observation: str"),
        ("one image", "unusable", "images and defects are tuples"),
    ],
)
def test_what_an_environment_does_is_a_failure_of_its_own_episode(
    pool: EnvironmentPool, how: str, kind: str, said: str
) -> None:
    async def work() -> None:
        bad, good = (pool.open(f"{how} {i}", problem(), i) for i in range(2))
        for one in (bad, good):
            await one.answer(None)
        before = words(await good.answer("a"))
        with pytest.raises(EnvironmentFailed, match=f"^{kind}: ") as found:
            await bad.answer(f"now {how}")
        assert said in str(found.value) and "\n" not in str(found.value)
        after = words(await good.answer("b"))
        # The other goes on where it was, in the same process or played again in a new one.
        assert (before[:2], after[:2]) == (["1", before[1]], ["2", before[1]])
        assert (before[2] != after[2]) == (kind in ("deadline", "died"))

    run(work)


def test_one_that_hangs_is_ended_and_the_others_are_played_again() -> None:
    config = EnvironmentConfig(name=NAME, workers=1, step_seconds=60.0)
    pool = EnvironmentPool(config)

    async def work() -> None:
        bad, good = pool.open("bad", problem(), 1), pool.open("good", problem(), 2)
        before = words(await good.answer("a"))
        bad.seconds = 0.5
        with pytest.raises(EnvironmentFailed, match=r"^deadline: no answer within 0.5 s"):
            await bad.answer("now hangs")
        after = words(await good.answer("b"))
        assert after[:2] == ["2", before[1]] and before[2] != after[2]

    try:
        run(work)
    finally:
        pool.close()


def test_an_answer_hangs_on_problem_seed_and_turns_alone(pool: EnvironmentPool) -> None:
    async def numbers(name: str, seed: int) -> list[str]:
        one = pool.open(name, problem(), seed)
        first = await one.answer(None)
        assert first is not None and first.text.startswith(problem().id)
        return [" ".join(words(await one.answer(t))[:2]) for t in ("a", "b")]

    # The last is begun again under the name of the first, as a group that is sampled again.
    one, same, other, again = (
        run(partial(numbers, name, seed)) for name, seed in zip("abca", (5, 5, 6, 5), strict=True)
    )
    assert one == same == again != other


def test_episodes_are_spread_over_the_processes() -> None:
    pool = EnvironmentPool(EnvironmentConfig(name=NAME, workers=2, step_seconds=60.0))

    async def work() -> None:
        episodes = [pool.open(f"e{i}", problem(), i) for i in range(6)]
        found = await asyncio.gather(*(one.answer(None) for one in episodes))
        places = [words(answer)[-1] for answer in found]
        assert sorted(places.count(place) for place in set(places)) == [3, 3]

    try:
        run(work)
    finally:
        pool.close()


def test_a_process_shows_other_pictures_where_it_is_asked_to() -> None:
    pool = EnvironmentPool(EnvironmentConfig(name="zoom", workers=1, step_seconds=60.0))
    call = "<look>0 0 500 500</look>"

    async def picture(returns: Returns | None) -> bytes:
        one = pool.open(f"{returns}", problem(), 1, returns)
        await one.answer(None)
        answer = await one.answer(call)
        assert answer is not None
        return answer.images[0]

    async def work() -> None:
        true = await picture(None)
        assert await picture(Returns("blank")) == blank_like(true)
        assert await picture(Returns("elsewhere")) not in (true, blank_like(true))
        assert await picture(Returns("other", problem())) == true

    try:
        run(work)
    finally:
        pool.close()


def test_half_of_a_pair_of_surrogates_becomes_text_that_a_file_can_hold(
    pool: EnvironmentPool,
) -> None:
    async def work() -> None:
        one = pool.open("surrogate", problem(), 1)
        await one.answer(None)
        answer = await one.answer("now surrogate")
        assert answer is not None and answer.text == "a?b"

    run(work)
