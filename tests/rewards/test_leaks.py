"""A perception that states the answer earns nothing in a blind term, whatever words it uses."""

from __future__ import annotations

from typing import Any

import pytest

from rewards.leaks import leaks
from rewards.surrogates import BlindPolicy
from rollout.record import Group, Rollout
from tasks.core import Parsed, Problem, Task
from tasks.load import load_task
from tasks.responses import Read, parse_response
from tests.support.prose import GuardedProse, Prose, prose, says, words
from tests.support.report_pages import rollouts

BARE, GUARDED = load_task(Prose.name), load_task(GuardedProse.name)
PROBLEM = prose(6)  # the answer is 12
STATED = (
    "12",
    "There are 6 dots.\n12",
    "The final answer is 12.",
    "6 dots. So the answer: 12",
    "Therefore there are twice as many, which is 12.",
    r"Six dots, \boxed{12}",
    "<b>The answer is 12, since 6 + 6 = 12.</b>",
)
SEEN = (
    "There are 6 dots.",
    "6 dots in 12 rows",
    "The 12 lines are not dots; dots: 6",
    "",
    "\x00 12 x",
)


@pytest.mark.parametrize("task", [BARE, GUARDED], ids=["without a word of its own", "with one"])
def test_the_answer_is_found_in_prose_and_a_mention_is_none(task: Task) -> None:
    for answer in ("12", "13", None):
        assert [leaks(task, PROBLEM, text, answer) for text in STATED] == [True] * len(STATED)
        assert [leaks(task, PROBLEM, text, answer) for text in SEEN] == [False] * len(SEEN)
    # Of a wrong answer nothing is given away.
    assert not leaks(task, PROBLEM, "The final answer is 13.", "12")


def test_what_is_stated_is_read_by_the_tasks_own_parser() -> None:
    class Numbers(Prose):
        """Answers are numbers; its check takes nothing else."""

        def number(self, text: str) -> Read:
            return (int(text), ()) if text.strip().isdecimal() else (None, ("bad_number",))

        def parse(self, text: str) -> Parsed:
            return parse_response(text, words, self.number)

        def check(self, problem: Problem, answer: Any) -> bool:
            return bool(answer - 2 * 6 == 0)

    assert leaks(Numbers(), PROBLEM, "The answer is 12.", None)
    assert not leaks(Numbers(), PROBLEM, "The answer is twelve.", None)
    assert not leaks(Numbers(), PROBLEM, "6 dots", 12)
    # What is no prose is compared.
    assert leaks(Numbers(), PROBLEM, 12, 12) and not leaks(Numbers(), PROBLEM, 12, 13)


def test_only_what_leaks_nothing_is_asked_about() -> None:
    def asked(task: Task, term: BlindPolicy) -> list[str]:
        texts = [says(text, 12) for text in (STATED[2], SEEN[0])]
        made: tuple[Rollout, ...] = rollouts(task, PROBLEM, texts, 1).group.rollouts
        return [request.prefix for request in term.ask(task, Group("g", PROBLEM, made), None)]

    for task in (BARE, GUARDED):
        (prefix,) = asked(task, BlindPolicy())
        assert SEEN[0] in prefix
        assert len(asked(task, BlindPolicy(leakage_check=False))) == 2
