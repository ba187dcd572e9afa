"""What opening a data set costs the driver: seconds and resident memory, the first time and again.

    python -m benchmarks.open_data --rows 20000 --image-bytes 52000

Draws a Parquet file of photo-like JPEGs in a temporary folder, which also takes the place of the
user's cache, then opens it as a run does in fresh processes and draws problems from it. Resident
memory is that of Linux's /proc (`VmRSS`), mapped pages included.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

GROUP_ROWS = 500


def write_rows(file: Path, rows: int, image_bytes: int) -> None:
    """A Parquet file in geometry3k's columns, its images of about that size."""
    rng = np.random.default_rng(0)
    side = int((image_bytes / 0.75) ** 0.5)
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"images": pa.list_(image), "problem": pa.string(), "answer": pa.string()})
    ground = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)

    def made() -> Iterator[dict[str, object]]:
        for number in range(rows):
            pixels = np.roll(ground, number, axis=0)
            pixels[:16, :16] = number % 251
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, "JPEG", quality=75)
            cell = [{"bytes": out.getvalue(), "path": None}]
            text = f"<image>What is shown in picture {number}?"
            yield {"images": cell, "problem": text, "answer": str(number)}

    every = made()
    with pq.ParquetWriter(file, schema, compression="none") as writer:
        for _ in range(0, rows, GROUP_ROWS):
            batch = [row for _, row in zip(range(GROUP_ROWS), every, strict=False)]
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))


def resident() -> float:
    """MB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def open_and_draw(file: str, draws: int) -> dict[str, float]:
    """Seconds and MB of one opening, and of drawing problems afterwards."""
    from cluster.recipe.problems import open_sources, step_problems
    from tasks.settings import TaskConfig

    before, start, busy = resident(), time.perf_counter(), time.process_time()
    sources = open_sources([TaskConfig.model_validate({"name": "vqa", "data": file})])
    opened = {"seconds": time.perf_counter() - start, "CPU seconds": time.process_time() - busy}
    opened["MB"] = resident() - before
    start = time.perf_counter()
    for step in range(draws // 32):
        step_problems(sources, 0, step, 32)
    return opened | {
        "MB after draws": resident() - before,
        "ms a draw": (time.perf_counter() - start) / max(draws, 1) * 1000,
    }


def main() -> None:
    """Print a line of JSON for each opening."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--image-bytes", type=int, default=52_000)
    parser.add_argument("--draws", type=int, default=2_048)
    parser.add_argument("--open", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.open:
        print(json.dumps(open_and_draw(chosen.open, chosen.draws)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.parquet"
        write_rows(file, chosen.rows, chosen.image_bytes)
        print(json.dumps({"rows": chosen.rows, "GB": round(file.stat().st_size / 1e9, 3)}))
        again = [sys.executable, __file__, "--open", str(file), "--draws", str(chosen.draws)]
        for which in ("first", "again", "again"):
            env = os.environ | {"XDG_CACHE_HOME": folder}
            completed = subprocess.run(
                again, env=env, check=True, stdout=subprocess.PIPE, text=True
            )
            seconds_of = {
                name: round(value, 2) for name, value in json.loads(completed.stdout).items()
            }
            print(json.dumps({"opened": which} | seconds_of), flush=True)


if __name__ == "__main__":
    main()
