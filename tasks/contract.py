"""Whether a task keeps its contract: each ability tried on problems, what is wrong in a line each.

A fault here is silent in a run: a checker that accepts anything pays every response, a perception
that its own parser cannot read back scores 0 for ever. `equipoise tasks check TASK` tries
all of it on fresh problems; a run tries a few on a task of the user's own before it starts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel

from tasks.core import (
    SEGMENTS,
    CanLeak,
    DataError,
    Draws,
    DrawsLate,
    HasPerceptionItems,
    HasVisionLabels,
    Parsed,
    Problem,
    Style,
    Task,
)
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

T = TypeVar("T")


@dataclass
class _Findings:
    """What is wrong -> where it was seen."""

    seen: dict[str, list[str]] = field(default_factory=dict)

    def add(self, wrong: str, where: str) -> None:
        self.seen.setdefault(wrong, []).append(where)

    def attempt(self, where: str, call: Callable[..., T], *given: Any) -> T | None:
        """What a member returns, or None where it raised or returned another type: both wrong."""
        member = call.__name__
        try:
            value = call(*given)
        except Exception as error:
            said = " ".join(str(error).split())[:100]
            self.add(f"{member}: raised {type(error).__name__}", f"{where}: {said}")
            return None
        wanted = RETURNS.get(member, object)
        if not isinstance(value, wanted):
            self.add(f"{member}: returned a {type(value).__name__}, not a {wanted.__name__}", where)
            return None
        return value

    def refused(self, where: str, call: Callable[..., bool], *given: Any) -> bool:
        """Whether a member says no."""
        found = self.attempt(where, call, *given)
        return found is not None and not found

    def lines(self) -> list[str]:
        """A line each: what is wrong, where it was seen first, how often else."""
        return [
            f"{wrong} ({where[0]}{f', and {len(where) - 1} more' if len(where) > 1 else ''})"
            for wrong, where in self.seen.items()
        ]


def check_task(task: Task, spec: BaseModel, problems: int = 8, seed: int = 0) -> list[str]:
    """What is wrong with a task, one line each, tried on fresh problems; [] where nothing is.

    Draws `problems` problems, at least two, and depends on `seed` alone.
    """
    findings = _Findings()
    drawn = _drawn(findings, task, spec, max(2, problems), seed)
    return findings.lines() + check_problems(task, drawn)


def check_problems(task: Task, problems: Sequence[Problem]) -> list[str]:
    """The same of all abilities but `generate`, on given problems (the rows of a data set)."""
    findings = _Findings()
    stored = [p for problem in problems if (p := _stored(findings, problem)) is not None]
    responses = {
        problem.id: own
        for problem in stored
        if (own := _demonstrated(findings, task, problem)) is not None
    }
    for problem in stored:
        _check_perception(findings, task, problem)
        _check_row(findings, task, problem, responses.get(problem.id))
    for one, other in pairwise([*stored, *stored[:1]] if len(stored) > 1 else []):
        _compare(findings, task, one, other, responses)
    _check_answers(findings, task, stored, responses)
    _check_labels(findings, task, stored)
    _check_hostile(findings, task, stored[:2])
    return findings.lines()


def _drawn(
    findings: _Findings, task: Task, spec: BaseModel, count: int, seed: int
) -> list[Problem]:
    """Fresh problems, each drawn twice."""
    found: list[Problem] = []
    for index in range(count):
        where = f"draw {index}"
        try:
            twice = [draw_problem(task, spec, "train", seed, index) for _ in range(2)]
        except Exception as error:
            said = " ".join(str(error).split())
            findings.add(f"generate: {said}", where)
            break
        first, again = twice
        if isinstance(task, DrawsLate) and draws_late(task):
            _check_begin(findings, task, spec, (seed, index))
        names = Problem.__dataclass_fields__
        differ = [n for n in names if repr(getattr(first, n)) != repr(getattr(again, n))]
        if differ:
            findings.add(
                "generate: the same rng gives another problem; take all chance from it",
                f"{where}: {', '.join(differ)}",
            )
        if first.task != task.name:
            findings.add(f"generate: problem.task must be {task.name!r}", repr(first.task)[:60])
        found.append(first)
    if len(found) > 1:
        if len({(p.prompt, p.perception, p.image) for p in found}) == 1:
            findings.add(
                "generate: all draws are one problem; draw from `rng`, or loosen the knobs",
                f"{len(found)} draws",
            )
        if len({p.id for p in found}) < len({(p.prompt, p.perception, p.image) for p in found}):
            findings.add("generate: different problems have one id", f"of {len(found)} draws")
        try:
            draw_problem(task, spec, "test", seed, count)
        except Exception as error:
            findings.add(f"generate: {' '.join(str(error).split())}", "the test split")
    return found


def _check_begin(
    findings: _Findings, task: DrawsLate, spec: BaseModel, seed: tuple[int, int]
) -> None:
    """`begin` tells the key of what it makes, and makes what `generate` makes."""
    where = f"draw {seed[1]}"
    try:
        key, finish = task.begin(np.random.default_rng(seed), spec)
        made = finish()
        whole = task.generate(np.random.default_rng(seed), spec)  # type: ignore[attr-defined]
    except ValueError:
        return  # an unlucky draw
    if made.symmetry_key != key:
        findings.add("begin: tells another symmetry key than the problem has", where)
    if repr(made) != repr(whole):
        findings.add("begin: makes another problem than generate", where)


def _stored(findings: _Findings, problem: Problem) -> Problem | None:
    """The problem as it comes back from a data set or a run: truth and knobs through JSON."""
    for name in ("id", "prompt", "perception", "symmetry_key"):
        value = getattr(problem, name)
        if not isinstance(value, str) or (not value and name != "perception"):
            findings.add(f"problem.{name}: must be text", repr(value)[:60])
            return None
    findings.attempt(problem.id, check_image, problem.image, "problem.image")
    kept: dict[str, Any] = {}
    for name in ("truth", "knobs"):
        try:
            kept[name] = json.loads(json.dumps(dict(getattr(problem, name)), allow_nan=False))
        except (TypeError, ValueError) as error:
            findings.add(f"problem.{name}: cannot be stored as JSON: {error}", problem.id)
            return None
    return replace(problem, **kept)


def _demonstrated(findings: _Findings, task: Task, problem: Problem) -> tuple[str, Parsed] | None:
    """A demonstration that reads as right, and what was read; None where none does."""
    right: tuple[str, Parsed] | None = None
    for style in STYLES:
        where = f"{style}, problem {problem.id}"
        text = findings.attempt(where, task.demonstrate, problem, style)
        parsed = None if text is None else findings.attempt(where, task.parse, text)
        if text is None or parsed is None:
            continue
        if parsed.defects or parsed.answer is None:
            named = ", ".join(parsed.defects) or "no answer"
            findings.add(f"demonstrate: parse finds a defect in it: {named}", where)
            continue
        if findings.refused(where, task.check, problem, parsed.answer):
            findings.add("check: refuses the demonstrated answer", where)
            continue
        right = right or (text, parsed)
        if parsed.perception is None:
            continue
        score = findings.attempt(where, task.score_perception, problem, parsed.perception)
        if score is not None and not score[0]:
            findings.add("demonstrate: its perception is not p* by score_perception", where)
    return right


def _check_perception(findings: _Findings, task: Task, problem: Problem) -> None:
    """p*: read back from the forced prefix, scored 1, solved, and stating no answer."""
    where = f"problem {problem.id}"
    prefix = findings.attempt(where, task.oracle_prefix, problem)
    if not prefix:
        return  # a task without perception labels
    parsed = findings.attempt(f"oracle prefix, {where}", task.parse, prefix)
    if parsed is None:
        return
    truth = parsed.perception
    if truth is None:
        missing = ("missing_reasoning", "missing_answer")  # they come after the prefix
        named = ", ".join(d for d in parsed.defects if d not in missing) or "None"
        findings.add(f"oracle_prefix: parse does not read p* back: {named}", where)
        return
    if "perception" not in parsed.spans:
        findings.add("parse: reads a perception without its span; fill in `spans`", where)
    score = findings.attempt(where, task.score_perception, problem, truth)
    if score is not None and not (score[0] and score[1] == 1):
        findings.add(f"score_perception: of p* it must be (True, 1.0), not {score!r:.40}", where)
    solved = findings.attempt(where, task.solve, problem, truth)
    if solved is not None:
        if findings.refused(where, task.check, problem, solved):
            findings.add("solve: check refuses its answer for p*", where)
        if findings.refused(where, task.consistent, problem, truth, solved):
            findings.add("solve: consistent refuses its answer for p*", where)
    if isinstance(task, CanLeak) and findings.attempt(where, task.states_answer, problem, truth):
        findings.add("states_answer: must be False for p*", where)
    if isinstance(task, HasPerceptionItems):
        findings.attempt(where, task.perception_items, truth)
    if isinstance(task, Draws):
        findings.attempt(where, task.draw_perception, problem, truth)
        if solved is not None:
            findings.attempt(where, task.draw_answer, problem, truth, solved)
            findings.attempt(where, task.draw_answer, problem, None, solved)


def _check_labels(findings: _Findings, task: Task, problems: Sequence[Problem]) -> None:
    if not isinstance(task, HasVisionLabels):
        return
    shapes = set()
    for problem in problems:
        labels = findings.attempt(f"problem {problem.id}", task.vision_labels, problem)
        if labels is not None:
            shapes.add(labels.shape)
            if labels.ndim != 1 or labels.dtype != np.int64:
                findings.add("vision_labels: must be int64 [K]", f"problem {problem.id}")
    if len(shapes) > 1:
        findings.add("vision_labels: their number must be the same for all", f"{sorted(shapes)}")


def _check_row(
    findings: _Findings, task: Task, problem: Problem, response: tuple[str, Parsed] | None
) -> None:
    """`from_row` makes the problem again from `to_ground_truth`, and names bad rows."""
    where = f"problem {problem.id}"
    truth = findings.attempt(where, task.to_ground_truth, problem)
    if truth is None:
        return
    again = findings.attempt(where, task.from_row, problem.prompt, problem.image, truth)
    if again is not None:
        for name in ("task", "prompt", "image", "perception"):
            if getattr(again, name) != getattr(problem, name):
                findings.add(f"from_row: of to_ground_truth it makes another {name}", where)
        answer = None if response is None else response[1].answer
        if answer is not None and findings.refused(where, task.check, again, answer):
            findings.add("from_row: check refuses the right answer of what it makes", where)
    for hostile in GROUND_TRUTHS:
        try:
            task.from_row(problem.prompt, problem.image, hostile)
        except DataError:
            pass
        except Exception as error:
            findings.add(
                f"from_row: raised {type(error).__name__}; raise DataError naming the field",
                f"ground truth {hostile!r:.40}",
            )


def _compare(
    findings: _Findings,
    task: Task,
    one: Problem,
    other: Problem,
    responses: dict[str, tuple[str, Parsed]],
) -> None:
    """Two problems told apart, and what only the prompt may lend lent by it alone."""
    where = f"problems {one.id} and {other.id}"
    if one.id not in responses or other.id not in responses:
        return
    own, foreign = (responses[p.id][1] for p in (one, other))
    if (one.prompt, one.perception) == (other.prompt, other.perception):
        if one.symmetry_key != other.symmetry_key:
            findings.add(
                "symmetry_key: differs for one prompt and p*, so a held-out problem may be in "
                "training",
                where,
            )
        return
    if own.perception is None or foreign.perception is None:
        return
    score = findings.attempt(where, task.score_perception, one, foreign.perception)
    if score is not None:
        if score[0] and one.perception != other.perception:
            findings.add("score_perception: calls the p* of another problem exact", where)
        if not 0 <= float(score[1]) <= 1:
            findings.add("score_perception: the graded score must lie in [0, 1]", where)
    for answer in (own.answer, foreign.answer):
        right = findings.attempt(where, task.check, one, answer)
        valid = findings.attempt(where, task.consistent, one, own.perception, answer)
        if None not in (right, valid) and bool(right) != bool(valid):
            findings.add("consistent: with p* it must say what check says", where)
    if one.prompt == other.prompt:
        solutions = [findings.attempt(where, task.solve, p, own.perception) for p in (one, other)]
        if solutions[0] != solutions[1]:
            findings.add("solve: looks at the problem's truth, not at the perception", where)
        if findings.refused(where, task.consistent, one, foreign.perception, foreign.answer):
            findings.add("consistent: looks at the problem's truth, not at the perception", where)


def _check_answers(
    findings: _Findings,
    task: Task,
    problems: Sequence[Problem],
    responses: dict[str, tuple[str, Parsed]],
) -> None:
    """A checker that accepts every answer of every other problem looks at none."""
    tried = accepted = 0
    for problem in problems:
        for other, (_, parsed) in responses.items():
            own = responses.get(problem.id)
            if other == problem.id or own is None or parsed.answer == own[1].answer:
                continue
            tried += 1
            accepted += bool(findings.attempt(other, task.check, problem, parsed.answer))
    if tried > 1 and accepted == tried:
        findings.add("check: accepts the answer of every other problem", f"{tried} answers")


def _check_hostile(findings: _Findings, task: Task, problems: Sequence[Problem]) -> None:
    """No text makes `parse` raise, and no value that it returns makes another member raise."""
    rng = np.random.default_rng(0)
    texts = [*HOSTILE, *("([{" * LONG)[:LONG].split(), "9" * LONG, "<perception>1 " * (LONG // 14)]
    for problem in problems:
        try:
            whole = task.demonstrate(problem, "terse")
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
        _read_hostile(findings, task, problems[:1], text)


def _read_hostile(findings: _Findings, task: Task, problems: Sequence[Problem], text: str) -> None:
    where = f"text {text[:40]!r}{'...' if len(text) > 40 else ''}"
    start = time.process_time()
    parsed = findings.attempt(where, task.parse, text)
    if time.process_time() - start > PATIENT_SECONDS:
        findings.add(f"parse: takes over {PATIENT_SECONDS:g} s; it must be linear", where)
    if parsed is None:
        return
    for segment in SEGMENTS:
        start_at, end = parsed.spans.get(segment, (0, 0))
        if not 0 <= start_at <= end <= len(text):
            findings.add(f"parse: the span of {segment} lies outside the text", where)
    for name in ("perception", "answer"):
        if getattr(parsed, name) is None and not parsed.defects:
            findings.add(f"parse: no {name} was read and no defect is named", where)
    for problem in problems:
        seen, answer = parsed.perception, parsed.answer
        if answer is not None:
            findings.attempt(where, task.check, problem, answer)
            if isinstance(task, Draws):
                findings.attempt(where, task.draw_answer, problem, seen, answer)
        if seen is not None:
            if isinstance(task, Draws):
                findings.attempt(where, task.draw_perception, problem, seen)
            findings.attempt(where, task.score_perception, problem, seen)
            findings.attempt(where, task.solve, problem, seen)
            if answer is not None:
                findings.attempt(where, task.consistent, problem, seen, answer)
            if isinstance(task, HasPerceptionItems):
                findings.attempt(where, task.perception_items, seen)
            if isinstance(task, CanLeak):
                findings.attempt(where, task.states_answer, problem, seen)
