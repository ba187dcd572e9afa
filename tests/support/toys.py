"""A task of one number and terms that misbehave, importable from reward workers too.

The image shows a number n; perception says which, the answer is its double. A response reads
`p;a;defect,defect`, with an empty field for what cannot be read.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import BaseModel

from rewards.compose import Composition, compose_groups
from rewards.functions import Row
from rewards.scored import Reply, ScoredGroup, ScoredTerms
from rewards.terms import Outcome, Perception, score_group
from rollout.record import Group, Rollout, SampleRequest, Sampling
from tasks.core import Parsed, Problem, Style, Task
from tasks.load import load_task


class Knobs(BaseModel):
    """None."""


class Doubling:
    """Read a number, double it."""

    name = "tests.support.toys:Doubling"
    spec: type[BaseModel] = Knobs

    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        return problem(int(rng.integers(10)))

    def parse(self, text: str) -> Parsed:
        fields = text.split(";")
        p, a, defects = fields if len(fields) == 3 else ("", "", "unread")
        return Parsed(
            perception=int(p) if p.lstrip("-").isdigit() else None,
            reasoning="",
            answer=int(a) if a.lstrip("-").isdigit() else None,
            spans={},
            defects=tuple(d for d in defects.split(",") if d),
        )

    def check(self, problem: Problem, answer: Any) -> bool:
        if answer == 666:
            raise ArithmeticError("the checker cannot take 666")
        return bool(answer == 2 * problem.truth["n"])

    def score_perception(self, problem: Problem, perception: Any) -> tuple[bool, float]:
        n = problem.truth["n"]
        return perception == n, 1.0 / (1.0 + abs(perception - n))

    def consistent(self, problem: Problem, perception: Any, answer: Any) -> bool:
        return bool(answer == 2 * perception)

    def oracle_prefix(self, problem: Problem) -> str:
        return problem.perception

    def solve(self, problem: Problem, perception: Any) -> Any | None:
        return 2 * perception

    def demonstrate(self, problem: Problem, style: Style) -> str:
        n = problem.truth["n"]
        return f"{n};{2 * n};"

    def from_row(self, query: str, image: bytes, ground_truth: str) -> Problem:
        return problem(int(ground_truth))

    def to_ground_truth(self, problem: Problem) -> str:
        return str(problem.truth["n"])


TASK: Task = Doubling()


class Unlabelled:
    """The same numbers, and nobody has said what there is to see: draws, reads and checks."""

    name = "tests.support.toys:Unlabelled"
    spec: type[BaseModel] = Knobs
    parse, check = TASK.parse, TASK.check

    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        drawn = problem(int(rng.integers(100)))
        return replace(drawn, id=f"u-{drawn.id}", task=self.name, perception="")


def problem(n: int, name: str | None = None) -> Problem:
    return Problem(
        id=name or f"n{n}",
        task=Doubling.name,
        prompt="Double the number in the image.",
        perception=str(n),
        truth={"n": n},
        knobs={"noise": 0.5},
        symmetry_key=str(n),
        images=(b"\x89PNG picture of %d" % n,),
    )


def rollout(
    name: str, text: str, parsed: Parsed, ids: np.ndarray, segments: np.ndarray, **fields: Any
) -> Rollout:
    """A rollout named after its group and place in it, with the tokens given."""
    made: dict[str, Any] = {
        "group_id": name.rpartition("-")[0],
        "kind": "free",
        "view": "shown",
        "prompt_ids": np.arange(3, dtype=np.int32),
        "logprobs": np.full(len(ids), -0.5, dtype=np.float32),
        "versions": np.full(len(ids), 7, dtype=np.int32),
        "prefix": "",
        "finish_reason": "stop",
        "seconds": 0.25,
        "sampler": "sampler-0",
    }
    told = {"rollout_id": name, "text": text, "parsed": parsed}
    tokens = {"response_ids": ids, "segments": segments, "images": ()}
    return Rollout(**made | told | tokens | fields)


def group(n: int, *texts: str, tokens: int = 4, name: str | None = None, **fields: Any) -> Group:
    """A group for the number n whose rollouts say `texts`."""
    group_id = f"g-{name or n}"
    lengths = range(tokens, tokens + len(texts))
    ids = [np.arange(length, dtype=np.int32) for length in lengths]
    parts = [np.resize(np.array([0, 1, 2, -1], dtype=np.int8), length) for length in lengths]
    asked = problem(n, name)
    fields = {"images": asked.images} | fields
    rollouts = tuple(
        rollout(f"{group_id}-{i}", text, TASK.parse(text), ids[i], parts[i], **fields)
        for i, text in enumerate(texts)
    )
    return Group(group_id, asked, rollouts)


def score(one: Group, *terms: Any) -> ScoredTerms:
    """Score a group in this process."""
    return score_group(load_task(one.problem.task), one, {term.name: term for term in terms})


def scored(
    *groups: Group, terms: Sequence[Any] = (), composition: Composition | None = None
) -> list[ScoredGroup]:
    """Groups scored in this process, by outcome and perception and further `terms`."""
    found = [score(g, Outcome(), Perception(), *terms) for g in groups]
    weights = composition or Composition({"outcome": 0.7, "perception": 0.3})
    return compose_groups(groups, found, weights)


def graded(answers: Sequence[bool], name: str) -> ScoredGroup:
    """A scored group whose rollouts are right or wrong as told."""
    made = group(3, *("3;6;" if right else "3;5;" for right in answers), name=name)
    return scored(made, composition=Composition({"outcome": 1.0}))[0]


class Length:
    """Characters of the text: a well-behaved term of a user's own."""

    name = "length"

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, task: Task, group: Group) -> np.ndarray:
        return np.array([self.scale * len(r.text) for r in group.rollouts])


