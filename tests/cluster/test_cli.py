"""The command line tells what it is: every help text as it was written, version, completion."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import cluster.__main__
from cluster.cli import app
from cluster.tasks_cli import app as tasks_app
from tests.support.terminal import Equipoise


@pytest.fixture
def printed(equipoise: Equipoise, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `equipoise WORDS` prints, on a terminal as wide as its longest text."""
    monkeypatch.setenv("COLUMNS", "400")

    def of(*words: str) -> str:
        said = equipoise(*words)
        assert said.code == 0
        return said.out

    return of


def commands(made: Any, words: list[str]) -> list[tuple[list[str], Any]]:
    below = getattr(made, "commands", {})
    return [(words, made)] + [found for n, c in below.items() for found in commands(c, [*words, n])]


# `tasks` is an app of its own, loaded by the command that stands for it.
ALL = [found for found in commands(get_command(app), []) if found[0] != ["tasks"]]
ALL += commands(get_command(tasks_app), ["tasks"])


@pytest.mark.parametrize(("words", "command"), ALL, ids=[" ".join(words) for words, _ in ALL])
def test_help_shows_every_text_as_it_was_written(
    words: list[str], command: Any, printed: Callable[..., str]
) -> None:
    shown = re.sub(r"\s+", " ", printed(*words, "--help"))
    texts = [command.help, *(getattr(parameter, "help", None) for parameter in command.params)]
    for text in filter(None, texts):
        assert re.sub(r"\s+", " ", text).strip() in shown


def test_version_and_completion(
    monkeypatch: pytest.MonkeyPatch, printed: Callable[..., str]
) -> None:
    version = importlib.metadata.version("equipoise")
    assert printed("--version") == f"equipoise {version}\n"
    with monkeypatch.context() as patched:  # else the shell above this process has to be found
        patched.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
        assert "complete" in printed("--show-completion", "bash")
    monkeypatch.setenv("_EQUIPOISE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "equipoise e")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert printed().split() == ["eval"]


def test_what_eval_could_not_write_is_told_before_anything_is_measured(
    tmp_path: Path, equipoise: Equipoise
) -> None:
    (tmp_path / "file").touch()
    words = ["eval", tmp_path / "no-model", "--task", "sudoku"]
    code, _, error = equipoise(*words, "--output", tmp_path / "file" / "found.json")
    (said,) = error.splitlines()
    assert code == 2 and str(tmp_path / "file") in said and "no-model" not in said


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
