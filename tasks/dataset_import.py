"""Import: make a data set from Parquet or JSON lines with the columns of the public data sets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tasks.core import DataError, Problem, Task
from tasks.datasets import (
    SOURCE_COLUMNS,
    SplitWriter,
    as_text,
    file_hash,
    open_parquet,
    parquet_rows,
    question_of,
    side_of,
    staged,
    write_manifest,
)
from tasks.images import check_image

_SHOWN_ERRORS = 10
_MAX_FILE_BYTES = 64 * 2**20


def import_rows(
    source: str | Path,
    task: Task,
    out: str | Path,
    *,
    skip_bad: bool = False,
    overwrite: bool = False,
    on_row: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Make a data set from files with the public columns; returns its manifest.

    Args:
        source: a `.parquet` or `.jsonl` file, or a folder of them. A file's name without a
            shard's number (`train-00000-of-00002`) is its split. Columns: `query`, `image`
            (a struct of bytes and path, bytes, or a path relative to the file),
            `ground_truth` (text, or in JSON lines any JSON value), and, optionally,
            `response`, which is kept as it is.
        out: folder to write, as in `write_dataset`.
        skip_bad: leave bad rows out and list them in the manifest, rather than fail. Who made
            the data split it, so rows stay where they are; but a training row that repeats a
            held-out problem up to symmetry is a bad row, and so is a row of a held-out split
            that repeats a question (prompt and perception) of another.
        on_row: called with the split's name after each row (progress).

    Raises:
        DataError: nothing to read, a column is missing, or rows are bad; the first bad ones
            are listed with file, row and field. Nothing is written then.
    """
    files = _source_files(Path(source))
    keys: set[str] = set()  # of the held-out splits read so far
    questions: set[tuple[str, str]] = set()
    entries: dict[str, Any] = {}
    skipped: list[dict[str, str]] = []
    with staged(Path(out), files, overwrite) as stage:
        for split in sorted(files, key=lambda name: side_of(name) == "train"):
            held_out = side_of(split) == "test"
            with SplitWriter(stage, split, task) as writer:
                for file in files[split]:
                    for place, row in _source_rows(file):
                        try:
                            problem, ground_truth, response = _from_source(task, row, file.parent)
                            key, question = problem.symmetry_key, question_of(problem)
                            if question in questions if held_out else key in keys:
                                raise DataError(
                                    "ground_truth: the same problem, up to symmetry, is in a "
                                    "held-out split; take it out of one of them"
                                )
                        except DataError as error:
                            skipped.append({"file": file.name, "row": place, "reason": str(error)})
                        else:
                            writer.add(writer.with_fresh_id(problem), ground_truth, response)
                        if on_row is not None:
                            on_row(split)
            if held_out:
                keys |= writer.keys
                questions |= writer.questions
            entries[split] = writer.entry()
        empty = [split for split in files if not entries[split]["rows"]]
        if skipped and (empty or not skip_bad):
            raise DataError(_bad_rows_message(skipped, empty))
        if empty:
            raise DataError(f"{source}: no rows in split {', '.join(empty)}")
        sources = {f.name: file_hash(f) for fs in files.values() for f in fs}
        origin = {"imported_from": sources, "skipped": skipped}
        return write_manifest(stage, task, origin, {s: entries[s] for s in files})


def _source_files(source: Path) -> dict[str, list[Path]]:
    """Split name -> its files, in the order of their names."""
    if source.is_dir():
        files = sorted(p for p in source.rglob("*") if p.suffix in (".parquet", ".jsonl"))
    else:
        files = [source]
    splits: dict[str, list[Path]] = {}
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file; name a .parquet or .jsonl file, or a folder")
        if file.suffix not in (".parquet", ".jsonl"):
            raise DataError(f"{file}: not a .parquet or .jsonl file; convert it to one of them")
        stem = re.sub(r"-\d{5}-of-\d{5}$", "", file.stem)
        splits.setdefault(re.sub(r"\W+", "_", stem), []).append(file)
    if not splits:
        raise DataError(f"{source}: holds no .parquet or .jsonl file; name the folder that does")
    return splits


def _source_rows(file: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """(where, row): rows of Parquet from 0, lines of JSON from 1, as tools show them."""
    if file.suffix == ".parquet":
        parquet = open_parquet(file)
        names = parquet.schema_arrow.names
        missing = [name for name in SOURCE_COLUMNS if name not in names]
        if missing:
            raise DataError(
                f"{file}: no column {', '.join(missing)}; it has {', '.join(names)}; rename "
                f"its columns to {', '.join(SOURCE_COLUMNS)} (and response, if it has one)"
            )
        columns = [name for name in (*SOURCE_COLUMNS, "response") if name in names]
        for number, row in parquet_rows(parquet, file, columns):
            yield f"row {number}", row
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                yield place, DataError(f"not JSON ({error}); write one object a line")
                continue
            if isinstance(row, dict):
                yield place, row
            else:
                yield place, DataError("not a JSON object; write one object a line")


def _from_source(
    task: Task, row: dict[str, Any] | DataError, folder: Path
) -> tuple[Problem, str, str]:
    """(problem, ground_truth, response) of one row with the public columns."""
    if isinstance(row, DataError):
        raise row
    for name in SOURCE_COLUMNS:
        if row.get(name) is None:
            raise DataError(f"{name}: is missing; the row has {', '.join(map(str, row))}")
    truth = row["ground_truth"]
    texts = {
        "query": row["query"],
        "ground_truth": json.dumps(truth) if isinstance(truth, list | dict) else truth,
        "response": "" if row.get("response") is None else row["response"],
    }
    for name, text in texts.items():
        try:
            as_text(text, name).encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{name}: is not Unicode text ({error.reason})") from error
    image = _source_image(row["image"], folder)
    check_image(image, "image")
    problem = task.from_row(texts["query"], image, texts["ground_truth"])
    return problem, texts["ground_truth"], texts["response"]


def _source_image(value: Any, folder: Path) -> bytes:
    path = value
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return value["bytes"]
        path = value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(path, str) or not path:
        raise DataError("image: neither bytes nor a path; store the image file in the row")
    file = folder / path
    try:
        # A device or a pipe would never end; a huge file is no image.
        if not file.is_file():
            raise DataError(f"image: no file {path!r} in {folder}; paths are relative to the data")
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise DataError(f"image: {path!r} is over {_MAX_FILE_BYTES} bytes; scale it down")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"image: {path!r} cannot be read ({error}); check the path") from error


def _bad_rows_message(skipped: list[dict[str, str]], empty: list[str]) -> str:
    lines = [f"{bad['file']}: {bad['row']}: {bad['reason']}" for bad in skipped[:_SHOWN_ERRORS]]
    if len(skipped) > _SHOWN_ERRORS:
        lines.append(f"... and {len(skipped) - _SHOWN_ERRORS} more")
    if empty:
        remedy = f"no good row is left in split {', '.join(empty)}; correct the rows"
    else:
        remedy = "correct the rows, or leave them out with --skip-bad"
    head = f"{len(skipped)} bad rows, nothing written; {remedy}:"
    return "\n  ".join([head, *lines])
