"""The whole loop on real parts: Ray, vLLM and DeepSpeed, two policy updates, both families.

InternVL runs in the local mode on two ZeRO-3 ranks; Qwen3-VL runs as a Ray job submitted to a
head node on loopback.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from cluster.record.stored import read_metrics, read_rollouts
from tests.support.ray_heads import RAY, environment, ray_head
from tests.support.real_runs import ROOT, TINY_SUDOKU

RECIPE = (
    TINY_SUDOKU
    + """
[[tasks]]
name = "graph_coloring"
[tasks.knobs]
vertices = 6
canvas = 96
label_size = 0
prompt = "brief"

[sampler]
max_tokens = 24
max_num_seqs = 64

[reward]
terms = [
    {{ name = "outcome", weight = 0.5 }},
    {{ name = "perception", weight = 0.5 }},
    {{ name = "tests.support.wordiness:Wordiness", weight = 0.1 }},
    {{ name = "group_agreement", weight = 0.1, segments = ["perception"] }},
    {{ name = "blind_solver", weight = 0.0, gate = "perception" }},
    {{ name = "blind_policy", weight = 0.1, args = {{ max_tokens = 8 }} }},
    {{ name = "image_dependence", weight = 0.1, final_weight = 0.0, schedule = "linear" }},
]

[algorithm]
group_size = 4
problems_per_step = 4
steps = 2

[learner]
learning_rate = 1e-3
{learner}

