"""Data files as rows that are read when asked for: memory-mapped by Hugging Face `datasets`.

A file is converted to Arrow once, in the user's cache folder, and found there again by the hash
of its content. Rows of Parquet and Arrow files are numbered from 0, lines of JSON from 1.
"""

from __future__ import annotations

import atexit
import codecs
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa

from tasks.core import DataError
from tasks.files import put_text, user_cache

KINDS = (".parquet", ".arrow", ".jsonl", ".json")
BATCH_ROWS = 256
RESIDENT_BYTES = 64 * 2**20
"""Of a file, after which it is mapped anew: what was touched counts as this process's memory until
its mapping goes."""
APART_BYTES = 64 * 2**20
"""Size of a file from which on it pays to convert it in another process (some 3 s; saves 90 MB)."""
AROUND_BYTES = 2**20
"""What the system maps at least where one row is touched (with large pages; seen: 0.8 MB)."""

OUTPUT_MARKS = (("recipe.toml", "versions.json"), ("ablation.json",))
"""Files that a folder written by a run, an evaluation or an ablation has (`cluster.record`)."""

Row = dict[str, Any]


class DataFile:
    """The rows of one file. Raises DataError, at the start, where it cannot be read."""

    def __init__(self, file: Path, sha256: str) -> None:
        """`sha256`: of its content, as `file_hash` tells."""
        self.file, self.sha256 = file, sha256
        self._is_json = file.suffix.lower() in (".json", ".jsonl")
        self._arrow_files = _arrow_files(file, sha256, self._is_json)
        self._table = self._mapped()
        self._touched = 0

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def rows(
        self, numbers: range | None = None, without: Collection[str] = ()
    ) -> Iterator[tuple[str, Row | DataError]]:
        """(place, row, or what is wrong with it) of a range of rows, of all without one.

        `without`: columns that are not read, where that spares anything.
        """
        numbers = range(len(self)) if numbers is None else numbers
        for start in range(numbers.start, numbers.stop, BATCH_ROWS):
            part = self._part(start, min(BATCH_ROWS, numbers.stop - start), without)
            for number, row in enumerate(_values(part), start):
                if not self._is_json or isinstance(row, DataError):
                    yield f"row {number}", row
                else:
                    yield row["place"], _json_row(row["row"])

    def row(self, number: int) -> Row | DataError:
        """One row, or what is wrong with it."""
        ((_, row),) = self.rows(range(number, number + 1))
        return row

    def __getstate__(self) -> dict[str, Any]:
        """Another process maps the file itself: a table would travel with all its rows."""
        return self.__dict__ | {"_table": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._table = self._mapped()

    def _part(self, start: int, count: int, without: Collection[str]) -> pa.Table:
        if self._touched > RESIDENT_BYTES:
            self._table, self._touched = self._mapped(), 0
        part = self._table.slice(start, count)
        if not self._is_json:
            part = part.select([name for name in part.column_names if name not in without])
        self._touched += max(part.nbytes, AROUND_BYTES)
        return part

    def _mapped(self) -> pa.Table:
        tables = [pa.ipc.open_stream(pa.memory_map(name)).read_all() for name in self._arrow_files]
        return pa.concat_tables(tables)


def _arrow_files(file: Path, sha256: str, is_json: bool) -> list[str]:
    """The Arrow files of a data file's rows, made where they are not there yet."""
    # As `datasets` would tell; asking it takes over a second and 70 MB of imports.
    known = _cache_folder() / f"{sha256}{file.suffix.lower()}.json"
    try:
        arrow_files: list[str] = json.loads(known.read_text(encoding="utf-8"))
        if all(Path(name).is_file() for name in arrow_files):
            return arrow_files
    except (OSError, ValueError):
        pass
    convert = _converted_apart if file.stat().st_size > APART_BYTES else _converted
    arrow_files = convert(file, sha256, is_json, str(_cache_folder()))
    put_text(known, json.dumps(arrow_files))
    return arrow_files


def _converted_apart(*arguments: Any) -> list[str]:
    """`_converted` in a process of its own, which takes the memory along that it needed."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            return process.submit(_converted, *arguments).result()
    except BrokenProcessPool as error:
        raise DataError(
            f"{arguments[0]}: cannot be converted ({error}); is memory short?"
        ) from error


def _converted(file: Path, sha256: str, is_json: bool, home: str) -> list[str]:
    import datasets
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.exceptions import DatasetGenerationError
    from datasets.packaged_modules.arrow.arrow import Arrow
    from datasets.packaged_modules.parquet.parquet import Parquet

    shows = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if is_json:
            text = datasets.Value("large_string")
            features = datasets.Features({"place": datasets.Value("string"), "row": text})
            dataset = datasets.Dataset.from_generator(
                _json_texts,
                features=features,
                cache_dir=home,
                gen_kwargs={"file": file},
                fingerprint=sha256,
            )
        else:
            # Named by hand: as a pattern the path's own brackets would not be found.
            named = DataFilesDict({"train": DataFilesList([str(file)], [(sha256,)])})
            options: dict[str, Any] = {"cache_dir": home, "data_files": named}
            if file.suffix.lower() == ".parquet":
                builder = Parquet(**options, config_id=sha256, batch_size=BATCH_ROWS)
            else:
                builder = Arrow(**options, config_id=sha256)
            builder.download_and_prepare(verification_mode="no_checks")
            dataset = builder.as_dataset("train")
    except DatasetGenerationError as error:
        raise _unreadable(file, error.__cause__ or error, home) from error
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise _unreadable(file, error, home) from error
    finally:
        pa.default_memory_pool().release_unused()
        if shows:
            datasets.enable_progress_bars()
    return [entry["filename"] for entry in dataset.cache_files]


def _unreadable(file: Path, error: BaseException, home: str) -> DataError:
    if isinstance(error, DataError):
        return error
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if "disk space" in reason or "No space left" in reason:
        return DataError(
            f"{file}: no room to convert it in {home} ({reason}); make some, or set "
            "XDG_CACHE_HOME to a folder with more"
        )
    return DataError(f"{file}: cannot be read ({reason}); copy or write it again")


def _cache_folder() -> Path:
    """Where Arrow files are kept."""
    folder = user_cache("data")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _until_the_end()
    return folder if os.access(folder, os.W_OK) else _until_the_end()


@cache
def _until_the_end() -> Path:
    """Of a user without a folder to keep files in: one that goes with this process."""
    folder = tempfile.mkdtemp(prefix="equipoise-data-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _values(part: pa.Table) -> list[Row | DataError]:
    try:
        values: list[Row | DataError] = part.to_pylist()
        return values
    except (ValueError, ArithmeticError, pa.ArrowException) as error:  # not UTF-8, out of range
        if part.num_rows == 1:
            return [DataError(f"a value cannot be read ({error}); write the row again")]
        return [row for at in range(part.num_rows) for row in _values(part.slice(at, 1))]


def _json_texts(file: Path) -> Iterator[dict[str, str]]:
    """The rows of a file as they are written: their types may differ, and no number is rounded."""
    with file.open("rb") as opened:
        head = opened.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        opened.seek(0)
        if file.suffix.lower() == ".json" and head.startswith(b"["):
            try:
                items = json.loads(opened.read().decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}: not JSON ({error}); write it again") from error
            for number, item in enumerate(items):
                yield {"place": f"item {number}", "row": json.dumps(item)}
            return
        for number, line in enumerate(opened, start=1):
            if b"\0" in line:
                raise DataError(f"{file}: line {number} is UTF-16 or no text; save it as UTF-8")
            line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                # What is no UTF-8 is no JSON below.
                yield {"place": f"line {number}", "row": line.decode("utf-8", "replace")}


def _json_row(text: str) -> Row | DataError:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return DataError(f"not JSON ({error}); write one object a line")
    return row if isinstance(row, dict) else DataError("not a JSON object; write one object a line")


def files_below(folder: Path, kinds: Collection[str]) -> list[Path]:
    """Files with one of these suffixes, in order, that somebody may have put there as data.

    Left out are hidden files and folders, and what runs and ablations wrote below this folder.
    """
    paths: list[Path] = []
    for name, below, files in os.walk(folder):
        here = Path(name)
        below[:] = [n for n in below if n[0] != "." and not _is_output(here / n)]
        paths += [here / n for n in files if n[0] != "." and Path(n).suffix.lower() in kinds]
    return sorted(paths)


def _is_output(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in marks) for marks in OUTPUT_MARKS)
