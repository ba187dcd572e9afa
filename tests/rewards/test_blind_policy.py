"""The blind policy: what it is asked, and what its answers are worth."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from rewards.surrogates import (
    BlindPolicy,
    BlindSolver,
)
from rollout.record import Group, SampleRequest
from tasks.core import Parsed, Problem
from tasks.sudoku import Sudoku, grid_text
from tests.support.surrogate_groups import (
    MISREAD,
    PUZZLE,
    SOLUTION,
    SUDOKU,
    TASK_OF,
    TRUE,
    answered,
    group_of,
    perception_length,
    random_groups,
    reason,
    rollout_of,
    says,
)


def test_the_blind_request_holds_the_perception_and_nothing_else() -> None:
    perception = grid_text(TRUE)
    texts = [
        says(perception, grid_text(SOLUTION)),
        f"It is {grid_text(SOLUTION)}.\n{says(perception)}",
        says(perception).replace("</perception>\n", "</perception> so 1 2 3 4\n"),
        says(perception, reasoning="another way"),
        says(grid_text(MISREAD)),
        says(grid_text(SOLUTION)),
        "nothing",
    ]
    group = group_of(PUZZLE, *texts)
    term = BlindPolicy(model="some/frozen", max_tokens=99, temperature=0.5)
    requests = term.ask(SUDOKU, group, None)
    assert term.model == "some/frozen"
    assert [r.prefix for r in requests] == [
        SUDOKU.oracle_prefix(PUZZLE),
        f"<perception>\n{grid_text(MISREAD)}\n</perception>\n",
    ]
    for request in requests:
        assert (request.kind, request.view, request.n) == ("blind", "none", 1)
        assert (request.sampling.max_tokens, request.sampling.temperature) == (99, 0.5)
        assert request.problem is PUZZLE
    assert len({request.group_id for request in requests}) == 2
    replies = answered(requests, reason)
    assert term.score(SUDOKU, group, replies) == [1, 1, 1, 1, 0, 0, 0]
    right = answered(requests, lambda _: f"<answer>\n{grid_text(SOLUTION)}\n</answer>")
    assert term.score(SUDOKU, group, right) == [1, 1, 1, 1, 1, 0, 0]
    cut = answered(requests, lambda _: "<reasoning>\nwell")
    assert term.score(SUDOKU, group, cut) == [0] * 7


def test_prose_before_a_json_perception_is_not_forced() -> None:
    loud = f"The solution is {grid_text(SOLUTION)}\n<|im_end|> so I see {json.dumps(TRUE)} thus"
    group = group_of(PUZZLE, loud, f"{json.dumps(TRUE)} thus {json.dumps(SOLUTION)}")
    assert [r.parsed.perception for r in group.rollouts] == [TRUE, TRUE]
    (request,) = BlindPolicy().ask(SUDOKU, group, None)
    assert request.prefix == f"{json.dumps(TRUE)}\n"


class Described(Sudoku):
    """Its perception is the whole segment as text, brackets and all; it does not know leaks."""

    states_answer = None  # type: ignore[assignment]

    def parse(self, text: str) -> Parsed:
        end = text.find("END")
        if end < 0:
            return Parsed(None, "", text or None, {}, ("missing_perception",))
        return Parsed(text[:end], "", text[end + 4 :] or None, {"perception": (0, end + 3)}, ())

    def oracle_prefix(self, problem: Problem) -> str:
        return "pEND "


def test_a_task_with_another_notation_keeps_its_whole_segment() -> None:
    task = Described()
    said = "two dots [left] and [right]END so"
    group = Group("g", PUZZLE, (rollout_of(task, said),))
    (request,) = BlindPolicy().ask(task, group, None)
    assert request.prefix == "two dots [left] and [right]END\n"


def test_the_blind_request_needs_no_label_and_ends_in_the_line_ends_of_the_policy() -> None:
    spaced = says(grid_text(MISREAD)).replace("</perception>\n", "</perception>\n\n")
    group = group_of(PUZZLE, says(grid_text(TRUE)), spaced)
    unlabelled = replace(group, problem=replace(PUZZLE, perception="", truth={}))
    assert [r.prefix for r in BlindPolicy().ask(SUDOKU, unlabelled, None)] == [
        f"<perception>\n{grid_text(TRUE)}\n</perception>\n",
        f"<perception>\n{grid_text(MISREAD)}\n</perception>\n\n",
    ]


def test_random_groups_with_a_scripted_model_equal_another_implementation() -> None:
    term = BlindPolicy()

    def moody(request: SampleRequest) -> str:
        mood = hashlib.sha256(request.prefix.encode()).digest()[0] % 3
        return "<answer>?</answer>" if mood == 0 else reason(request)

    for group in random_groups():
        task = TASK_OF[group.problem.task]
        expected, asked = [], set()
        for rollout in group.rollouts:
            perception = rollout.parsed.perception
            leak = task is SUDOKU and perception and not any(0 in row for row in perception)
            if perception is None or leak:
                expected.append(0.0)
                continue
            prefix = rollout.text[: perception_length(rollout.text)] + "\n"
            asked.add(prefix)
            alone = BlindSolver(leakage_check=False)(task, replace(group, rollouts=(rollout,)))
            wrong = hashlib.sha256(prefix.encode()).digest()[0] % 3 == 0
            expected.append(0.0 if wrong else alone[0])
        requests = term.ask(task, group, None)
        assert {r.prefix for r in requests} == asked and len(requests) == len(asked)
        assert term.score(task, group, answered(requests, moody)) == expected
