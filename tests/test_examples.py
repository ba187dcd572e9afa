"""The examples' data set: golds worked out again from the pixels, and files as people have them."""

from __future__ import annotations

import io
import re
import runpy
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.ndimage import label

from tasks.checkers import CHECKERS, Gold
from tasks.free_text import parse_free

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "charts"
COLOURS = {"red": (208, 48, 48), "green": (48, 160, 48), "blue": (48, 80, 208),
           "yellow": (224, 176, 32)}  # fmt: skip


@pytest.fixture(scope="module")
def made() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        names = runpy.run_path(str(FOLDER / "make.py"))
        sys.modules.pop("pictures")
    return names


def rows_of(made: Any, kind: str, count: int = 40) -> list[Any]:
    rng = np.random.default_rng(1)
    return [made[kind](rng) for _ in range(count)]


def is_right(row: Any, said: str) -> bool:
    gold = Gold((row.question.gold,), row.question.choices)
    return CHECKERS[row.question.verifier].right(said, gold)


def coloured(image: bytes, name: str) -> np.ndarray:
    """bool [64, 64]: the pixels of a colour."""
    pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).astype(int)
    return np.abs(pixels - COLOURS[name]).sum(-1) < 40


def counted(image: bytes) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """(colour, shape) -> the cells, found as connected pixels; a square fills its bounds."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for name in COLOURS:
        labels, count = label(coloured(image, name))
        for n in range(1, count + 1):
            rows, columns = np.nonzero(labels == n)
            full = len(rows) == np.ptp(rows) * np.ptp(columns) + np.ptp(rows) + np.ptp(columns) + 1
            cell = int(rows.mean() // 16), int(columns.mean() // 16)
            found.setdefault((name, "square" if full else "disc"), []).append(cell)
    return found


def test_scenes_hold_what_their_labels_and_answers_say(made: Any) -> None:
    asked = set()
    for row in rows_of(made, "scene", 150):
        found = counted(row.images[0])
        told = dict(line.rsplit(" ", 1) for line in row.seen.split("\n"))
        assert {f"{c} {s}": str(len(cells)) for (c, s), cells in found.items()} == told
        by_colour = Counter({c: 0 for c in COLOURS})
        for (colour, _), cells in found.items():
            by_colour[colour] += len(cells)
        total, discs = sum(by_colour.values()), sum(
            len(cells) for (_, shape), cells in found.items() if shape == "disc"
        )  # fmt: skip
        words = row.problem.removeprefix("<image>")
        asked.add(" ".join(words.split()[:3]))
        colour = next((c for c in COLOURS if c in words), "")
        if words.startswith("Where"):
            (row_at, column_at), = (
                cell for (c, _), cells in found.items() if c == colour for cell in cells
            )  # fmt: skip
            answer = row.question.gold
            truth = [column_at * 16, row_at * 16, column_at * 16 + 16, row_at * 16 + 16]
            assert CHECKERS["box"].right(str(truth), Gold((answer,)))
            continue
        if words.startswith("Are there"):
            truth_text = "yes" if discs > total - discs else "no"
        elif words.startswith("Which colour"):
            truth_text = "ABCD"[row.question.choices.index(by_colour.most_common(1)[0][0])]
        else:
            truth_text = str(by_colour[colour])
        assert CHECKERS[row.question.verifier].right(
            truth_text, Gold((row.question.gold,), row.question.choices)
        ), row
    assert len(asked) == 7, "of four colours each is counted and looked for"


def test_bars_are_as_high_as_they_say(made: Any) -> None:
    for row in rows_of(made, "bars", 20):
        told = dict(line.split() for line in row.seen.split("\n"))
        high = {name: round(coloured(row.images[0], name).any(axis=1).sum() / 6.4) for name in told}
        assert high == {name: int(height) for name, height in told.items()}
        names = re.findall("|".join(COLOURS), row.problem.partition("?")[0])
        if row.question.verifier == "number":
            assert [int(row.question.gold)] == [high[name] for name in names]
        elif row.question.verifier == "choice":
            assert row.question.choices["ABCD".index(row.question.gold)] == max(
                high, key=high.__getitem__
            )
        else:
            assert row.question.gold == min(high, key=high.__getitem__)


def test_shares_of_a_pie_are_shares_of_its_pixels(made: Any) -> None:
    for row in rows_of(made, "pie", 20):
        told = dict(line.split() for line in row.seen.split("\n"))
        areas = {name: coloured(row.images[0], name).sum() for name in told}
        for name, share in told.items():
            assert abs(areas[name] / sum(areas.values()) - int(share) / 8) < 0.03
        name = re.findall("|".join(COLOURS), row.problem)[0]
        assert is_right(row, str(Fraction(int(told[name]), 8)))


def test_the_highest_point_of_a_line_is_where_its_highest_pixel_is(made: Any) -> None:
    kinds = set()
    for row in rows_of(made, "line", 20):
        pixels = np.asarray(Image.open(io.BytesIO(row.images[0])).convert("L"))
        y, x = np.argwhere(pixels < 100)[0]
        kinds.add(row.question.verifier)
        if row.question.verifier == "point":
            assert CHECKERS["point"].right(f"({x}, {y})", Gold((row.question.gold,)))
    assert kinds == {"point", "text"}


def test_tables_and_pairs_of_them_answer_from_what_they_show(made: Any) -> None:
    for row in rows_of(made, "table"):
        cells = [[int(cell) for cell in line.split()] for line in row.seen.split("\n")]
        asked = [int(n) - 1 for n in re.findall(r"\d+", row.problem.partition("?")[0])]
        if "column" in row.problem:
            truth = str(cells[asked[0]][asked[1]])
        elif "add up" in row.problem:
            truth = str(sum(cells[asked[0]]))
        else:
            truth = str(max(cells[asked[0]]))
        assert CHECKERS[row.question.verifier].right(
            truth, Gold((row.question.gold,), row.question.choices)
        ), row
    for row in rows_of(made, "pair"):
        assert row.problem.count("<image>") == len(row.images) == 2
        if "changed" in row.problem:
            one, other = (np.asarray(Image.open(io.BytesIO(i)).convert("L")) for i in row.images)
            cells = (one != other).reshape(4, 16, 4, 16).any(axis=(1, 3))
            assert int(row.question.gold) == cells.sum()
            continue
        discs = [
            sum(len(cells) for (_, shape), cells in counted(image).items() if shape == "disc")
            for image in row.images
        ]
        more = row.question.choices.index("first" if discs[0] > discs[1] else "second")
        assert discs[0] != discs[1] and row.question.gold == "AB"[more]


def test_the_files_are_as_people_have_them_and_the_same_for_a_seed(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "other"):
        monkeypatch.setattr(sys, "argv", ["make.py", "--rows", "50", "--out", str(tmp_path / name)])
        made["main"]()
    tables = [
        pq.read_table(tmp_path / name / f"{split}.parquet").to_pylist()
        for name in ("one", "other")
        for split in ("train", "test")
    ]
    assert tables[:2] == tables[2:]
    rows = [*tables[0], *tables[1]]
    assert len(rows) == 50 and len({row["id"] for row in rows}) == 50
    pictures = [
        {tuple(image["bytes"] for image in row["images"]) for row in table if row["images"]}
        for table in tables[:2]
    ]
    assert pictures[0] and pictures[1] and not pictures[0] & pictures[1]
    for row in rows:
        gold = Gold((row["answer"],), tuple(row["choices"]))
        assert CHECKERS[row["verifier"]].fault(gold) is None
        assert row["problem"].count("<image>") == len(row["images"])
        assert all(f") {choice}" in row["problem"] for choice in row["choices"])
        assert not row["images"] or Image.open(io.BytesIO(row["images"][0]["bytes"])).size == (
            64,
            64,
        )
    assert 0 < sum(bool(row["perception"]) for row in rows) < 50


def test_a_whole_data_set_has_all_kinds_and_checkers_and_no_picture_twice(made: Any) -> None:
    quick = tuple(
        (kind, 1 / 5) for kind in map(made.get, ("table", "scene", "geometry", "pair", "text"))
    )
    made["draw"].__globals__["KINDS"], whole = quick, made["KINDS"]
    try:
        rows = made["draw"](1500, 0)
    finally:
        made["draw"].__globals__["KINDS"] = whole
    assert sum(weight for _, weight in whole) == pytest.approx(1)
    assert {row.question.verifier for row in rows} == {
        "number",
        "expression",
        "choice",
        "text",
        "box",
    }
    shown = [row.images or row.problem for row in rows]
    assert len(set(shown)) == len(shown) == 1500
    assert {len(row.images) for row in rows} == {0, 1, 2}
    for row in rows:
        assert is_right(row, parse_free(row.response, "segments").answer), row


def test_bare_answers_change_what_is_demonstrated_and_nothing_else(made: Any) -> None:
    written, mixed = made["draw"](400, 3), made["draw"](400, 3, short=0.6)
    assert 0.5 < sum(row.short for row in mixed) / 400 < 0.7
    assert not any(row.short for row in written)
    for whole, row in zip(written, mixed, strict=True):
        assert (whole.problem, whole.images, whole.question) == (
            row.problem,
            row.images,
            row.question,
        )
        parsed = parse_free(row.response, "segments")
        assert not parsed.defects and is_right(row, parsed.answer)
        assert (parsed.perception == row.seen) == (not row.short)
        if not row.short:
            assert row.response == whole.response
