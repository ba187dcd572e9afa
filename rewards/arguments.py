"""Checks of the `args` a recipe gives a term; each raises a ValueError that names the argument."""

from __future__ import annotations

import math
from typing import Any


def whole(name: str, value: Any, least: int) -> int:
    """`value` if it is a whole number >= `least`."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} = {value!r}: a whole number >= {least}")
    return value


def number(name: str, value: Any, most: float = math.inf) -> float:
    """`value` if it is a finite number from 0 to `most`."""
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value <= most:
        limits = ">= 0" if most == math.inf else f"from 0 to {most:g}"
        raise ValueError(f"{name} = {value!r}: a finite number {limits}")
    return float(value)


def positive(name: str, value: Any, most: float = math.inf) -> float:
    """`value` if it is a finite number above 0, up to `most`."""
    if number(name, value, most) == 0:
        raise ValueError(f"{name} = {value!r}: a finite number > 0")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """`value` if it is true or false."""
    if type(value) is not bool:
        raise ValueError(f"{name} = {value!r}: true or false")
    return value


def one_of(name: str, value: Any, known: tuple[str, ...]) -> str:
    """`value` if it is one of `known`."""
    if value not in known:
        raise ValueError(f"{name} = {value!r}: one of {', '.join(map(repr, known))}")
    return str(value)
