"""What a cell of an ablation leaves: its folder, its result or failure, what proves its pairing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.ablation.grid import CellName
from cluster.ablation.settings import CellCommand
from cluster.record.folder import DEMONSTRATION_SCHEMA, ROLLOUT_SCHEMA, read_rows
from tasks.fetched import local
from tasks.files import put_text

CELL_SCHEMA = pa.schema(
    {
        "cell": pa.string(),
        "arm": pa.string(),
        "difficulty": pa.string(),  # "" where the ablation names none
        "seed": pa.int64(),
        "seconds": pa.float64(),
        "weights": pa.string(),  # SHA-256 of the initial checkpoint's files
        "first_batch": pa.string(),  # SHA-256 of what was learnt from first
        "made_with": pa.string(),  # JSON: `versions.environment()` of the cell's run
    }
)
"""`cells.parquet`: what each finished cell's `result.json` says, a row a cell."""


def is_finished(folder: Path, cell: CellName) -> bool:
    """Whether the cell has a result."""
    return (cell_folder(folder, cell) / "result.json").is_file()


def read_result(folder: Path, cell: CellName) -> dict[str, Any]:
    """A finished cell's result: the columns of `CELL_SCHEMA`, `made_with` as an object."""
    text = (cell_folder(folder, cell) / "result.json").read_text(encoding="utf-8")
    result: dict[str, Any] = json.loads(text)
    return result


def read_failure(folder: Path, cell: CellName) -> str | None:
    """Why a cell failed; None where it did not."""
    file = cell_folder(folder, cell) / "failure.json"
    return json.loads(file.read_text(encoding="utf-8"))["error"] if file.is_file() else None


def cell_folder(folder: Path, cell: CellName) -> Path:
    """Where a cell keeps its files; the run itself is in `run` below it."""
    return folder / "cells" / cell.id


def as_cells(results: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Results of cells as a table (`CELL_SCHEMA`)."""
    rows = [
        {name: result.get(name) for name in CELL_SCHEMA.names}
        | {"made_with": json.dumps(result.get("made_with"), sort_keys=True)}
        for result in results
    ]
    return pa.Table.from_pylist(rows, schema=CELL_SCHEMA)


def read_cells(path: Path) -> dict[str, dict[str, Any]]:
    """Cell id -> its result, of a table that `as_cells` made; raises what pyarrow and json do."""
    rows: list[dict[str, Any]] = pq.read_table(path, schema=CELL_SCHEMA).to_pylist()
    return {row["cell"]: row | {"made_with": json.loads(row["made_with"])} for row in rows}


def pairing_faults(
    cells: Sequence[CellName], results: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Cells with a result whose initial weights or first batch differ from those of their pairs.

    Pairs have one difficulty and seed. The hashes are of the files read and of the problems that
    the runs really saw.
    """
    faults = []
    first: dict[tuple[str, int], tuple[str, Mapping[str, Any]]] = {}
    for cell in cells:
        if (result := results.get(cell.id)) is None:
            continue
        other, reference = first.setdefault((cell.difficulty, cell.seed), (cell.id, result))
        for field, words in (("weights", "initial weights"), ("first_batch", "first batch")):
            if result[field] != reference[field]:
                faults.append(f"{cell.id} and {other}: {words} differ, so they are not paired")
    return faults


def hash_weights(model: str) -> str:
    """SHA-256 over the files of a checkpoint folder, names included; of the name of a hub model."""
    digest = hashlib.sha256()
    path = Path(local(model))
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    for file in files:
        digest.update(f"{file.relative_to(path)}\0".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    if not files:
        digest.update(f"hub:{model}".encode())
    return digest.hexdigest()


def hash_first_batch(run: Path, command: CellCommand = "train") -> str:
    """SHA-256 over what a run learnt from first, in order.

    Of RL the problems of step 1: ids, prompts, images. Of SFT the demonstrations of update 1: token
    ids, segments, images. Raises OSError where the run left no record of them.
    """
    if command == "sft":
        rows = _first_rows(run / "demonstrations", DEMONSTRATION_SCHEMA.names)
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()

    columns = ["group_id", "problem_id", "prompt", "image_sha256"]
    problems = {row["group_id"]: row for row in _first_rows(run / "rollouts", columns)}
    # A group's id starts with its position in the step; scoring may return groups in another order.
    ordered = sorted(problems.values(), key=lambda row: int(row["group_id"].split("/")[1]))
    text = json.dumps([[row[name] for name in columns[1:]] for row in ordered])
    return hashlib.sha256(text.encode()).hexdigest()


def _first_rows(folder: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Of step 1; one image is its hash and none is null, as results of before were hashed."""
    schema = pa.unify_schemas([ROLLOUT_SCHEMA, DEMONSTRATION_SCHEMA])
    only = pa.schema([schema.field(name) for name in columns])
    rows: list[dict[str, Any]] = read_rows(folder / "step-000001.parquet", only).to_pylist()
    for row in rows:
        images = row["image_sha256"]
        row["image_sha256"] = images if len(images) > 1 else next(iter(images), None)
    return rows


def last_step_of(run: Path, command: CellCommand) -> int:
    """The last step that a run which goes on has left something of."""
    from cluster.record.stored import last_logged_step

    try:
        if command == "train":
            return len([n for n in os.listdir(run / "rollouts") if n.startswith("step-")])
        return last_logged_step(run)
    except OSError:
        return 0


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all, also when the machine stops."""
    put_text(path, json.dumps(value, indent=1))
