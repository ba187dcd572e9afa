"""Data sets as Parquet files in the image layout that Hugging Face `datasets` reads.

A data set is a folder with one `<split>.parquet` a split and a `manifest.json` that says how
it came to be and holds the hash of every file. Columns: `image` (struct of bytes and path),
`query`, `ground_truth`, `response` as in the public data sets, then ours: `id`, `task`,
`perception`, `truth` (JSON), `knobs` (JSON), `symmetry_key`.

What holds for every folder that `write_dataset` makes:

- A split is held out or for training by its name (`tasks.split_names`): its problems are of the
  `test` or the `train` side of `tasks.splits`. So no held-out problem occurs, up to the task's
  symmetries, in a training split of this or any other data set drawn here, nor in a run that
  draws its own problems.
- The splits of one side, sorted by name, are consecutive parts of one stream: that of
  `draw_problem`, from which runs with the same seed and knobs draw too.
- No problem (`id`) is there twice, within a split or in two of them. Held-out splits do not
  even repeat a question (`query` and `perception`) in another picture. Splits of one side may
  hold symmetric twins: 4x4 Sudoku with 8 blanks has only 1040 puzzles up to symmetry.
- Every response that was generated reads back, with the task's own parser and checker, as
  right in perception and answer.
- It is written whole or not at all, and the same arguments (and library versions, which the
  manifest names) give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import count as count_from
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from tasks.core import DataError, Problem, Style, Task
from tasks.files import flush
from tasks.images import check_image, content_hash
from tasks.split_names import side_of
from tasks.splits import Split, draw_problem

FORMAT_VERSION = 1
"""Of the columns and the manifest."""
GENERATOR_VERSION = 1
"""Raise it when a built-in task draws or renders differently for the same seed."""
MANIFEST = "manifest.json"
COMPLETE = ".complete"
"""Holds a data set that is whole and was not yet moved to its place."""

ResponseStyle = Literal["none", Style]

PATIENCE = 500
"""Draws in a row without a new problem after which the knobs are held to allow no more. If a
share s of the draws were still new, it would be reached by chance with (1 - s)^500."""

_TEXT_COLUMNS = ("query", "ground_truth", "response")
_OUR_COLUMNS = ("id", "task", "perception", "truth", "knobs", "symmetry_key")
SOURCE_COLUMNS = ("query", "image", "ground_truth")
_BATCH_ROWS = 256


def _schema() -> pa.Schema:
    texts = (*_TEXT_COLUMNS, *_OUR_COLUMNS)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    features |= {name: {"dtype": "string", "_type": "Value"} for name in texts}
    return pa.schema(
        [("image", image), *((name, pa.string()) for name in texts)],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )


SCHEMA = _schema()


@dataclass(frozen=True)
class Example:
    """A problem and the response to learn from, "" where the data set has none."""

    problem: Problem
    response: str


def write_dataset(
    folder: str | Path,
    splits: Mapping[str, int],
    task: Task,
    spec: BaseModel,
    seed: int,
    style: ResponseStyle = "none",
    *,
    overwrite: bool = False,
    on_row: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Draw and write a data set; returns its manifest.

    Splits are drawn in the order of their names; repeats are skipped and counted.

    Args:
        folder: made if absent; must hold no data set yet, unless `overwrite`.
        splits: name -> number of problems, e.g. `{"train": 10000, "test": 1000}`.
        style: of the demonstrations in `response`; "none" leaves it empty.
        on_row: called with the split's name after each problem (progress).

    Raises:
        DataError: the folder holds a data set; the knobs allow too few different problems, or
            none; or the task makes an image or a demonstration that does not pass its own checks.
    """
    for split, rows in splits.items():
        if not re.fullmatch(r"\w+", split) or rows < 1:
            raise DataError(f"split {split!r}: {rows} rows: give a plain name and at least 1 row")
    streams: dict[Split, _Stream] = {}
    entries: dict[str, Any] = {}
    with staged(Path(folder), splits, overwrite) as stage:
        for split in sorted(splits):
            side = side_of(split)
            stream = streams.setdefault(side, _Stream(task, spec, side, seed))
            start = stream.index
            with SplitWriter(stage, split, task) as writer:
                for problem in stream.take(split, splits[split]):
                    response = "" if style == "none" else task.demonstrate(problem, style)
                    check_image(problem.image, f"{task.name}: generated image of {problem.id}")
                    if not writer.add(problem, task.to_ground_truth(problem), response):
                        raise DataError(
                            f"task {task.name}: its own {style} demonstration of {problem.id} "
                            "is not right by its own parse, score_perception and check"
                        )
                    if on_row is not None:
                        on_row(split)
            draws = stream.index - start
            entries[split] = writer.entry() | {
                "side": side,
                "first_draw": start,
                "draws": draws,
                "skipped_repeats": draws - splits[split],
            }
        origin = {
            "seed": seed,
            "knobs": spec.model_dump(mode="json"),
            "style": style,
            "command": _command(task, spec, splits, seed, style),
        }
        return write_manifest(stage, task, origin, {s: entries[s] for s in splits})


