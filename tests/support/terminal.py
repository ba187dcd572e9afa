"""`equipoise` as a user types it, in this process."""

from __future__ import annotations

import sys

import pytest

from cluster.cli import main


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of `equipoise WORDS`; what it prints is `capsys`'s."""
    monkeypatch.setattr(sys, "argv", ["equipoise", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)
