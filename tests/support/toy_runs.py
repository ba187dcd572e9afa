"""Run folders as trainings leave them, made up by chance from a cell's arm and seed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.ablate_cli import ablate_to_the_end
from cluster.ablation.cells import (
    read_result,
)
from cluster.ablation.grid import Ablation, Cell, load_ablation
from cluster.ablation.launch import run_ablation
from cluster.ablation.processes import MARK, Runner
from cluster.ablation.progress import GridProgress
from cluster.record.folder import DEMONSTRATION_SCHEMA, METRIC_SCHEMA
from cluster.report.ablation_report import read_ablation

TOY_BASE = """
name = "base"
[model]
path = "{model}"
[[tasks]]
name = "sudoku"
[sampler]
cpus = 0
[learner]
cpus = 0
"""
"""A base recipe of cells that take no core."""
MADE_WITH = {
    "packages": {"torch": "2.13.0", "ray": "2.60.0"},
    "python": "3.11.9",
    "git": {"commit": "c" * 40, "modified": True},
    "machine": {
        "architecture": "x86_64",
        "processor": "An EPYC",
        "system": "Linux",
        "cores": 2,
        "memory_gib": 7.5,
    },
}
"""What a run's `versions.json` says, as `cluster.record.versions.environment` makes it."""
TOY_CELLS = Runner((sys.executable, "-S", str(Path(__file__).with_name("toy_cell.py"))))
"""Runs `toy_cell.py` in place of each cell's training."""
TOY_ROW = replace(
    TOY_CELLS, in_a_row=(sys.executable, "-S", str(Path(__file__).with_name("toy_row.py")))
)
"""The same, one cell after another in one process."""


def run_cells(path: Path, folder: Path, runner: Runner = TOY_CELLS, slots: int = 1) -> list[str]:
    """Run the cells of an ablation file, without its report; the ids of those that failed."""
    ablation = load_ablation(path)
    with GridProgress(ablation.cells) as progress:
        return run_ablation(ablation, folder, runner, slots, progress)


def make_runs(folder: Path, cells: Iterable[Cell]) -> None:
    """Write the run of every cell to `folder/<cell id>`; a greater alpha or λ learns more."""
    for cell in cells:
        sft = cell.recipe.sft
        if cell.command == "sft" and sft is not None:
            write_sft_run(folder / cell.id, cell, sft.perception_weight)
        else:
            alpha = cell.recipe.reward.alpha or 0.0
            write_run(folder / cell.id, cell, gain=0.1 + 0.4 * alpha)


def results_of(folder: Path, ablation: Ablation) -> dict[str, dict[str, Any]]:
    """Cell id -> its result."""
    return {cell.id: read_result(folder, cell) for cell in ablation.cells}


def started(folder: Path, text: str, base: str) -> tuple[Ablation, Path]:
    """An ablation file, its base recipe, and the folder as `equipoise ablate` starts it."""
    (folder / "base.toml").write_text(base)
    (folder / "grid.toml").write_text(text)
    ablation = load_ablation(folder / "grid.toml")
    out = folder / "out"
    out.mkdir()
    (out / "ablation.json").write_text(json.dumps(ablation.identity()))
    return ablation, out


def finish(out: Path, cell: Cell, gain: float) -> Path:
    """Leave what a cell leaves, its run by `write_run`; the cell's folder."""
    here = out / "cells" / cell.id
    write_run(here / "run", cell, gain)
    who = {"cell": cell.id, "arm": cell.arm, "difficulty": cell.difficulty, "seed": cell.seed}
    hashes = {"weights": "w" * 64, "first_batch": f"{cell.seed:064d}"}
    result = who | hashes | {"seconds": 90.0, "made_with": MADE_WITH}
    (here / "result.json").write_text(json.dumps(result))
    return here


def write_run(run: Path, cell: Cell, gain: float) -> None:
    """A run whose accuracies rise by `gain`; reasoning gains half as much as perception."""
    (run / "rollouts").mkdir(parents=True)
    (run / "versions.json").write_text(json.dumps(MADE_WITH))
    batch = [
        {"group_id": f"step-1/{i}/p{i}", "problem_id": f"p-{cell.seed}-{i}"}
        for i in range(3)
        for _ in range(2)
    ]
    table = pa.Table.from_pylist([row | {"prompt": "?", "image_sha256": ["0"]} for row in batch])
    pq.write_table(table, run / "rollouts" / "step-000001.parquet")

    chance = random.Random(zlib.crc32(cell.id.encode()))
    steps = cell.recipe.algorithm.steps
    rows = []
    for step in range(1, steps + 1):
        level = 0.3 + gain * step / steps + chance.gauss(0, 0.01)
        numbers = {"acc/a": level, "acc/a_p": level + 0.1, "response/tokens": 100.0 + cell.seed}
        numbers |= {"time/step": 2.0, "coupling/outcome_perception/within": 0.6 * step / steps}
        numbers |= {"coupling/outcome_perception/n_within": 64.0}
        rows += [(step, name, value, 0.0) for name, value in numbers.items()]
    write_end(run, rows, chance, gain)


