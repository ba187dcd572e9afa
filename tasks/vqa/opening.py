"""From what a recipe names as data to rows of two sides: files, splits, bad rows, repeats."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tasks.core import DataError
from tasks.data_files import KINDS, DataFile, files_below
from tasks.datasets import StoredReader, file_hash, split_file
from tasks.free_text import instructions
from tasks.image_cells import Beside
from tasks.rows import Fact, Reader, ReadFile, Rows, Watch, look
from tasks.settings import TaskConfig
from tasks.split_names import side_of, split_of_file
from tasks.splits import SPLITS, Split, split_of_key
from tasks.vqa.layouts import layout_of, names_in
from tasks.vqa.reading import RowReader

HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?::([\w.-]+))?")
"""`owner/name` on the hub, or `owner/name:config`."""
FIRST_ROWS = 20
"""By which columns and struct fields are told."""
SHOWN = 5
"""Bad rows that are listed; the others are counted."""

Place = tuple[int, int]
MakeReader = Callable[[Sequence[str], Beside], Reader]
"""A reader for a file with these columns, whose paths are looked for there."""


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used: where it is, and why."""

    where: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without what is the row's own."""
        return re.sub(r"'[^']*'(\.\.\. of \d+ characters)?|\d[\d,.x]*", "...", self.reason)


@dataclass(frozen=True)
class Opened:
    """A data set: the rows of each side, what cannot be used, and how it was divided.

    `splits`: names as the data has them, with their numbers of good rows. `notes`: what a user is
    to hear.
    """

    rows: Mapping[Split, Rows]
    bad: Sequence[Bad] = ()
    splits: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()


def open_data(
    data: str | Mapping[Split, str], make_reader: MakeReader, watch: Watch | None = None
) -> Opened:
    """The rows of a data set.

    Args:
        data: a file, a folder, a name on the hub, or one of these for `train` and `test` each.
        make_reader: called once a file.
        watch: shows what takes long, the first time.

    A split's side is told by its name (`tasks.split_names`). Of several that are held out `test`
    is taken. Where nothing is held out by name, or by `data.test`, a share of the problems is, by
    a hash of images and question: those of one problem are always on one side.

    Raises DataError: nothing there, or a file that cannot be read.
    """
    files: list[ReadFile] = []
    splits: dict[str, list[Place]] = {}
    for side, source in data.items() if isinstance(data, Mapping) else [("", data)]:
        there = _files(source)
        own = [split for split in there if side in ("", side_of(split))]
        for split in own or there:
            name = side or split
            for file, folders in there[split]:
                read = DataFile(file, file_hash(file))
                first = [row for _, row in read.rows(range(min(FIRST_ROWS, len(read))))]
                try:
                    reader = make_reader(names_in(first), Beside(folders, fetches=True))
                except DataError as error:
                    raise DataError(f"{file}: {error}") from error
                files.append(look(read, reader, watch))
                splits.setdefault(name, [])
                for row, fact in enumerate(files[-1].facts):
                    splits.setdefault(side or fact.split or name, []).append((len(files) - 1, row))
    return _divided(files, {name: rows for name, rows in splits.items() if rows})


def open_stored(folder: str, task: str, watch: Watch | None = None) -> Opened:
    """The rows of a data set that was drawn or imported for a task (`tasks.datasets`).

    Raises DataError: as `split_file`, or a training problem that is, up to symmetry, held out.
    """
    files: list[ReadFile] = []
    bad: list[Bad] = []
    rows: dict[Split, Rows] = {}
    held_out: dict[str, str] = {}
    for split in reversed(SPLITS):
        file, sha256 = split_file(folder, split)
        files.append(look(DataFile(file, sha256), StoredReader(task), watch))
        seen: set[str] = set()
        places = []
        for row, fact in enumerate(files[-1].facts):
            repeated = f"id: {fact.id!r} occurs twice; make ids unique"
            if fault := fact.fault or (repeated if fact.id in seen else ""):
                bad.append(Bad(_where(files, (len(files) - 1, row)), fault))
                continue
            seen.add(fact.id)
            if split == "train" and fact.key in held_out:
                raise DataError(
                    f"{folder}: problem {fact.id} of split train is, up to symmetry, "
                    f"{held_out[fact.key]} of split test; take it out of one of them (`equipoise "
                    "tasks import --skip-bad` does)"
                )
            places.append((len(files) - 1, row))
        rows[split] = Rows(files, places)
        if split == "test":
            held_out = {fact.key: fact.id for fact in files[-1].facts}
    return Opened(rows, bad, {split: len(its) for split, its in rows.items()})


def row_reader(config: TaskConfig) -> MakeReader:
    """How a recipe's entry has the rows of a file read."""
    checker, options = config.judged
    by_row = config.checker.get("column", "") if isinstance(config.checker, dict) else ""

    def make(names: Sequence[str], beside: Beside) -> RowReader:
        layout = layout_of(names, config.columns, str(by_row))
        prompt = config.prompt or "{question}\n\n" + instructions(config.form)
        return RowReader(layout, beside, config.task_name, prompt, checker, options)

    return make