class Misbehaves:
    """Does `what` on groups of the number 0, and gives ones for every other."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.name = what

    def __call__(self, task: Task, group: Group) -> Any:
        size = len(group.rollouts)
        if group.problem.truth["n"] != 0:
            return [1.0] * size
        if self.what == "hang":
            time.sleep(600)
        if self.what == "crash":
            os._exit(17)
        if self.what == "exit":
            raise SystemExit(3)
        if self.what == "raise":
            raise KeyError("no such cell")
        return {
            "nan": [float("nan")] * size,
            "inf": [1.0] * (size - 1) + [float("inf")],
            "short": [1.0] * (size - 1),
            "empty": [],
            "matrix": np.ones((size, 1)),
            "none": None,
            "nones": [None] * size,
            "words": ["1.0"] * size,
            "scalar": 1.0,
            "ragged": [[1.0], [1.0, 2.0]] * size,
            "complex": [1j] * size,
            "huge": [10**400] * size,
            "parts": {"value": [1.0] * size, "more": [float("nan")] * size},
            "no value": {"more": [1.0] * size},
        }[self.what]


class NoTerm:
    """Lacks a name and cannot be called."""


class Hog:
    """Allocates without end on groups of the number 0."""

    name = "hog"

    def __call__(self, task: Task, group: Group) -> list[float]:
        held = []
        while group.problem.truth["n"] == 0:
            held.append(np.ones(2**24))  # 128 MiB, written to
        return [1.0] * len(group.rollouts)


class Asks:
    """1 where a model says what the rollout says; asks about rollouts that saw something."""

    name = "asks"

    def __init__(self, model: str = "", misbehaves: str = "") -> None:
        self.model, self.misbehaves = model, misbehaves

    def ask(self, task: Task, group: Group, other: Problem | None) -> list[SampleRequest]:
        if self.misbehaves == "ask" and group.problem.truth["n"] == 0:
            raise KeyError("nothing to ask")
        if self.misbehaves == "words":
            return ["what do you see?"]  # type: ignore[list-item]
        shown = group.problem if other is None else other
        return [
            SampleRequest(r.rollout_id, shown, 1, Sampling(0.0), "blind", "none", r.text)
            for r in group.rollouts
            if r.parsed.perception is not None
        ]

    def score(self, task: Task, group: Group, replies: Sequence[Reply]) -> list[float]:
        if self.misbehaves == "score" and group.problem.truth["n"] == 0:
            os._exit(17)
        answers = iter(replies)
        found = []
        for rollout in group.rollouts:
            reply = next(answers) if rollout.parsed.perception is not None else None
            same = isinstance(reply, Group) and reply.rollouts[0].text == rollout.text
            found.append(float(same))
        return found


class Waits:
    """A remote term: waits a moment, or does `what` on groups of the number 0.

    "three": each waits until three were at it at once.
    """

    name = "waits"

    def __init__(self, what: str = "") -> None:
        self.what = what
        self.calls = self.now = self.most = 0

    async def __call__(self, task: Task, group: Group) -> list[float]:
        self.calls += 1
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.05)
        while self.what == "three" and self.most < 3:
            await asyncio.sleep(0.01)
        self.now -= 1
        if group.problem.truth["n"] == 0:
            if self.what == "hang":
                await asyncio.sleep(600)
            if self.what == "block":
                time.sleep(600)
            if self.what == "crash":
                os._exit(17)
            if self.what == "raise":
                raise ConnectionError("nobody at home")
            if self.what == "short":
                return [1.0]
        return [float(len(r.text)) for r in group.rollouts]

    def counts(self) -> dict[str, float]:
        return {"sent": self.calls, "most": self.most}


def above_the_mean(rows: Sequence[Row], what: str = "") -> list[float]:
    """How much longer a response is than the mean of all rows; or does `what` if it sees a 0."""
    if any(row.gold["n"] == 0 for row in rows):
        if what == "hang":
            time.sleep(600)
        if what == "short":
            return [1.0]
    mean = sum(len(row.response) for row in rows) / len(rows)
    return [len(row.response) - mean for row in rows]


async def later(rows: Sequence[Row]) -> list[float]:
    """Characters of the response, after a while."""
    await asyncio.sleep(0.05)
    return [float(len(row.response)) for row in rows]
