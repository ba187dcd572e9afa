"""Checkers of answers that are text: what `[[tasks]]` with `name = "vqa"` names as `checker`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tasks.checkers.boxes import BoxChecker, PointChecker
from tasks.checkers.choice import Choice
from tasks.checkers.expression import Expression
from tasks.checkers.gold import Checker, Gold
from tasks.checkers.number import Number
from tasks.checkers.text import Text

_ALL: tuple[Checker, ...] = (
    Expression(), Choice(), Number(), Text(), BoxChecker(), PointChecker(),
)  # fmt: skip
CHECKERS: Mapping[str, Checker] = MappingProxyType({checker.name: checker for checker in _ALL})
"""name -> checker. All are stateless and may be asked by any thread."""

__all__ = ["CHECKERS", "Checker", "Gold"]
