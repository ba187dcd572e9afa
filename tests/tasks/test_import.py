"""Import of files as people have them: which split a file is, what a row holds, what is refused."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.core import DataError
from tasks.dataset_import import import_rows
from tasks.dataset_write import write_dataset
from tasks.datasets import read_examples
from tasks.split_names import side_of, split_of_file, tells_side
from tests.support.image_files import png_header
from tests.support.puzzles import TASKS
from tests.support.shade import SHADE, png, read_dataset, tree

LETTERS = base64.b64encode(png(7)).decode()


def row(number: Any = "3", **changes: Any) -> dict[str, Any]:
    return {"query": "q", "image": png(), "ground_truth": number} | changes


def parquet(file: Path, *rows: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file


def json_lines(file: Path, *rows: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return file


def layout(folder: Path, files: dict[str, str]) -> Path:
    """Parquet and JSON lines files by name, one row for each digit."""
    for name, numbers in files.items():
        rows = [row(number) for number in numbers]
        if name.lower().endswith(".parquet"):
            parquet(folder / name, *rows)
        else:
            json_lines(folder / name, *(one | {"image": LETTERS} for one in rows))
    return folder


def perceived(folder: Path, split: str = "train") -> str:
    return "".join(problem.perception for problem in read_dataset(folder, split))


# Which split a file is

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


SPLIT_OF = {
    "train.jsonl": "train",
    "TRAIN.PARQUET": "train",
    "train-00000-of-00002.parquet": "train",
    "data/train-00001-of-00002-0123456789abcdef.parquet": "train",
    "train_00003.parquet": "train",
    "train/0000.parquet": "train",
    "default/test/0012.parquet": "test",
    "train/part-00000-1f0e-c000.snappy.parquet": "train",
    "test/images.parquet": "test",
    "images/test.parquet": "test",
    "test/testmini-0.parquet": "testmini_0",
    "train/train_sft.parquet": "train_sft",
    "Val/en/0000.parquet": "val",
    "testA.parquet": "test_a",
    "a.b/sft.parquet": "sft",
    "geometry/0000.parquet": "geometry",
    "0000.parquet": "source",
}


def test_the_split_of_a_file(tmp_path: Path) -> None:
    assert {name: split_of_file("source" / PurePath(name)) for name in SPLIT_OF} == SPLIT_OF
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
    sides = {split: entry["side"] for split, entry in manifest["splits"].items()}
    assert sides == {"train": "train", "test": "test"}
    assert (perceived(tmp_path / "out"), perceived(tmp_path / "out", "test")) == ("123", "4")
    assert manifest["imported_from"].keys() == {f for f in files if f[0] != "."}


def test_a_linked_file_has_the_name_of_the_link(tmp_path: Path) -> None:
    blob = layout(tmp_path, {"blobs/0f3a.parquet": "12"}) / "blobs" / "0f3a"
    blob.with_suffix(".parquet").rename(blob)  # as the hub's cache keeps it
    (tmp_path / "test-00000-of-00001.parquet").symlink_to(blob)
    import_rows(tmp_path / "test-00000-of-00001.parquet", SHADE, tmp_path / "out")
    assert perceived(tmp_path / "out", "test") == "12"


@pytest.mark.parametrize("name", ["testmini", "val2017", "train_dev"])
def test_no_training_row_is_in_any_held_out_split(tmp_path: Path, name: str) -> None:
    files = {"train.parquet": "1274", f"{name}.parquet": "47", "unseen.parquet": "57"}
    source = layout(tmp_path / "in", files | {"test_0.parquet": "8"})
    with pytest.raises(DataError, match=r"3 bad rows, nothing written"):
        import_rows(source, SHADE, tmp_path / "out")
    manifest = import_rows(source, SHADE, tmp_path / "out", skip_bad=True)
    assert {(bad["file"], bad["row"]) for bad in manifest["skipped"]} == {
        ("train.parquet", "row 2"), ("train.parquet", "row 3"), ("unseen.parquet", "row 1"),
    }  # fmt: skip
    assert all("in the held-out split" in bad["reason"] for bad in manifest["skipped"])
    assert perceived(tmp_path / "out") == "12"


def test_a_question_is_not_in_two_held_out_splits(tmp_path: Path) -> None:
    source = layout(tmp_path / "in", {"test.parquet": "4", "valid.parquet": "34"})
    with pytest.raises(DataError, match=r"valid\.parquet: row 1: .* held-out split"):
        import_rows(source, SHADE, tmp_path / "out")


# What a row holds

PUBLIC = {
    "sudoku": {
        "query": "Complete the Sudoku in the image.",
        "ground_truth": "[[0, 2, 3, 4], [3, 4, 0, 2], [2, 1, 4, 3], [4, 3, 2, 0]]",
        # "-" where the truth has 0: the task reads both as a blank
        "response": 'The grid is [["-",2,3,4],[3,4,"-",2],[2,1,4,3],[4,3,2,"-"]]. So it is '
        "[[1,2,3,4],[3,4,1,2],[2,1,4,3],[4,3,2,1]]",
    },
    "graph_coloring": {
        "query": "There are 4 vertices, labeled 0 through 3. Solve the graph coloring problem.",
        "ground_truth": '{"v": 4, "c": 3, "edges": [[0, 1], [0, 2], [1, 2], [2, 3]]}',
        "response": "",
    },
}


@pytest.mark.parametrize("name", TASKS)
def test_import_of_public_columns(tmp_path: Path, name: str) -> None:
    task, public = TASKS[name], PUBLIC[name]
    rows = [public | {"image": {"bytes": png(n), "path": "no-such.png"}} for n in range(3)]
    source = parquet(tmp_path / "in" / "train_sft-00000-of-00001.parquet", *rows)
    manifest = import_rows(source, task, tmp_path / "out")
    entry, right = manifest["splits"]["train_sft"], 3 if public["response"] else 0
    assert (entry["rows"], entry["responses"], entry["responses_right"]) == (3, right, right)
    assert manifest["imported_from"].keys() == {source.name}
    examples = list(read_examples(tmp_path / "out", "train_sft"))
    assert [e.problem.images[0] for e in examples] == [png(shade) for shade in range(3)]
    for example in examples:
        problem = example.problem
        assert (problem.prompt, example.response) == (public["query"], public["response"])
        perception = task.parse(task.oracle_prefix(problem)).perception
        assert task.score_perception(problem, perception) == (True, 1.0)
        assert task.check(problem, task.solve(problem, perception))
    stored = pq.read_table(tmp_path / "out" / "train_sft.parquet")["ground_truth"].to_pylist()
    assert stored == [public["ground_truth"]] * 3


FORMS: dict[str, Any] = {
    "a path": "7.png",
    "base64": LETTERS,
    "base64 in lines": base64.encodebytes(png(7)).decode(),
    "url-safe base64 without padding": base64.urlsafe_b64encode(png(7)).decode().rstrip("="),
    "data URI": f"data:image/png;base64,{LETTERS}",
    "data URI in capitals": f"DATA:image/png;charset=x;BASE64,{LETTERS}",
    "struct of base64": {"bytes": LETTERS, "path": None},
    "list of a path": ["7.png"],
    "list of a struct": [{"path": "7.png", "bytes": None}],
    "list of a list": [[{"path": "7.png"}]],
    "a file of base64's name": "iVBORw0KGgo.png",
    "bytes": png(7),
    "struct of a path": {"bytes": None, "path": "7.png"},
    "struct of bytes": {"bytes": png(7), "path": "no-such.png"},
    "list of a struct of bytes": [{"bytes": png(7), "path": None}],
}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_an_image(tmp_path: Path, form: str) -> None:
    for name in ("7.png", "iVBORw0KGgo.png"):
        (tmp_path / name).write_bytes(png(7))
    files = [tmp_path / "train.parquet"]
    if "bytes" in form:
        parquet(files[0], row(image=FORMS[form]))
    else:
        files = [json_lines(tmp_path / "train.jsonl", row(3, image=FORMS[form]))]
        if "list of a" not in form or "path" in form:  # Parquet has one type a column
            files.append(parquet(tmp_path / "2" / "train.parquet", row(image=FORMS[form])))
            (tmp_path / "2" / "7.png").write_bytes(png(7))
            (tmp_path / "2" / "iVBORw0KGgo.png").write_bytes(png(7))
    for number, file in enumerate(files):
        out = tmp_path / f"out{number}"
        import_rows(file, SHADE, out)
        (problem,) = read_dataset(out)
        assert problem.images[0] == png(7) and problem.perception == "3"


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("sudoku", {"size": 4, "blanks": 2, "cell_size": 16, "font_size": 12}),
        ("sudoku", {"blanks": 12, "cell_size": 12, "font_size": 10, "noise": 5}),
        ("graph_coloring", {"vertices": 5, "canvas": 64, "noise": 5}),
        (
            "graph_coloring",
            {"vertices": 7, "chromatic": 4, "layout": "spring", "split_by": "labelled"},
        ),
    ],
)
def test_what_was_generated_imports_again(tmp_path: Path, name: str, knobs: dict[str, Any]) -> None:
    task, made, again = TASKS[name], tmp_path / "made", tmp_path / "again"
    splits = {"train": 12, "test": 6, "valid": 6}  # small enough that held-out twins occur
    write_dataset(made, splits, task, task.spec(**knobs), 0, "terse")
    manifest = import_rows(made, task, again)
    for split in splits:
        first, second = (
            [e._replace(problem=replace(e.problem, knobs={})) for e in read_examples(f, split)]
            for f in (made, again)
        )
        assert first == second  # but for the knobs, which a public row does not tell
        assert manifest["splits"][split]["responses_right"] == splits[split]


def test_equal_rows_keep_their_place_under_new_ids(tmp_path: Path) -> None:
    file = parquet(tmp_path / "train.parquet", *(row("7", response=text) for text in "abc"))
    import_rows(file, SHADE, tmp_path / "out")
    examples = list(read_examples(tmp_path / "out"))
    assert [e.problem.id for e in examples] == ["shade-7", "shade-7-2", "shade-7-3"]
    assert [e.response for e in examples] == ["a", "b", "c"]


# What cannot be read

BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"image": "gone.png"}, "image: no file 'gone.png'"),
    ({"image": "short.png"}, "image: the image is damaged or truncated"),
    ({"image": "huge.png"}, "image: the image is 20000x20000"),
    ({"image": "/dev/zero"}, "image: no file '/dev/zero'"),
    ({"image": "a\0b"}, "image: "),
    ({"image": 5}, "image: int 5; wanted bytes, a struct of bytes and path, a path"),
    ({"image": None}, "image: is missing"),
    ({"image": None, "a\nb": 1}, "image: is missing; the row has query, image, ground_truth"),
    ({"image": ["a.png", "b.png"]}, "image: a list of 2, list ['a.png', 'b.png']; a row has"),
    ({"image": []}, "image: a list of 0"),
    ({"image": [None]}, "image: list [None]; wanted bytes"),
    ({"image": list(png())}, "image: a list of "),
    ({"image": {"url": "x"}}, "image: dict {'url': 'x'}; wanted bytes"),
    ({"image": "https://a.b/c.png"}, "image: 'https://a.b/c.png' is a URL; store"),
    ({"image": "data:image/png,%89PNG"}, "a data URI without base64"),
    ({"image": "iVBORw0KGgo" + "A?" * 9_999}, "damaged base64"),
    ({"image": LETTERS[:-8]}, "image: the image is damaged or truncated"),
    ({"image": "R0lGODlh" * 9_999}, "image: 'R0lGODlhR0lGODlhR0lGODlhR0lGODlhR0lGODlh'... of"),
    ({"ground_truth": "red"}, "ground_truth: 'red' is not a shade"),
    ({"ground_truth": {"a": float("nan")}}, "ground_truth: dict {'a': nan}: neither text"),
    ({"ground_truth": "x" * 99_999}, "ground_truth: 'xxx"),
    ({"query": 3}, "query: is a int, not text"),
    ({"x" * 99_999: 1, "query": None}, "query: is missing; the row has"),
    ({"response": "\ud800"}, "response: is not Unicode text"),
]


def test_bad_rows_are_listed_in_a_short_line_each_and_nothing_is_written(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "short.png").write_bytes(png()[:-9])
    (source / "huge.png").write_bytes(png_header(20_000, 20_000))
    for number, (change, message) in enumerate(BAD_ROWS):
        file = json_lines(source / "train.jsonl", row(image=LETTERS), row(image=LETTERS) | change)
        file.write_text(file.read_text() + "{")
        before = tree(tmp_path)
        with pytest.raises(DataError) as caught:
            import_rows(source, SHADE, out / "deep")
        head, *lines = str(caught.value).split("\n")
        assert "2 bad rows, nothing written" in head and "--skip-bad" in head
        assert lines[0].strip().startswith("train.jsonl: line 2: ") and message in lines[0]
        assert len(lines[0]) < 400 and "train.jsonl: line 4: not JSON" in lines[1]
        assert tree(tmp_path) == before
        if number == 0:
            manifest = import_rows(source, SHADE, tmp_path / "rest", skip_bad=True)
            assert manifest["splits"]["train"]["rows"] == 1 == len(read_dataset(tmp_path / "rest"))
            assert [bad["row"] for bad in manifest["skipped"]] == ["line 2", "line 4"]


def test_values_that_no_row_can_have_are_bad_rows(tmp_path: Path) -> None:
    file = parquet(tmp_path / "train.parquet", row([b"\xff"]))
    with pytest.raises(DataError, match=r"row 0: ground_truth: list \[b'\\xff'\]: neither text"):
        import_rows(file, SHADE, tmp_path / "out")
    text = pa.array([b"ok", b"\xff\xfe", b"ok"]).view(pa.string())  # as a careless writer leaves it
    far = pa.array([3, 2**62, 4], pa.int64()).view(pa.duration("s"))
    for name, column, good in (("query", text, 2), ("response", far, 0)):
        table = {"query": ["q"] * 3, "image": [png()] * 3, "ground_truth": ["1", "2", "3"]}
        pq.write_table(pa.table(table | {name: column}), file)
        with pytest.raises(DataError, match=r"train\.parquet: row 1: a value cannot be read \("):
            import_rows(file, SHADE, tmp_path / name)
        if good:
            manifest = import_rows(file, SHADE, tmp_path / name, skip_bad=True)
            assert manifest["splits"]["train"]["rows"] == good


def test_a_byte_order_mark_is_not_data_and_utf_16_is_named(tmp_path: Path) -> None:
    line = json.dumps(row(image=LETTERS, query="é"))
    file = tmp_path / "train.jsonl"
    file.write_text(f"{line}\n\ufeff{line}\n\ufeff\n", encoding="utf-8-sig")  # as `cat` makes it
    import_rows(file, SHADE, tmp_path / "out")
    assert perceived(tmp_path / "out") == "33"
    for coding in ("utf-16", "utf-16-le", "utf-32"):
        file.write_text(line, encoding=coding)
        with pytest.raises(DataError, match=r"train\.jsonl: line 1 is UTF-16 or no text; save it"):
            import_rows(file, SHADE, tmp_path / "other", skip_bad=True)


def test_files_without_rows_or_columns_are_refused(tmp_path: Path) -> None:
    table = pa.table({"question": ["q"], "image": [png()], "ground_truth": ["1"]})
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "train.parquet"
    pq.write_table(table, source)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "train.csv").write_text("query")
    (tmp_path / "train.jsonl").write_text("{}\n")
    for file, message in (
        (source, r"no column query; it has question, image, ground_truth"),
        (tmp_path / "none", r"holds no \.parquet or \.jsonl file"),
        (tmp_path / "none" / "train.csv", r"not a \.parquet or \.jsonl file"),
        (tmp_path / "train.jsonl", "no good row is left"),
    ):
        with pytest.raises(DataError, match=message):
            import_rows(file, SHADE, tmp_path / "out", skip_bad=True)
        assert not (tmp_path / "out").exists()


# What is there already


@pytest.mark.parametrize("out", ["in", "in/deep", "."])
def test_a_source_is_never_written_into(tmp_path: Path, out: str) -> None:
    source = layout(tmp_path / "in", {"train.parquet": "12", "test.parquet": "3"})
    before = tree(tmp_path)
    pairs = [(source, tmp_path / out), (source, source / ".." / out)]
    for read, named in [*pairs, (source / "train.parquet", source)]:
        with pytest.raises(DataError, match="is, holds or lies in the source"):
            import_rows(read, SHADE, named, overwrite=True)
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
    assert perceived(out) == "12"
    layout(out, {"train.parquet": "45"})  # in the place of ours
    layout(tmp_path / "other", {"test.parquet": "3"})
    for data in (source, tmp_path / "other"):
        with pytest.raises(DataError, match=r"out: train\.parquet there is no part"):
            import_rows(data, SHADE, out, overwrite=True)
    (out / "train.parquet").write_bytes(b"PAR1 and damaged")
    import_rows(source, SHADE, out, overwrite=True)
    assert perceived(out) == "12"


def test_a_split_in_a_file_of_another_kind_is_told(tmp_path: Path) -> None:
    source = layout(tmp_path / "in", {"train.parquet": "12"})
    (source / "val").mkdir()
    for name in ("test.csv", "val/0000.arrow", "train.jsonl.gz", "about.json", "logo.png"):
        (source / name).write_bytes(b"")
    manifest = import_rows(source, SHADE, tmp_path / "out")
    assert manifest["not_read"] == ["test.csv", "train.jsonl.gz", "val/0000.arrow"]
