"""Commands before anything starts: each shipped recipe dry-runs, bad input is one message."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.recipe.recipe import (
    load_recipe,
)
from tests.support.recipes import ROOT, SHIPPED, TINY_POLICY, recipe_file
from tests.support.terminal import Equipoise, with_set


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_dry_runs_without_an_accelerator(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equipoise: Equipoise
) -> None:
    command = "sft" if load_recipe(path).sft else "train"
    # Some start from what another recipe makes.
    shipped = [] if path.parent.name == "gpu" else ["model.path=models/tiny-qwen3-vl"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for engine in ("ray", "vllm", "deepspeed"):
        monkeypatch.setitem(sys.modules, engine, None)  # cannot be imported
    printed = equipoise(command, path, "--dry-run", *with_set(*shipped))
    assert (printed.code, printed.err) == (0, "")
    assert "# learner 0" in printed.out
    generated = [task.knobs for task in load_recipe(path).tasks if task.data is None]
    assert printed.out.count(": held out: ") == len(generated)
    labelled = [knobs for knobs in generated if knobs.get("split_by") == "labelled"]
    assert printed.out.count("an isomorphic one may be in training") == len(labelled)
    again = tmp_path / "printed.toml"
    again.write_text(printed.out, encoding="utf-8")
    assert load_recipe(again) == load_recipe(path, shipped)
    if path.parent.name == "gpu":
        assert "needs 8 GPUs, this machine has 0: dry run only" in printed.out
        assert "is not on this machine, so no row was measured" in printed.out


def test_help_and_what_files_tell_come_before_the_heavy_imports(tmp_path: Path) -> None:
    """In a process of its own; a base checkpoint stands for all that `glance` refuses."""
    base = tmp_path / "base"
    shutil.copytree(TINY_POLICY, base, ignore=shutil.ignore_patterns("chat_template*"))
    code = """
import sys
from cluster.cli import main
for words, heavy in (
    (["--help"], {"numpy", "pydantic", "torch", "transformers", "ray"}),
    (["train", sys.argv[1]], {"torch", "transformers", "ray", "scipy", "vllm", "deepspeed"}),
):
    sys.argv = ["equipoise", *words]
    try:
        main()
    except SystemExit as end:
        print("CODE", end.code)
    print("HEAVY", sorted(heavy & set(sys.modules)))
"""
    words = [sys.executable, "-c", code, str(recipe_file(tmp_path, model=base))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stdout.splitlines() if line.startswith(("CODE", "HEAVY"))]
    assert said == ["CODE 0", "HEAVY []", "CODE 2", "HEAVY []"], done.stderr
    assert done.stderr.startswith(f"model.path: {base}: has no chat template; take the instruct")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "{recipe}", "--set", "learner.rank=2"], "learner.rank: no such key; did you"),
        (
            ["train", "{recipe}", "--set", "learner.ranks=999"],
            "learner.ranks × learner.cpus = 1000",
        ),
        (["sft", "{recipe}"], "sft: `equipoise sft` needs this section"),
        (["eval", "nowhere", "--task", "sudokoo"], '--task: no task "sudokoo"'),
    ],
)
def test_bad_input_is_one_message_exit_2_and_nothing_written(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
    equipoise: Equipoise,
) -> None:
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(recipe=recipe) for argument in arguments]
    printed = equipoise(*filled)
    assert (printed.code, printed.out) == (2, "")
    assert said in printed.err and "Traceback" not in printed.err
    assert sorted(tmp_path.rglob("*")) == before
