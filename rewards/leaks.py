"""Whether a perception gives the answer away: who answers from it alone would have seen nothing.

A guard, and no proof: it finds what is given as the answer, not what merely suffices for it.
"""

from __future__ import annotations

from typing import Any

from tasks.checkers.stated import states
from tasks.core import CanLeak, Problem, Task
from tasks.responses import compose_response

WITHOUT = (
    "has no states_answer, so leakage_check finds only a perception that equals the answer or "
    'gives it in words such as "the answer is"'
)
"""What is to be said of a task that is not `CanLeak`."""


def leaks(task: Task, problem: Problem, perception: Any, answer: Any | None) -> bool:
    """Whether a parsed perception states the answer; `answer` is the rollout's own.

    By the task's own word where it is `CanLeak`. Else a perception leaks that equals the own
    answer, and prose that gives a right one as the answer (`tasks.checkers.stated`): what it gives
    is read by the task's parser, as if it stood in the answer's tags, and checked.
    """
    if isinstance(task, CanLeak):
        return bool(task.states_answer(problem, perception))
    if answer is not None and bool(perception == answer):
        return True

    def right(answer: str) -> bool:
        read = task.parse(compose_response("-", "-", answer)).answer
        return read is not None and bool(task.check(problem, read))

    return isinstance(perception, str) and states(perception, right)
