"""Import of what cannot be read, and over what is there already: named, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.core import DataError
from tasks.dataset_import import import_rows
from tests.support.image_files import png_header
from tests.support.import_files import LETTERS, json_lines, layout, parquet, perceived, row
from tests.support.shade import SHADE, png, read_dataset, tree

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
