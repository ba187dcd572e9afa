"""`equipoise` as a user types it, in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cluster.cli import main


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of `equipoise WORDS`; what it prints is `capsys`'s."""
    monkeypatch.setattr(sys, "argv", ["equipoise", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def dry_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *settings: str,
    command: str = "train",
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `equipoise COMMAND x.toml --dry-run`."""
    words = [word for setting in settings for word in ("--set", setting)]
    path = str(tmp_path / "x.toml")
    code = run(monkeypatch, command, path, "--dry-run", *words)
    printed = capsys.readouterr()
    return code, printed.out, printed.err
