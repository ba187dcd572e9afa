"""Free text about a number: a task that only parses and checks, and one that knows labels too.

A problem's label is what `label` says, "" for none, so one data set may hold both kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from tasks.checkers import CHECKERS, Gold
from tasks.core import Parsed, Problem
from tasks.dataset_write import SplitWriter, staged, write_manifest
from tasks.load import load_task
from tasks.responses import Read, compose_response, oracle_prefix, parse_response
from tests.support.shade import png


def words(text: str) -> Read:
    """Any text, stripped."""
    return (text.strip(), ()) if text.strip() else (None, ("empty",))


class Prose:
    """The core and nothing else."""

    name = f"{__name__}:Prose"

    def parse(self, text: str) -> Parsed:
        return parse_response(text, words, words)

    def check(self, problem: Problem, answer: Any) -> bool:
        return bool(answer == problem.truth["answer"])


class LabelledProse(Prose):
    """Knows a perception label where a problem has one."""

    name = f"{__name__}:LabelledProse"

    def score_perception(self, problem: Problem, perception: Any) -> tuple[bool, float]:
        exact = perception.split() == problem.perception.split()
        return exact, float(exact)

    def oracle_prefix(self, problem: Problem) -> str:
        return oracle_prefix(problem.perception)


class GuardedProse(LabelledProse):
    """Tells a perception that states the answer, in whatever words around it."""

    name = f"{__name__}:GuardedProse"

    def states_answer(self, problem: Problem, perception: Any) -> bool:
        return CHECKERS["number"].states(perception, Gold((problem.truth["answer"],)))


def unlabelled(number: int) -> str:
    """No label."""
    return ""


def prose(
    number: int, task: type[Prose] = Prose, label: Callable[[int], str] = unlabelled
) -> Problem:
    """How many dots a picture has; the answer is twice as many."""
    return Problem(
        id=f"prose-{number}",
        task=task.name,
        prompt="Double the dots.",
        images=(png(number, 32),),
        perception=label(number),
        truth={"answer": str(2 * number)},
        knobs={},
        symmetry_key=str(number),
    )


def says(perception: str, answer: Any) -> str:
    """A whole response."""
    return compose_response(perception, "I double it.", str(answer))


def write_prose(
    folder: Path,
    train: Iterable[int],
    test: Iterable[int],
    task: type[Prose] = Prose,
    label: Callable[[int], str] = unlabelled,
    respond: Callable[[int], str] = lambda number: "",
) -> Path:
    """A data set of such problems."""
    rows = {"train": train, "test": test}
    made, entries = load_task(task.name), {}
    with staged(folder, rows, False) as stage:
        for split, numbers in rows.items():
            with closing(SplitWriter(stage, split, made)) as writer:
                for number in numbers:
                    writer.add(prose(number, task, label), "", respond(number))
            entries[split] = writer.entry()
        write_manifest(stage, made, {}, entries)
    return folder


def stored(data: Path, task: type[Prose] = Prose) -> str:
    """A recipe's entry of them."""
    return f'{{ name = "{task.name}", data = "{data}" }}'
