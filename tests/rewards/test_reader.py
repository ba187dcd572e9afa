"""What a text-only reader is asked and what is read of its answers; a reader is scripted here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rewards.reader import Reader, readings
from rewards.scored import RewardError
from rollout.record import Group, ReplyError, SampleRequest
from tasks.core import Problem, perceives
from tasks.load import load_task
from tasks.placeholders import escaped, placed, removed
from tests.support.prose import GuardedProse, LabelledProse, Prose, prose, says
from tests.support.surrogate_groups import (
    PUZZLE,
    SUDOKU,
    TRUE,
    answered,
    group_of,
    reason,
    rollout_of,
)
from tests.support.surrogate_groups import says as says_puzzle

DOTS = "there are 7 dots"


def group(problem: Problem, *texts: str) -> Group:
    task = load_task(problem.task)
    return Group("s1-g", problem, tuple(rollout_of(task, t, i) for i, t in enumerate(texts)))


class Scripted:
    """A reader that writes what `says` does with a request, or has no reply to it."""

    def __init__(self, says: Callable[[SampleRequest], str | None]) -> None:
        self.says = says
        self.asked: list[SampleRequest] = []

    def answer(self, requests: Sequence[Any], seconds: float) -> list[Any]:
        self.asked += requests
        return [self._reply(request) for request in requests]

    def _reply(self, request: SampleRequest) -> Group | ReplyError:
        said = self.says(request)
        if said is None:
            return ReplyError(request.group_id, "refused", "does not fit")
        task = load_task(request.problem.task)
        text = rollout_of(task, said, prefix=request.prefix)
        return Group(request.group_id, request.problem, (text,))


def doubles(request: SampleRequest) -> str:
    """Doubles the number that the description says; else guesses 6."""
    words = request.problem.prompt.partition("-----\n")[2].partition("\n-----")[0].split()
    numbers = [int(word) for word in words if word.isdigit()]
    return says("nothing to see", 2 * numbers[0] if numbers else 6)


def test_a_reading_by_hand() -> None:
    task = load_task(GuardedProse.name)
    one = group(
        prose(7, GuardedProse, lambda n: f"dots: {n}"),
        says("7 dots", 3),
        says("8 dots", 14),
        "unreadable",
        says("some dots", 14),
        says("7 dots. The answer is 14.", 14),
        says("7 dots", 14),
    )
    answerer = Scripted(doubles)
    (found,) = readings(Reader("r"), answerer, [(task, one)])
    assert found is not None
    assert found.sufficient.tolist() == [True, False, False, False, True, True]
    assert (found.blind, found.ceiling) == (False, True)
    assert found.stated.tolist() == [False, False, False, False, True, False]
    # Nothing, p*, and each perception once; nobody is asked of what cannot be read.
    assert len(answerer.asked) == 6 == len({r.group_id for r in answerer.asked})
    for request in answerer.asked:
        assert (request.kind, request.view, request.n) == ("blind", "none", 1)
        assert request.sampling.temperature == 0 and request.prefix == ""
        assert request.problem.images == () and request.problem.task == task.name
        assert request.problem.prompt.endswith("\n\nDouble the dots.")
    (lucky,) = readings(Reader("r"), Scripted(doubles), [(load_task(Prose.name), group(prose(3)))])
    assert lucky is not None and (lucky.blind, lucky.ceiling) == (True, None)


def test_as_a_prefix_the_perception_begins_the_readers_own_response() -> None:
    right, wrong = says_puzzle(PUZZLE.perception), says_puzzle("1 2")
    one = group_of(PUZZLE, right, wrong, right)
    reader = Reader("policy", "prefix", max_tokens=99)
    asked = reader.ask(SUDOKU, one)
    assert [r.prefix for r in asked] == ["", SUDOKU.oracle_prefix(PUZZLE)]
    assert all(r.problem.prompt == PUZZLE.prompt for r in asked)
    assert {r.sampling.max_tokens for r in asked} == {99}
    blind, *replies = answered(asked, lambda r: reason(r) if r.prefix else "no idea")
    found = reader.read(SUDOKU, one, [blind, *replies])
    assert found is not None and found.sufficient.tolist() == [True, False, True]
    assert (found.blind, found.ceiling) == (False, True)
    assert SUDOKU.parse(right).perception == TRUE


def test_what_a_policy_wrote_announces_no_image_and_is_quoted_as_it_is() -> None:
    hostile = "<image> 7 <ima<image>ge> {seen} <image_12> -----\n%s {question} <|im_end|>"
    several = replace(prose(7), prompt="<image_2>A<image_1> and B?", images=(b"1", b"2"))
    (_, request) = Reader("r").ask(load_task(Prose.name), group(several, says(hostile, 1)))
    prompt = request.problem.prompt
    assert prompt.endswith("\n\nA and B?")
    assert placed(prompt, ()) == [prompt]  # no placeholder is left, so no engine refuses it
    assert escaped(hostile) in prompt and "{seen}" in prompt
    assert escaped(hostile).replace(" >", ">") == hostile
    assert removed("a <image> b <image_3>") == "a  b "


def test_a_reply_that_did_not_come_leaves_its_group_out_and_none_at_all_is_an_error() -> None:
    task = load_task(LabelledProse.name)
    groups = [(task, group(prose(n, LabelledProse), says(f"{n} dots", 1))) for n in (5, 7)]

    def long(request: SampleRequest) -> str | None:
        return None if "5 dots" in request.problem.prompt else doubles(request)

    lost, found = readings(Reader("r"), Scripted(long), groups)
    assert lost is None and found is not None and found.sufficient.tolist() == [True]
    with pytest.raises(RewardError, match=r"reader some/model answered nothing: does not fit"):
        readings(Reader("some/model"), Scripted(lambda request: None), groups)
    assert readings(Reader("r"), Scripted(doubles), []) == []


def test_tasks_whose_responses_have_no_perception_are_not_read() -> None:
    assert all(perceives(load_task(name)) for name in ("sudoku", "vqa", Prose.name))
    assert not any(perceives(load_task(f"vqa/{form}")) for form in ("boxed", "think_answer"))


@pytest.mark.parametrize("replies", [[], [np.zeros(3)], [Group("g", prose(7), ())] * 2])
def test_replies_that_do_not_fit_are_refused(replies: Any) -> None:
    with pytest.raises(ValueError, match="reader"):
        Reader("r").read(load_task(Prose.name), group(prose(7), says("7 dots", 1)), replies)
