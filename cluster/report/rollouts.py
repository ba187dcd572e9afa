"""The rollouts of a report: which are shown, and what the page needs to show each of them."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.record.folder import by_name
from cluster.record.stored import turns_of
from cluster.report.charts import CELLS
from cluster.report.choice import Entry, cell_of, choose, evenly, read_index, whole_rows
from rollout.record import Turn, acts, as_turns
from tasks.core import SEGMENTS, DataError, Draws, Parsed, Problem, Task
from tasks.figures import compared_words, plain_words
from tasks.images import check_image
from tasks.load import load_task
from tasks.looking import pointed_at
from tasks.turns import read_turns

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
PROPORTION = (
    "They are not in proportion; the counts beside the filters say how many there were in all."
)


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
    steps_read = evenly(files, MOST_STEPS)
    problems: list[str] = []
    entries = [entry for file in steps_read for entry in read_index(file, "", problems)]
    chosen = sorted(choose(entries), key=lambda e: (e.step, e.row))
    selection = f"All {len(entries)} rollouts of {len(steps_read)} steps are here."
    if not entries:
        selection = "This run holds no rollouts."
    elif len(chosen) < len(entries):
        selection = (
            f"{len(chosen)} of {len(entries)} rollouts of {len(steps_read)} steps are here, chosen "
            "so that every step, task, defect and cell of seeing × thinking that occurs is "
            f"represented. {PROPORTION}"
        )
    if entries and len(steps_read) < len(files):
        read = f"{len(steps_read)} of the run's {len(files)} steps, evenly spaced"
        selection += f" They were read from {read}."
    return _as_shown({"": chosen}, [run_dir], entries, selection, problems)


def read_arms(runs: Mapping[str, Path], seed: int) -> Shown:
    """A handful of rollouts of the last step of each arm's run; `runs`: arm -> run folder.

    Each arm shows every cell of seeing × thinking that it has, and the arms show the same problems
    where they saw the same, which paired arms of one seed do.
    """
    problems: list[str] = []
    by_arm: dict[str, list[Entry]] = {}
    for arm, run in runs.items():
        files = sorted((run / "rollouts").glob("step-*.parquet"))
        if not files:
            problems.append(f"{arm}: its run of seed {seed} holds no rollouts.")
        elif arm_entries := read_index(files[-1], f"{arm}: ", problems):
            by_arm[arm] = arm_entries
    chosen = {arm: choose(entries, MOST_OF_AN_ARM) for arm, entries in by_arm.items()}
    often = Counter(
        p for arm_entries in chosen.values() for p in {e.problem_id for e in arm_entries}
    )
    for problem in sorted(often, key=lambda p: (-often[p], p))[:COMMON_PROBLEMS]:
        for arm, arm_entries in chosen.items():
            if all(e.problem_id != problem for e in arm_entries):
                arm_entries += [e for e in by_arm[arm] if e.problem_id == problem][:1]
    entries = [entry for arm_entries in by_arm.values() for entry in arm_entries]
    selection = "No arm left rollouts that could be read."
    if entries:
        selection = (
            f"{sum(map(len, chosen.values()))} of the {len(entries)} rollouts that {len(by_arm)} "
            f"arms made in their last step at seed {seed}: of each arm all cells of seeing × "
            f"thinking that it has, and of all arms the same problems. {PROPORTION}"
        )
    ordered = {arm: sorted(arm_entries, key=lambda e: e.row) for arm, arm_entries in chosen.items()}
    return _as_shown(ordered, [*runs.values()], entries, selection, problems)


def _as_shown(
    chosen: Mapping[str, Sequence[Entry]],
    runs: Sequence[Path],
    entries: Sequence[Entry],
    selection: str,
    problems: list[str],
) -> Shown:
    """`chosen`: arm ("" for a run alone) -> entries ordered by file; `entries`: all that were."""
    tasks = _tasks({e.task for arm_entries in chosen.values() for e in arm_entries}, problems)
    views = [
        _view(row, tasks.get(e.task)) | ({"arm": arm} if arm else {})
        for arm, arm_entries in chosen.items()
        for e, row in whole_rows(arm_entries)
    ]
    cap = _fit_texts(views)
    images, side = _images(
        [run / "images" for run in runs],
        dict.fromkeys(
            sha for view in views for part in (view, *view["turns"]) for sha in part["images"]
        ),
    )
    if cap:
        selection += f" Texts over {cap} characters are cut."
    if side:
        selection += (
            f" The {len(images)} images are stored again at {side} pixels to keep this file small."
        )
    counts = Counter((e.step, e.cell) for e in entries)
    cells = {
        step: tuple(counts[step, cell] for cell in range(len(CELLS)))
        for step in dict.fromkeys(e.step for e in entries)
    }
    return Shown(tuple(views), images, len(entries), selection, cells, tuple(problems))


def _tasks(names: set[str], problems: list[str]) -> dict[str, Task]:
    tasks = {}
    for name in sorted(names):
        try:
            tasks[name] = load_task(name)
        except ValueError as error:
            problems.append(f"responses are shown unparsed: {error}")
    return tasks


def _view(row: Mapping[str, Any], task: Task | None) -> dict[str, Any]:
    """One rollout for the page. Text is as the model wrote it; the page makes it harmless."""
    turns = _told(row)
    said = as_turns(row["prefix"] or "", row["text"] or "", turns)
    text, parsed = "".join(said), _parse(task, said)
    shift = len(row["prefix"] or "")
    pieces = _pieces(text, parsed, [(a + shift, b + shift) for a, b in acts(turns)])
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
        "images": row["image_sha256"],
        "prompt": row["prompt"],
        "true": row["true_perception"],
        "pieces": pieces,
        "figure": figure,
        "answered": answered,
        "cell": cell_of(row["a_p"], row["self_consistency"]),
        "saw": row["a_p"],
        "thought": row["self_consistency"],
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
        "turns": _turns(row, turns),
    }


def _told(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    """The turns of a response with an environment."""
    if not row["episode"]:
        return ()
    try:
        return turns_of(row["episode"])[0]
    except (ValueError, TypeError):
        return ()  # the rest of the row is whole


def _turns(row: Mapping[str, Any], turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """What was said, and where a call pointed."""
    image_hashes = list(row["shown_sha256"] or ())
    at, pictures = len(image_hashes) - sum(turn.images for turn in turns), len(row["image_sha256"])
    views = []
    for turn in turns:
        images, at = image_hashes[at : at + turn.images], at + turn.images
        call = pointed_at(turn.text, pictures)
        views.append(
            {
                "text": _cut(turn.text, 1000),
                "said": _cut(turn.said, 400),
                "images": images,
                "defects": [_cut(defect, 80) for defect in turn.defects],
                "reward": _number(turn.reward),
                "call": [call.picture, *call.numbers] if call and images else None,
            }
        )
    return views


def _parse(task: Task | None, turns: Sequence[str]) -> Parsed | None:
    if task is None:
        return None
    try:
        return read_turns(task, turns)
    except Exception:
        # A user's own parser that raises is the run's news, not the report's: shown unparsed.
        return None


def _pieces(text: str, parsed: Parsed | None, calls: Sequence[tuple[int, int]]) -> list[list[str]]:
    """The whole text as [segment or "", text] in order; nothing is left out.

    A call that stands within another segment parts it, as its tokens do.
    """
    read = (parsed, *parsed.earlier) if parsed else ()
    spans: list[tuple[int, int, str]] = [
        (a, b, s) for one in read for s, (a, b) in one.spans.items()
    ]
    for start, end in calls:
        halves = ((a, min(b, start), max(a, end), b, s) for a, b, s in spans)
        spans = [(start, end, "act")] + [
            part for a, b, c, d, s in halves for part in ((a, b, s), (c, d, s))
        ]
    pieces, at = [], 0
    for start, end, segment in sorted(span for span in spans if span[0] < span[1]):
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
        perception, answer, true = parsed.perception, parsed.answer, row["true_perception"]
        try:
            problem = Problem(
                row["problem_id"], row["task"], row["prompt"], true,
                truth=json.loads(row["truth"]), knobs={}, symmetry_key="",
            )  # fmt: skip
            return (
                None if perception is None else task.draw_perception(problem, perception).as_json(),
                None if answer is None else task.draw_answer(problem, perception, answer).as_json(),
            )
        except Exception:
            # A user's own task that fails at it, or the facts of an older version of the task.
            pass
    segment = next((text for name, text in reversed(pieces) if name == "perception"), "")
    perception_text = (re.sub(r"</?perception>", " ", segment) or row["perception"] or "")[:20_000]
    if not perception_text.strip():
        return None, None
    true = row["true_perception"]
    return (
        compared_words(true, perception_text) if true else plain_words(_cut(perception_text, 2000))
    ).as_json(), None


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
            remaining = cap
            for segment, text in pieces:
                view["pieces"].append([segment, _cut(text, remaining)])
                remaining = max(0, remaining - len(text))
            cut = cut or sum(len(text) for _, text in pieces) > cap or len(prompt + true) > cap
            if cap < TEXT_CAPS[1]:
                view["figure"], view["answered"], view["turns"] = None, None, []
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
        files = (folder / f"{name}.{kind}" for folder in folders for kind in ("png", "jpg"))
        file = next((file for file in files if file.is_file()), None)
        if file is not None:
            stored[name] = file.read_bytes()
    if sum(map(len, stored.values())) <= IMAGE_BYTES:
        png = b"\x89PNG"
        return {
            h: _uri("image/png" if data.startswith(png) else "image/jpeg", data)
            for h, data in stored.items()
        }, None
    sample = evenly(sorted(stored), 8)
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


def _number(value: Any) -> float | None:
    """A finite float of at most 6 digits, or None: JSON has no NaN."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.6g}")


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}–{high}"
