"""Import of files as people have them: which split a file is, what a row's image is, text."""

import base64
import json
import re
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.core import DataError
from tasks.dataset_import import import_rows
from tasks.datasets import read_dataset
from tasks.split_names import side_of, split_of_file, tells_side
from tests.support.shade import SHADE, png, tree


def rows(numbers: str) -> list[dict[str, Any]]:
    return [{"query": "q", "image": png(), "ground_truth": n} for n in numbers]


def layout(folder: Path, files: dict[str, str]) -> Path:
    """Parquet and JSON lines files by name, one row for each digit."""
    for name, numbers in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix.lower() == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows(numbers)), file)
        else:
            image = base64.b64encode(png()).decode()
            file.write_text("\n".join(json.dumps(row | {"image": image}) for row in rows(numbers)))
    return folder


def perceived(folder: Path, split: str) -> str:
    return "".join(problem.perception for problem in read_dataset(folder, split))


HELD_OUT = re.findall(
    r"\S+",
    """test tests testmini test_mini mini_test TEST testA TestB test2015 test-dev test_images val
    val2017 VAL_1 valA valid valid_seen validation Validation dev dev_1 eval evaluation holdout
    held_out heldOut hold-out minival sft_test my_val""",
)
BOTH = ["train_dev", "train_val"]
TRAINING = ["train", "training", "train_rl", "TRAIN", "train2017", "trainSFT", "trainval"]
UNTOLD = ["latest", "contest", "value", "valley", "device", "developer", "sft", "rl", "ood", "a"]


def test_a_splits_name_tells_its_side() -> None:
    assert [n for n in HELD_OUT + BOTH if side_of(n) != "test"] == []
    assert [n for n in TRAINING + UNTOLD if side_of(n) != "train"] == []
    assert [n for n in UNTOLD + BOTH if tells_side(n)] == []
    assert [n for n in TRAINING + HELD_OUT if not tells_side(n)] == []


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("train.jsonl", "train"),
        ("TRAIN.PARQUET", "train"),
        ("train-00000-of-00002.parquet", "train"),
        ("data/train-00001-of-00002-0123456789abcdef.parquet", "train"),
        ("train_00003.parquet", "train"),
        ("train/0000.parquet", "train"),
        ("default/test/0012.parquet", "test"),
        ("train/part-00000-1f0e-c000.snappy.parquet", "train"),
        ("test/images.parquet", "test"),
        ("images/test.parquet", "test"),
        ("test/testmini-0.parquet", "testmini_0"),
        ("train/train_sft.parquet", "train_sft"),
        ("Val/en/0000.parquet", "val"),
        ("testA.parquet", "test_a"),
        ("a.b/sft.parquet", "sft"),
        ("geometry/0000.parquet", "geometry"),
        ("0000.parquet", "source"),
    ],
)
def test_the_split_of_a_file(file: str, split: str) -> None:
    assert split_of_file("source" / PurePath(file)) == split


def test_a_file_between_two_sides_is_refused(tmp_path: Path) -> None:
    layout(tmp_path / "in", {"eval/train.parquet": "1"})
    with pytest.raises(DataError, match=r"in/eval/train\.parquet: is it held out\? .*rename one"):
        import_rows(tmp_path / "in", SHADE, tmp_path / "out", skip_bad=True)


@pytest.mark.parametrize(
    "files",
    [
        {"train/0000.parquet": "123", "test/0000.parquet": "4"},
        {"data/train-00000-of-00002-aabbccdd.parquet": "12", "test-00000-of-00001.parquet": "4"}
        | {"data/train-00001-of-00002-ddeeff00.parquet": "3"},
        {"train.jsonl": "123", "deep/er/TEST.jsonl": "4", ".cache/train.parquet": "9"},
        {"train-0001.parquet": "1", "train-0002.jsonl": "23", "Test.PARQUET": "4"},
    ],
)
def test_files_come_to_their_splits_in_order(tmp_path: Path, files: dict[str, str]) -> None:
    manifest = import_rows(layout(tmp_path / "in", files), SHADE, tmp_path / "out")
    assert {s: e["side"] for s, e in manifest["splits"].items()} == {
        "train": "train",
        "test": "test",
    }
    assert perceived(tmp_path / "out", "train") == "123"
    assert perceived(tmp_path / "out", "test") == "4"
    assert manifest["imported_from"].keys() == {f for f in files if f[0] != "."}


