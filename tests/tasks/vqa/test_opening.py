"""Which rows are on which side, which cannot be used, and what opening leaves in memory."""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pytest

from tasks.core import DataError
from tasks.datasets import file_hash
from tasks.splits import split_of_key
from tasks.vqa.opening import bad_rows_message
from tests.support.vqa_files import bars as row
from tests.support.vqa_files import (
    opened,
    picture,
    problems,
    write_lines,
    write_parquet,
    write_pictures,
    zip_pictures,
)


def answers(found, side: str) -> list[str]:
    return [example.problem.truth["answers"][0] for example in found.rows[side]]


def test_splits_are_told_by_names_of_files_folders_and_the_recipe(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a/train-00000-of-00002-abc123.parquet", [row(1)])
    write_parquet(tmp_path / "a/train-00001-of-00002-abc123.parquet", [row(2)])
    write_parquet(tmp_path / "a/validation-00000-of-00001.parquet", [row(3)])
    write_parquet(tmp_path / "a/test-00000-of-00001.parquet", [row(4)])
    found = opened(str(tmp_path / "a"))
    assert (answers(found, "train"), answers(found, "test")) == (["1", "2"], ["4"])
    assert any("validation" in note for note in found.notes)
    write_parquet(tmp_path / "b/train/0000.parquet", [row(1)])
    write_parquet(tmp_path / "b/dev/0000.parquet", [row(2)])
    found = opened(str(tmp_path / "b"))
    assert (answers(found, "train"), answers(found, "test")) == (["1"], ["2"])
    named = {"train": str(tmp_path / "b/dev/0000.parquet"), "test": str(tmp_path / "a")}
    found = opened(named)
    assert (answers(found, "train"), answers(found, "test")) == (["2"], ["4", "3"])


def test_what_runs_and_ablations_wrote_beside_the_data_is_no_data(tmp_path: Path) -> None:
    """`data = "."` with the runs in `runs/` reads the same rows before and after a run."""
    write_parquet(tmp_path / "train.parquet", [row(1), row(2)])
    write_parquet(tmp_path / "more/test.parquet", [row(3)])
    for mark in ("runs/a/recipe.toml", "runs/a/versions.json", "runs/grid/ablation.json"):
        (tmp_path / mark).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / mark).write_text("")
    for name in ("runs/a/metrics", "runs/a/rollouts/step-1", "runs/grid/results", ".kept/train"):
        write_parquet(tmp_path / f"{name}.parquet", [row(4)])
    found = opened(str(tmp_path))
    assert [answers(found, side) for side in ("train", "test")] == [["1", "2"], ["3"]]
    # A recipe beside data makes no run of its folder.
    (tmp_path / "more/recipe.toml").write_text("")
    assert answers(opened(str(tmp_path)), "test") == ["3"]


def test_one_split_is_cut_by_content_whatever_the_order(tmp_path: Path) -> None:
    rows = [row(number) for number in range(40)] + [row(3, answer="three")]
    one = opened(str(write_parquet(tmp_path / "one.parquet", rows)))
    sides = [set(answers(one, side)) for side in ("train", "test")]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    # All that is asked of one picture in the same words is on one side.
    assert ({"3", "three"} <= sides[0]) != ({"3", "three"} <= sides[1])
    keys = [example.problem.symmetry_key for example in one.rows["test"]]
    assert all(split_of_key("vqa", key) == "test" for key in keys)
    other = opened(str(write_parquet(tmp_path / "other.parquet", rows[::-1])))
    assert [set(answers(other, side)) for side in ("train", "test")] == sides
    assert any("held out" in note for note in one.notes)
    few = opened(str(write_parquet(tmp_path / "few.parquet", rows[:2])))
    assert sorted(len(rows) for rows in few.rows.values()) == [1, 1]


