"""What an answer is judged by, and what judges it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tasks.checkers.stated import states


@dataclass(frozen=True)
class Gold:
    """What is right.

    Attributes:
        answers: each of them is right; as a data set has them.
        choices: the texts of options A, B, C, ... where the question has some.
        options: of the checker: `tolerance` (number), `threshold` (text, box).
    """

    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


class Checker(ABC):
    """Judges the text of an answer segment.

    That text is hostile: nothing here raises on it or evaluates it, each is judged within a
    deadline, and what is empty, too long or holds answers that contradict one another is not right.
    """

    name: str

    @abstractmethod
    def right(self, answer: str, gold: Gold) -> bool:
        """Whether the text gives one answer, and that is right."""

    @abstractmethod
    def fault(self, gold: Gold) -> str | None:
        """Why this gold cannot be used, in one line; None where it can. Cheap."""

    def states(self, text: str, gold: Gold) -> bool:
        """Whether prose states the answer; see `tasks.checkers.stated` for what that can tell."""
        return states(text, lambda candidate: self.right(candidate, gold))


def number_option(gold: Gold, name: str, default: float) -> float:
    """An option that is a number, checked by `option_fault`."""
    return float(gold.options.get(name, default))


def option_fault(gold: Gold, **bounds: float) -> str | None:
    """What is wrong with the options; `bounds` has each known one and its largest value."""
    for name, value in gold.options.items():
        if name not in bounds:
            known = ", ".join(bounds) or "none"
            return f"options: {name!r} is not one of this checker's ({known})"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"options: {name} must be a number, not {value!r:.40}"
        if not 0 <= value <= bounds[name]:
            return f"options: {name} must lie from 0 to {bounds[name]:g}, not {value:g}"
    return None
