"""Thousands of spoilt rows: each is refused in a line or taken for exactly what it says."""

import base64
import io
import json
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from tasks.core import DataError
from tasks.dataset_import import import_rows
from tasks.datasets import read_examples
from tasks.images import check_image
from tests.support.image_files import chunk, encoded, noise
from tests.support.puzzles import TASKS

GRIDS = ["[[0,2,3,4],[3,4,0,2],[2,1,4,3],[4,3,2,0]]", "[[1,0,3,4],[3,4,1,0],[0,1,4,3],[4,3,0,1]]"]
GRAPHS = ['{"v":4,"c":3,"edges":[[0,1],[0,2],[1,2],[2,3]]}', '{"v":3,"c":2,"edges":[[0,1],[1,2]]}']
TRUTHS = {"sudoku": GRIDS, "graph_coloring": GRAPHS}
DEEP: list[Any] = []
for _ in range(400):
    DEEP = [DEEP]
VALUES = [
    None, True, 0, -7, 1.5, float("nan"), float("inf"), 10**400, "", " ", "\0", "\ud800", "é\u202e",
    "x" * 5000, "data:", "data:image/png;base64,", "https://a.b/c.png", "/dev/zero", "..", "a\nb",
    [], [None], {}, {"bytes": 3}, {"path": "a.png"}, {"bytes": "", "path": None}, DEEP, [[1, 2]],
]  # fmt: skip
ROWS, A_FILE = 2000, 50
FORMS = ("struct", "path", "base64", "uri", "list", "bytes")


def pictures() -> list[bytes]:
    """Small files of the kinds that people have."""
    photo, exif = noise(16, 12), Image.Exif()
    exif[0x0112] = 6
    exif[282] = 72.0  # a rational
    plain, turned = encoded(photo), photo.rotate(180)
    text = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2_000_000)))
    red, green, _ = photo.split()
    deep = Image.fromarray((np.asarray(red).astype(np.uint16) + 1) * 200)
    faded = photo.convert("RGBA")
    faded.putalpha(green)
    return [
        plain,
        plain[:33] + text + plain[33:],
        encoded(photo, exif=exif),
        encoded(photo.quantize(9), transparency=3),
        encoded(faded),
        encoded(deep),
        encoded(photo.convert("1")),
        encoded(photo, "JPEG", exif=exif),
        encoded(photo, "JPEG", progressive=True, quality=60),
        encoded(photo.convert("CMYK"), "JPEG"),
        encoded(photo.convert("L"), "JPEG"),
        encoded(photo, "MPO", save_all=True, append_images=[turned]),
        encoded(faded, "WEBP", lossless=True),
        encoded(photo, "WEBP", exif=exif),
        encoded(photo, "WEBP", save_all=True, append_images=[turned]),
        encoded(photo, "GIF"),
    ]


