"""The rollouts of a report: which are shown, and what the page needs to show each of them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.record.folder import ROLLOUT_SCHEMA, by_name
from cluster.report.charts import CELLS
from tasks.core import SEGMENTS, DataError, Draws, Parsed, Problem, Task
from tasks.figures import compared_words
from tasks.images import check_image
from tasks.load import load_task

MOST_ROLLOUTS = 500
MOST_STEPS = 250
"""Steps whose rollouts are read; of a longer run these, evenly spaced, its ends included."""
MOST_OF_AN_ARM = 16
"""Rollouts of each arm of an ablation, before those that make problems common to all."""
COMMON_PROBLEMS = 8
IMAGE_BYTES = 4_800_000
"""Of all images together, before base64 adds a third."""
TEXT_BYTES = 2_200_000
"""Of all rollouts as JSON; longer texts are cut until it holds."""
TEXT_CAPS = (6000, 3000, 1500, 700, 300)
IMAGE_SIDES = (448, 320, 224, 160, 112, 80)

_INDEX_COLUMNS = (
    "rollout_id", "group_id", "problem_id", "task", "a", "a_p", "self_consistency", "defects",
    "image_sha256",
)  # fmt: skip
_UNUSED_COLUMNS = ("prompt_ids", "response_ids", "logprobs", "knobs", "symmetry_key")


@dataclass(frozen=True)
class Entry:
    """A rollout as far as choosing needs it: `file` and `row` say where the rest is."""

    file: Path
    row: int
    step: int
    rollout_id: str
    problem_id: str
    task: str
    image: str
    cell: int
    """Index into `CELLS`."""
    defects: tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """What the rollout browser holds.

    Attributes:
        rollouts: JSON-able, one a rollout, ordered by step; see `_view`.
        images: hash -> data URI.
        total: rollouts read; `kept` of them are in `rollouts`.
        how: in words, how they were chosen and what was cut.
        cells: step -> rollouts read in each of `CELLS`.
    """

    rollouts: tuple[dict[str, Any], ...]
    images: Mapping[str, str]
    total: int
    how: str
    cells: Mapping[int, tuple[int, ...]]
    problems: tuple[str, ...]
    """What could not be read, in words."""


def read_shown(run_dir: Path) -> Shown:
    """Read a run's rollouts, choose at most `MOST_ROLLOUTS`, and make them ready for the page."""
    files = sorted((run_dir / "rollouts").glob("step-*.parquet"))
    chosen_files = _evenly(files, MOST_STEPS)
    problems: list[str] = []
    entries: list[Entry] = []
    for file in chosen_files:
        try:
            entries += _index(file)
        except (pa.ArrowException, OSError, ValueError) as error:
            problems.append(f"rollouts/{file.name} cannot be read: {type(error).__name__}: {error}")
    counts: dict[int, list[int]] = defaultdict(lambda: [0] * len(CELLS))
    for entry in entries:
        counts[entry.step][entry.cell] += 1
    chosen = sorted(choose(entries), key=lambda e: (e.step, e.row))
    tasks = _tasks({e.task for e in chosen}, problems)
    views = [_view(row, tasks.get(e.task)) for e, row in _rows(chosen)]
    cap = _fit_texts(views)
    images, side = _images([run_dir / "images"], dict.fromkeys(v["image"] for v in views))
    how = _how(len(entries), len(chosen), len(files), len(chosen_files), cap, side, len(images))
    cells = {step: tuple(row) for step, row in counts.items()}
    return Shown(tuple(views), images, len(entries), how, cells, tuple(problems))