def read_dataset(
    path: str | Path, split: str = "train", *, check_images: bool = True
) -> list[Problem]:
    """All problems of a split; see `read_examples`."""
    return [example.problem for example in read_examples(path, split, check_images=check_images)]


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
    file = _split_file(Path(path), split)
    _check_hash(file)
    parquet = open_parquet(file)
    _check_columns(parquet.schema_arrow, file)
    return _examples(parquet, file, check_images)


# Drawing and writing


class _Stream:
    """The different problems of one side, in the order of their draws, for its splits in turn."""

    def __init__(self, task: Task, spec: BaseModel, side: Split, seed: int) -> None:
        self.task, self.spec, self.side, self.seed = task, spec, side, seed
        self.index = 0
        """Of the next draw."""
        self._seen: set[str | tuple[str, str]] = set()

    def take(self, split: str, count: int) -> Iterator[Problem]:
        """The next `count` problems that are new; the split's name is for the error message."""
        found = barren = 0
        while found < count:
            if barren == PATIENCE:
                raise DataError(
                    f"split {split}: these knobs allow too few different problems: asked for "
                    f"{count}, found {found}, and {PATIENCE} draws in a row brought no new one; "
                    "ask for fewer, or loosen the knobs (larger problems, wider ranges)"
                )
            problem = draw_problem(self.task, self.spec, self.side, self.seed, self.index)
            self.index += 1
            barren += 1
            if self._is_new(problem):
                found += 1
                barren = 0
                yield problem

    def _is_new(self, problem: Problem) -> bool:
        names: set[str | tuple[str, str]] = {problem.id}
        if self.side == "test":
            names.add(question_of(problem))
        new = self._seen.isdisjoint(names)
        self._seen |= names
        return new


def question_of(problem: Problem) -> tuple[str, str]:
    """What is asked about what is seen: the problem without its picture."""
    return problem.prompt, problem.perception


class SplitWriter:
    """Writes the rows of one split in batches and counts what the manifest tells of them."""

    def __init__(self, stage: Path, split: str, task: Task) -> None:
        self.file = stage / f"{split}.parquet"
        self.task = task
        self.ids: set[str] = set()
        self.keys: set[str] = set()
        self.questions: set[tuple[str, str]] = set()
        self.rows = self.responses = self.right = self.chars = self.perception_chars = 0
        self._batch: list[dict[str, Any]] = []
        self._parquet = pq.ParquetWriter(self.file, SCHEMA, compression="zstd")

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if kind is None:
            self._flush()
        self._parquet.close()

    def with_fresh_id(self, problem: Problem) -> Problem:
        """The problem, its id numbered if the split has that id already."""
        if problem.id not in self.ids:
            return problem
        fresh = next(
            f"{problem.id}-{n}" for n in count_from(2) if f"{problem.id}-{n}" not in self.ids
        )
        return replace(problem, id=fresh)

    def add(self, problem: Problem, ground_truth: str, response: str) -> bool:
        """Take one row; False if its response is given but not right."""
        self.ids.add(problem.id)
        self.keys.add(problem.symmetry_key)
        self.questions.add(question_of(problem))
        self.rows += 1
        right = not response or self._count_response(problem, response)
        kind = "png" if problem.image.startswith(b"\x89PNG") else "img"
        self._batch.append(
            {
                "image": {
                    "bytes": problem.image,
                    "path": f"{content_hash(problem.image)[:16]}.{kind}",
                },
                "query": problem.prompt,
                "ground_truth": ground_truth,
                "response": response,
                "id": problem.id,
                "task": problem.task,
                "perception": problem.perception,
                "truth": _to_json(self.task, "truth", problem.truth),
                "knobs": _to_json(self.task, "knobs", problem.knobs),
                "symmetry_key": problem.symmetry_key,
            }
        )
        if len(self._batch) == _BATCH_ROWS:
            self._flush()
        return right

    def entry(self) -> dict[str, Any]:
        """What the manifest says of this split; call it after closing."""
        return {
            "file": self.file.name,
            "rows": self.rows,
            "sha256": file_hash(self.file),
            "distinct_up_to_symmetry": len(self.keys),
            "responses": self.responses,
            "responses_right": self.right,
            "response_chars": self.chars,
            "perception_chars": self.perception_chars,
        }

    def _count_response(self, problem: Problem, response: str) -> bool:
        parsed = self.task.parse(response)
        start, end = parsed.spans.get("perception", (0, 0))
        right = (
            parsed.perception is not None
            and parsed.answer is not None
            and self.task.score_perception(problem, parsed.perception)[0]
            and self.task.check(problem, parsed.answer)
        )
        self.responses += 1
        self.right += right
        self.chars += len(response)
        self.perception_chars += end - start
        return right

    def _flush(self) -> None:
        if self._batch:
            self._parquet.write_table(pa.Table.from_pylist(self._batch, schema=SCHEMA))
            self._batch = []