def test_a_linked_file_has_the_name_of_the_link(tmp_path: Path) -> None:
    blob = layout(tmp_path, {"blobs/0f3a.parquet": "12"}) / "blobs" / "0f3a"
    blob.with_suffix(".parquet").rename(blob)  # as the hub's cache keeps it
    (tmp_path / "test-00000-of-00001.parquet").symlink_to(blob)
    import_rows(tmp_path / "test-00000-of-00001.parquet", SHADE, tmp_path / "out")
    assert perceived(tmp_path / "out", "test") == "12"


@pytest.mark.parametrize("name", HELD_OUT[::3] + BOTH[:1])
def test_no_training_row_is_in_any_held_out_split(tmp_path: Path, name: str) -> None:
    files = {"train.parquet": "1274", f"{name}.parquet": "47", "unseen.parquet": "57"}
    source = layout(tmp_path / "in", files | {"test_0.parquet": "8"})
    with pytest.raises(DataError, match=r"3 bad rows, nothing written"):
        import_rows(source, SHADE, tmp_path / "out")
    manifest = import_rows(source, SHADE, tmp_path / "out", skip_bad=True)
    assert {(b["file"], b["row"]) for b in manifest["skipped"]} == {
        ("train.parquet", "row 2"),
        ("train.parquet", "row 3"),
        ("unseen.parquet", "row 1"),
    }
    assert all("in the held-out split" in b["reason"] for b in manifest["skipped"])
    assert perceived(tmp_path / "out", "train") == "12"


# What a row holds

FORMS: dict[str, Any] = {
    "base64": base64.b64encode(png(7)).decode(),
    "base64 in lines": base64.encodebytes(png(7)).decode(),
    "url-safe base64 without padding": base64.urlsafe_b64encode(png(7)).decode().rstrip("="),
    "data URI": "data:image/png;base64," + base64.b64encode(png(7)).decode(),
    "data URI in capitals": "DATA:image/png;charset=x;BASE64," + base64.b64encode(png(7)).decode(),
    "struct of base64": {"bytes": base64.b64encode(png(7)).decode(), "path": None},
    "list of a path": ["7.png"],
    "list of a struct": [{"path": "7.png", "bytes": None}],
    "list of a list": [[{"path": "7.png"}]],
    "a file of base64's name": "iVBORw0KGgo.png",
}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_an_image(tmp_path: Path, form: str) -> None:
    for name in ("7.png", "iVBORw0KGgo.png"):
        (tmp_path / name).write_bytes(png(7))
    row = {"query": "q", "image": FORMS[form], "ground_truth": 3}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    import_rows(tmp_path / "train.jsonl", SHADE, tmp_path / "out")
    (problem,) = read_dataset(tmp_path / "out")
    assert problem.image == png(7) and problem.perception == "3"