def read_arms(runs: Mapping[str, Path], seed: int) -> Shown:
    """A handful of rollouts of the last step of each arm's run; `runs`: arm -> run folder.

    Each arm shows every cell of seeing × thinking that it has, and the arms show the same problems
    where they saw the same, which paired arms of one seed do.
    """
    problems: list[str] = []
    by_arm: dict[str, list[Entry]] = {}
    for arm, run in runs.items():
        files = sorted((run / "rollouts").glob("step-*.parquet"))
        try:
            by_arm[arm] = _index(files[-1])
        except IndexError:
            problems.append(f"{arm}: its run of seed {seed} holds no rollouts.")
        except (pa.ArrowException, OSError, ValueError) as error:
            said = f"rollouts/{files[-1].name} cannot be read: {type(error).__name__}: {error}"
            problems.append(f"{arm}: {said}")
    chosen = {arm: choose(entries, MOST_OF_AN_ARM) for arm, entries in by_arm.items()}
    often = Counter(p for found in chosen.values() for p in {e.problem_id for e in found})
    common = sorted(often, key=lambda p: (-often[p], p))[:COMMON_PROBLEMS]
    for arm, found in chosen.items():
        for problem in common:
            if all(e.problem_id != problem for e in found):
                found += [e for e in by_arm[arm] if e.problem_id == problem][:1]
    tasks = _tasks({e.task for found in chosen.values() for e in found}, problems)
    views = [
        _view(row, tasks.get(e.task)) | {"arm": arm}
        for arm, found in chosen.items()
        for e, row in _rows(sorted(found, key=lambda e: e.row))
    ]
    cap = _fit_texts(views)
    folders = [run / "images" for run in runs.values()]
    images, side = _images(folders, dict.fromkeys(v["image"] for v in views))
    counts: dict[int, list[int]] = defaultdict(lambda: [0] * len(CELLS))
    for entry in (e for entries in by_arm.values() for e in entries):
        counts[entry.step][entry.cell] += 1
    total = sum(map(len, by_arm.values()))
    how = (
        f"{len(views)} of the {total} rollouts that {len(by_arm)} arms made in their last step at "
        f"seed {seed}: of each arm all cells of seeing × thinking that it has, and of all arms the "
        "same problems. They are not in proportion; the counts beside the filters say how many "
        "there were in all."
        if total
        else "No arm left rollouts that could be read."
    )
    cells = {step: tuple(row) for step, row in counts.items()}
    return Shown(tuple(views), images, total, how + _cuts(cap, side, len(images)), cells,
                 tuple(problems))  # fmt: skip


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

    by_cell: dict[tuple[int, str], list[Entry]] = defaultdict(list)
    by_defect: dict[str, list[Entry]] = defaultdict(list)
    by_step: dict[int, list[Entry]] = defaultdict(list)
    by_problem: dict[str, list[Entry]] = defaultdict(list)
    strata: dict[tuple[int, str, int], list[Entry]] = defaultdict(list)
    for entry in order:
        by_cell[entry.cell, entry.task].append(entry)
        by_step[entry.step].append(entry)
        by_problem[entry.problem_id].append(entry)
        strata[entry.step, entry.task, entry.cell].append(entry)
        for defect in entry.defects:
            by_defect[defect].append(entry)
    for found in (by_cell[key] for key in sorted(by_cell)):
        take(found, max(1, min(5, limit // (2 * len(by_cell)))))
    for defect in sorted(by_defect, key=lambda d: (len(by_defect[d]), d))[: limit // 4]:
        take(by_defect[defect], 1)
    again = [p for p, found in by_problem.items() if len({e.step for e in found}) > 1]
    for problem in sorted(again)[: limit // 8]:
        found = sorted(by_problem[problem], key=lambda e: e.step)
        take(found[:1], 1)
        take(found[-1:], 1)
    seen_steps = {e.step for e in chosen.values()}
    unseen = [s for s in sorted(by_step) if s not in seen_steps]
    for step in _evenly(unseen, limit - len(chosen)):
        take(by_step[step], 1)
    images = {e.image for e in chosen.values()}
    while len(chosen) < limit:
        for key in sorted(strata):
            left = [e for e in strata[key] if e.rollout_id not in chosen]
            strata[key] = left
            if left:
                best = next((e for e in left if e.image in images), left[0])
                take([best], 1)
                images.add(best.image)
    return list(chosen.values())


def _index(file: Path) -> list[Entry]:
    lacking = set(ROLLOUT_SCHEMA.names) - set(pq.read_schema(file).names) - set(_UNUSED_COLUMNS)
    if lacking:
        raise ValueError(f"columns {sorted(lacking)} are missing, as of another version")
    step = int(file.stem.removeprefix("step-"))
    rows = pq.read_table(file, columns=list(_INDEX_COLUMNS)).to_pylist()
    return [
        Entry(
            file=file,
            row=i,
            step=step,
            rollout_id=row["rollout_id"],
            problem_id=row["problem_id"],
            task=row["task"],
            image=row["image_sha256"],
            cell=cell_of(row["a_p"], row["self_consistency"]),
            defects=tuple(row["defects"] or ()),
        )
        for i, row in enumerate(rows)
    ]


def cell_of(seen: bool | None, thought: bool | None) -> int:
    """Index into `CELLS`; the last where the task's own code failed."""
    if seen is None or thought is None:
        return 4
    return (0 if seen else 2) + (0 if thought else 1)


def _rows(chosen: Sequence[Entry]) -> Iterable[tuple[Entry, dict[str, Any]]]:
    """Each chosen entry with its whole row; `chosen` is ordered by file."""
    by_file: dict[Path, list[Entry]] = defaultdict(list)
    for entry in chosen:
        by_file[entry.file].append(entry)
    for file, found in by_file.items():
        wanted = pa.schema([field for field in ROLLOUT_SCHEMA if field.name not in _UNUSED_COLUMNS])
        table = pq.read_table(file, schema=wanted).take([e.row for e in found])
        yield from zip(found, table.to_pylist(), strict=True)


def _tasks(names: set[str], problems: list[str]) -> dict[str, Task]:
    found = {}
    for name in sorted(names):
        try:
            found[name] = load_task(name)
        except ValueError as error:
            problems.append(f"responses are shown unparsed: {error}")
    return found


def _view(row: Mapping[str, Any], task: Task | None) -> dict[str, Any]:
    """One rollout for the page. Text is as the model wrote it; the page makes it harmless."""
    text = (row["prefix"] or "") + (row["text"] or "")
    parsed = _parse(task, text)
    pieces = _pieces(text, parsed)
    figure, answered = _figures(row, task, parsed, pieces)
    versions = row["versions"] or [0]
    segments = Counter(row["segments"] or ())
    terms, advantages = (
        [[name, _number(value)] for name, value in by_name(row[column] or ()).items()]
        for column in ("terms", "advantages")
    )
    return {
        "id": row["rollout_id"],
        "group": row["group_id"],
        "step": row["step"],
        "task": row["task"],
        "problem": row["problem_id"],
        "kind": row["kind"] if row["view"] == "shown" else f"{row['kind']}, image {row['view']}",
        "image": row["image_sha256"],
        "prompt": row["prompt"],
        "true": row["true_perception"],
        "pieces": pieces,
        "figure": figure,
        "answered": answered,
        "cell": cell_of(row["a_p"], row["self_consistency"]),
        "a": row["a"],
        "leak": row["leak"],
        "graded": _number(row["a_p_graded"]),
        "terms": terms,
        "total": _number(row["total"]),
        "advantages": advantages,
        "note": "dropped" if row["dropped"] else "zero variance" if row["zero_variance"] else "",
        "failures": [_cut(f, 400) for f in (row["failures"] or ())[:8]],
        "defects": [_cut(d, 80) for d in (row["defects"] or ())[:20]],
        "version": _span(min(versions), max(versions)),
        "tokens": {name: segments[i] for i, name in [*enumerate(SEGMENTS), (-1, "outside")]},
        "finish": row["finish_reason"],
    }


def _parse(task: Task | None, text: str) -> Parsed | None:
    if task is None:
        return None
    try:
        return task.parse(text)
    except Exception:
        # A user's own parser that raises is the run's news, not the report's: shown unparsed.
        return None


def _pieces(text: str, parsed: Parsed | None) -> list[list[str]]:
    """The whole text as [segment or "", text] in order; nothing is left out."""
    spans = sorted((a, b, s) for s, (a, b) in (parsed.spans if parsed else {}).items() if a < b)
    pieces, at = [], 0
    for start, end, segment in spans:
        if start < at:
            continue  # overlapping spans of a user's own task
        pieces += [["", text[at:start]]] if text[at:start].strip() else []
        pieces.append([segment, text[start:end]])
        at = end
    return pieces + ([["", text[at:]]] if text[at:].strip() or not pieces else [])


def _figures(
    row: Mapping[str, Any],
    task: Task | None,
    parsed: Parsed | None,
    pieces: Sequence[Sequence[str]],
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What was seen and what was answered, as the task draws it; else the texts compared."""
    if isinstance(task, Draws) and parsed is not None:
        seen, answer, true = parsed.perception, parsed.answer, row["true_perception"]
        try:
            problem = Problem(
                row["problem_id"], row["task"], row["prompt"], b"", true,
                truth=json.loads(row["truth"]), knobs={}, symmetry_key="",
            )  # fmt: skip
            return (
                None if seen is None else task.draw_perception(problem, seen).as_json(),
                None if answer is None else task.draw_answer(problem, seen, answer).as_json(),
            )
        except Exception:
            # A user's own task that fails at it, or the facts of an older version of the task.
            pass
    segment = "".join(text for name, text in pieces if name == "perception")
    told = re.sub(r"</?perception>", " ", segment) or row["perception"] or ""
    if not told.strip():
        return None, None
    return compared_words(row["true_perception"][:2000], told[:2000]).as_json(), None


def embedded(value: Any) -> str:
    """JSON that can stand inside an HTML script element: ASCII, without `<`, `>` and `&`."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _fit_texts(views: Sequence[dict[str, Any]]) -> int | None:
    """Cut texts in place until all views fit `TEXT_BYTES`; the cap in characters, if one."""
    whole = [(view["pieces"], view["prompt"], view["true"]) for view in views]
    for cap in TEXT_CAPS:
        cut = False
        for view, (pieces, prompt, true) in zip(views, whole, strict=True):
            view["pieces"], view["prompt"], view["true"] = [], _cut(prompt, cap), _cut(true, cap)
            left = cap
            for segment, text in pieces:
                view["pieces"].append([segment, _cut(text, left)])
                left = max(0, left - len(text))
            cut = cut or sum(len(text) for _, text in pieces) > cap or len(prompt + true) > cap
            if cap < TEXT_CAPS[1]:
                view["figure"], view["answered"] = None, None
        if len(embedded(views)) <= TEXT_BYTES:
            return cap if cut else None
    return TEXT_CAPS[-1]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} … [{len(text) - most} characters cut]"


def _images(folders: Sequence[Path], hashes: Iterable[str]) -> tuple[dict[str, str], int | None]:
    """(hash -> data URI, longest side if they had to be made smaller), each image once.

    The first folder that has an image is read; a hash without a readable file is left out. Where
    the files are too many bytes, all are stored again as JPEG, the smaller the more there are.
    """
    stored = {}
    for name in (h for h in hashes if re.fullmatch(r"[0-9a-f]{64}", h or "")):
        files = (folder / f"{name}.png" for folder in folders)
        file = next((file for file in files if file.is_file()), None)
        if file is not None:
            stored[name] = file.read_bytes()
    if sum(map(len, stored.values())) <= IMAGE_BYTES:
        png = b"\x89PNG"
        return {
            h: _uri("image/png" if data.startswith(png) else "image/jpeg", data)
            for h, data in stored.items()
        }, None
    sample = _evenly(sorted(stored), 8)
    for side in IMAGE_SIDES:
        # A few images tell whether this size can do, so that most are encoded once.
        tried = sum(len(_smaller(stored[h], side)) for h in sample)
        last = side == IMAGE_SIDES[-1]
        if not last and tried / len(sample) * len(stored) > IMAGE_BYTES:
            continue
        small = {h: _smaller(data, side) for h, data in stored.items()}
        if last or sum(map(len, small.values())) <= IMAGE_BYTES:
            return {h: _uri("image/jpeg", data) for h, data in small.items() if data}, side
    raise AssertionError("the last side returns")


def _smaller(data: bytes, side: int) -> bytes:
    """JPEG of at most `side` pixels; b"" for what is no image."""
    try:
        small = check_image(data, "image")
    except DataError:
        return b""
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=75)
    return out.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _how(
    total: int, kept: int, files: int, read: int, cap: int | None, side: int | None, images: int
) -> str:
    if not total:
        return "This run holds no rollouts."
    said = f"All {total} rollouts of {read} steps are here."
    if kept < total:
        said = (
            f"{kept} of {total} rollouts of {read} steps are here, chosen so that every step, "
            "task, defect and cell of seeing × thinking that occurs is represented. They are not "
            "in proportion; the counts beside the filters say how many there were in all."
        )
    if read < files:
        said += f" They were read from {read} of the run's {files} steps, evenly spaced."
    return said + _cuts(cap, side, images)


def _cuts(cap: int | None, side: int | None, images: int) -> str:
    said = f" Texts over {cap} characters are cut." if cap else ""
    if side:
        said += f" The {images} images are stored again at {side} pixels to keep this file small."
    return said


def _number(value: Any) -> float | None:
    """A finite float of at most 6 digits, or None: JSON has no NaN."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.6g}")


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}–{high}"


def _evenly(things: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of a sequence, evenly spaced, both ends included."""
    if len(things) <= most:
        return list(things)
    if most <= 1:
        return list(things[:most])
    return [things[round(i * (len(things) - 1) / (most - 1))] for i in range(most)]
