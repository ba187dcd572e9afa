"""`equipoise pretrained`: what is done is not done again, and what it says of itself is so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cluster.pretrained as chain_of
from cluster.pretrained import (
    GFLOPS,
    MINUTES,
    held_below,
    plan_table,
    read_results,
    results_table,
    run_pretrained,
    stages,
)
from cluster.recipe.recipe import RunFailed, UserError, load_recipe
from cluster.record.evaluation import EvalTable
from learner.checkpoint import checkpoint_folder


def made(out: Path, name: str) -> None:
    """A stage's folder as it is left."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").touch()
    tables = {"before": evaluated(0.0), "after": evaluated(1.0)} if name != "smollm2" else {}
    (folder / "evaluation.json").write_text(json.dumps({"scenes": tables}))


def evaluated(value: float) -> dict[str, Any]:
    values = {f"p{i}": value for i in range(8)}
    return EvalTable({"a": values, "text_right": {"Who?": 1 - value}}).to_dict()


def test_a_stage_begins_with_what_the_one_before_leaves() -> None:
    out = Path("x y")
    chain = stages(out, "mixed")
    assert {stage.name for stage in chain} == set(MINUTES)
    *_, graft, tower, first, align, sft, rl = chain
    assert graft.words(out)[2:4] == ["--language", str(out / "smollm2")]
    begun_from = {tower: "model", first: "tower/checkpoint", align: "first/checkpoint"}
    for stage, before in (begun_from | {sft: "align/checkpoint", rl: "sft/checkpoint"}).items():
        words = stage.words(out)
        assert words[2:4] == ["--output", str(out / stage.name)]
        recipe = load_recipe(Path(words[1]), words[5::2])
        assert (recipe.model.path, recipe.model.dtype) == (str(out / before), "mixed")
        assert recipe.checkpoint.every and recipe.eval.text


def test_one_that_was_stopped_goes_on_and_one_without_a_checkpoint_is_told_of(
    tmp_path: Path,
) -> None:
    align = stages(tmp_path, "float32")[4]
    (tmp_path / "align").mkdir()
    (tmp_path / "align" / "recipe.toml").touch()
    with pytest.raises(UserError, match=r"align: holds a stage .* remove it"):
        align.words(tmp_path)
    checkpoint_folder(tmp_path / "align", 75).mkdir(parents=True)
    assert align.words(tmp_path) == ["sft", "--resume", str(tmp_path / "align")]
    assert not align.done(tmp_path)
    table = plan_table(stages(tmp_path, "float32"), tmp_path, 2.0, "float32")
    left = {name: text for name, _, text in table.rows}
    assert left["rl"] == f"{2 * MINUTES['rl']:.0f} min" and left["align"].startswith("goes on")
    made(tmp_path, "align")
    assert align.done(tmp_path)
    later = plan_table(stages(tmp_path, "float32"), tmp_path, 1.0, "float32")
    assert later.rows[4][2] == "done"
    assert f"about {sum(MINUTES.values()) - MINUTES['align']:.0f} minutes" in later.title


def test_the_chain_makes_what_is_missing_stops_at_a_failure_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []
    fails = {"sft": 1}

    def run(command: list[str]) -> tuple[int, int]:
        words = command[3:]
        name = Path(words[words.index("--output" if words[0] != "models" else "--out") + 1]).name
        ran.append([name, *words])
        if code := fails.pop(name, 0):
            return code, 5
        made(tmp_path, name)
        return 0, 2**30

    monkeypatch.setattr(chain_of, "_run", run)
    monkeypatch.setattr(chain_of, "speed", lambda dtype: GFLOPS)
    run_pretrained(tmp_path, dry_run=True)
    assert not ran
    with pytest.raises(RunFailed, match=r"stage sft: .* code 1; the same call goes on"):
        run_pretrained(tmp_path)
    assert [name for name, *_ in ran] == ["smollm2", "model", "tower", "first", "align", "sft"]
    ran.clear()
    run_pretrained(tmp_path)
    assert [name for name, *_ in ran] == ["sft", "rl"]
    times = json.loads((tmp_path / "stages.json").read_text())
    assert times["rl"]["memory"] == 2**30 and times.keys() == MINUTES.keys()
    assert "stage 7 of 7" in capsys.readouterr().out
    results = read_results(tmp_path, stages(tmp_path, "mixed"))
    assert list(results) == ["before", "tower", "first", "align", "sft", "rl"]
    rows = {name: cells for name, *cells in results_table(results, times).rows}
    assert [cell[:5] for cell in rows["a"]] == ["0.000", *["1.000"] * 5]
    assert rows["text_right"][0].startswith("1.000") and rows["a_r"] == [""] * 6
    assert rows["memory"][0] == "" and rows["memory"][-1] == "1.0 GiB"


def test_memory_is_that_of_all_processes_below() -> None:
    size = 200 * 2**20
    code = f"held = bytearray({size}); held[::4096] = b'x' * len(held[::4096]); print(1); input()"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdin
        process.stdout.readline()
        assert size < held_below(process.pid) < size + 100 * 2**20
        assert held_below(process.pid) < held_below(os.getpid())
        process.stdin.write(b"\n")
        process.stdin.close()
    assert held_below(process.pid) == 0
