"""Ablations of SFT: what a file may say, cells that are paired by demonstrations, what is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.ablation.cells import (
    hash_first_batch,
    last_step_of,
    pairing_faults,
    read_result,
)
from cluster.ablation.grid import Ablation, load_ablation, stored_ablation
from cluster.ablation.processes import program
from cluster.ablation.progress import cost_table
from cluster.ablation.statistics import seed_interval
from cluster.ablation.summary import SHARES
from cluster.recipe.hardware import Machine
from cluster.recipe.placement import plan
from cluster.recipe.recipe import RecipeError
from cluster.record.folder import DEMONSTRATION_SCHEMA
from cluster.record.tracker import Tracker
from cluster.report.ablation_report import build_ablation, read_ablation
from cluster.report.run_report import run_report
from learner.batch import TrainBatch, TrainSequence
from tests.support.toy_runs import TOY_BASE, make_runs, results_of, run_cells

BASE = (
    TOY_BASE
    + """
[sft]
steps = 999
batch_size = 3
balance = "token_mean"
norm_every = 2
[eval]
problems = 40
every = 2
"""
)
FILE = """
command = "sft"
question = "What does the weight of seeing decide?"
base = "base.toml"
seeds = [1, 2, 3]
[budget]
kind = "updates"
amount = 5
[[arms]]
name = "token_mean"
[[arms]]
name = "low"
set.sft = { balance = "fixed", perception_weight = 0.1 }
[[arms]]
name = "high"
set.sft = { balance = "fixed", perception_weight = 0.9 }
"""

Write = Callable[..., Path]


def written(folder: Path, *replaced: str, base: tuple[str, str] = ("", ""), more: str = "") -> Path:
    """Writes an ablation of SFT; returns its file."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "weights").write_bytes(b"123")
    (folder / "base.toml").write_text(BASE.format(model=folder / "model").replace(*base))
    path = folder / "grid.toml"
    path.write_text((FILE.replace(*replaced) if replaced else FILE) + more)  # type: ignore[call-arg]
    return path


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return partial(written, tmp_path)


def test_cells_are_runs_of_sft_as_long_as_the_budget(write: Write) -> None:
    ablation = load_ablation(write())
    assert {cell.command for cell in ablation.cells} == {"sft"}
    assert {cell.recipe.sft.steps for cell in ablation.cells if cell.recipe.sft} == {5}
    assert program("sft")[-1] == "sft" and program("train")[-1] == "train"
    identity = json.loads(json.dumps(ablation.identity()))
    assert stored_ablation(identity)[0].command == "sft"
    # 5 updates of 3 demonstrations; measured at 0, 2, 4 and 5: 40 problems, greedy and oracle.
    printed = cost_table(ablation, Machine(2, 1), {}, 1)
    row = next(line for line in printed.splitlines() if line.startswith("high--seed-2"))
    assert row.split()[1:4] == ["5", "15", "320"] and "demonstrations" in printed


ARM = '[[arms]]\nname = "b"\nset.'
WRONG = {
    'budget.kind: got "tokens", and cells of command = "sft"': {"text": ('"updates"', '"tokens"')},
    "target: costs are counted to an accuracy of RL": {"text": ("seeds", "target = 0.5\nseeds")},
    'command: expected "train" or "sft"': {"text": ('"sft"', '"eval"')},
    'base: sft: command = "sft" needs this section': {
        "base": (BASE[BASE.index("[sft]") : BASE.index("[eval]")], ""),
        "text": (FILE[FILE.index('[[arms]]\nname = "low"') :], ""),
    },
    "eval.every: got 0, and cells of": {"base": ('every = 2\n"', "")},
    "arms[3] (b): sft.batch_size differs from that of arms[0]": {"more": "sft.batch_size = 4"},
    "arms[3] (b): sft.blind_share differs": {"more": "sft.blind_share = 0.5"},
    "arms[3] (b): sampler.max_tokens differs": {"more": "sampler.max_tokens = 99"},
    "arms[3] (b).set: sft.steps: [budget] decides": {"more": "sft.steps = 4"},
    'arms[3] (b): reward.alpha: command = "sft" does not read it': {"more": "reward.alpha = 0.5"},
    "arms[3] (b): algorithm.group_size: command": {"more": "algorithm.group_size = 4"},
    'arms[1] (low): sft.balance: command = "train" does': {"text": ('command = "sft"\n', "")},
}


@pytest.mark.parametrize("said", WRONG)
def test_what_is_wrong_is_said_with_file_and_place(write: Write, said: str) -> None:
    how = WRONG[said]
    base = how.get("base", ("", ""))
    if "every" in said:
        base = ("problems = 40\nevery = 2", "problems = 40")
    more = ARM + str(how["more"]) if "more" in how else ""
    path = write(*how.get("text", ()), base=base, more=more)
    with pytest.raises(RecipeError) as refused:
        load_ablation(path)
    assert any(line.startswith(f"{path}: {said}") for line in str(refused.value).splitlines())


def test_an_sft_that_measures_on_the_way_needs_both_at_once(write: Write) -> None:
    cores = ("cpus = 0", "cpus = 1")
    recipe = load_ablation(write(base=cores)).cells[0].recipe
    assert plan(recipe, Machine(2, 1), "sft").cpus == 2
    assert plan(recipe, Machine(1, 1), "sft").shortages
    alone = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"every": 0})})
    assert plan(alone, Machine(1, 1), "sft").cpus == 1
    assert not plan(alone, Machine(1, 1), "sft").shortages


