"""`equipoise` as a user types it, in this process; the fixture of that name runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from cluster.cli import main


class Said(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


Equipoise = Callable[..., Said]
"""Runs `equipoise WORDS`."""


def typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> Said:
    """What came of `equipoise WORDS`."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["equipoise", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return Said(int(ended.value.code or 0), *capsys.readouterr())


def with_set(*overrides: str) -> list[str]:
    """As `--set` takes them."""
    return [word for override in overrides for word in ("--set", override)]