def write_sft_run(run: Path, cell: Cell, weight: float) -> None:
    """A run of SFT with λ = `weight` that was measured at every `eval.every` updates."""
    (run / "demonstrations").mkdir(parents=True)
    (run / "versions.json").write_text(json.dumps(MADE_WITH))
    batch = [
        {"prompt_ids": [1, i], "response_ids": [cell.seed, i, 9], "segments": [0, 1, 2]}
        for i in range(3)
    ]
    table = pa.Table.from_pylist([row | {"image_sha256": ["0"]} for row in batch])
    pq.write_table(table.cast(DEMONSTRATION_SCHEMA), run / "demonstrations/step-000001.parquet")

    chance = random.Random(zlib.crc32(cell.id.encode()))
    gain, every = 0.1 + 0.4 * weight, cell.recipe.eval.every
    rows = []
    for step in range(cell.steps + 1):
        numbers = {}
        if step:
            numbers = {
                "sft/lambda": weight,
                "sft/seconds": 1.5,
                "sft/share/tokens/perception": 0.05,
            }
            numbers["sft/share/loss/perception"] = weight / 2 + chance.gauss(0, 0.01)
        if step % 2:  # as with norm_every = 2
            numbers["sft/share/grad_norm/perception"] = weight * 0.9
        if step % every == 0 or step == cell.steps:
            numbers |= {
                f"eval/sudoku/{m}": level + share * gain * step / cell.steps
                for m, level, share in (("a", 0.3, 1), ("a_p", 0.4, 1), ("a_r", 0.6, 0.5))
            }
        rows += [(step, name, value, 0.0) for name, value in numbers.items()]
    write_end(run, rows, chance, gain)


def metric_table(rows: Iterable[tuple[int, str, float, float]]) -> pa.Table:
    """(step, name, value, wall seconds) as `metrics.parquet` has them."""
    columns = zip(zip(*rows, strict=True), METRIC_SCHEMA, strict=True)
    return pa.Table.from_arrays([pa.array(c, f.type) for c, f in columns], schema=METRIC_SCHEMA)


def write_end(
    run: Path, rows: list[tuple[int, str, float, float]], chance: random.Random, gain: float
) -> None:
    """The metrics of all steps, and the answers before and after."""
    pq.write_table(metric_table(rows), run / "metrics.parquet")

    evaluation = {
        "sudoku": {"before": answers(chance, 0.0), "after": answers(chance, gain), "change": {}}
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))


def answers(chance: random.Random, gain: float) -> dict[str, object]:
    """Right or wrong on 40 problems."""
    level = {"a": 0.3 + gain, "a_p": 0.4 + gain, "a_r": 0.6 + gain / 2}
    values = {m: {f"t{i}": float(chance.random() < v) for i in range(40)} for m, v in level.items()}
    return {"rows": [], "per_problem": values}


class Launcher:
    """A launcher in a process of its own, forked so that it starts at once; prints to a file."""

    def __init__(self, path: Path, folder: Path, runner: Runner, **environment: str) -> None:
        self._log = path.with_suffix(".log")
        self._log.write_text("")

        def work() -> None:
            os.environ.update(environment)
            sys.stdout = self._log.open("w", buffering=1)
            raise SystemExit(ablate_to_the_end(load_ablation(path), folder, runner=runner))

        self.process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
        self.process.start()

    def printed(self) -> str:
        return self._log.read_text()

    def end(self, number: int) -> int | None:
        """Send a signal and return the exit code."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        self.process.join(60)
        return self.process.exitcode


def outcome(folder: Path) -> tuple[list[object], dict[str, object], list[object]]:
    """All that an ablation concludes: rows, summary, and each cell's hashes."""
    cells = []
    for file in sorted(folder.glob("cells/*/result.json")):
        cells.append({k: v for k, v in json.loads(file.read_text()).items() if k != "seconds"})
    found = read_ablation(folder)
    return found.table.to_pylist(), found.summary.to_dict(), cells


def marked(folder: Path) -> list[str]:
    """Living processes of the cells of an ablation."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={folder}".encode() in environ.read_bytes():
                found.append((environ.parent / "cmdline").read_text())
        except OSError:
            continue
    return found
