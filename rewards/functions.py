"""A reward that is a function of a user's own: rows in, numbers out (docs/your_reward.md)."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rollout.record import Group, Rollout
from tasks.core import Problem, Segment, Task
from tasks.responses import TAG


@dataclass(frozen=True)
class Row:
    """One response, as a reward function gets it.

    Attributes:
        prompt: the problem's text.
        response: the whole text, hostile input; a forced prefix is part of it.
        perception, reasoning, answer: what a segment holds, without tags; None where the response
            has no such segment.
        gold: the problem's `truth`, which its task checks answers by.
        extra: the other columns of the data set's row.
        finish_reason: `stop`; `length` where `sampler.max_tokens` cut it; or `abort`.
        tokens: how many the policy wrote.
        defects: the parser's names of what is wrong with the response.
        images: the problem's encoded images.
        task, problem, group: the task's name, the problem's id, and that of its rollouts in the
            step, which share it.
    """

    prompt: str
    response: str
    perception: str | None
    reasoning: str | None
    answer: str | None
    gold: Mapping[str, Any]
    extra: Mapping[str, Any]
    finish_reason: str
    tokens: int
    defects: tuple[str, ...]
    images: tuple[bytes, ...] = field(repr=False)
    task: str
    problem: str
    group: str


@dataclass
class FunctionTerm:
    """A `RewardTerm` of a function; `of_step` where one call gets the rows of the whole step."""

    name: str
    function: Callable[[list[Row]], Any]

    def __call__(self, task: Task, group: Group) -> Any:
        """What the function returns: to be [G] numbers."""
        return self.function(rows_of(group))

    def of_step(self, groups: Sequence[Group]) -> Any:
        """What the function returns: to be one number a rollout, group after group."""
        return self.function([row for group in groups for row in rows_of(group)])


@dataclass
class CoroutineTerm:
    """A `RemoteTerm` of a coroutine function."""

    name: str
    function: Callable[[list[Row]], Awaitable[Any]]

    async def __call__(self, task: Task, group: Group) -> Any:
        """As of `FunctionTerm`."""
        return await self.function(rows_of(group))


def function_term(
    name: str, function: Callable[..., Any], args: Mapping[str, Any]
) -> FunctionTerm | CoroutineTerm:
    """The term called `name` that calls `function(rows, **args)`.

    Raises TypeError where it does not take that.
    """
    try:
        inspect.signature(function).bind([], **args)
    except TypeError as error:
        call = ", ".join(["rows", *(f"{key}={value!r}" for key, value in args.items())])
        raise TypeError(f"a reward function is called as {name}({call}): {error}") from error
    kind = CoroutineTerm if inspect.iscoroutinefunction(function) else FunctionTerm
    return kind(name, partial(function, **args))


def rows_of(group: Group) -> list[Row]:
    """A row a rollout, in order."""
    return [_row(group.problem, rollout) for rollout in group.rollouts]


def _row(problem: Problem, rollout: Rollout) -> Row:
    return Row(
        prompt=problem.prompt,
        response=rollout.prefix + rollout.text,
        perception=_segment_text(rollout, "perception"),
        reasoning=_segment_text(rollout, "reasoning"),
        answer=_segment_text(rollout, "answer"),
        gold=problem.truth,
        extra=problem.extra,
        finish_reason=rollout.finish_reason,
        tokens=int(rollout.sampled.sum()),
        defects=rollout.parsed.defects,
        images=problem.images,
        task=problem.task,
        problem=problem.id,
        group=rollout.group_id,
    )


def _segment_text(rollout: Rollout, segment: Segment) -> str | None:
    """A segment as the task reads it where that is text, else as it was written."""
    read = getattr(rollout.parsed, segment)
    if isinstance(read, str) and read:
        return read
    if segment not in rollout.parsed.spans:
        return None
    start, end = rollout.parsed.spans[segment]
    return TAG.sub("", (rollout.prefix + rollout.text)[start:end]).strip()
