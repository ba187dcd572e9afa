"""Writing data sets (`tasks.datasets` says what they look like): drawn whole, or not at all.

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

import json
import re
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib.metadata import version
from itertools import count as count_from
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from tasks.core import DataError, Demonstrates, Problem, ReadsRows, Style, Task, labelled, need
from tasks.datasets import (
    BATCH_ROWS,
    COMPLETE,
    MANIFEST,
    OUR_COLUMNS,
    SCHEMA,
    file_hash,
    listed_files,
    settle,
)
from tasks.files import flush
from tasks.images import check_image, content_hash
from tasks.placeholders import check_placed
from tasks.split_names import side_of
from tasks.splits import Split, draw_problem

FORMAT_VERSION = 1
"""Of the columns and the manifest."""
GENERATOR_VERSION = 1
"""Raise it when a built-in task draws or renders differently for the same seed."""

ResponseStyle = Literal["none", Style]

PATIENCE = 500
"""Draws in a row without a new problem after which the knobs are held to allow no more. If a
share s of the draws were still new, it would be reached by chance with (1 - s)^500."""


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
    if style != "none":
        need(task, Demonstrates, f'style "{style}"', 'add it, or set the style to "none"')
    streams: dict[Split, _Stream] = {}
    entries: dict[str, Any] = {}
    with staged(Path(folder), splits, overwrite) as stage:
        for split in sorted(splits):
            side = side_of(split)
            stream = streams.setdefault(side, _Stream(task, spec, side, seed))
            start = stream.index
            with closing(SplitWriter(stage, split, task)) as writer:
                for problem in stream.take(split, splits[split]):
                    response = ""
                    if style != "none" and isinstance(task, Demonstrates):
                        response = task.demonstrate(problem, style)
                    for image in problem.images:
                        check_image(image, f"{task.name}: generated image of {problem.id}")
                    check_placed(problem.prompt, problem.images, f"{task.name}: {problem.id}")
                    row = task.to_ground_truth(problem) if isinstance(task, ReadsRows) else ""
                    if not writer.add(problem, row, response):
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


class _Stream:
    """The different problems of one side, in the order of their draws, for its splits in turn."""

    def __init__(self, task: Task, spec: BaseModel, side: Split, seed: int) -> None:
        self.task, self.spec, self.side, self.seed = task, spec, side, seed
        self.index = 0
        """Of the next draw."""
        self._seen_keys: set[str | tuple[str, str]] = set()

    def take(self, split: str, count: int) -> Iterator[Problem]:
        """The next `count` problems that are new; the split's name is for the error message."""
        taken = barren = 0
        while taken < count:
            if barren == PATIENCE:
                raise DataError(
                    f"split {split}: these knobs allow too few different problems: asked for "
                    f"{count}, found {taken}, and {PATIENCE} draws in a row brought no new one; "
                    "ask for fewer, or loosen the knobs (larger problems, wider ranges)"
                )
            problem = draw_problem(self.task, self.spec, self.side, self.seed, self.index)
            self.index += 1
            barren += 1
            if self._is_new(problem):
                taken += 1
                barren = 0
                yield problem

    def _is_new(self, problem: Problem) -> bool:
        names: set[str | tuple[str, str]] = {problem.id}
        if self.side == "test":
            names.add(question_of(problem))
        new = self._seen_keys.isdisjoint(names)
        self._seen_keys |= names
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
        self._counts: Counter[str] = Counter()
        self._batch: list[dict[str, Any]] = []
        self._parquet = pq.ParquetWriter(self.file, SCHEMA, compression="zstd")

    def close(self) -> None:
        """Write what is left and close the file."""
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
        self._counts["rows"] += 1
        right = not response or self._count_response(problem, response)
        images = [_stored_image(image) for image in problem.images]
        alone = len(images) == 1
        row = {name: getattr(problem, name) for name in OUR_COLUMNS} | {
            "image": images[0] if alone else None,
            "images": None if alone else images,
            "query": problem.prompt,
            "ground_truth": ground_truth,
            "response": response,
            "truth": _to_json(self.task, "truth", problem.truth),
            "knobs": _to_json(self.task, "knobs", problem.knobs),
            "extra": _to_json(self.task, "extra", problem.extra) if problem.extra else None,
        }
        self._batch.append(row)
        if len(self._batch) == BATCH_ROWS:
            self._flush()
        return right

    def entry(self) -> dict[str, Any]:
        """What the manifest says of this split; call it after closing."""
        counted = ("responses", "responses_right", "response_chars", "perception_chars")
        return {
            "file": self.file.name,
            "rows": self._counts["rows"],
            "sha256": file_hash(self.file),
            "distinct_up_to_symmetry": len(self.keys),
            **{name: self._counts[name] for name in counted},
        }

    def _count_response(self, problem: Problem, response: str) -> bool:
        parsed = self.task.parse(response)
        start, end = parsed.spans.get("perception", (0, 0))
        right = parsed.answer is not None and self.task.check(problem, parsed.answer)
        if labelled(self.task, problem):
            perception = parsed.perception
            right = (
                right
                and perception is not None
                and self.task.score_perception(problem, perception)[0]
            )
        self._counts.update(
            responses=1,
            responses_right=int(right),
            response_chars=len(response),
            perception_chars=end - start,
        )
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
    names = (MANIFEST, *(f"{s}.parquet" for s in splits), *listed_files(folder))
    existing = [name for name in dict.fromkeys(names) if (folder / name).exists()]
    foreign = [name for name in existing if not _is_ours(folder / name)]
    if foreign:
        raise DataError(
            f"{folder}: {', '.join(foreign)} there is no part of a data set that this command "
            "wrote; move it away, or name another folder"
        )
    if existing and not overwrite:
        raise DataError(
            f"{folder}: already holds {', '.join(existing)}; name another folder, or replace the "
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


def _is_ours(file: Path) -> bool:
    """Whether a manifest or a split was written here, so that --force may replace it."""
    listed = listed_files(file.parent)
    if file.name == MANIFEST:
        return bool(listed)
    try:
        return set(OUR_COLUMNS) <= set(pq.read_schema(file).names)
    except (OSError, pa.ArrowException):  # damaged: to be repaired if it was ours
        return file.name in listed


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


def _stored_image(image: bytes) -> dict[str, Any]:
    kind = "png" if image.startswith(b"\x89PNG") else "img"
    return {"bytes": image, "path": f"{content_hash(image)[:16]}.{kind}"}


def _to_json(task: Task, field: str, value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"task {task.name}: Problem.{field} is not JSON-able: {error}") from error