def sequence(token: int, *images: bytes) -> TrainSequence:
    ids = np.array([token, 2], np.int32)
    zeros = np.zeros(2, np.float32)
    return TrainSequence(ids, ids, images, np.zeros(2, np.int8), zeros, zeros)


def test_the_hash_of_a_first_batch_is_of_all_that_was_learnt_from(tmp_path: Path) -> None:
    batches = {
        "same": (sequence(1, b"image"), sequence(2)),
        "again": (sequence(1, b"image"), sequence(2)),
        "order": (sequence(2), sequence(1, b"image")),
        "token": (sequence(1, b"image"), sequence(3)),
        "image": (sequence(1, b"other"), sequence(2)),
        "blind": (sequence(1), sequence(2)),
        "two": (sequence(1, b"image", b"other"), sequence(2)),
        "turned": (sequence(1, b"other", b"image"), sequence(2)),
    }
    hashes = {}
    for name, sequences in batches.items():
        with Tracker(tmp_path / name) as tracker:
            tracker.log_demonstrations(1, TrainBatch(sequences))
        hashes[name] = hash_first_batch(tmp_path / name, "sft")
    assert hashes["same"] == hashes["again"]
    assert len(set(hashes.values())) == len(batches) - 1
    with pytest.raises(OSError, match="step-000001"):
        hash_first_batch(tmp_path, "sft")


def test_a_running_cell_tells_how_far_it_is(tmp_path: Path) -> None:
    assert last_step_of(tmp_path, "sft") == 0
    with Tracker(tmp_path) as tracker:
        tracker.log(0, {"eval/sudoku/a": 0.5})
        for step in (1, 2, 2, 3):
            tracker.log(step, {"sft/loss": 1.0})
            assert last_step_of(tmp_path, "sft") == step


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ablation, Path]:
    """A finished ablation, its cells toys."""
    folder = tmp_path_factory.mktemp("sft")
    path = written(folder)
    make_runs(folder / "runs", load_ablation(path).cells)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOY_RUNS", str(folder / "runs"))
        assert run_cells(path, folder / "out") == []
    return load_ablation(path), folder / "out"


def test_cells_are_paired_by_their_demonstrations(
    ran: tuple[Ablation, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ablation, finished = ran
    hashes = {c.id: read_result(finished, c)["first_batch"] for c in ablation.cells}
    assert len(set(hashes.values())) == 3
    assert hashes["low--seed-1"] == hashes["token_mean--seed-1"] != hashes["token_mean--seed-2"]
    shutil.copytree(finished.parent, tmp_path / "again")
    folder, cell = tmp_path / "again" / "out", "high--seed-3"
    made = tmp_path / "again" / "runs" / cell / "demonstrations" / "step-000001.parquet"
    rows = pq.read_table(made).to_pylist()
    rows[1]["response_ids"][0] += 1
    pq.write_table(pa.Table.from_pylist(rows, schema=DEMONSTRATION_SCHEMA), made)
    (folder / "cells" / cell / "result.json").unlink()
    monkeypatch.setenv("TOY_RUNS", str(made.parents[2]))
    assert run_cells(finished.parent / "grid.toml", folder) == []
    (fault,) = pairing_faults(ablation.cells, results_of(folder, ablation))
    assert "high--seed-3 and token_mean--seed-3: first batch differ" in fault


def test_shares_of_the_updates_and_no_word_of_rewards(
    ran: tuple[Ablation, Path], tmp_path: Path
) -> None:
    ablation, folder = ran
    record = read_ablation(folder)
    shares = {(s.arm, s.of): s.share for s in record.summary.shares}
    assert set(shares) == {(arm, of) for arm in ("token_mean", "low", "high") for of in SHARES}
    by_seed = []
    for cell in ablation.cells:
        if cell.arm == "high":
            metrics = pq.read_table(folder / "cells" / cell.id / "run/metrics.parquet").to_pylist()
            chosen = [r["value"] for r in metrics if r["name"] == SHARES["loss"]]
            assert len(chosen) == 5
            by_seed.append(np.mean(chosen))
    assert shares["high", "loss"] == seed_interval(by_seed, (0, 1))
    assert shares["low", "gradient norm"].value == pytest.approx(0.09)
    assert shares["high", "λ"].value == pytest.approx(0.9)

    report = build_ablation(record)
    sections = {part.name: part for part in report.parts}
    assert list(sections) == [
        "arms", "outcome", "seeing", "frontier", "learning", "shares", "cost", "pairing",
    ]  # fmt: skip
    (path,) = sections["seeing"].charts
    assert [line.label for line in path.lines] == ["token_mean", "low", "high"]
    # Updates 0, 2, 4 and 5.
    assert {len(line.x) for line in path.lines} == {4}
    plane, over = sections["frontier"].charts
    assert [line.label for line in plane.lines] == ["λ 0.1", "λ 0.9"] and over.x_label == "λ"
    (table,) = sections["shares"].tables
    assert [row[0] for row in table.rows] == ["token_mean", "low", "high"]
    (cost,) = sections["cost"].tables
    assert cost.columns == ("arm", "seconds an update", "mean time of a cell")
    assert report.warnings == () and "fine-tuned on demonstrations" in report.lead
    text = run_report(folder, "md", tmp_path / "report.md").read_text("utf-8")
    assert "sft.perception_weight = 0.9" in text and "token ids, segments, images" in text
    for word in ("reward", "rollout", "outcome alone", "α"):
        assert word not in text.lower(), word
    flat = pq.read_table(run_report(folder, "parquet", tmp_path / "flat.parquet")).to_pylist()
    assert sum(row["kind"] == "share" for row in flat) == 12
