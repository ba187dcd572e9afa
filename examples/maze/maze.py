"""A maze of one's own: the policy says where to go, and is shown where it is. See maze.toml."""

import re
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pydantic import BaseModel, ConfigDict, Field

from tasks.calls import Tool
from tasks.core import Parsed, Problem
from tasks.drawing import to_png
from tasks.environments import Observation

MOVES = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}
PROMPT = "You are red, the way out is green."
HOW = "Write <go>up</go>, down, left or right; one a turn."
WRITTEN = re.compile(r'(?:<go>|"to":\s*")(\w+)')  # in tags, or as JSON


class Spec(BaseModel):
    """The knobs: cells a side, and pixels of a cell."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    side: int = Field(default=4, ge=2, le=12)
    cell: int = Field(default=16, ge=8, le=64)


class Maze:
    """As a task it draws problems; as an environment it answers moves."""

    name = "examples.maze.maze:Maze"
    spec: type[BaseModel] = Spec

    def generate(self, rng: np.random.Generator, spec: Any) -> Problem:
        at, out = (
            tuple(map(int, divmod(i, spec.side)))
            for i in rng.choice(spec.side**2, 2, replace=False)
        )
        truth = {"at": at, "out": out} | spec.model_dump()
        key = f"{spec.side}-{at}-{out}"
        return Problem(f"maze-{key}", self.name, PROMPT, "", truth, {}, key, (draw(truth, at),))

    def parse(self, text: str) -> Parsed:
        moves = WRITTEN.findall(text)
        return Parsed(None, "", moves or None, {}, () if moves else ("no_move",))

    def check(self, problem: Problem, answer: list[str]) -> bool:
        at = problem.truth["at"]
        for move in answer:
            at = step(problem.truth, at, move)
        return bool(tuple(at) == tuple(problem.truth["out"]))

    def reset(self, problem: Problem, rng: np.random.Generator) -> Observation:
        self.truth, self.at = problem.truth, tuple(problem.truth["at"])
        return Observation(how=HOW)

    def tools(self) -> list[Tool]:
        return [Tool("go", "Go one cell.", {"to": {"type": "string", "enum": [*MOVES]}})]

    def step(self, text: str) -> Observation:
        moves = re.findall(r"<go>(\w+)</go>", text)
        if len(moves) != 1 or moves[0] not in MOVES:
            return Observation("One move, please.", defects=("bad_move",))
        self.at = step(self.truth, self.at, moves[0])
        if self.at == tuple(self.truth["out"]):
            return Observation(reward=1.0, done=True)
        return Observation(images=(draw(self.truth, self.at),))


def step(truth: Any, at: Any, move: str) -> tuple[int, int]:
    x, y = (at[i] + MOVES.get(move, (0, 0))[i] for i in (0, 1))
    return (x, y) if min(x, y) >= 0 and max(x, y) < truth["side"] else tuple(at)


def draw(truth: Any, at: Any) -> bytes:
    cell = truth["cell"]
    picture = Image.new("RGB", (truth["side"] * cell,) * 2, "white")
    for (x, y), colour in ((truth["out"], "green"), (at, "red")):
        box = (x * cell, y * cell, (x + 1) * cell - 1, (y + 1) * cell - 1)
        ImageDraw.Draw(picture).rectangle(box, fill=colour)
    return to_png(picture)
