"""The command line tells what it is: every help text as it was written, version, completion."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import cluster.__main__
from cluster.cli import app, main
from cluster.tasks_cli import app as tasks_app
from tests.support.terminal import run


def printed(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What `equipoise WORDS` prints, on a terminal as wide as its longest text."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys, "argv", ["equipoise", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    return capsys.readouterr().out


def commands(made: Any, words: list[str]) -> list[tuple[list[str], Any]]:
    below = getattr(made, "commands", {})
    return [(words, made)] + [found for n, c in below.items() for found in commands(c, [*words, n])]


# `tasks` is an app of its own, loaded by the command that stands for it.
ALL = [found for found in commands(get_command(app), []) if found[0] != ["tasks"]]
ALL += commands(get_command(tasks_app), ["tasks"])


@pytest.mark.parametrize(("words", "command"), ALL, ids=[" ".join(words) for words, _ in ALL])
def test_help_shows_every_text_as_it_was_written(
    words: list[str],
    command: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = re.sub(r"\s+", " ", printed([*words, "--help"], monkeypatch, capsys))
    texts = [command.help, *(getattr(parameter, "help", None) for parameter in command.params)]
    for text in filter(None, texts):
        assert re.sub(r"\s+", " ", text).strip() in shown


def test_version_and_completion(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = importlib.metadata.version("equipoise")
    assert printed(["--version"], monkeypatch, capsys) == f"equipoise {version}\n"
    with monkeypatch.context() as patched:  # else the shell above this process has to be found
        patched.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
        assert "complete" in printed(["--show-completion", "bash"], patched, capsys)
    monkeypatch.setenv("_EQUIPOISE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "equipoise e")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert printed([], monkeypatch, capsys).split() == ["eval"]


def test_what_eval_could_not_write_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = ["eval", tmp_path / "no-model", "--task", "sudoku"]
    assert run(monkeypatch, *words, "--output", tmp_path / "file" / "found.json") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file") in said and "no-model" not in said


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ({}, "PASSIVE"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        ({"GOMP_SPINCOUNT": "300000"}, None),
    ],
)
def test_threads_wait_without_spinning_unless_the_environment_says_otherwise(
    given: dict[str, str], policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["equipoise", "--version"])
    with pytest.raises(SystemExit):
        cluster.__main__.main()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