def test_a_training_row_that_repeats_a_held_out_one_is_found(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "train.parquet", [row(1), row(2), row(2, problem="<image> How  many bars?")]
    )
    write_parquet(tmp_path / "test.parquet", [row(2, answer="other"), row(5)])
    found = opened(str(tmp_path))
    assert answers(found, "train") == ["1"] and answers(found, "test") == ["other", "5"]
    assert [bad.where.rpartition("/")[2] for bad in found.bad] == [
        "train.parquet: row 1", "train.parquet: row 2",
    ]  # fmt: skip
    assert "test.parquet: row 0, which is held out" in found.bad[0].reason
    # The same words about another picture, or others about the same, repeat nothing.
    write_parquet(tmp_path / "train.parquet", [row(3), row(2, problem="<image>Why?")])
    assert not opened(str(tmp_path)).bad


def test_repeated_problems_of_one_split_have_ids_of_their_own(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [row(1), row(1), row(1), row(2)])
    write_parquet(tmp_path / "test.parquet", [row(4)])
    ids = [example.problem.id for example in opened(str(tmp_path)).rows["train"]]
    assert len(set(ids)) == 4 and ids[1] == f"{ids[0]}-2" and ids[2] == f"{ids[0]}-3"


def test_bad_rows_are_named_and_counted_by_reason(tmp_path: Path) -> None:
    rows = [
        row(1),
        row(2, answer=""),
        row(3, answer=None),
        row(4, problem="<image><image>Which?"),
        row(5, problem="<image> "),
        row(6, images=[{"bytes": b"GIF89a", "path": None}]),
        row(7, images=[{"bytes": None, "path": "no/such.png"}]),
        row(8, images=[{"bytes": None, "path": "nor/this.png"}]),
        row(9, answer=r"\boxed{1} \boxed{2}"),
    ]
    found = opened(str(write_parquet(tmp_path / "train.parquet", rows)))
    assert [bad.where.rpartition(": ")[2] for bad in found.bad] == [f"row {n}" for n in range(1, 9)]
    fields = ["answer", "answer", "problem", "problem", "image", "images", "images", "answer"]
    assert [bad.reason.partition(":")[0] for bad in found.bad] == fields
    said = bad_rows_message(found.bad, "cannot be used").splitlines()
    assert said[0].startswith(f"{tmp_path}/train.parquet: row 1: answer: ")
    assert said[-1] == "8 rows cannot be used"
    assert any(line.strip().startswith("2 rows: images: no file ... in ") for line in said)


def test_json_lines_keep_types_and_name_lines(tmp_path: Path) -> None:
    good = {"question": "How many?", "answer": 3, "level": 1.0, "tags": ["a", 2]}
    lines = [json.dumps(good), "", "{oops", "[1]", json.dumps(good | {"answer": ["3", "three"]})]
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    found = opened(str(file))
    assert [bad.where.rpartition(": ")[2] for bad in found.bad] == ["line 3", "line 4"]
    assert [p.truth["answers"] for p in problems(found)] == [["3"], ["3", "three"]]
    extra = problems(found)[0].extra
    assert extra == {"level": 1.0, "tags": ["a", 2]} and isinstance(extra["level"], float)
    array = tmp_path / "array" / "train.json"
    array.parent.mkdir()
    array.write_text(json.dumps([good, 5]), encoding="utf-8")
    found = opened(str(array))
    assert len(problems(found)) == 1 and found.bad[0].where.endswith("item 1")


def test_arrow_files_are_read(tmp_path: Path) -> None:
    import datasets

    table = pa.Table.from_pylist([row(1), row(2)])
    with pa.ipc.new_file(tmp_path / "data.arrow", table.schema) as writer:
        writer.write_table(table)
    assert [p.truth["answers"] for p in problems(opened(str(tmp_path / "data.arrow")))] == [
        ["1"],
        ["2"],
    ]
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_list([row(1), row(2)]),
        test=datasets.Dataset.from_list([row(3)]),
    )
    both.save_to_disk(str(tmp_path / "saved"))
    found = opened(str(tmp_path / "saved"))
    assert (answers(found, "train"), answers(found, "test")) == (["1", "2"], ["3"])


