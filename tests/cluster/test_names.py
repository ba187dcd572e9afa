"""A module of the user's own with the name of one of ours is named; others are their business."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.names import other_than_ours
from cluster.recipe import machine
from tests.support.recipes import TINY_POLICY, recipe_file
from tests.support.terminal import Equipoise


@pytest.mark.parametrize(
    "name", ["rewards.py", "tasks.py", "learner.py", "rollout.py", "cluster.py", "datasets.py"]
)
def test_a_module_of_the_users_own_that_is_named_like_ours_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, equipoise: Equipoise
) -> None:
    (tmp_path / name).write_text("raise SystemExit('the module of the user was run')")
    monkeypatch.chdir(tmp_path)
    said = equipoise("train", recipe_file(tmp_path, model=TINY_POLICY), "--dry-run")
    assert said.code == 2 and said.err.startswith(
        f"{tmp_path / name}: has the name of a module that Equipoise is"
    )
    assert said.err.count("\n") == 1 and said.out == ""
    if name == "rewards.py":  # as one process has it that searches the working folder first
        command = [sys.executable, "-m", "cluster", "doctor", "--quick"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (2, said.err)


def test_modules_and_folders_of_other_names_are_the_users_business(tmp_path: Path) -> None:
    for name in ("my_rewards.py", "random.py", "utils.py"):
        (tmp_path / name).touch()
    (tmp_path / "data").mkdir()
    assert other_than_ours(str(tmp_path), sys.path) == ""
    for name in ("tasks", "cluster"):  # and a folder of data does not hide an installed package
        (tmp_path / name).mkdir()
    assert other_than_ours(str(tmp_path), [str(Path(machine.__file__).parents[2])]) == ""
