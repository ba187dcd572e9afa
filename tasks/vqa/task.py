"""The task `vqa`: questions about images, answered in free text; one class a form of responses.

Its problems come from data files (`tasks.vqa.opening`), and carry what judges an answer in
`Problem.truth`: `checker`, `answers`, `choices`, `options`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rapidfuzz import fuzz

from tasks.checkers import CHECKERS, Gold
from tasks.core import Parsed, Problem
from tasks.free_text import has_perception, parse_free
from tasks.responses import oracle_prefix


class ThinkAnswer:
    """Responses of `<think>` and `<answer>`: without a perception segment."""

    name = "vqa/think_answer"
    form = "think_answer"

    @property
    def perceives(self) -> bool:
        """Whether this form has a perception segment (`tasks.core.perceives`)."""
        return has_perception(self.form)

    def parse(self, text: str) -> Parsed:
        """See `tasks.free_text`."""
        return parse_free(text, self.form)

    def check(self, problem: Problem, answer: Any) -> bool:
        """Whether the problem's checker calls the text right."""
        return CHECKERS[problem.truth["checker"]].right(answer, gold_of(problem))

    def same_answer(self, problem: Problem, one: Any, other: Any) -> bool:
        """Whether the second would be right if the first were the gold."""
        checker, gold = CHECKERS[problem.truth["checker"]], gold_of(problem)
        said = replace(gold, answers=(one,))
        return one == other or (checker.fault(said) is None and checker.right(other, said))


class Boxed(ThinkAnswer):
    r"""Responses that end in `\boxed{}`: without a perception segment."""

    name = "vqa/boxed"
    form = "boxed"


class Vqa(ThinkAnswer):
    """Responses in segments; perception is free text, scored where a row has it."""

    name = "vqa"
    form = "segments"

    def score_perception(self, problem: Problem, perception: Any) -> tuple[bool, float]:
        """Exact up to white space; graded by the share of characters in common (Indel ratio)."""
        said, true = (" ".join(text.split()) for text in (perception, problem.perception))
        return said == true, fuzz.ratio(said, true) / 100

    def oracle_prefix(self, problem: Problem) -> str:
        """The perception segment holding `p*`."""
        return oracle_prefix(problem.perception)

    def states_answer(self, problem: Problem, perception: Any) -> bool:
        """Whether the perception gives a gold, what is equal to it, or its choice as the answer."""
        return CHECKERS[problem.truth["checker"]].states(perception, gold_of(problem))


def gold_of(problem: Problem) -> Gold:
    """What a stored problem is judged by."""
    truth = problem.truth
    return Gold(tuple(truth["answers"]), tuple(truth["choices"]), truth["options"])
