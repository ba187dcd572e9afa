"""Rows of data files as problems: looked at once, remembered by content, read in their turn."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol, overload

from tasks.core import DataError
from tasks.data_files import BATCH_ROWS, DataFile, Row
from tasks.datasets import Example
from tasks.files import put_text, user_cache
from tasks.images import check_image

LOOKING = 2
"""Raise it when rows are looked at differently: what was kept before counts no more."""

Watch = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Shows the progress of what is gone through: items, what is done, and of how many rows."""


class Reader(Protocol):
    """Makes problems of the rows of a file."""

    @property
    def fingerprint(self) -> str:
        """Of all that a row's `Fact` depends on beside the file's content."""

    @property
    def asks(self) -> str:
        """What the prompts depend on besides."""

    @property
    def picture_columns(self) -> frozenset[str]:
        """Columns that may be left out where the pictures are not asked for."""

    def read(self, row: Row, with_images: bool = True) -> Example:
        """The problem of a row, its images not looked at. Raises DataError naming the field."""

    def column(self, field: str) -> str:
        """The column of the file that `query` or `image` is read from."""

    def split_of(self, row: Row) -> str:
        """Which split a row says that it is of; "" where that is its file's to say."""

    def touched(self) -> Mapping[str, list[int] | None]:
        """Other files that were read, each with its state now, and paths where there is none."""

    def untouched(self, touched: Mapping[str, list[int] | None]) -> bool:
        """Whether these files are still as they were."""


@dataclass(frozen=True)
class Fact:
    """What is known of a row without reading it again.

    Attributes:
        location: where it is in its file (`row 3`, `line 4`).
        id, key: of its problem: `Problem.id`, `Problem.symmetry_key`.
        sizes: width and height of each image, in pixels.
        later: of each that answers an earlier turn of its response.
        split: which one it says that it is of, if it does.
        responds: whether it has a response to learn from.
        labelled: whether it says what is to be seen.
        fault: field and reason, where it cannot be used.
    """

    location: str
    id: str = ""
    key: str = ""
    sizes: tuple[tuple[int, int], ...] = ()
    later: tuple[tuple[int, int], ...] = ()
    split: str = ""
    responds: bool = False
    labelled: bool = False
    fault: str = ""


@dataclass(frozen=True)
class ReadFile:
    """A data file, what makes problems of its rows, and what is known of each."""

    data: DataFile
    reader: Reader
    facts: Sequence[Fact]


