"""Data sets as Parquet files in the image layout that Hugging Face `datasets` reads.

A data set is a folder with one `<split>.parquet` a split and a `manifest.json` that says how
it came to be and holds the hash of every file. Columns: `image` (struct of bytes and path),
`query`, `ground_truth`, `response` as in the public data sets, then ours: `id`, `task`,
`perception`, `truth` (JSON), `knobs` (JSON), `symmetry_key`. A row with no image or several has
them as a list in `images` and null in `image`; `extra` (JSON) is null where there is nothing.
Files without these two columns are read too. What holds for those that are drawn is said in
`tasks.dataset_write`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core import DataError, Problem
from tasks.image_cells import shown
from tasks.images import check_image
from tasks.placeholders import check_placed

MANIFEST = "manifest.json"
COMPLETE = ".complete"
"""Holds a data set that is whole and was not yet moved to its place."""
OUR_COLUMNS = ("id", "task", "perception", "truth", "knobs", "symmetry_key")
SOURCE_COLUMNS = ("query", "image", "ground_truth")
NEWER_COLUMNS = ("images", "extra")
"""Of rows with other than one image, and with other columns; older files lack them."""
BATCH_ROWS = 256


_TEXTS = ("query", "ground_truth", "response", *OUR_COLUMNS)
_FEATURES: dict[str, Any] = {"image": {"_type": "Image"}}
_FEATURES |= {name: {"dtype": "string", "_type": "Value"} for name in _TEXTS}
_FEATURES |= {
    "images": {"feature": {"_type": "Image"}, "_type": "List"},
    "extra": {"dtype": "string", "_type": "Value"},
}
_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
SCHEMA = pa.schema(
    {"image": _IMAGE}
    | dict.fromkeys(_TEXTS, pa.string())
    | {"images": pa.list_(_IMAGE), "extra": pa.string()},
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


class Exchange(NamedTuple):
    """A turn of a response but its last, and the answer to it: its images stand before its text.

    An image is empty where it was not read.
    """

    turn: str
    text: str
    images: tuple[bytes, ...] = ()


class Example(NamedTuple):
    """A problem and the response to learn from, "" where the data set has none.

    `response` is its last turn, `earlier` are those before it.
    """

    problem: Problem
    response: str
    earlier: tuple[Exchange, ...] = ()


def read_examples(
    path: str | Path, split: str = "train", *, check_images: bool = True
) -> Iterator[Example]:
    """Read a split row by row, a batch in memory at a time.

    Args:
        path: a data set's folder, or one Parquet file of it (which is then the split).
        split: which `<split>.parquet` of a folder.
        check_images: decode every image once, so that a damaged one is found here and not in
            the middle of a run.

    Raises:
        DataError: at the call, for a missing or damaged file, a file that does not match the
            manifest beside it, or a missing column; while iterating, for a bad row, with its
            number (from 0) and field.
    """
    file, _ = split_file(path, split)
    return _examples(open_parquet(file), file, check_images)


def split_file(path: str | Path, split: str) -> tuple[Path, str]:
    """A split's file, with all columns and as its manifest says, and its `file_hash`.

    Raises DataError where it is not.
    """
    file = _split_file(Path(path), split)
    sha256 = _check_hash(file)
    _check_columns(open_parquet(file).schema_arrow, file)
    return file, sha256


def settle(folder: Path) -> None:
    """Move a data set that is complete to its place, also for a process that was killed at it."""
    complete = folder / COMPLETE
    if (complete / MANIFEST).exists():
        for name in {*listed_files(folder)} - {*listed_files(complete)}:
            (folder / name).unlink(missing_ok=True)
        # The manifest comes last: until then the old one says which files are of the old set.
        for file in sorted(complete.iterdir(), key=lambda p: (p.name == MANIFEST, p.name)):
            os.replace(file, folder / file.name)
    if complete.exists():
        complete.rmdir()


def listed_files(folder: Path) -> list[str]:
    """The Parquet files that a folder's manifest lists as its own."""
    try:
        return [entry["file"] for entry in _manifest(folder)["splits"].values()]
    except DataError:  # absent, or the damage that is being repaired
        return []


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """A data set's manifest.

    Raises:
        DataError: absent, not JSON, or not of a data set.
    """
    settle(Path(folder))
    return _manifest(Path(folder))


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read ({error}); write the data set again") from error
    splits = manifest.get("splits") if isinstance(manifest, dict) else None
    if not isinstance(splits, dict) or not all(
        isinstance(e, dict) and re.fullmatch(r"\w+\.parquet", str(e.get("file")))
        for e in splits.values()
    ):
        raise DataError(f"{file}: splits: not the manifest of a data set; write it again")
    return manifest


def _split_file(path: Path, split: str) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; `equipoise tasks generate` makes one")
    settle(path)
    file = path / f"{split}.parquet"
    if not file.is_file():
        available = ", ".join(sorted(p.stem for p in path.glob("*.parquet"))) or "none"
        raise DataError(f"{path}: no split {split!r} ({file.name}); the splits here: {available}")
    return file