@contextmanager
def staged(folder: Path, splits: Iterable[str], overwrite: bool) -> Iterator[Path]:
    """A hidden folder to write in; its files move to `folder` once all of them are done.

    Killed at any moment, the next reader or writer (`settle`) finds the old set or the new one.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file; name a folder to write the data set in")
    names = (MANIFEST, *(f"{s}.parquet" for s in splits), *_listed_files(folder))
    taken = [name for name in dict.fromkeys(names) if (folder / name).exists()]
    foreign = [name for name in taken if not _is_ours(folder / name)]
    if foreign:
        raise DataError(
            f"{folder}: {', '.join(foreign)} there is no part of a data set that this command "
            "wrote; move it away, or name another folder"
        )
    if taken and not overwrite:
        raise DataError(
            f"{folder}: already holds {', '.join(taken)}; name another folder, or replace the "
            "data set with --force"
        )
    settle(folder)
    home = next(p for p in (folder, *folder.parents) if p.is_dir())  # the same file system
    with tempfile.TemporaryDirectory(prefix=".equipoise-", dir=home) as name:
        stage = Path(name)
        yield stage
        for path in (*stage.iterdir(), stage):
            flush(path)
        folder.mkdir(parents=True, exist_ok=True)
        stage.rename(folder / COMPLETE)
    settle(folder)


def settle(folder: Path) -> None:
    """Move a data set that is complete to its place, also for a process that was killed at it."""
    complete = folder / COMPLETE
    if (complete / MANIFEST).exists():
        for name in {*_listed_files(folder)} - {*_listed_files(complete)}:
            (folder / name).unlink(missing_ok=True)
        # The manifest comes last: until then the old one says which files are of the old set.
        for file in sorted(complete.iterdir(), key=lambda p: (p.name == MANIFEST, p.name)):
            os.replace(file, folder / file.name)
    if complete.exists():
        complete.rmdir()


def _is_ours(file: Path) -> bool:
    """Whether a manifest or a split was written here, so that --force may replace it."""
    listed = _listed_files(file.parent)
    if file.name == MANIFEST:
        return bool(listed)
    try:
        return set(_OUR_COLUMNS) <= set(pq.read_schema(file).names)
    except (OSError, pa.ArrowException):  # damaged: to be repaired if it was ours
        return file.name in listed


def _listed_files(folder: Path) -> list[str]:
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


def write_manifest(
    stage: Path, task: Task, origin: dict[str, Any], splits: dict[str, Any]
) -> dict[str, Any]:
    """Write and return the manifest: `origin` says how, `splits` what (see `SplitWriter.entry`)."""
    libraries = ("numpy", "pillow", "pyarrow")
    manifest = {
        "format_version": FORMAT_VERSION,
        "generator_version": GENERATOR_VERSION,
        "library_versions": {name: version(name) for name in libraries},
        "task": task.name,
        **origin,
        "splits": splits,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=True) + "\n"
    (stage / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def _command(
    task: Task, spec: BaseModel, splits: Mapping[str, int], seed: int, style: ResponseStyle
) -> str:
    """The call that draws this data set again, but for where it is written."""
    words = ["equipoise", "tasks", "generate", task.name]
    for split, rows in splits.items():
        if split in ("train", "test"):
            words += [f"--{split}", str(rows)]
        else:
            words += ["--split", f"{split}={rows}"]
    words += ["--seed", str(seed), "--style", style]
    for name, value in spec.model_dump(mode="json", exclude_defaults=True).items():
        words += ["--set", f"{name}={json.dumps(value)}"]
    return shlex.join(words)


def _to_json(task: Task, field: str, value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"task {task.name}: Problem.{field} is not JSON-able: {error}") from error


# Reading


def _split_file(path: Path, split: str) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; `equipoise tasks generate` makes one")
    settle(path)
    file = path / f"{split}.parquet"
    if not file.is_file():
        there = ", ".join(sorted(p.stem for p in path.glob("*.parquet"))) or "none"
        raise DataError(f"{path}: no split {split!r} ({file.name}); the splits here: {there}")
    return file


def file_hash(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _check_hash(file: Path) -> None:
    if not (file.parent / MANIFEST).exists():
        return
    for entry in read_manifest(file.parent)["splits"].values():
        if entry["file"] == file.name and entry.get("sha256") != file_hash(file):
            raise DataError(
                f"{file}: its hash is not the one in {MANIFEST}: the file is incomplete or was "
                f"changed; write the data set again (or, if you meant it, delete {MANIFEST})"
            )


def open_parquet(file: Path) -> pq.ParquetFile:
    """Raises DataError for a file that is not whole."""
    try:
        return pq.ParquetFile(file, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{file}: not a whole Parquet file ({error}); copy or write it again"
        ) from error


def _check_columns(schema: pa.Schema, file: Path) -> None:
    missing = [name for name in SCHEMA.names if name not in schema.names]
    if missing:
        public = all(name in schema.names for name in SOURCE_COLUMNS)
        remedy = "`equipoise tasks import` reads it" if public else "write the data set again"
        raise DataError(
            f"{file}: no column {', '.join(missing)}; it has {', '.join(schema.names)}; {remedy}"
        )
    image = schema.field("image").type
    if not pa.types.is_struct(image) or "bytes" not in [
        image[i].name for i in range(image.num_fields)
    ]:
        raise DataError(
            f"{file}: column image: is {image}, not struct<bytes, path>; "
            "`equipoise tasks import` converts it"
        )


def _examples(parquet: pq.ParquetFile, file: Path, check_images: bool) -> Iterator[Example]:
    ids: set[str] = set()
    for number, row in parquet_rows(parquet, file, SCHEMA.names):
        place = f"{file}: row {number}"
        if isinstance(row, DataError):
            raise DataError(f"{place}: {row}")
        texts = {name: as_text(row[name], f"{place}: {name}") for name in _OUR_COLUMNS}
        image = (row["image"] or {}).get("bytes")
        if not isinstance(image, bytes):
            raise DataError(
                f"{place}: image: has no bytes; `equipoise tasks import` takes images by path"
            )
        if check_images:
            check_image(image, f"{place}: image")
        if texts["id"] in ids:
            raise DataError(f"{place}: id: {texts['id']!r} occurs twice; make ids unique")
        ids.add(texts["id"])
        problem = Problem(
            id=texts["id"],
            task=texts["task"],
            prompt=as_text(row["query"], f"{place}: query"),
            image=image,
            perception=texts["perception"],
            truth=_json_object(texts["truth"], f"{place}: truth"),
            knobs=_json_object(texts["knobs"], f"{place}: knobs"),
            symmetry_key=texts["symmetry_key"],
        )
        response = row["response"]
        yield Example(problem, "" if response is None else as_text(response, f"{place}: response"))


def parquet_rows(
    parquet: pq.ParquetFile, file: Path, columns: list[str]
) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """(number from 0, row, or what is wrong with its values).

    Raises DataError naming the file where it is damaged.
    """
    number = 0
    batches = parquet.iter_batches(batch_size=_BATCH_ROWS, columns=columns)
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
        found: list[dict[str, Any] | DataError] = batch.to_pylist()
        return found
    except (ValueError, ArithmeticError, pa.ArrowException) as error:  # not UTF-8, out of range
        if batch.num_rows == 1:
            return [DataError(f"a value cannot be read ({error}); write the row again")]
        return [row for at in range(batch.num_rows) for row in _rows(batch.slice(at, 1))]


def as_text(value: Any, place: str) -> str:
    """The value if it is text; raises DataError naming the place if not."""
    if not isinstance(value, str):
        what = "empty" if value is None else f"a {type(value).__name__}, not text"
        raise DataError(f"{place}: is {what}; write the row again")
    return value


def _json_object(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}); write the row again") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: not a JSON object; write the row again")
    return value
