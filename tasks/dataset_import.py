"""Import: make a data set from Parquet or JSON lines with the columns of the public data sets."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from tasks.core import DataError, Problem, ReadsRows, Task, need
from tasks.data_files import files_below
from tasks.dataset_write import SplitWriter, question_of, staged, write_manifest
from tasks.datasets import (
    SOURCE_COLUMNS,
    as_text,
    file_hash,
    open_parquet,
    parquet_rows,
    text_or_json,
)
from tasks.image_cells import Beside, image_bytes
from tasks.images import check_image
from tasks.placeholders import check_placed
from tasks.split_names import side_of, split_of_file, tells_side

_SHOWN_ERRORS = 10
_MAX_REASON = 300
"""Characters of what is said about a row, which may quote any of it."""


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
        source: a `.parquet` or `.jsonl` file, or a folder of them, at any depth; the split of
            each is told by `split_of_file`. Columns: `query`, `image` (bytes, a struct of bytes
            and path, a path relative to the file, base64 or a data URI, or a list of one of
            these), `ground_truth` (text, or any other value as JSON), and, optionally,
            `response`, which is kept as it is.
        out: folder to write, as in `write_dataset`; apart from the source.
        skip_bad: leave bad rows out and list them in the manifest, rather than fail. Who made
            the data split it, so rows stay where they are; but a training row that repeats a
            held-out problem up to symmetry is a bad row, and so is a row of a held-out split
            that repeats a question (prompt and perception) of another.
        on_row: called with the split's name after each row (progress).

    Raises:
        DataError: nothing to read, a column is missing, or rows are bad; the first bad ones
            are listed with file, row and field. Nothing is written then.
    """
    source = Path(os.path.abspath(source))  # links stay: what they point to may have no name
    task = need(
        task, ReadsRows, "importing rows", "add them, or read the files as they are by `vqa`"
    )
    files = _source_files(source)
    real, target = source.resolve(), Path(out).resolve()
    if real == target or real in target.parents or target in real.parents:
        raise DataError(
            f"{target}: is, holds or lies in the source {real}; write the data set somewhere else"
        )
    keys: dict[str, str] = {}  # of the held-out splits read so far, and their names
    questions: dict[tuple[str, str], str] = {}
    entries: dict[str, Any] = {}
    skipped: list[dict[str, str]] = []
    with staged(Path(out), files, overwrite) as stage:
        for split in sorted(files, key=lambda name: side_of(name) == "train"):
            held_out = side_of(split) == "test"
            with closing(SplitWriter(stage, split, task)) as writer:
                for name, file in files[split].items():
                    for location, row in _source_rows(file):
                        try:
                            problem, ground_truth, response = _from_source(task, row, file.parent)
                            key, question = problem.symmetry_key, question_of(problem)
                            twin = questions.get(question) if held_out else keys.get(key)
                            if twin is not None:
                                raise DataError(
                                    "ground_truth: the same problem, up to symmetry, is in the "
                                    f"held-out split {twin}; take it out of one of them"
                                )
                        except DataError as error:
                            reason = " ".join(str(error).split())[:_MAX_REASON]
                            skipped.append({"file": name, "row": location, "reason": reason})
                        else:
                            writer.add(writer.with_fresh_id(problem), ground_truth, response)
                        if on_row is not None:
                            on_row(split)
            if held_out:
                keys |= dict.fromkeys(writer.keys, split)
                questions |= dict.fromkeys(writer.questions, split)
            entries[split] = writer.entry() | {"side": side_of(split)}
        empty = [split for split in files if not entries[split]["rows"]]
        if skipped and (empty or not skip_bad):
            raise DataError(_bad_rows_message(skipped, empty))
        if empty:
            raise DataError(f"{source}: no rows in split {', '.join(empty)}")
        sources = {name: file_hash(f) for fs in files.values() for name, f in fs.items()}
        origin = {"imported_from": sources, "not_read": _not_read(source), "skipped": skipped}
        return write_manifest(stage, task, origin, {s: entries[s] for s in files})


def _source_files(source: Path) -> dict[str, dict[str, Path]]:
    """Split -> its files by their names within the source, in the order of these."""
    home = source if source.is_dir() else source.parent
    files = [source]
    if source.is_dir():
        files = files_below(source, (".parquet", ".jsonl"))
    splits: dict[str, dict[str, Path]] = {}
    for file in sorted(files):
        if not file.is_file():
            raise DataError(f"{file}: no such file; name a .parquet or .jsonl file, or a folder")
        if file.suffix.lower() not in (".parquet", ".jsonl"):
            raise DataError(f"{file}: not a .parquet or .jsonl file; convert it to one of them")
        name = file.relative_to(home)
        splits.setdefault(split_of_file(home.name / name), {})[str(name)] = file
    if not splits:
        raise DataError(f"{source}: holds no .parquet or .jsonl file; name the folder that does")
    return splits


def _not_read(source: Path) -> list[str]:
    """Files of other kinds in the source whose names say that they hold a split."""
    kinds = (".csv", ".tsv", ".json", ".arrow", ".gz", ".zst", ".zip", ".tar")
    files = source.rglob("*") if source.is_dir() else ()
    named = (p.relative_to(source) for p in files if p.suffix.lower() in kinds)
    return sorted(str(p) for p in named if any(map(tells_side, (p.stem, *p.parts[:-1]))))


def _source_rows(file: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """(where, row): rows of Parquet from 0, lines of JSON from 1, as tools show them."""
    if file.suffix.lower() == ".parquet":
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
            if b"\0" in line:
                raise DataError(f"{file}: line {number} is UTF-16 or no text; save it as UTF-8")
            line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            location = f"line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                yield location, DataError(f"not JSON ({error}); write one object a line")
                continue
            if isinstance(row, dict):
                yield location, row
            else:
                yield location, DataError("not a JSON object; write one object a line")


def _from_source(
    task: ReadsRows, row: dict[str, Any] | DataError, folder: Path
) -> tuple[Problem, str, str]:
    """(problem, ground_truth, response) of one row with the public columns."""
    if isinstance(row, DataError):
        raise row
    for name in SOURCE_COLUMNS:
        if row.get(name) is None:
            raise DataError(f"{name}: is missing; the row has {', '.join(map(str, row))}")
    texts = {
        "query": row["query"],
        "ground_truth": text_or_json(row["ground_truth"], "ground_truth"),
        "response": "" if row.get("response") is None else row["response"],
    }
    for name, text in texts.items():
        try:
            as_text(text, name).encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{name}: is not Unicode text ({error.reason})") from error
    try:
        image = image_bytes(row["image"], Beside([folder]))
    except DataError as error:
        raise DataError(f"image: {error}") from error
    check_image(image, "image")
    problem = task.from_row(texts["query"], image, texts["ground_truth"])
    check_placed(problem.prompt, problem.images, "query")
    return problem, texts["ground_truth"], texts["response"]


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
