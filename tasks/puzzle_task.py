"""What both built-in tasks are: a puzzle drawn apart from its picture, answered in tags."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel

from tasks.core import Parsed, Problem
from tasks.drawing import streams
from tasks.responses import Read, oracle_prefix, parse_response


class PuzzleTask(ABC):
    """The part of `tasks.core.Task` that does not depend on the kind of puzzle."""

    name: str
    spec: type[BaseModel]
    kind: ClassVar[str]
    """Head of the problems' ids, also of a subclass's."""
    id_separator: ClassVar[str]
    stream_count: ClassVar[int]
    """Random streams a problem takes: the puzzle's, then those of its picture."""

    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        """Draw one problem; the same puzzle whatever the perception knobs, and vice versa.

        Raises:
            TypeError: `spec` is not one of this task.
            ValueError: no such puzzle or picture was found; the message names the remedy.
        """
        return self.begin(rng, spec)[1]()

    def begin(self, rng: np.random.Generator, spec: BaseModel) -> tuple[str, Callable[[], Problem]]:
        """The symmetry key of the puzzle, and what draws its picture (`tasks.core.DrawsLate`)."""
        if not isinstance(spec, self.spec):
            raise TypeError(f"{self.name} needs a {self.spec.__name__}, not {type(spec).__name__}")
        return self.draw(streams(rng, self.stream_count), spec)

    @abstractmethod
    def draw(self, rngs: list[np.random.Generator], spec: Any) -> tuple[str, Callable[[], Problem]]:
        """As `begin`, from streams of its own."""

    def parse(self, text: str) -> Parsed:
        """Read a whole response; never raises. See `read_perception` and `read_answer`."""
        return parse_response(text, self.read_perception, self.read_answer)

    @abstractmethod
    def read_perception(self, text: str) -> Read:
        """What the perception segment says."""

    @abstractmethod
    def read_answer(self, text: str) -> Read:
        """What the answer segment says."""

    def oracle_prefix(self, problem: Problem) -> str:
        """The perception segment holding `p*`."""
        return oracle_prefix(problem.perception)

    def problem(
        self,
        prompt: str,
        image: bytes,
        perception: str,
        truth: Mapping[str, Any],
        knobs: Mapping[str, Any],
        symmetry_key: str,
    ) -> Problem:
        """A problem whose id tells what is seen, and in which picture."""
        separator = self.id_separator.encode()
        identity = separator.join((self.kind.encode(), perception.encode(), image))
        digest = hashlib.sha256(identity).hexdigest()[:16]
        return Problem(
            f"{self.kind}-{digest}", self.name, prompt, perception, truth, knobs, symmetry_key,
            (image,),
        )  # fmt: skip
