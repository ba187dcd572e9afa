"""The contract every task follows: a problem whose seeing and thinking can be scored apart.

A *problem* is a prompt with its images, its canonical perception `p*` (the text a perfect
reader of the images would write) and what it takes to check an answer. A *task* reads model
responses and checks answers; what else it can do are its abilities. Everything here is pure: no
torch, no Ray.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeGuard, TypeVar, get_args, runtime_checkable

import numpy as np
from pydantic import BaseModel

from tasks.figures import Figure

Segment = Literal["perception", "reasoning", "answer", "act"]
SEGMENTS: tuple[Segment, ...] = get_args(Segment)
"""A token's segment is stored as its index here, or `NO_SEGMENT` outside every segment. `act` are
the calls of an environment (`tasks/calls.py`): of responses without one nothing is of it."""
READ: tuple[Segment, ...] = SEGMENTS[:3]
"""Those that a response's text is read as, in the order in which they are written."""
ACT = SEGMENTS.index("act")
NO_SEGMENT = -1
ENVIRONMENT = -2
"""In the place of a segment: the token stands between two turns, and no policy wrote it."""

Style = Literal["terse", "verbose"]


@dataclass(frozen=True)
class Problem:
    """One task instance.

    Attributes:
        id: unique within a data set, stable under regeneration from the same seed.
        task: the task's name as a recipe writes it (`"sudoku"`, `"module:Class"`).
        prompt: the user's text. Its images stand where it says `<image>`, or `<image_1>`,
            `<image_2>` by number; before it where it says neither (see `tasks/placeholders.py`).
        perception: canonical perception `p*`, the text the strict parser reads back; "" where the
            problem has no perception label.
        truth: JSON-able facts that `Task.check` needs (never shown to the policy).
        knobs: the difficulty settings the problem was drawn with.
        symmetry_key: equal for two problems exactly when they are the same problem up to
            the task's symmetries; a train and a test split share none.
        images: the encoded image files (PNG, JPEG or WebP bytes): none, one or several.
        extra: the other columns of a data set's row, JSON-able; for reward terms and results.
    """

    id: str
    task: str
    prompt: str
    perception: str
    truth: Mapping[str, Any]
    knobs: Mapping[str, Any]
    symmetry_key: str
    images: tuple[bytes, ...] = field(default=(), repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Parsed:
    """What a response says, read strictly; parsing never raises and never repairs.

    Attributes:
        perception: the task's own perception value (a grid, an edge set), or None where it
            could not be read.
        reasoning: text between the reasoning tags ("" where there is none).
        answer: the task's own answer value, or None where it could not be read.
        spans: segment -> [start, end) in characters of the parsed text, tags included.
        defects: named defects in order of discovery, without repeats
            (`missing_perception`, `bad_cell`, `duplicate_tag`, `text_after_answer`, ...).
        earlier: of several turns, what a later one says again (`tasks/turns.py`): each turn's, its
            spans those of the segments that no longer count.
    """

    perception: Any | None
    reasoning: str
    answer: Any | None
    spans: Mapping[Segment, tuple[int, int]]
    defects: tuple[str, ...]
    earlier: tuple[Parsed, ...] = ()


@runtime_checkable
class Task(Protocol):
    """What a recipe's `task` must provide; name a user's own as `"module:Class"`.

    A task object is made without arguments and holds no mutable state. What else it can do are
    the abilities below, each a protocol of its own: a feature asks for those that it needs.
    """

    name: str

    def parse(self, text: str) -> Parsed:
        """Read a whole response (a forced oracle prefix included). Never raises."""

    def check(self, problem: Problem, answer: Any) -> bool:
        """Whether a parsed answer solves the problem."""


@runtime_checkable
class Generates(Task, Protocol):
    """A task that draws problems, so that a recipe needs no data."""

    spec: type[BaseModel]
    """The pydantic model of the knobs a recipe may set for `generate` (`extra="forbid"`)."""

    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        """Draw one problem; all randomness comes from `rng`."""


@runtime_checkable
class ScoresPerception(Task, Protocol):
    """A task that tells a right perception where a problem has one to compare with (`labelled`)."""

    def score_perception(self, problem: Problem, perception: Any) -> tuple[bool, float]:
        """(own p equals p* exactly, graded score in [0, 1])."""

    def oracle_prefix(self, problem: Problem) -> str:
        """The perception segment holding `p*`, up to where the reasoning begins."""


@runtime_checkable
class Solves(Task, Protocol):
    """A task that needs no image to tell what follows from a perception.

    `problem` lends only what its prompt tells (a vertex count), never its truth.
    """

    def solve(self, problem: Problem, perception: Any) -> Any | None:
        """An exact answer for a perception, or None where it has none (or is ill-posed)."""

    def consistent(self, problem: Problem, perception: Any, answer: Any) -> bool:
        """Whether the answer is right for the *given* perception, whatever the image shows."""


@runtime_checkable
class Demonstrates(Task, Protocol):
    """A task with a chain-of-thought teacher of its own."""

    def demonstrate(self, problem: Problem, style: Style) -> str:
        """A whole correct response."""


@runtime_checkable
class DemonstratesCalls(Task, Protocol):
    """A task whose teacher calls an environment before it answers (`sft.call_share`)."""

    def calls(self, problem: Problem) -> tuple[str, ...]:
        """The turns before its demonstration, each a call in tags as the environment reads it.

        None where nothing needs to be called for.
        """


@runtime_checkable
class ReadsRows(Task, Protocol):
    """A task that reads the public data sets' rows."""

    def from_row(self, query: str, image: bytes, ground_truth: str) -> Problem:
        """A problem from a row; raises `DataError` naming the field."""

    def to_ground_truth(self, problem: Problem) -> str:
        """The `ground_truth` of a row from which `from_row` makes the problem again."""


@runtime_checkable
class DrawsLate(Protocol):
    """A task that knows a problem's symmetry key before its picture: none is drawn in vain."""

    def begin(self, rng: np.random.Generator, spec: BaseModel) -> tuple[str, Callable[[], Problem]]:
        """The symmetry key of what `generate` makes with this `rng`, and what makes the rest.

        All that is drawn from `rng` itself is drawn at once, so that the next problem is the same
        whether or not this one is made.
        """


@runtime_checkable
class HasVisionLabels(Protocol):
    """A task whose images can warm up a vision tower (see `learner/warmup.py`)."""

    def vision_labels(self, problem: Problem) -> np.ndarray:
        """int64 [K]: K small-class labels read off the image, K and order fixed by the knobs."""


@runtime_checkable
class HasPerceptionItems(Protocol):
    """A task whose perception is made of parts that can be right one by one.

    The reward `group_agreement` with `mode = "soft"` lets the rollouts of a group vote on them.
    """

    def perception_items(self, perception: Any) -> frozenset[Hashable]:
        """What a parsed perception claims, one item a claim (a cell's value, an edge)."""


@runtime_checkable
class CanLeak(Protocol):
    """A task that can tell when a perception holds the answer, so that no solver is needed."""

    def states_answer(self, problem: Problem, perception: Any) -> bool:
        """Whether a parsed perception states the answer, however it is put.

        Must be False for the perception of every honest reading, `p*` above all: who reads off an
        image what happens to be the answer has not given it as the answer.
        """


@runtime_checkable
class ComparesAnswers(Protocol):
    """A task whose answers may be the same though they were parsed differently (`0.5`, `1/2`)."""

    def same_answer(self, problem: Problem, one: Any, other: Any) -> bool:
        """Whether two parsed answers say the same, right or wrong."""


@runtime_checkable
class HasKinds(Protocol):
    """A task that asks several kinds of question; a reader is judged on each by itself."""

    def question_kind(self, problem: Problem) -> str:
        """The kind of a problem's question, in a word or two."""


@runtime_checkable
class Draws(Protocol):
    """A task that draws what a model saw and answered, beside the image, errors marked.

    The report asks for it, and compares perceptions word by word where it is missing. `problem` is
    as a run stored it: task, prompt, perception and truth, but no image and no knobs.
    """

    def draw_perception(self, problem: Problem, perception: Any) -> Figure:
        """A parsed perception against the true one."""

    def draw_answer(self, problem: Problem, perception: Any | None, answer: Any) -> Figure:
        """A parsed answer against the *own* perception, None where that could not be read."""


@runtime_checkable
class TellsHeldOut(Protocol):
    """A task that can say in words which problems its symmetry key keeps out of training."""

    def held_out(self, spec: BaseModel) -> str:
        """What is held out with these knobs, as the end of "held out: "."""


class DataError(ValueError):
    """A data file, row or image that cannot be used; the message names file, field, remedy."""


ABILITIES = (
    Generates,
    ScoresPerception,
    Solves,
    Demonstrates,
    DemonstratesCalls,
    ReadsRows,
    DrawsLate,
    HasVisionLabels,
    HasPerceptionItems,
    CanLeak,
    ComparesAnswers,
    HasKinds,
    Draws,
    TellsHeldOut,
)

Able = TypeVar("Able")


def members(ability: type) -> list[str]:
    """What a task must have for an ability (or `Task`), beside the core."""
    methods = [n for n, v in vars(ability).items() if inspect.isfunction(v) and n[0] != "_"]
    return [*vars(ability).get("__annotations__", ()), *methods]


def lacking(task: object, ability: type) -> list[str]:
    """Those of the `members` that a task has not."""
    return [name for name in members(ability) if getattr(task, name, None) is None]


def need(task: Task, ability: type[Able], feature: str, remedy: str) -> Able:
    """The task, which has the ability; else raises DataError: what needs it, and the remedy."""
    if isinstance(task, ability):
        return task
    missing = ", ".join(lacking(task, ability))
    raise DataError(f'{feature} needs {missing}, which task "{task.name}" lacks; {remedy}')


def perceives(task: Task) -> bool:
    """Whether its responses have a perception segment; one that has none says `perceives = False`.

    Nothing that is made of perceptions exists for such a task.
    """
    return bool(getattr(task, "perceives", True))


def labelled(task: Task, problem: Problem) -> TypeGuard[ScoresPerception]:
    """Whether it is known what is to be seen: without, `a_p`, `a_r` and `leak` do not exist."""
    return bool(problem.perception) and isinstance(task, ScoresPerception)