def bad_rows_message(bad: Sequence[Bad], remedy: str) -> str:
    """Bad rows: the first of them, a line each, how many have which reason, and what to do."""
    lines = [f"{row.where}: {row.reason}" for row in bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"... and {len(bad) - SHOWN:,} more")
        kinds = Counter(row.kind for row in bad).most_common()
        lines += [f"  {count:,} rows: {kind}" for kind, count in kinds[:SHOWN]]
        rest = sum(count for _, count in kinds[SHOWN:])
        lines += [f"  {rest:,} rows: other reasons"] if rest else []
    return "\n".join([*lines, f"{len(bad):,} row{'s' * (len(bad) != 1)} {remedy}"])


def _divided(files: Sequence[ReadFile], splits: Mapping[str, list[Place]]) -> Opened:
    bad: list[Bad] = []
    good: dict[str, list[Place]] = {}
    for name, places in splits.items():
        good[name] = []
        for file, row in places:
            fact = files[file].facts[row]
            if fact.fault:
                bad.append(Bad(_where(files, (file, row)), fact.fault))
            else:
                good[name].append((file, row))
    notes: list[str] = []
    held = [name for name in good if side_of(name) == "test"]
    if len(held) > 1:
        chosen = "test" if "test" in held else held[0]
        others = [name for name in held if name != chosen]
        notes.append(f"held out: split {chosen}; {', '.join(others)} not used")
        held = [chosen]
    test = [source_row for name in held for source_row in good[name]]
    train = [source_row for name in good if side_of(name) == "train" for source_row in good[name]]
    if not held:
        keys = {files[file].facts[row].key for file, row in train}
        out = {key for key in keys if split_of_key("vqa", key) == "test"}
        if keys and not out:  # of a few rows
            out = {min(keys, key=lambda key: hashlib.sha256(key.encode()).digest())}
        test = [source_row for source_row in train if _fact(files, source_row).key in out]
        notes.append(
            f"nothing is held out by name: {len(test):,} of {len(train):,} rows are, by a hash of "
            "images and question"
        )
        train = [source_row for source_row in train if _fact(files, source_row).key not in out]
    first = {files[file].facts[row].key: (file, row) for file, row in reversed(test)}
    unseen = []
    for source_row in train:
        twin = first.get(_fact(files, source_row).key)
        if twin is None:
            unseen.append(source_row)
        else:
            said = f"images and question are those of {_where(files, twin)}, which is held out"
            bad.append(Bad(_where(files, source_row), said))
    sides: dict[Split, list[Place]] = {"train": unseen, "test": test}
    rows = {side: Rows(files, sides[side], _ids(files, sides[side])) for side in SPLITS}
    return Opened(rows, bad, {name: len(places) for name, places in good.items()}, notes)


def _fact(files: Sequence[ReadFile], source_row: Place) -> Fact:
    file, number = source_row
    return files[file].facts[number]


def _where(files: Sequence[ReadFile], source_row: Place) -> str:
    return f"{files[source_row[0]].data.file}: {_fact(files, source_row).location}"


def _ids(files: Sequence[ReadFile], places: Iterable[Place]) -> dict[Place, str]:
    """Ids of rows whose problem was there before in the split: numbered."""
    seen: Counter[str] = Counter()
    ids = {}
    for file, row in places:
        own = files[file].facts[row].id
        seen[own] += 1
        if seen[own] > 1:
            ids[file, row] = f"{own}-{seen[own]}"
    return ids


def _files(source: str) -> dict[str, list[tuple[Path, list[Path]]]]:
    """Split -> its files, each with the folders in which its rows' paths are looked for."""
    path = Path(os.path.abspath(source))
    if path.is_file():
        if path.suffix.lower() not in KINDS:
            raise DataError(f"{source}: not one of {', '.join(KINDS)}; convert it to one of them")
        return {split_of_file(Path(path.parent.name) / path.name): [(path, [path.parent])]}
    if not path.is_dir():
        path = _fetched(source, path)
    files_of: dict[str, list[tuple[Path, list[Path]]]] = {}
    files = files_below(path, KINDS)
    # `datasets` writes further .json files beside rows, and arrow files of what was made of them.
    files = [p for p in files if p.suffix.lower() != ".json"] or files
    for file in files:
        inner = file.relative_to(path)
        if file.name.startswith("cache-"):
            continue
        folders = [path.joinpath(*inner.parts[:n]) for n in range(len(inner.parts) - 1, -1, -1)]
        files_of.setdefault(split_of_file(path.name / inner), []).append((file, folders))
    if not files_of:
        raise DataError(f"{source}: holds no file of rows ({', '.join(KINDS)})")
    return files_of


def _fetched(source: str, path: Path) -> Path:
    """The folder of a data set of the hub, fetched where it is not in the hub's cache yet."""
    match = HUB_NAME.fullmatch(source)
    if match is None or path.suffix.lower() in KINDS:
        beside = os.listdir(path.parent) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise DataError(f"{source}: no such file or folder ({path}){meant}")
    from huggingface_hub import snapshot_download

    name, config = match.groups()
    try:
        folder = Path(snapshot_download(name, repo_type="dataset"))
    except Exception as error:  # of the network, the hub, its cache
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source}: no such file or folder here ({path}), and the hub could not be asked for a "
            f"data set of that name: {type(error).__name__}: {why[:200]}"
        ) from error
    if config is None:
        return folder
    if not (folder / config).is_dir():
        there = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "none"
        raise DataError(f"{source}: no folder {config!r} in the data set; there are: {there}")
    return folder / config