def test_images_are_found_beside_the_file_above_it_and_in_zips(tmp_path: Path) -> None:
    folder = tmp_path / "set [1]"  # a pattern to some readers
    write_pictures(folder, "images/a.png")
    zip_pictures(folder / "more.zip", "b.png", "inner/c.png")
    named = ["images/a.png", "b.png", "more/b.png", "inner/c.png", "./c.png"]
    rows = [{"image": name, "question": f"{at}?", "answer": "1"} for at, name in enumerate(named)]
    write_lines(folder / "data" / "train.jsonl", rows)
    found = opened(str(folder))
    assert not found.bad
    wanted = [picture(1), picture(1), picture(1), picture(2), picture(2)]
    assert [p.images for p in problems(found)] == [(data,) for data in wanted]


def test_a_changed_file_beside_the_data_is_looked_at_again(tmp_path: Path) -> None:
    rows = [{"image": name, "question": "?", "answer": "1"} for name in ("a.png", "b.png")]
    file = str(write_parquet(tmp_path / "train.parquet", rows))
    write_pictures(tmp_path, "a.png")
    assert len(opened(file).bad) == 1
    write_pictures(tmp_path, "a.png", "b.png")
    found = opened(file)
    assert not found.bad
    (tmp_path / "a.png").write_bytes(picture(1)[:-20])
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert [bad.reason.partition(":")[0] for bad in opened(file).bad] == ["image"]


def test_what_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "train.parquet", [row(1)])
    (tmp_path / "rows.csv").write_text("a,b\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:-50])
    for name, said in (
        ("trian.parquet", "did you mean train.parquet"),
        ("rows.csv", "not one of .parquet"),
        ("empty", "holds no file of rows"),
        ("broken.parquet", "cannot be read"),
    ):
        with pytest.raises(DataError) as caught:
            opened(str(tmp_path / name))
        assert said in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        opened("owner/no-such-set")
    assert "the hub could not be asked" in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_of_the_hub_is_found_in_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "datasets--owner--bars"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    snapshot = home / "snapshots" / "abc"
    write_parquet(snapshot / "data/train-00000-of-00001.parquet", [row(1), row(2)])
    write_parquet(snapshot / "data/test-00000-of-00001.parquet", [row(3)])
    write_parquet(snapshot / "hard/train.parquet", [row(4)])
    found = opened("owner/bars")
    assert sorted(answers(found, "train")) == ["1", "2", "4"] and answers(found, "test") == ["3"]
    assert len(problems(opened("owner/bars:hard"))) == 1
    with pytest.raises(DataError, match="there are: data, hard"):
        opened("owner/bars:easy")


def test_what_was_read_does_not_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import data_files

    file = write_parquet(tmp_path / "rows.parquet", [row(n) for n in range(20)])
    data = data_files.DataFile(file, file_hash(file))
    once = [data.row(n) for n in range(20)]
    monkeypatch.setattr(data_files, "RESIDENT_BYTES", 4 * data_files.AROUND_BYTES)
    first = weakref.ref(data._table)
    assert [data.row(n) for n in range(20)] == once
    assert first() is None  # and with it went its mapping


def test_a_large_file_is_converted_by_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import data_files

    file = write_parquet(tmp_path / "rows.parquet", [row(n) for n in range(20)])
    here = list(data_files.DataFile(file, "0" * 64).rows())
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(file.read_bytes()[:-50])
    monkeypatch.setattr(data_files, "APART_BYTES", 0)
    assert list(data_files.DataFile(file, "1" * 64).rows()) == here
    with pytest.raises(DataError, match=rf"{torn}: cannot be read \(.*; copy or write it again"):
        data_files.DataFile(torn, "2" * 64)
