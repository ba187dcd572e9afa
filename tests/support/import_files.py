"""Files that a data set is imported from, of rows of the task Shade."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.shade import png, read_dataset

LETTERS = base64.b64encode(png(7)).decode()


def row(number: Any = "3", **changes: Any) -> dict[str, Any]:
    return {"query": "q", "image": png(), "ground_truth": number} | changes


def parquet(file: Path, *rows: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file


def json_lines(file: Path, *rows: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return file


def layout(folder: Path, files: dict[str, str]) -> Path:
    """Parquet and JSON lines files by name, one row for each digit."""
    for name, numbers in files.items():
        rows = [row(number) for number in numbers]
        if name.lower().endswith(".parquet"):
            parquet(folder / name, *rows)
        else:
            json_lines(folder / name, *(one | {"image": LETTERS} for one in rows))
    return folder


def perceived(folder: Path, split: str = "train") -> str:
    return "".join(problem.perception for problem in read_dataset(folder, split))
