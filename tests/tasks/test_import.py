"""Import of files as people have them: which split a file is, what a row holds."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import pyarrow.parquet as pq
import pytest

from tasks.core import DataError
from tasks.dataset_import import import_rows
from tasks.dataset_write import write_dataset
from tasks.datasets import read_examples
from tasks.split_names import side_of, split_of_file, tells_side
from tests.support.import_files import LETTERS, json_lines, layout, parquet, perceived, row
from tests.support.puzzles import TASKS
from tests.support.shade import SHADE, png, read_dataset

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