@dataclass(frozen=True)
class Rows(Sequence[Example]):
    """Rows of one or several files, read when they are asked for; none of them is at fault.

    `locations`: (file, row) of each. `ids`: by location, those that differ from the reader's.
    """

    files: Sequence[ReadFile] = ()
    locations: Sequence[tuple[int, int]] = ()
    ids: Mapping[tuple[int, int], str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.locations)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> Rows: ...
    def __getitem__(self, at: int | slice) -> Example | Rows:
        if isinstance(at, slice):
            return replace(self, locations=self.locations[at])
        file, row = self.locations[at]
        return self._example(self.locations[at], self.files[file].data.row(row))

    def without_images(self) -> Iterator[Example]:
        """All in order and in batches, but for their images: these are not read."""
        for (file, block), locations in groupby(
            self.locations, lambda p: (p[0], p[1] // BATCH_ROWS)
        ):
            source = self.files[file]
            start = block * BATCH_ROWS
            numbers = range(start, min(start + BATCH_ROWS, len(source.data)))
            rows = list(source.data.rows(numbers, source.reader.picture_columns))
            for location in locations:
                yield self._example(location, rows[location[1] - start][1], with_images=False)

    @property
    def labelled(self) -> bool:
        """Whether any row says what is to be seen."""
        return any(self.fact(at).labelled for at in range(len(self)))

    @property
    def fingerprint(self) -> str:
        """Of all that prompts and sizes of images depend on."""
        files = [(f.data.sha256, f.reader.fingerprint, f.reader.asks) for f in self.files]
        sizes = [self.fact(at).sizes for at in range(len(self))]
        return hashlib.sha256(repr((files, list(self.locations), sizes)).encode()).hexdigest()

    def fact(self, at: int) -> Fact:
        """What is known of a row."""
        file, row = self.locations[at]
        return self.files[file].facts[row]

    def where(self, at: int, field: str = "") -> str:
        """File and row, and the column of a field of the problem, to be read."""
        column = self.files[self.locations[at][0]].reader.column(field)
        return self._named(self.locations[at]) + (f": {column}" if field else "")

    def id(self, at: int) -> str:
        """The id of a row's problem."""
        return self.ids.get(self.locations[at], self.fact(at).id)

    def chosen(self, keep: Iterable[int]) -> Rows:
        """Those rows alone."""
        return replace(self, locations=[self.locations[at] for at in keep])

    def _example(
        self, location: tuple[int, int], row: Row | DataError, with_images: bool = True
    ) -> Example:
        try:
            if isinstance(row, DataError):
                raise row
            example = self.files[location[0]].reader.read(row, with_images)
        except DataError as error:
            raise DataError(f"{self._named(location)}: {error}") from error
        renamed = self.ids.get(location)
        if renamed is None:
            return example
        return example._replace(problem=replace(example.problem, id=renamed))

    def _named(self, location: tuple[int, int]) -> str:
        source = self.files[location[0]]
        return f"{source.data.file}: {source.facts[location[1]].location}"


def look(data: DataFile, reader: Reader, watch: Watch | None = None) -> ReadFile:
    """Look at every row of a file, images decoded, or find what was seen before."""
    whole = f"{LOOKING} {data.sha256} {reader.fingerprint}"
    cache = user_cache("facts") / f"{hashlib.sha256(whole.encode()).hexdigest()}.json"
    facts = _read_cache(cache, reader, len(data))
    if facts is None:
        facts = _looked_at(data, reader, watch)
        _write_cache(cache, reader, facts)
    return ReadFile(data, reader, facts)


def _looked_at(data: DataFile, reader: Reader, watch: Watch | None) -> list[Fact]:
    def fact(placed: tuple[str, Row | DataError]) -> Fact:
        location, row = placed
        try:
            if isinstance(row, DataError):
                raise row
            example = reader.read(row)
            problem, split = example.problem, reader.split_of(row)
            answers = tuple(image for exchange in example.earlier for image in exchange.images)
            sizes, later = (
                tuple(check_image(image, "image").size for image in images)
                for images in (problem.images, answers)
            )
        except DataError as error:
            return Fact(location, fault=" ".join(str(error).split())[:300])
        columns = bool(example.response), bool(problem.perception)
        return Fact(location, problem.id, problem.symmetry_key, sizes, later, split, *columns)

    facts: list[Fact] = []
    rows = data.rows()
    starts: Iterable[int] = range(0, len(data), BATCH_ROWS)
    if watch is not None:
        starts = watch(starts, f"looking at {data.file}", len(data))
    with ThreadPoolExecutor() as threads:  # Pillow decodes without Python's lock
        for _ in starts:  # a batch at a time: `map` holds all that it is given
            facts.extend(threads.map(fact, list(islice(rows, BATCH_ROWS))))
    return facts


def _read_cache(file: Path, reader: Reader, rows: int) -> list[Fact] | None:
    try:
        cached = json.loads(file.read_text(encoding="utf-8"))
        facts = [
            Fact(location, id, key, _pairs(sizes), _pairs(later), *others)
            for location, id, key, sizes, later, *others in cached["facts"]
        ]
        sound = len(facts) == rows and reader.untouched(cached["touched"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return facts if sound else None


def _pairs(pairs_stored: Any) -> tuple[tuple[int, int], ...]:
    return tuple((width, height) for width, height in pairs_stored)


def _write_cache(file: Path, reader: Reader, facts: Sequence[Fact]) -> None:
    """A full disk, or no folder to write in, costs only the time to look again."""
    values = [list(asdict(fact).values()) for fact in facts]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if os.access(file.parent, os.W_OK):
            put_text(file, json.dumps({"touched": reader.touched(), "facts": values}))
    except OSError:
        pass
