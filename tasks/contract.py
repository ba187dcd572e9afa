"""Whether a task keeps its contract: each ability tried on problems, what is wrong in a line each.

A fault here is silent in a run: a checker that accepts anything pays every response, a perception
that its own parser cannot read back scores 0 for ever. `equipoise tasks check TASK` tries
all of it on fresh problems; a run tries a few on a task of the user's own before it starts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
from pydantic import BaseModel

from tasks.core import SEGMENTS, DataError, DrawsLate, Parsed, Problem, Style, Task
from tasks.figures import Figure
from tasks.images import check_image
from tasks.splits import draw_problem, draws_late

STYLES: tuple[Style, ...] = ("terse", "verbose")
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
GROUND_TRUTHS = ("", "x", "{}", "[]", "[[1]]", "null", "-1", '{"a": 1}', "9" * 400)

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


def check_task(task: Task, spec: BaseModel, problems: int = 8, seed: int = 0) -> list[str]:
    """What is wrong with a task, one line each, tried on fresh problems; [] where nothing is.

    Draws `problems` problems, at least two, and depends on `seed` alone.
    """
    trial = _Trial(task)
    drawn = trial.draw(spec, max(2, problems), seed)
    return trial.lines() + check_problems(task, drawn)


def check_problems(task: Task, problems: Sequence[Problem]) -> list[str]:
    """The same of all abilities but `generate`, on given problems (the rows of a data set)."""
    trial = _Trial(task)
    trial.try_abilities(problems)
    return trial.lines()


class _Trial:
    """A task being tried, and what was found wrong."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.seen: dict[str, list[str]] = {}
        """What is wrong -> where it was seen."""
        self.read: dict[str, Parsed] = {}
        """By problem id: what was read from a demonstration that is right."""

    def lines(self) -> list[str]:
        """A line each: what is wrong, where it was seen first, how often else."""
        return [
            f"{wrong} ({where[0]}{f', and {len(where) - 1} more' if len(where) > 1 else ''})"
            for wrong, where in self.seen.items()
        ]

    def wrong(self, what: str, where: str) -> None:
        self.seen.setdefault(what, []).append(where)

    def call(self, where: str, function: Callable[..., Any], *given: Any) -> Any | None:
        """What it returns, or None where it raised or returned another type: both wrong."""
        name = function.__name__
        try:
            value = function(*given)
        except Exception as error:
            self.wrong(f"{name}: raised {type(error).__name__}", f"{where}: {_said(error)[:100]}")
            return None
        wanted = RETURNS.get(name, object)
        if not isinstance(value, wanted):
            self.wrong(f"{name}: returned a {type(value).__name__}, not a {wanted.__name__}", where)
            return None
        return value

    def ask(self, where: str, member: str, *given: Any) -> Any | None:
        """The same of a member of the task; None too where the task lacks that ability."""
        found = getattr(self.task, member, None)
        return None if found is None else self.call(where, found, *given)

    def refused(self, where: str, member: str, *given: Any) -> bool:
        """Whether a member says no."""
        found = self.ask(where, member, *given)
        return found is not None and not found

    def draw(self, spec: BaseModel, count: int, seed: int) -> list[Problem]:
        """Fresh problems, each drawn twice."""
        task, found = self.task, list[Problem]()
        for index in range(count):
            where = f"draw {index}"
            try:
                first, again = (draw_problem(task, spec, "train", seed, index) for _ in range(2))
            except Exception as error:
                self.wrong(f"generate: {_said(error)}", where)
                break
            if isinstance(task, DrawsLate) and draws_late(task):
                self.try_begin(spec, (seed, index))
            names = [field.name for field in fields(Problem)]
            differ = [n for n in names if repr(getattr(first, n)) != repr(getattr(again, n))]
            if differ:
                self.wrong(
                    "generate: the same rng gives another problem; take all chance from it",
                    f"{where}: {', '.join(differ)}",
                )
            if first.task != task.name:
                self.wrong(f"generate: problem.task must be {task.name!r}", repr(first.task)[:60])
            found.append(first)
        different = len({(p.prompt, p.perception, p.image) for p in found})
        if len(found) < 2:
            return found
        if different == 1:
            self.wrong(
                "generate: all draws are one problem; draw from `rng`, or loosen the knobs",
                f"{len(found)} draws",
            )
        if len({p.id for p in found}) < different:
            self.wrong("generate: different problems have one id", f"of {len(found)} draws")
        try:
            draw_problem(task, spec, "test", seed, count)
        except Exception as error:
            self.wrong(f"generate: {_said(error)}", "the test split")
        return found

    def try_begin(self, spec: BaseModel, seed: tuple[int, int]) -> None:
        """`begin` tells the key of what it makes, and makes what `generate` makes."""
        task: Any = self.task
        try:
            key, finish = task.begin(np.random.default_rng(seed), spec)
            made = finish()
            whole = task.generate(np.random.default_rng(seed), spec)
        except ValueError:
            return  # an unlucky draw
        if made.symmetry_key != key:
            self.wrong("begin: tells another symmetry key than the problem has", f"draw {seed[1]}")
        if repr(made) != repr(whole):
            self.wrong("begin: makes another problem than generate", f"draw {seed[1]}")

    def try_abilities(self, problems: Sequence[Problem]) -> None:
        """All abilities but `generate`."""
        stored = [p for problem in problems if (p := self.stored(problem)) is not None]
        for problem in stored:
            self.try_teacher(problem)
        for problem in stored:
            self.try_perception(problem)
            self.try_rows(problem)
        for one, other in pairwise([*stored, *stored[:1]] if len(stored) > 1 else []):
            self.compare(one, other)
        self.try_checker(stored)
        self.try_labels(stored)
        self.try_hostile(stored[:2])

    def stored(self, problem: Problem) -> Problem | None:
        """The problem as it comes back from a data set or a run: truth and knobs through JSON."""
        for name in ("id", "prompt", "perception", "symmetry_key"):
            value = getattr(problem, name)
            if not isinstance(value, str) or (not value and name != "perception"):
                self.wrong(f"problem.{name}: must be text", repr(value)[:60])
                return None
        self.call(problem.id, check_image, problem.image, "problem.image")
        kept: dict[str, Any] = {}
        for name in ("truth", "knobs"):
            try:
                kept[name] = json.loads(json.dumps(dict(getattr(problem, name)), allow_nan=False))
            except (TypeError, ValueError) as error:
                self.wrong(f"problem.{name}: cannot be stored as JSON: {error}", problem.id)
                return None
        return replace(problem, **kept)

    def try_teacher(self, problem: Problem) -> None:
        """Demonstrations read as right."""
        for style in STYLES:
            where = f"{style}, problem {problem.id}"
            text = self.ask(where, "demonstrate", problem, style)
            parsed = None if text is None else self.ask(where, "parse", text)
            if parsed is None:
                continue
            if parsed.defects or parsed.answer is None:
                named = ", ".join(parsed.defects) or "no answer"
                self.wrong(f"demonstrate: parse finds a defect in it: {named}", where)
                continue
            if self.refused(where, "check", problem, parsed.answer):
                self.wrong("check: refuses the demonstrated answer", where)
                continue
            self.read.setdefault(problem.id, parsed)
            if parsed.perception is None:
                continue
            score = self.ask(where, "score_perception", problem, parsed.perception)
            if score is not None and not score[0]:
                self.wrong("demonstrate: its perception is not p* by score_perception", where)

    def try_perception(self, problem: Problem) -> None:
        """p*: read back from the forced prefix, scored 1, solved, and stating no answer."""
        where = f"problem {problem.id}"
        prefix = self.ask(where, "oracle_prefix", problem)
        if not prefix:
            return  # a task without perception labels
        parsed = self.ask(f"oracle prefix, {where}", "parse", prefix)
        if parsed is None:
            return
        truth = parsed.perception
        if truth is None:
            missing = ("missing_reasoning", "missing_answer")  # they come after the prefix
            named = ", ".join(d for d in parsed.defects if d not in missing) or "None"
            self.wrong(f"oracle_prefix: parse does not read p* back: {named}", where)
            return
        if "perception" not in parsed.spans:
            self.wrong("parse: reads a perception without its span; fill in `spans`", where)
        score = self.ask(where, "score_perception", problem, truth)
        if score is not None and not (score[0] and score[1] == 1):
            said = f"score_perception: of p* it must be (True, 1.0), not {score!r:.40}"
            self.wrong(said, where)
        solved = self.ask(where, "solve", problem, truth)
        if solved is not None:
            if self.refused(where, "check", problem, solved):
                self.wrong("solve: check refuses its answer for p*", where)
            if self.refused(where, "consistent", problem, truth, solved):
                self.wrong("solve: consistent refuses its answer for p*", where)
            for seen in (truth, None):
                self.ask(where, "draw_answer", problem, seen, solved)
        if self.ask(where, "states_answer", problem, truth):
            self.wrong("states_answer: must be False for p*", where)
        self.ask(where, "perception_items", truth)
        self.ask(where, "draw_perception", problem, truth)

    def try_labels(self, problems: Sequence[Problem]) -> None:
        """As many labels for every problem, of the right type."""
        shapes = set()
        for problem in problems:
            labels = self.ask(f"problem {problem.id}", "vision_labels", problem)
            if labels is not None:
                shapes.add(labels.shape)
                if labels.ndim != 1 or labels.dtype != np.int64:
                    self.wrong("vision_labels: must be int64 [K]", f"problem {problem.id}")
        if len(shapes) > 1:
            self.wrong("vision_labels: their number must be the same for all", f"{sorted(shapes)}")

    def try_rows(self, problem: Problem) -> None:
        """`from_row` makes the problem again from `to_ground_truth`, and names bad rows."""
        where = f"problem {problem.id}"
        truth = self.ask(where, "to_ground_truth", problem)
        if truth is None:
            return
        again = self.ask(where, "from_row", problem.prompt, problem.image, truth)
        if again is not None:
            for name in ("task", "prompt", "image", "perception"):
                if getattr(again, name) != getattr(problem, name):
                    self.wrong(f"from_row: of to_ground_truth it makes another {name}", where)
            own = self.read.get(problem.id)
            if own is not None and self.refused(where, "check", again, own.answer):
                self.wrong("from_row: check refuses the right answer of what it makes", where)
        for hostile in GROUND_TRUTHS:
            try:
                self.task.from_row(problem.prompt, problem.image, hostile)
            except DataError:
                pass
            except Exception as error:
                self.wrong(
                    f"from_row: raised {type(error).__name__}; raise DataError naming the field",
                    f"ground truth {hostile!r:.40}",
                )

    def compare(self, one: Problem, other: Problem) -> None:
        """Two problems told apart, and what only the prompt may lend lent by it alone."""
        where = f"problems {one.id} and {other.id}"
        if one.id not in self.read or other.id not in self.read:
            return
        own, foreign = self.read[one.id], self.read[other.id]
        if (one.prompt, one.perception) == (other.prompt, other.perception):
            if one.symmetry_key != other.symmetry_key:
                self.wrong(
                    "symmetry_key: differs for one prompt and p*, so a held-out problem may be in "
                    "training",
                    where,
                )
            return
        if own.perception is None or foreign.perception is None:
            return
        score = self.ask(where, "score_perception", one, foreign.perception)
        if score is not None:
            if score[0] and one.perception != other.perception:
                self.wrong("score_perception: calls the p* of another problem exact", where)
            if not 0 <= float(score[1]) <= 1:
                self.wrong("score_perception: the graded score must lie in [0, 1]", where)
        for answer in (own.answer, foreign.answer):
            right = self.ask(where, "check", one, answer)
            valid = self.ask(where, "consistent", one, own.perception, answer)
            if None not in (right, valid) and bool(right) != bool(valid):
                self.wrong("consistent: with p* it must say what check says", where)
        if one.prompt == other.prompt:
            first, second = (self.ask(where, "solve", p, own.perception) for p in (one, other))
            if first != second:
                self.wrong("solve: looks at the problem's truth, not at the perception", where)
            if self.refused(where, "consistent", one, foreign.perception, foreign.answer):
                self.wrong("consistent: looks at the problem's truth, not at the perception", where)

    def try_checker(self, problems: Sequence[Problem]) -> None:
        """A checker that accepts every answer of every other problem looks at none."""
        foreign = [
            (problem, other, parsed.answer)
            for problem in problems
            for other, parsed in self.read.items()
            if problem.id in self.read and parsed.answer != self.read[problem.id].answer
        ]
        accepted = [self.ask(other, "check", problem, said) for problem, other, said in foreign]
        if len(foreign) > 1 and all(accepted):
            where = f"{len(foreign)} answers"
            self.wrong("check: accepts the answer of every other problem", where)

    def try_hostile(self, problems: Sequence[Problem]) -> None:
        """No text makes `parse` raise, and no value that it returns makes another member raise."""
        rng = np.random.default_rng(0)
        texts = [*HOSTILE, ("([{" * LONG)[:LONG], "9" * LONG, "<perception>1 " * (LONG // 14)]
        for problem in problems:
            try:
                whole = self.task.demonstrate(problem, "terse")
            except Exception:
                continue  # told already
            for at in rng.integers(len(whole), size=24).tolist():
                texts.append(whole[:at])
                texts.append(whole[:at] + str(rng.choice(list("0a-]}<\n9"))) + whole[at + 1 :])
            for bad in ("9" * 5000, "-" + "1" * 30, "[" * 5000, "", "\ud800", "null", "1e999"):
                texts.append(
                    f"<perception>{bad}</perception><reasoning></reasoning><answer>{bad}</answer>"
                )
        for text in texts:
            self.try_text(problems[:1], text)

    def try_text(self, problems: Sequence[Problem], text: str) -> None:
        """A text of any kind is read in time, and what was read hurts no other member."""
        where = f"text {text[:40]!r}{'...' if len(text) > 40 else ''}"
        start = time.process_time()
        parsed = self.ask(where, "parse", text)
        if time.process_time() - start > PATIENT_SECONDS:
            self.wrong(f"parse: takes over {PATIENT_SECONDS:g} s; it must be linear", where)
        if parsed is None:
            return
        for segment in SEGMENTS:
            begins, ends = parsed.spans.get(segment, (0, 0))
            if not 0 <= begins <= ends <= len(text):
                self.wrong(f"parse: the span of {segment} lies outside the text", where)
        seen, answer = parsed.perception, parsed.answer
        for name, value in (("perception", seen), ("answer", answer)):
            if value is None and not parsed.defects:
                self.wrong(f"parse: no {name} was read and no defect is named", where)
        for problem in problems:
            if answer is not None:
                self.ask(where, "check", problem, answer)
                self.ask(where, "draw_answer", problem, seen, answer)
            if seen is not None:
                for member in ("score_perception", "solve", "draw_perception", "states_answer"):
                    self.ask(where, member, problem, seen)
                self.ask(where, "perception_items", seen)
                if answer is not None:
                    self.ask(where, "consistent", problem, seen, answer)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())