def test_a_parquet_list_of_one_struct(tmp_path: Path) -> None:
    row = {"query": "q", "image": [{"bytes": png(7), "path": None}], "ground_truth": "3"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    import_rows(tmp_path / "train.parquet", SHADE, tmp_path / "out")
    assert read_dataset(tmp_path / "out")[0].image == png(7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": ["a.png", "b.png"]}, "image: a list of 2, list ['a.png', 'b.png']; a row has"),
        ({"image": []}, "image: a list of 0"),
        ({"image": [None]}, "image: list [None]; wanted bytes"),
        ({"image": list(png())}, "image: a list of "),
        ({"image": {"url": "x"}}, "image: dict {'url': 'x'}; wanted bytes"),
        ({"image": "https://a.b/c.png"}, "image: 'https://a.b/c.png' is a URL; store"),
        ({"image": "data:image/png,%89PNG"}, "a data URI without base64"),
        ({"image": "iVBORw0KGgo" + "A?" * 9_999}, "damaged base64"),
        ({"image": FORMS["base64"][:-8]}, "image: the image is damaged or truncated"),
        ({"image": "R0lGODlh" * 9_999}, "image: 'R0lGODlhR0lGODlhR0lGODlhR0lGODlhR0lGODlh'... of"),
        ({"ground_truth": {"a": float("nan")}}, "ground_truth: dict {'a': nan}: neither text"),
        ({"ground_truth": "x" * 99_999}, "ground_truth: 'xxx"),
        ({"x" * 99_999: 1, "query": None}, "query: is missing; the row has"),
        ({"image": None, "a\nb": 1}, "image: is missing; the row has query, image, ground_truth"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_short_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    row = {"query": "q", "image": FORMS["base64"], "ground_truth": "3"} | change
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError) as caught:
        import_rows(tmp_path / "train.jsonl", SHADE, tmp_path / "out")
    head, line = str(caught.value).split("\n")
    assert message in line and len(line) < 400
    assert "no good row is left" in head


def test_a_value_that_is_no_json_is_a_bad_row(tmp_path: Path) -> None:
    row = {"query": "q", "image": png(), "ground_truth": [b"\xff"]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"row 0: ground_truth: list \[b'\\xff'\]: neither text"):
        import_rows(tmp_path / "train.parquet", SHADE, tmp_path / "out")


def test_a_value_that_python_cannot_hold_is_one_bad_row(tmp_path: Path) -> None:
    text = pa.array([b"ok", b"\xff\xfe", b"ok"]).view(pa.string())  # as a careless writer leaves it
    far = pa.array([3, 2**62, 4], pa.int64()).view(pa.duration("s"))
    for name, column, good in (("query", text, 2), ("response", far, 0)):
        table = {"query": ["q"] * 3, "image": [png()] * 3, "ground_truth": ["1", "2", "3"]}
        file = tmp_path / name / "train.parquet"
        file.parent.mkdir()
        pq.write_table(pa.table(table | {name: column}), file)
        with pytest.raises(DataError, match=r"train\.parquet: row 1: a value cannot be read \("):
            import_rows(file, SHADE, tmp_path / "out" / name)
        if good:
            manifest = import_rows(file, SHADE, tmp_path / "out" / name, skip_bad=True)
            assert manifest["splits"]["train"]["rows"] == good


def test_a_byte_order_mark_is_not_data_and_utf_16_is_named(tmp_path: Path) -> None:
    line = json.dumps({"query": "é", "image": FORMS["base64"], "ground_truth": "3"})
    file = tmp_path / "train.jsonl"
    file.write_text(f"{line}\n\ufeff{line}\n\ufeff\n", encoding="utf-8-sig")  # as `cat` makes it
    import_rows(file, SHADE, tmp_path / "out")
    assert perceived(tmp_path / "out", "train") == "33"
    for coding in ("utf-16", "utf-16-le", "utf-32"):
        file.write_text(line, encoding=coding)
        with pytest.raises(DataError, match=r"train\.jsonl: line 1 is UTF-16 or no text; save it"):
            import_rows(file, SHADE, tmp_path / "other", skip_bad=True)


# What is there already


@pytest.mark.parametrize("out", ["in", "in/deep", "."])
def test_a_source_is_never_written_into(tmp_path: Path, out: str) -> None:
    source = layout(tmp_path / "in", {"train.parquet": "12", "test.parquet": "3"})
    before = tree(tmp_path)
    for named in (tmp_path / out, source / ".." / out):
        with pytest.raises(DataError, match="is, holds or lies in the source"):
            import_rows(source, SHADE, named, overwrite=True)
    with pytest.raises(DataError, match="is, holds or lies in the source"):
        import_rows(source / "train.parquet", SHADE, source, overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("foreign", ["train.parquet", "manifest.json"])
def test_what_another_program_wrote_is_not_replaced(tmp_path: Path, foreign: str) -> None:
    source = layout(tmp_path / "in", {"train.parquet": "12", "test.parquet": "3"})
    out = layout(tmp_path / "out", {"train.parquet": "45"})
    if foreign == "manifest.json":
        (out / "train.parquet").unlink()
        (out / foreign).write_text('{"name": "a web page"}')
    before = tree(out)
    with pytest.raises(DataError, match=rf"out: {foreign} there is no part of a data set"):
        import_rows(source, SHADE, out, overwrite=True)
    assert tree(out) == before
    (out / foreign).unlink()
    import_rows(source, SHADE, out)
    import_rows(source, SHADE, out, overwrite=True)
    assert perceived(out, "train") == "12"
    layout(out, {"train.parquet": "45"})  # in the place of ours
    layout(tmp_path / "other", {"test.parquet": "3"})
    for data in (source, tmp_path / "other"):
        with pytest.raises(DataError, match=r"out: train\.parquet there is no part"):
            import_rows(data, SHADE, out, overwrite=True)
    (out / "train.parquet").write_bytes(b"PAR1 and damaged")
    import_rows(source, SHADE, out, overwrite=True)
    assert perceived(out, "train") == "12"


def test_a_split_in_a_file_of_another_kind_is_told(tmp_path: Path) -> None:
    source = layout(tmp_path / "in", {"train.parquet": "12"})
    (source / "val").mkdir()
    for name in ("test.csv", "val/0000.arrow", "train.jsonl.gz", "about.json", "logo.png"):
        (source / name).write_bytes(b"")
    manifest = import_rows(source, SHADE, tmp_path / "out")
    assert manifest["not_read"] == ["test.csv", "train.jsonl.gz", "val/0000.arrow"]
