"""Run folders as trainings leave them, made up by chance from a cell's arm and seed."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.ablation_config import Cell
from cluster.tracking import METRIC_SCHEMA


def make_runs(folder: Path, cells: Iterable[Cell]) -> None:
    """Write the run of every cell to `folder/<cell id>`; a greater alpha learns more."""
    for cell in cells:
        alpha = cell.recipe.reward.alpha or 0.0
        write_run(folder / cell.id, cell, gain=0.1 + 0.4 * alpha)


def write_run(run: Path, cell: Cell, gain: float) -> None:
    """A run whose accuracies rise by `gain`; reasoning gains half as much as perception."""
    (run / "rollouts").mkdir(parents=True)
    batch = [
        {"group_id": f"step-1/{i}/p{i}", "problem_id": f"p-{cell.seed}-{i}"}
        for i in range(3)
        for _ in range(2)
    ]
    table = pa.Table.from_pylist([row | {"prompt": "?", "image_sha256": "0"} for row in batch])
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
    columns = [
        pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), METRIC_SCHEMA, strict=True)
    ]
    pq.write_table(pa.Table.from_arrays(columns, schema=METRIC_SCHEMA), run / "metrics.parquet")

    evaluation = {
        "sudoku": {"before": answers(chance, 0.0), "after": answers(chance, gain), "change": {}}
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))


def answers(chance: random.Random, gain: float) -> dict[str, object]:
    """Right or wrong on 40 problems."""
    level = {"a": 0.3 + gain, "a_p": 0.4 + gain, "a_r": 0.6 + gain / 2}
    values = {m: {f"t{i}": float(chance.random() < v) for i in range(40)} for m, v in level.items()}
    return {"rows": [], "per_problem": values}