def spoilt(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes flipped, cut, repeated or put in; a third of the time none."""
    changed = bytearray(data)
    for _ in range(int(rng.choice([0, 0, 1, 1, 3, 20]))):
        at = int(rng.integers(len(changed) + 1))
        match int(rng.integers(6)):
            case 0:
                del changed[at:]
            case 1:
                changed[at:at] = rng.bytes(int(rng.integers(1, 9)))
            case 2:
                del changed[at : at + int(rng.integers(1, 9))]
            case _ if at < len(changed):
                changed[at] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def spoilt_row(task: str, data: bytes, form: str, rng: np.random.Generator) -> dict[str, Any]:
    letters = base64.b64encode(data).decode()
    path = f"{rng.integers(10**9)}.png"
    image = {
        "struct": {"bytes": data, "path": path},
        "path": path,
        "base64": letters,
        "uri": f"data:image/png;base64,{letters}",
        "list": [{"bytes": None, "path": path}],
        "bytes": data,
    }[form]
    truth = str(rng.choice(TRUTHS[task]))
    row = {"query": f"Ü {rng.integers(99)}", "image": image, "ground_truth": truth}
    if rng.random() < 0.3:
        row["ground_truth"] = spoilt(truth.encode(), rng).decode("utf-8", "replace")
    return row | {"_file": (path, data)}


def json_line(row: dict[str, Any], rng: np.random.Generator) -> bytes:
    """The row as a line, with a value of another type or bytes changed now and then."""
    if rng.random() < 0.3:
        names = ["query", "image", "ground_truth", "response", "other"]
        row[str(rng.choice(names))] = VALUES[int(rng.integers(len(VALUES)))]
    if rng.random() < 0.05:
        del row[str(rng.choice(["query", "image", "ground_truth"]))]
    line = json.dumps(row, ensure_ascii=bool(rng.integers(2))).encode("utf-8", "surrogatepass")
    match int(rng.integers(12)):
        case 0:
            line = spoilt(line, rng)
        case 1:
            line = b"\xef\xbb\xbf" + line
        case 2:
            line = line.decode("utf-8", "replace").encode("latin-1", "replace")
        case 3:
            line = b"[" * 5000 + line
    return line.replace(b"\n", b" ").replace(b"\0", b" ")


def source_image(value: Any, folder: Path) -> bytes:
    """What a row holds as its image, read in another way than the product does."""
    while isinstance(value, list):
        (value,) = value
    if isinstance(value, dict):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return value
    if (folder / value[:200]).is_file():
        return (folder / value).read_bytes()
    letters = value.split(",")[-1]
    return (base64.b64decode if {"+", "/"} & {*letters} else base64.urlsafe_b64decode)(letters)


def shown(data: bytes) -> np.ndarray | None:
    """The picture as Pillow alone reads it; None where it fails, as on large texts."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF data
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        ground = Image.new("RGBA", image.size, "white")
        return np.asarray(Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB"))
    except Exception:
        return None


def test_a_spoilt_row_is_refused_or_taken_for_what_it_says(tmp_path: Path) -> None:
    rng, seen, images = np.random.default_rng(12), Counter[str](), pictures()
    for number in range(ROWS // A_FILE):
        home = tmp_path / str(number)
        home.mkdir(parents=True)
        task, form = str(rng.choice(list(TRUTHS))), str(rng.choice(FORMS))
        lines = form not in ("struct", "bytes") and rng.random() < 0.8
        rows = []
        for _ in range(A_FILE):
            data = spoilt(images[int(rng.integers(len(images)))], rng)
            row = spoilt_row(task, data, form, rng)
            path, held = row.pop("_file")
            (home / path).write_bytes(held)
            rows.append(row)
        file = home / ("train.jsonl" if lines else "train.parquet")
        if lines:
            file.write_bytes(b"\n".join(json_line(row, rng) for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), file)
            if rng.random() < 0.1:
                file.write_bytes(spoilt(file.read_bytes(), rng))
        try:
            manifest = import_rows(file, TASKS[task], home / "out", skip_bad=True)
        except DataError as error:
            assert all(len(line) < 400 for line in str(error).splitlines()), error
            seen["file refused"] += A_FILE
            continue
        reasons = [bad["reason"] for bad in manifest["skipped"]]
        assert all("\n" not in reason and 0 < len(reason) <= 300 for reason in reasons)
        seen["row refused"] += len(reasons)
        left_out = {bad["row"] for bad in manifest["skipped"]}
        if lines:
            whole = enumerate(file.read_bytes().split(b"\n"), start=1)
            good = [
                json.loads(line.decode("utf-8-sig"))
                for n, line in whole
                if line.strip() and f"line {n}" not in left_out
            ]
        else:
            rows = pq.read_table(file).to_pylist()  # a changed byte may be one of a row
            good = [r for n, r in enumerate(rows) if f"row {n}" not in left_out]
        for row, example in zip(good, read_examples(home / "out"), strict=True):
            problem = example.problem
            assert problem.prompt == row["query"]
            truth = row["ground_truth"]
            truth = json.loads(truth) if isinstance(truth, str) else truth
            ours = json.loads(TASKS[task].to_ground_truth(problem))
            if task == "sudoku":
                assert ours == truth
            else:
                assert (ours["v"], ours["c"]) == (truth["v"], truth["c"])
                assert ours["edges"] == sorted(truth["edges"])
            assert problem.images[0] == source_image(row["image"], home)
            expected, found = (
                shown(problem.images[0]),
                np.asarray(check_image(problem.images[0], "x")),
            )
            seen["taken" if expected is not None else "taken, Pillow alone fails"] += 1
            assert expected is None or np.array_equal(found, expected)
    assert seen["taken"] > 300 and seen["row refused"] > 300, seen
    assert seen.total() >= ROWS - A_FILE