[eval]
problems = 8
"""
)


def write_recipe(folder: Path, model: Path, learner: str = "") -> Path:
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(model=model, learner=learner), encoding="utf-8")
    return recipe


def check_run(run: Path, model: Path) -> None:
    """What any finished two-update run must have left behind."""
    table = read_metrics(run).to_pylist()
    metrics = {(row["step"], row["name"]): row["value"] for row in table}
    assert metrics[2, "policy/version"] == 2
    # On-policy: before its first update the learner's policy is the sampler's.
    for step in (1, 2):
        assert metrics[step, "learner/ratio_gap"] < 1e-4
        assert metrics[step, "learner/logprob_gap"] < 1e-4
        assert metrics[step, "learner/clip_fraction"] == 0
        assert metrics[step, "learner/grad_norm"] > 0
        assert metrics[step, "reward/wordiness/std"] > 0
        assert metrics[step, "transfer/bytes"] > 1e6
        for term in ("blind_policy", "image_dependence", "blind_solver", "group_agreement"):
            assert metrics[step, f"reward/{term}/failures"] == 0
            assert metrics[step, f"reward/{term}/mean"] >= 0
    for name in ("acc/a", "acc/a_p", "group/zero_variance", "idle/sampler", "time/step"):
        assert (1, name) in metrics
    for step, version in ((1, 0), (2, 1)):
        rows = read_rollouts(run, step).to_pylist()
        assert len(rows) == 16
        assert {v for row in rows for v in row["versions"]} == {version}
        assert all((run / "images" / f"{row['image_sha256']}.png").exists() for row in rows)
    trained, start = (
        load_file(run / "checkpoint" / "model.safetensors"),
        load_file(model / "model.safetensors"),
    )
    assert trained.keys() == start.keys()
    changed = [name for name in start if not np.array_equal(start[name], trained[name])]
    assert len(changed) > 0.9 * len(start)
    assert (run / "checkpoint" / "chat_template.jinja").exists()
    assert "Content-Security-Policy" in (run / "report.html").read_text()
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert set(evaluation) == {"sudoku", "graph_coloring", "all tasks"}
    assert {row["n"] for row in evaluation["all tasks"]["after"]["rows"]} == {16}
    for table in evaluation.values():
        assert {"a", "a_p", "a_r"} <= {row["metric"] for row in table["after"]["rows"]}


def check_halves(run: Path, folder: Path) -> None:
    """The learner alone makes the updates of a run again; the samplers alone ask what it asked."""
    replay, sampled = folder / "replay", folder / "sampled"
    for arguments in (
        ["train", "--replay", str(run), "--output", str(replay)],
        ["sample", str(run / "checkpoint"), "--steps", "2", "--output", str(sampled)],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "cluster", *arguments],
            cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    old, new = (
        {(r["step"], r["name"]): r["value"] for r in read_metrics(f).to_pylist()}
        for f in (run, replay)
    )
    for step in (1, 2):
        for name in ("loss", "grad_norm", "entropy/other", "mismatch/k3", "lr"):
            same = pytest.approx(old[step, f"learner/{name}"], rel=1e-4, abs=1e-6)
            assert new[step, f"learner/{name}"] == same, (step, name)
    before, after = (load_file(f / "checkpoint" / "model.safetensors") for f in (run, replay))
    for name, tensor in before.items():
        assert np.abs(after[name] - tensor).mean() < 1e-5, name
    for step in (1, 2):
        asked, again = (read_rollouts(f, step).to_pylist() for f in (run, sampled))
        assert [r["rollout_id"] for r in again] == [r["rollout_id"] for r in asked]
        assert [r["response_ids"] for r in again] != [r["response_ids"] for r in asked]
        assert {r["terms"][0]["name"] for r in again} == {r["terms"][0]["name"] for r in asked}


def test_internvl_on_two_zero3_ranks_in_local_mode(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    # Fractions of a core, so that a sampler and two ranks fit on the smallest machine.
    recipe = write_recipe(
        tmp_path, tiny_models["internvl"], "ranks = 2\ncpus = 0.5\nzero_stage = 3"
    )
    run = tmp_path / "run"
    command = [sys.executable, "-m", "cluster", "train", str(recipe), "--output", str(run)]
    # A step samples at most 16 * 24 = 384 tokens, and a policy with random weights hardly ends one
    # early: the second step spends the budget.
    command += ["--set", "algorithm.steps=50"]
    command += ["--set", 'algorithm.budget={kind="tokens", amount=400}']
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    check_run(run, tiny_models["internvl"])
    # Random weights write no tags, and are cut off: known before the first step.
    for task in ("sudoku", "graph_coloring"):
        (said,) = [s for s in done.stdout.splitlines() if s.startswith(f"warning: {task}: ")]
        assert " of 8 responses, and no answer is right; " in said
    spent = {
        r["step"]: r["value"] for r in read_metrics(run).to_pylist() if "spent/tok" in r["name"]
    }
    assert set(spent) == {1, 2} and spent[1] < 400 <= spent[2]
    check_halves(run, tmp_path)


def test_qwen3_vl_as_a_submitted_ray_job(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_models["qwen3_vl"])
    run = tmp_path / "run"
    with ray_head(tmp_path / "head.log") as address:
        command = [RAY, "job", "submit", "--address", address, "--working-dir", str(ROOT), "--"]
        command += [sys.executable, "-m", "cluster", "train", str(recipe), "--output", str(run)]
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=600
        )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    check_run(run, tiny_models["qwen3_vl"])


def test_a_killed_engine_that_may_not_start_again_ends_the_run_with_its_own_error(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_models["qwen3_vl"])
    run = tmp_path / "run"
    command = [sys.executable, "-m", "cluster", "train", str(recipe), "--output", str(run)]
    command += ["--set", "algorithm.steps=1000", "--set", "sampler.max_restarts=0"]
    with (tmp_path / "out.log").open("w") as log:
        driver = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + 400
            while not list((run / "rollouts").glob("*.parquet")):
                assert driver.poll() is None, (tmp_path / "out.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.5)
            engines = [p for p in psutil.Process(driver.pid).children(recursive=True)]
            killed = [p for p in engines if "VLLM::EngineCore" in " ".join(p.cmdline())]
            assert killed
            for process in killed:
                process.kill()
            # Far below every time-out of the recipe: the death is seen, not waited for.
            assert driver.wait(120) == 1
        finally:
            driver.kill()
    printed = (tmp_path / "out.log").read_text()
    # Seen by the next request, or by the weight transfer where that came first.
    assert "the run failed: " in printed
    first = (run / "error.txt").read_text().splitlines()[0]
    assert "SamplerLost: sampler 'sampler-0' failed 1 times" in first
    assert "EngineDied: sampler-0: the engine's process died" in first
    # What was finished before is there to debug with.
    assert read_metrics(run).num_rows > 0


def test_sft_of_both_tasks_measures_what_it_made(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_models["qwen3_vl"])
    text = recipe.read_text() + (
        "\n[sft]\nsteps = 3\nbatch_size = 8\nvision_warmup_steps = 2\nlearning_rate = 1e-3\n"
    )
    # One image size for the warm-up's probe.
    recipe.write_text(text.replace("canvas = 96", "canvas = 64"))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "cluster", "sft", str(recipe), "--output", str(run)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = read_metrics(run).to_pylist()
    metrics = {(row["step"], row["name"]): row["value"] for row in rows}
    for segment in ("perception", "reasoning", "answer"):
        assert metrics[3, f"sft/nll/{segment}"] < metrics[1, f"sft/nll/{segment}"]
    assert (2, "warmup/sudoku/accuracy") in metrics
    evaluation = json.loads((run / "evaluation.json").read_text())
    for table in evaluation.values():
        found = {row["metric"]: row for row in table["rows"]}
        for name in ("a", "a_p", "a_p_graded", "a_r", "a_r_blank", "blind", "leak", "a avg@1"):
            assert found[name]["n"] == 8
            assert 0 <= found[name]["low"] <= found[name]["value"] <= found[name]["high"] <= 1
    card = (run / "checkpoint" / "README.md").read_text()
    assert "perception's share" in card and "a_r_blank" in card