def file_hash(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _check_hash(file: Path) -> str:
    actual = file_hash(file)
    if not (file.parent / MANIFEST).exists():
        return actual
    for entry in read_manifest(file.parent)["splits"].values():
        if entry["file"] == file.name and entry.get("sha256") != actual:
            raise DataError(
                f"{file}: its hash is not the one in {MANIFEST}: the file is incomplete or was "
                f"changed; write the data set again (or, if you meant it, delete {MANIFEST})"
            )
    return actual


def open_parquet(file: Path) -> pq.ParquetFile:
    """Raises DataError for a file that is not whole."""
    try:
        return pq.ParquetFile(file, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{file}: not a whole Parquet file ({error}); copy or write it again"
        ) from error


def _check_columns(schema: pa.Schema, file: Path) -> None:
    missing = [n for n in SCHEMA.names if n not in schema.names and n not in NEWER_COLUMNS]
    if missing:
        public = all(name in schema.names for name in SOURCE_COLUMNS)
        remedy = "`equipoise tasks import` reads it" if public else "write the data set again"
        raise DataError(
            f"{file}: no column {', '.join(missing)}; it has {', '.join(schema.names)}; {remedy}"
        )
    image = schema.field("image").type
    if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise DataError(
            f"{file}: column image: is {image}, not struct<bytes, path>; "
            "`equipoise tasks import` converts it"
        )


class StoredReader:
    """Makes problems of a data set's rows (`tasks.rows.Reader`); all must be of `task`."""

    picture_columns = frozenset(("image", "images"))
    asks = ""

    def __init__(self, task: str) -> None:
        self.task = task
        self.fingerprint = f"stored {task}"

    def read(self, row: Mapping[str, Any], with_images: bool = True) -> Example:
        """The problem of a row. Raises DataError naming the field."""
        example = _example(row, with_images)
        if example.problem.task != self.task:
            raise DataError(f"task: is {example.problem.task!r}, not {self.task!r}; name that task")
        return example

    def column(self, field: str) -> str:
        """A field of the problem is the column of that name."""
        return field

    def split_of(self, row: Mapping[str, Any]) -> str:
        """The file says it."""
        return ""

    def touched(self) -> dict[str, Any]:
        """No other file is read."""
        return {}

    def untouched(self, touched: Mapping[str, Any]) -> bool:
        """As no other file was read."""
        return True


def _examples(parquet: pq.ParquetFile, file: Path, check_images: bool) -> Iterator[Example]:
    ids: set[str] = set()
    columns = [name for name in SCHEMA.names if name in parquet.schema_arrow.names]
    for number, row in parquet_rows(parquet, file, columns):
        try:
            if isinstance(row, DataError):
                raise row
            example = _example(row)
            for image in example.problem.images if check_images else ():
                check_image(image, "image")
            if example.problem.id in ids:
                raise DataError(f"id: {example.problem.id!r} occurs twice; make ids unique")
        except DataError as error:
            raise DataError(f"{file}: row {number}: {error}") from error
        ids.add(example.problem.id)
        yield example


def _example(row: Mapping[str, Any], with_images: bool = True) -> Example:
    texts = {name: as_text(row[name], name) for name in OUR_COLUMNS}
    prompt, images = as_text(row["query"], "query"), tuple(_images(row)) if with_images else ()
    if with_images:
        check_placed(prompt, images, "query")
    problem = Problem(
        id=texts["id"],
        task=texts["task"],
        prompt=prompt,
        perception=texts["perception"],
        truth=_json_object(texts["truth"], "truth"),
        knobs=_json_object(texts["knobs"], "knobs"),
        symmetry_key=texts["symmetry_key"],
        images=images,
        extra=_json_object(row.get("extra") or "{}", "extra"),
    )
    response = row["response"]
    return Example(problem, "" if response is None else as_text(response, "response"))


def _images(row: Mapping[str, Any]) -> Iterator[bytes]:
    several = row.get("images")
    for stored in [row["image"]] if several is None else several:
        image = (stored or {}).get("bytes")
        if not isinstance(image, bytes):
            raise DataError("image: has no bytes; `equipoise tasks import` takes images by path")
        yield image


def parquet_rows(
    parquet: pq.ParquetFile, file: Path, columns: list[str]
) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """(number from 0, row, or what is wrong with its values).

    Raises DataError naming the file where it is damaged.
    """
    number = 0
    batches = parquet.iter_batches(batch_size=BATCH_ROWS, columns=columns)
    while True:
        try:
            batch = next(batches, None)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(
                f"{file}: damaged after row {number} ({error}); copy or write it again"
            ) from error
        if batch is None:
            return
        for row in _rows(batch):
            yield number, row
            number += 1


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any] | DataError]:
    try:
        rows: list[dict[str, Any] | DataError] = batch.to_pylist()
        return rows
    except (ValueError, ArithmeticError, pa.ArrowException) as error:  # not UTF-8, out of range
        if batch.num_rows == 1:
            return [DataError(f"a value cannot be read ({error}); write the row again")]
        return [row for at in range(batch.num_rows) for row in _rows(batch.slice(at, 1))]


def text_or_json(value: Any, name: str) -> str:
    """A value that is text, or is written as JSON. Raises DataError naming the field."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise DataError(f"{name}: {shown(value)}: neither text nor a JSON value") from None


def as_text(value: Any, location: str) -> str:
    """The value if it is text; raises DataError naming the place if not."""
    if not isinstance(value, str):
        defect = "empty" if value is None else f"a {type(value).__name__}, not text"
        raise DataError(f"{location}: is {defect}; write the row again")
    return value


def _json_object(text: str, location: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: not JSON ({error}); write the row again") from error
    if not isinstance(value, dict):
        raise DataError(f"{location}: not a JSON object; write the row again")
    return value
