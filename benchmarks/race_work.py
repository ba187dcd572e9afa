"""What both sides of the race do: the problems, the reward, and what is timed how."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.record import Group
from tasks.core import Parsed, Problem, Task

GROUP = 8
PROBLEMS = 16
RATE = 1e-6
TASK = "sudoku"
KNOBS = {
    "size": 4, "blanks": 8, "cell_size": 16, "font_size": 12, "margin": 0, "noise": 120,
    "contrast": 0.85, "prompt": "brief",
}  # fmt: skip
"""The problems of recipes/tiny/sudoku.toml."""


@dataclass(frozen=True)
class Turn:
    """Some steps on end, from step `first` (from 1) of the run that draws the problems.

    `settings` are put into our recipe, as `--set`.
    """

    first: int
    steps: int
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """What a side is started with."""

    model: str
    folder: str
    """For what it writes, its own."""
    max_tokens: int
    turns: tuple[Turn, ...]
    """All that it will be asked for."""
    drawn: str = ""
    """A file with the problems of all turns, step by step."""
    problems: int = PROBLEMS
    settings: tuple[str, ...] = ()
    """Of our recipe from the start on, as `--set`."""
    mixed: bool = False
    """Products in bfloat16, weights of what learns in float32; else all in float32."""
    rate: float = RATE
    seed: int = 0


@dataclass(frozen=True)
class Save:
    """Asks a side to write its policy, as it is now, to a folder."""

    folder: str


@dataclass(frozen=True)
class Step:
    """What a step took. Seconds are those of the clock on the wall."""

    seconds: float
    sampling: float
    learning: float
    tokens: int


@dataclass(frozen=True)
class Fixed:
    """What a side makes of one fixed batch: two that do the same work agree."""

    loss: float
    grad_norm: float


Side = Callable[[Any, Work], None]
"""Runs in a process of its own, over a connection: sends "ready", then a list of `Step`s for each
`Turn` it is sent, and for a file's name (`write`: sequences to learn from) what it makes of that
`Fixed` batch, which our side writes there itself; for a `Save` "saved"; ends when it is sent
None."""


def score(task: Any, problem: Problem, parsed: Parsed, text: str) -> float:
    """The reward of both: half for seeing, half for solving, and a little for digits.

    The last differs within every group of any policy, so no group is without a gradient.
    """
    perceived = (
        parsed.perception is not None and task.score_perception(problem, parsed.perception)[0]
    )
    solved = parsed.answer is not None and task.check(problem, parsed.answer)
    digits = sum(letter.isdigit() for letter in text) / max(1, len(text))
    return 0.5 * perceived + 0.5 * solved + 0.1 * digits


class Score:
    """The same as a reward term of ours."""

    name = "score"

    def __call__(self, task: Task, group: Group) -> list[float]:
        return [score(task, group.problem, r.parsed, r.text) for r in group.rollouts]


def write(path: Path | str, value: Any) -> str:
    """Keep something for another side, in a folder of this run alone."""
    Path(path).write_bytes(pickle.dumps(value))
    return str(path)


def policy_beside(path: Path | str) -> Path:
    """The folder of the policy that a fixed batch is for: each side has made steps of its own."""
    return Path(f"{path}-policy")


def read(path: Path | str) -> Any:
    """What `write` kept."""
    return pickle.loads(Path(path).read_bytes())
