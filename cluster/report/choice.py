"""Which of the stored rollouts a report shows."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.record.folder import MAY_BE_ABSENT, ROLLOUT_SCHEMA, read_rows

MOST_ROLLOUTS = 500

_INDEX_COLUMNS = (
    "rollout_id", "group_id", "problem_id", "task", "a", "a_p", "self_consistency", "defects",
    "image_sha256",
)  # fmt: skip
_UNUSED_COLUMNS = ("prompt_ids", "response_ids", "logprobs", "knobs", "symmetry_key", "extra")


@dataclass(frozen=True)
class Entry:
    """A rollout as far as choosing needs it: `file` and `row` say where the rest is."""

    file: Path
    row: int
    step: int
    rollout_id: str
    problem_id: str
    task: str
    images: tuple[str, ...]
    cell: int
    """Index into `CELLS`."""
    defects: tuple[str, ...]


def choose(entries: Sequence[Entry], limit: int = MOST_ROLLOUTS) -> list[Entry]:
    """At most `limit` entries in which every kind of rollout that occurs is represented.

    First some of each cell of each task, one of each defect, both ends of problems that occur
    at several steps, and one of each step; then in turn from each step, task and cell, problems
    already shown first. A hash of the id decides where nothing else does, so the choice is the
    same each time and favours none.
    """
    if len(entries) <= limit:
        return list(entries)
    order = sorted(entries, key=lambda e: hashlib.sha256(e.rollout_id.encode()).digest())
    chosen: dict[str, Entry] = {}

    def take(candidates: Iterable[Entry], most: int) -> None:
        for entry in candidates:
            if most <= 0 or len(chosen) >= limit:
                return
            if entry.rollout_id not in chosen:
                chosen[entry.rollout_id] = entry
                most -= 1

    def grouped(keys: Callable[[Entry], Iterable[Any]]) -> dict[Any, list[Entry]]:
        groups: dict[Any, list[Entry]] = defaultdict(list)
        for entry in order:
            for key in keys(entry):
                groups[key].append(entry)
        return groups

    by_cell = grouped(lambda e: [(e.cell, e.task)])
    by_defect = grouped(lambda e: e.defects)
    by_step = grouped(lambda e: [e.step])
    by_problem = grouped(lambda e: [e.problem_id])
    strata = grouped(lambda e: [(e.step, e.task, e.cell)])
    for group in (by_cell[key] for key in sorted(by_cell)):
        take(group, max(1, min(5, limit // (2 * len(by_cell)))))
    for defect in sorted(by_defect, key=lambda d: (len(by_defect[d]), d))[: limit // 4]:
        take(by_defect[defect], 1)
    again = [p for p, group in by_problem.items() if len({e.step for e in group}) > 1]
    for problem in sorted(again)[: limit // 8]:
        group = sorted(by_problem[problem], key=lambda e: e.step)
        take([group[0], group[-1]], 2)
    seen_steps = {e.step for e in chosen.values()}
    unseen = [s for s in sorted(by_step) if s not in seen_steps]
    for step in evenly(unseen, limit - len(chosen)):
        take(by_step[step], 1)
    images = {e.images for e in chosen.values()}
    while len(chosen) < limit:
        for key in sorted(strata):
            remaining = [e for e in strata[key] if e.rollout_id not in chosen]
            strata[key] = remaining
            if remaining:
                best = next((e for e in remaining if e.images in images), remaining[0])
                take([best], 1)
                images.add(best.images)
    return list(chosen.values())


def read_index(file: Path, whose: str, problems: list[str]) -> list[Entry]:
    """The entries of a file of rollouts; of one that cannot be read none, and why."""
    try:
        return _index(file)
    except (pa.ArrowException, OSError, ValueError) as error:
        problem = f"rollouts/{file.name} cannot be read: {type(error).__name__}: {error}"
        problems.append(f"{whose}{problem}")
        return []


def _index(file: Path) -> list[Entry]:
    needed = set(ROLLOUT_SCHEMA.names) - {*_UNUSED_COLUMNS, *MAY_BE_ABSENT}
    lacking = needed - set(pq.read_schema(file).names)
    if lacking:
        raise ValueError(f"columns {sorted(lacking)} are missing, as of another version")
    step = int(file.stem.removeprefix("step-"))
    rows = read_rows(file, pa.schema([ROLLOUT_SCHEMA.field(n) for n in _INDEX_COLUMNS])).to_pylist()
    return [
        Entry(
            file=file,
            row=i,
            step=step,
            rollout_id=row["rollout_id"],
            problem_id=row["problem_id"],
            task=row["task"],
            images=tuple(row["image_sha256"]),
            cell=cell_of(row["a_p"], row["self_consistency"]),
            defects=tuple(row["defects"] or ()),
        )
        for i, row in enumerate(rows)
    ]


def cell_of(perceived: bool | None, thought: bool | None) -> int:
    """Index into `CELLS`; the last where one of the two is not known."""
    if perceived is None or thought is None:
        return 4
    return (0 if perceived else 2) + (0 if thought else 1)


def whole_rows(entries_chosen: Sequence[Entry]) -> Iterable[tuple[Entry, dict[str, Any]]]:
    """Each chosen entry with its whole row; `entries_chosen` is ordered by file."""
    by_file: dict[Path, list[Entry]] = defaultdict(list)
    for entry in entries_chosen:
        by_file[entry.file].append(entry)
    for file, entries in by_file.items():
        schema = pa.schema([field for field in ROLLOUT_SCHEMA if field.name not in _UNUSED_COLUMNS])
        table = read_rows(file, schema).take([e.row for e in entries])
        yield from zip(entries, table.to_pylist(), strict=True)


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of a sequence, evenly spaced, both ends included."""
    if len(items) <= most:
        return list(items)
    if most <= 1:
        return list(items[:most])
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
