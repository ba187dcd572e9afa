"""Small data files in the layouts of public data sets; every picture and question is our own."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from tasks.core import Problem
from tasks.image_cells import Beside
from tasks.rows import Rows
from tasks.splits import Split
from tasks.vqa.layouts import layout_of
from tasks.vqa.opening import Opened, open_data
from tasks.vqa.reading import RowReader


def picture(number: int, size: tuple[int, int] = (24, 16)) -> bytes:
    """A PNG of `number` bars; another picture for another number."""
    image = Image.new("RGB", size, (255, 255, 255 - number % 7))
    draw = ImageDraw.Draw(image)
    for bar in range(number):
        draw.line((2 * bar, 0, 2 * bar, size[1] - number % 5), fill=(bar % 3 * 80, 40, 90))
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def cell(number: int) -> dict[str, Any]:
    return {"bytes": picture(number), "path": None}


def bars(number: int, **more: object) -> dict[str, object]:
    """A row that asks how many there are."""
    told = {"images": [cell(number)], "problem": "<image>How many bars?", "answer": str(number)}
    return told | more


def write_parquet(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file


def write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_pictures(folder: Path, *names: str) -> None:
    for number, name in enumerate(names, start=1):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))


def zip_pictures(file: Path, *names: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        for number, name in enumerate(names, start=1):
            archive.writestr(name, picture(number))


def opened(data: str | dict[Split, str], **columns: str | list[str]) -> Opened:
    def reader(names, beside: Beside) -> RowReader:
        return RowReader(layout_of(names, columns), beside, "vqa", "{question}")

    return open_data(data, reader)


def problems(found: Opened) -> list[Problem]:
    """All rows in the order of their places."""
    sides: list[Rows] = list(found.rows.values())
    placed = [(rows.locations[at], rows[at].problem) for rows in sides for at in range(len(rows))]
    return [problem for _, problem in sorted(placed, key=lambda pair: pair[0])]
