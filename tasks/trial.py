"""A task being tried: whatever it is asked, what is wrong is noted and nothing is raised.

Model output is hostile, so `try_hostile` hands it what no policy should write.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tasks.core import SEGMENTS, Demonstrates, Parsed, Problem, ScoresPerception, Task
from tasks.figures import Figure

LONG = 50_000
"""Characters of the long hostile texts, and the seconds of processor time one may take."""
PATIENT_SECONDS = 3.0
HOSTILE = (
    "",
    "\n \t",
    "\x00\ud800 ٣ <perception>",
    "<answer><perception></answer></perception>",
    "<perception></perception><reasoning></reasoning><answer></answer>",
    '{"a": [1, {"b": null}]} NaN -1e999',
)
RETURNS: dict[str, type] = {
    "parse": Parsed,
    "score_perception": tuple,
    "oracle_prefix": str,
    "demonstrate": str,
    "to_ground_truth": str,
    "from_row": Problem,
    "vision_labels": np.ndarray,
    "perception_items": frozenset,
    "draw_perception": Figure,
    "draw_answer": Figure,
}


class Trial:
    """A task being tried, and what is wrong with it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.failures: dict[str, list[str]] = {}
        """What is wrong -> where it was seen."""
        self.read: dict[str, Parsed] = {}
        """By problem id: what was read from a demonstration that is right."""

    def lines(self) -> list[str]:
        """A line each: what is wrong, where it was seen first, how often else."""
        return [
            f"{wrong} ({where[0]}{f', and {len(where) - 1} more' if len(where) > 1 else ''})"
            for wrong, where in self.failures.items()
        ]

    def claim(self, holds: Any, otherwise: str, where: str) -> bool:
        """Whether it holds; what is wrong is noted."""
        if not holds:
            self.failures.setdefault(otherwise, []).append(where)
        return bool(holds)

    def wrong(self, failure: str, where: str) -> None:
        self.claim(False, failure, where)

    def call(self, where: str, function: Callable[..., Any], *arguments: Any) -> Any | None:
        """What it returns, or None where it raised or returned another type: both wrong."""
        name = function.__name__
        try:
            value = function(*arguments)
        except Exception as error:
            self.wrong(
                f"{name}: raised {type(error).__name__}", f"{where}: {error_text(error)[:100]}"
            )
            return None
        expected = RETURNS.get(name, object)
        failure = f"{name}: returned a {type(value).__name__}, not a {expected.__name__}"
        return value if self.claim(isinstance(value, expected), failure, where) else None

    def ask(self, where: str, member: str, *arguments: Any) -> Any | None:
        """The same of a member of the task; None too where the task lacks that ability."""
        method = getattr(self.task, member, None)
        return None if method is None else self.call(where, method, *arguments)

    def accepts(self, where: str, otherwise: str, member: str, *arguments: Any) -> bool:
        """Whether a member says yes; a no is wrong."""
        answer = self.ask(where, member, *arguments)
        return answer is None or self.claim(answer, otherwise, where)

    def try_hostile(self, problems: Sequence[Problem]) -> None:
        """No text makes `parse` raise, and no value that it returns makes another member raise."""
        rng = np.random.default_rng(0)
        texts = [*HOSTILE, ("([{" * LONG)[:LONG], "9" * LONG, "<perception>1 " * (LONG // 14)]
        for bad in ("9" * 5000, "-" + "1" * 30, "[" * 5000, "", "\ud800", "null", "1e999"):
            texts.append(
                f"<perception>{bad}</perception><reasoning></reasoning><answer>{bad}</answer>"
            )
        teacher: Any = self.task
        for problem in problems if isinstance(teacher, Demonstrates) else ():
            try:
                response = teacher.demonstrate(problem, "terse")
            except Exception:
                continue  # told already
            for at in rng.integers(len(response), size=24).tolist():
                texts.append(response[:at])
                texts.append(
                    response[:at] + str(rng.choice(list("0a-]}<\n9"))) + response[at + 1 :]
                )
        for text in texts:
            self.try_text(problems[:1], text)

    def try_text(self, problems: Sequence[Problem], text: str) -> None:
        """A text of any kind is read in time, and what was read hurts no other member."""
        where = f"text {text[:40]!r}{'...' if len(text) > 40 else ''}"
        start = time.process_time()
        parsed = self.ask(where, "parse", text)
        failure = f"parse: takes over {PATIENT_SECONDS:g} s; it must be linear"
        self.claim(time.process_time() - start <= PATIENT_SECONDS, failure, where)
        if parsed is None:
            return
        for segment in SEGMENTS:
            begins, ends = parsed.spans.get(segment, (0, 0))
            failure = f"parse: the span of {segment} lies outside the text"
            self.claim(0 <= begins <= ends <= len(text), failure, where)
        perception, answer = parsed.perception, parsed.answer
        sees = isinstance(self.task, ScoresPerception)
        for name, value in (("answer", answer), *([("perception", perception)] if sees else [])):
            failure = f"parse: no {name} was read and no defect is named"
            self.claim(value is not None or parsed.defects, failure, where)
        for problem in problems:
            if answer is not None:
                self.ask(where, "check", problem, answer)
                self.ask(where, "draw_answer", problem, perception, answer)
            if perception is not None:
                for member in ("score_perception", "solve", "draw_perception", "states_answer"):
                    self.ask(where, member, problem, perception)
                self.ask(where, "perception_items", perception)
                if answer is not None:
                    self.ask(where, "consistent", problem, perception, answer)


def error_text(error: Exception) -> str:
    """In one line."""
    return " ".join(str(error).split())
