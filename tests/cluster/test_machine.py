"""What people's machines, folders and paths are like: used as they are, or one line at once."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.config import load_recipe
from cluster.sections_rollout import TaskConfig
from rollout.models import why_missing
from tests.tasks.killed import contents

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-qwen3-vl"


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of an `equipoise` command."""
    monkeypatch.setattr(sys, "argv", ["equipoise", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def recipe(folder: Path, model: str, more: str = "") -> Path:
    """A recipe file in a folder."""
    text = f'name = "x"\n{more}\n[model]\npath = "{model}"\n[[tasks]]\nname = "sudoku"\n'
    (folder / "x.toml").write_text(text + "[tasks.knobs]\nsize = 4\nblanks = 6\n")
    return folder / "x.toml"


# Paths


def test_paths_of_a_recipe_are_those_of_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/big")
    read = load_recipe(recipe(tmp_path, "~/a model"), ['output.folder="~/runs"'])
    assert read.model.path == str(tmp_path / "a model")
    assert read.output.folder == str(tmp_path / "runs")
    assert TaskConfig(name="sudoku", data="$SCRATCH/sudoku").data == "/big/sudoku"


def test_a_home_that_the_shell_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for words in (("--out=~/made",), ("--out", "~/made as well")):
        knobs = ("--train", 1, "--test", 0, "--set", "size=4", "--set", "blanks=6")
        assert run(monkeypatch, "tasks", "generate", "sudoku", *knobs, *words) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "made as well"]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("~/policy", "no such folder: looked for HOME/policy"),
        ("./policy", "no such folder: looked for HERE/policy"),
        ("build/policy", "no such folder: looked for HERE/build/policy"),
        ("a/b/c", "no such folder: looked for HERE/a/b/c"),
        ("org/policy", "no such folder: looked for HERE/org/policy; not in the hub's cache either"),
        ("build", "no config.json in HERE/build;"),
        ("x.toml", "is a file; give the folder"),
    ],
)
def test_a_missing_model_is_said_at_once_with_where_it_was_looked_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    said: str,
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    (home / "x").mkdir(parents=True)
    (here / "build").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    start = time.monotonic()
    assert run(monkeypatch, "train", recipe(here, model), "--output", tmp_path / "run") == 2
    assert time.monotonic() - start < 60  # it was 157 s, and 10 at most are a wait for the hub
    printed = capsys.readouterr().err.splitlines()
    said = said.replace("HOME", str(home)).replace("HERE", str(here))
    assert len(printed) == 1 and re.match(r"model\.path: [^ ]+: ", printed[0])
    assert said in printed[0]
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_here_is_not_asked_of_the_hub() -> None:
    assert why_missing(str(TINY)) == ""


# Writing over what is there


def test_a_model_is_not_made_over_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tmp_path / "checkpoint"
    trained.mkdir()
    (trained / "model.safetensors").write_text("trained for a week")
    before = contents(tmp_path)
    assert run(monkeypatch, "models", "make", "qwen3_vl", "--out", trained) == 2
    assert capsys.readouterr().err == (
        f"--out {trained}: already holds something; name a new folder\n"
    )
    assert contents(tmp_path) == before
