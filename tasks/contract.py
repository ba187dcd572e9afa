"""Whether a task keeps its contract: each ability tried on problems, what is wrong in a line each.

A fault here is silent in a run: a checker that accepts anything pays every response, a perception
that its own parser cannot read back scores 0 for ever. `equipoise tasks check TASK` tries
all of it on fresh problems; a run tries a few on a task of the user's own before it starts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
from pydantic import BaseModel

from tasks.core import (
    DataError,
    Problem,
    ReadsRows,
    Style,
    Task,
    labelled,
)
from tasks.images import check_image
from tasks.placeholders import placed
from tasks.splits import draw_problem, draws_late
from tasks.trial import Trial, error_text

STYLES: tuple[Style, ...] = ("terse", "verbose")
GROUND_TRUTHS = ("", "x", "{}", "[]", "[[1]]", "null", "-1", '{"a": 1}', "9" * 400)


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


class _Trial(Trial):
    """Of problems, one ability after the other."""

    def draw(self, spec: BaseModel, count: int, seed: int) -> list[Problem]:
        """Fresh problems, each drawn twice."""
        task, problems = self.task, list[Problem]()
        for index in range(count):
            where = f"draw {index}"
            try:
                first, second = (draw_problem(task, spec, "train", seed, index) for _ in range(2))
            except Exception as error:
                self.wrong(f"generate: {error_text(error)}", where)
                break
            if draws_late(task):
                self.try_begin(spec, (seed, index))
            names = [field.name for field in fields(Problem)]
            differ = [n for n in names if repr(getattr(first, n)) != repr(getattr(second, n))]
            failure = "generate: the same rng gives another problem; take all chance from it"
            self.claim(not differ, failure, f"{where}: {', '.join(differ)}")
            failure = f"generate: problem.task must be {task.name!r}"
            self.claim(first.task == task.name, failure, repr(first.task)[:60])
            problems.append(first)
        different = len({(p.prompt, p.perception, p.images) for p in problems})
        ids = {p.id for p in problems}
        if len(problems) < 2:
            return problems
        failure = "generate: all draws are one problem; draw from `rng`, or loosen the knobs"
        self.claim(different > 1, failure, f"{len(problems)} draws")
        failure = "generate: different problems have one id"
        self.claim(len(ids) >= different, failure, f"of {len(problems)} draws")
        try:
            draw_problem(task, spec, "test", seed, count)
        except Exception as error:
            self.wrong(f"generate: {error_text(error)}", "the test split")
        return problems

    def try_begin(self, spec: BaseModel, seed: tuple[int, int]) -> None:
        """`begin` tells the key of what it makes, and makes what `generate` makes."""
        task: Any = self.task
        try:
            key, finish = task.begin(np.random.default_rng(seed), spec)
            finished = finish()
            generated = task.generate(np.random.default_rng(seed), spec)
        except ValueError:
            return  # an unlucky draw
        where, failure = f"draw {seed[1]}", "begin: tells another symmetry key than the problem has"
        self.claim(finished.symmetry_key == key, failure, where)
        self.claim(
            repr(finished) == repr(generated), "begin: makes another problem than generate", where
        )

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
        """The problem as it comes back from a data set or a run: what is JSON there through it."""
        for name in ("id", "prompt", "perception", "symmetry_key"):
            value = getattr(problem, name)
            is_text = isinstance(value, str) and (value or name == "perception")
            if not self.claim(is_text, f"problem.{name}: must be text", repr(value)[:60]):
                return None
        for image in problem.images:
            self.call(problem.id, check_image, image, "problem.images")
        self.call(problem.id, placed, problem.prompt, problem.images)
        stored_fields: dict[str, Any] = {}
        for name in ("truth", "knobs", "extra"):
            try:
                stored_fields[name] = json.loads(
                    json.dumps(dict(getattr(problem, name)), allow_nan=False)
                )
            except (TypeError, ValueError) as error:
                self.wrong(f"problem.{name}: cannot be stored as JSON: {error}", problem.id)
                return None
        return replace(problem, **stored_fields)

    def try_teacher(self, problem: Problem) -> None:
        """Demonstrations read as right."""
        for style in STYLES:
            where = f"{style}, problem {problem.id}"
            text = self.ask(where, "demonstrate", problem, style)
            parsed = None if text is None else self.ask(where, "parse", text)
            if parsed is None:
                continue
            named = ", ".join(parsed.defects) or ("no answer" if parsed.answer is None else "")
            failure = f"demonstrate: parse finds a defect in it: {named}"
            refused = "check: refuses the demonstrated answer"
            if not self.claim(not named, failure, where) or not self.accepts(
                where, refused, "check", problem, parsed.answer
            ):
                continue
            self.read.setdefault(problem.id, parsed)
            if parsed.perception is not None:
                score = self.ask(where, "score_perception", problem, parsed.perception)
                failure = "demonstrate: its perception is not p* by score_perception"
                self.claim(score is None or score[0], failure, where)

    def try_perception(self, problem: Problem) -> None:
        """p*: read back from the forced prefix, scored 1, solved, and stating no answer."""
        where = f"problem {problem.id}"
        if not labelled(self.task, problem):
            return
        prefix = self.ask(where, "oracle_prefix", problem)
        parsed = None if prefix is None else self.ask(f"oracle prefix, {where}", "parse", prefix)
        if parsed is None:
            return
        truth = parsed.perception
        if truth is None:
            missing = ("missing_reasoning", "missing_answer")  # they come after the prefix
            named = ", ".join(d for d in parsed.defects if d not in missing) or "None"
            self.wrong(f"oracle_prefix: parse does not read p* back: {named}", where)
            return
        failure = "parse: reads a perception without its span; fill in `spans`"
        self.claim("perception" in parsed.spans, failure, where)
        score = self.ask(where, "score_perception", problem, truth)
        failure = f"score_perception: of p* it must be (True, 1.0), not {score!r:.40}"
        self.claim(score is None or (score[0] and score[1] == 1), failure, where)
        solved = self.ask(where, "solve", problem, truth)
        if solved is not None:
            for member, arguments in (("check", ()), ("consistent", (truth,))):
                failure = f"solve: {member} refuses its answer for p*"
                self.accepts(where, failure, member, problem, *arguments, solved)
            for perception in (truth, None):
                self.ask(where, "draw_answer", problem, perception, solved)
        stated = self.ask(where, "states_answer", problem, truth)
        self.claim(not stated, "states_answer: must be False for p*", where)
        demonstrated = self.read.get(problem.id)
        if isinstance(truth, str) and demonstrated and isinstance(demonstrated.answer, str):
            stating = f"{truth} The answer is {demonstrated.answer}."
            failure = 'states_answer: must be True where the answer follows "The answer is"'
            self.accepts(where, failure, "states_answer", problem, stating)
        self.ask(where, "perception_items", truth)
        self.ask(where, "draw_perception", problem, truth)

    def try_labels(self, problems: Sequence[Problem]) -> None:
        """As many labels for every problem, of the right type."""
        shapes = set()
        for problem in problems:
            labels = self.ask(f"problem {problem.id}", "vision_labels", problem)
            if labels is not None:
                shapes.add(labels.shape)
                sound = labels.ndim == 1 and labels.dtype == np.int64
                self.claim(sound, "vision_labels: must be int64 [K]", f"problem {problem.id}")
        failure = "vision_labels: their number must be the same for all"
        self.claim(len(shapes) < 2, failure, f"{sorted(shapes)}")

    def try_rows(self, problem: Problem) -> None:
        """`from_row` makes the problem again from `to_ground_truth`, and names bad rows."""
        where = f"problem {problem.id}"
        reader = self.task
        if not isinstance(reader, ReadsRows) or len(problem.images) != 1:
            return  # a row of the public layout has one image
        (image,) = problem.images
        truth = self.ask(where, "to_ground_truth", problem)
        if truth is None:
            return
        rebuilt = self.ask(where, "from_row", problem.prompt, image, truth)
        if rebuilt is not None:
            for name in ("task", "prompt", "images", "perception"):
                failure = f"from_row: of to_ground_truth it makes another {name}"
                self.claim(getattr(rebuilt, name) == getattr(problem, name), failure, where)
            if demonstrated := self.read.get(problem.id):
                failure = "from_row: check refuses the right answer of what it makes"
                self.accepts(where, failure, "check", rebuilt, demonstrated.answer)
        for hostile in GROUND_TRUTHS:
            try:
                reader.from_row(problem.prompt, image, hostile)
            except DataError:
                pass
            except Exception as error:
                failure = (
                    f"from_row: raised {type(error).__name__}; raise DataError naming the field"
                )
                self.wrong(failure, f"ground truth {hostile!r:.40}")

    def compare(self, one: Problem, other: Problem) -> None:
        """Two problems told apart, and what only the prompt may lend lent by it alone."""
        where = f"problems {one.id} and {other.id}"
        if one.id not in self.read or other.id not in self.read:
            return
        ours, foreign = self.read[one.id], self.read[other.id]
        if (one.prompt, one.perception) == (other.prompt, other.perception):
            failure = "symmetry_key: differs for one prompt and p*"
            failure += ", so a held-out problem may be in training"
            self.claim(one.symmetry_key == other.symmetry_key, failure, where)
            return
        if ours.perception is None or foreign.perception is None:
            return
        score = self.ask(where, "score_perception", one, foreign.perception)
        if score is not None:
            apart = not score[0] or one.perception == other.perception
            self.claim(apart, "score_perception: calls the p* of another problem exact", where)
            failure = "score_perception: the graded score must lie in [0, 1]"
            self.claim(0 <= float(score[1]) <= 1, failure, where)
        for answer in (ours.answer, foreign.answer):
            right = self.ask(where, "check", one, answer)
            valid = self.ask(where, "consistent", one, ours.perception, answer)
            agree = None in (right, valid) or bool(right) == bool(valid)
            self.claim(agree, "consistent: with p* it must say what check says", where)
        if one.prompt == other.prompt:
            peeks = "looks at the problem's truth, not at the perception"
            first, second = (self.ask(where, "solve", p, ours.perception) for p in (one, other))
            self.claim(first == second, f"solve: {peeks}", where)
            arguments = (one, foreign.perception, foreign.answer)
            self.accepts(where, f"consistent: {peeks}", "consistent", *arguments)

    def try_checker(self, problems: Sequence[Problem]) -> None:
        """A checker that accepts every answer of every other problem looks at none."""
        foreign = [
            (problem, other, parsed.answer)
            for problem in problems
            for other, parsed in self.read.items()
            if problem.id in self.read and parsed.answer != self.read[problem.id].answer
        ]
        accepted = [self.ask(other, "check", problem, answer) for problem, other, answer in foreign]
        failure = "check: accepts the answer of every other problem"
        self.claim(len(foreign) < 2 or not all(accepted), failure, f"{len(foreign)} answers")
