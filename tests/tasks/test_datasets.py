"""Data sets: their layout, that they can be drawn again, that splits stay apart, bad input."""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import BaseModel

from tasks import dataset_write
from tasks.core import DataError, Problem, Style
from tasks.dataset_import import import_rows
from tasks.dataset_write import write_dataset
from tasks.datasets import SCHEMA, read_dataset, read_examples
from tasks.load import load_task
from tasks.responses import compose_response
from tasks.splits import draw_problem, split_of
from tests.support.image_files import png_header
from tests.support.killed import killed_before
from tests.support.shade import SHADE, SPEC, Shade, ShadeSpec, png, shades, tree


def written(tmp_path: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = dict(
        splits={"train": 40, "test": 10}, task=SHADE, spec=SPEC, seed=0, style="terse"
    )
    write_dataset(tmp_path / "data", **(arguments | changes))
    return tmp_path / "data"


def rewrite(file: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change rows of a split behind the manifest's back, and drop the manifest."""
    rows = pq.read_table(file).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)
    (file.parent / "manifest.json").unlink()


# Drawing


def test_a_split_is_its_side_of_the_endless_stream(tmp_path: Path) -> None:
    folder = written(tmp_path, splits={"train_rl": 30, "test": 20, "train": 30, "valid": 10})
    for side, splits in {"train": ("train", "train_rl"), "test": ("test", "valid")}.items():
        stored = [p for split in splits for p in read_dataset(folder, split)]
        drawn = [draw_problem(SHADE, SPEC, side, 0, index) for index in range(100)]
        seen: set[Any] = set()
        different = []
        for problem in drawn:
            name = problem.perception if side == "test" else problem.id
            if name not in seen:
                different.append(problem)
            seen.add(name)
        assert stored == different[: len(stored)]


@pytest.mark.parametrize(
    ("name", "knobs"),
    [("sudoku", {"size": 4, "blanks": 5}), ("graph_coloring", {"vertices": 5})],
)
def test_same_arguments_give_the_same_bytes(
    tmp_path: Path, name: str, knobs: dict[str, int]
) -> None:
    task = load_task(name)
    for folder in ("a", "b"):
        spec = task.spec(**knobs)
        write_dataset(tmp_path / folder, {"train": 12, "test": 6}, task, spec, 5, "verbose")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert sorted(tree(tmp_path / "a")) == ["manifest.json", "test.parquet", "train.parquet"]


def test_splits_share_no_problem(tmp_path: Path) -> None:
    sizes = {"train": 1500, "valid": 12, "test": 20, "train_rl": 300}
    manifest = write_dataset(tmp_path, sizes, SHADE, SPEC, 0)
    assert list(manifest["splits"]) == list(sizes)
    problems = {s: read_dataset(tmp_path, s, check_images=False) for s in sizes}
    keys = {split: {p.symmetry_key for p in found} for split, found in problems.items()}
    for split, found in problems.items():
        entry = manifest["splits"][split]
        assert {split_of(p) for p in found} == {entry["side"]}
        assert entry["rows"] == sizes[split] == len(found)
        assert entry["draws"] == entry["rows"] + entry["skipped_repeats"]
    assert not (keys["train"] | keys["train_rl"]) & (keys["test"] | keys["valid"])
    # The same shade in another grain is the same question: held out, it occurs once.
    assert len({p.perception for p in problems["test"] + problems["valid"]}) == 32
    assert len({p.id for p in problems["train"] + problems["train_rl"]}) == 1800
    assert manifest["splits"]["train"]["skipped_repeats"] > 0


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("sudoku", {"size": 4, "blanks": 1, "cell_size": 16, "font_size": 12}),
        ("graph_coloring", {"vertices": 4, "canvas": 64, "noise": 2}),
    ],
)
def test_held_out_splits_of_few_classes_hold_twins_and_no_repeats(
    tmp_path: Path, name: str, knobs: dict[str, Any]
) -> None:
    task = load_task(name)
    rows = 30 if name == "sudoku" else 10
    manifest = write_dataset(
        tmp_path, {"train": 20, "test": rows}, task, task.spec(**knobs), 0, "terse"
    )
    train, test = (read_dataset(tmp_path, split) for split in ("train", "test"))
    assert not {p.symmetry_key for p in train} & {p.symmetry_key for p in test}
    assert len({p.perception for p in test}) == rows
    entry = manifest["splits"]["test"]
    assert entry["responses_right"] == rows
    assert name != "sudoku" or entry["distinct_up_to_symmetry"] < rows


def test_too_small_a_space_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    few = ShadeSpec(shades=38)
    held_out = sum(split_of(p) == "test" for p in shades(range(38)))
    message = rf"split test: .* asked for 10000, found {held_out}, .*loosen"
    with pytest.raises(DataError, match=message):
        write_dataset(tmp_path / "x", {"train": 5, "test": 10_000}, SHADE, few, 0)
    with pytest.raises(DataError, match=r"split train: .* asked for 50, found"):
        write_dataset(tmp_path / "x", {"train": 50}, SHADE, ShadeSpec(shades=3, grain=3), 0)
    (one,) = shades([0])
    other = "train" if split_of(one) == "test" else "test"
    with pytest.raises(DataError, match=rf"no problem of the {other} split.*loosen"):
        write_dataset(tmp_path / "x", {other: 1}, SHADE, ShadeSpec(shades=1), 0)
    assert tree(tmp_path) == {}


# Layout and reading


def test_layout_is_the_one_hugging_face_datasets_reads(tmp_path: Path) -> None:
    table = pq.read_table(written(tmp_path) / "train.parquet")
    image = table.schema.field("image").type
    assert image == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features.pop("image") == {"_type": "Image"}
    assert list(features) == [name for name in table.column_names if name != "image"]
    assert set(table.column_names) >= {"query", "image", "ground_truth", "response"}
    for name, feature in features.items():
        assert feature == {"dtype": "string", "_type": "Value"}
        assert table.schema.field(name).type == pa.string()
    row = table.to_pylist()[0]
    assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (4, 4)
    assert Path(row["image"]["path"]).name == row["image"]["path"]


def test_hugging_face_datasets_reads_what_was_generated(tmp_path: Path) -> None:
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    folder = written(tmp_path)
    found = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert set(found) == {"train", "test"}
    for split, table in found.items():
        ours = pq.read_table(folder / f"{split}.parquet").to_pylist()
        assert isinstance(table.features["image"], ImageFeature)
        assert [row["image"].size for row in table] == [
            Image.open(io.BytesIO(row["image"]["bytes"])).size for row in ours
        ]
        texts = [name for name in table.column_names if name != "image"]
        assert [{n: row[n] for n in texts} for row in table] == [
            {n: row[n] for n in texts} for row in ours
        ]


def test_what_is_read_is_what_was_drawn(tmp_path: Path) -> None:
    folder = written(tmp_path, splits={"test": 30})
    drawn = {p.id: p for p in (draw_problem(SHADE, SPEC, "test", 0, i) for i in range(100))}
    for example in read_examples(folder, "test"):
        assert example.problem == drawn[example.problem.id]
        assert example.response == SHADE.demonstrate(example.problem, "terse")
    assert read_dataset(folder / "test.parquet") == read_dataset(folder, "test")


def test_manifest_holds_the_hashes_and_no_path(tmp_path: Path) -> None:
    folder = written(tmp_path)
    text = (folder / "manifest.json").read_text()
    manifest = json.loads(text)
    for split in ("train", "test"):
        data = (folder / f"{split}.parquet").read_bytes()
        assert manifest["splits"][split]["sha256"] == hashlib.sha256(data).hexdigest()
    assert str(tmp_path) not in text
    assert manifest["seed"] == 0 and manifest["knobs"] == {"shades": 200, "grain": 1000}
    assert manifest["command"].startswith("equipoise tasks generate shade --train 40 --test 10")


def test_a_file_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path)
    (folder / "train.parquet").write_bytes((folder / "test.parquet").read_bytes())
    with pytest.raises(DataError, match=r"train\.parquet: its hash is not the one"):
        read_dataset(folder)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_dataset(tmp_path / "nowhere")
    folder = written(tmp_path)
    with pytest.raises(DataError, match=r"no split 'valid'.*test, train"):
        read_dataset(folder, "valid")
    (folder / "manifest.json").unlink()
    file = folder / "train.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train\.parquet: not a whole Parquet file"):
        read_dataset(folder)


@pytest.mark.parametrize("column", SCHEMA.names)
def test_missing_column_is_named_with_those_that_are_there(tmp_path: Path, column: str) -> None:
    file = tmp_path / "train.parquet"
    table = pq.read_table(written(tmp_path) / "train.parquet").drop_columns([column])
    pq.write_table(table, file)
    others = ", ".join(table.column_names)
    with pytest.raises(DataError, match=rf"train\.parquet: no column {column}; it has {others}"):
        read_examples(file)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image", {"bytes": png()[:-15], "path": None}, "image: the image is damaged or truncated"),
        (
            "image",
            {"bytes": png_header(20_000, 20_000), "path": None},
            "image: the image is 20000x20000",
        ),
        ("image", {"bytes": b"text", "path": None}, "image: not an image"),
        ("image", {"bytes": None, "path": "a.png"}, "image: has no bytes"),
        ("image", None, "image: has no bytes"),
        ("query", None, "query: is empty"),
        ("truth", "{", "truth: not JSON"),
        ("truth", "[" * 100_000, "truth: not JSON"),
        ("knobs", "[1]", "knobs: not a JSON object"),
        ("id", "shade-dup", "id: 'shade-dup' occurs twice"),
    ],
)
def test_bad_row_is_named_with_its_field(
    tmp_path: Path, field: str, value: Any, message: str
) -> None:
    file = written(tmp_path) / "train.parquet"

    def spoil(rows: list[dict[str, Any]]) -> None:
        rows[6][field] = value
        if field == "id":
            rows[2][field] = value

    rewrite(file, spoil)
    with pytest.raises(DataError) as caught:
        read_dataset(file)
    assert str(caught.value).startswith(f"{file}: row 6: {message}")


def test_image_of_a_column_of_the_wrong_type(tmp_path: Path) -> None:
    file = written(tmp_path) / "train.parquet"
    table = pq.read_table(file)
    raw = pa.array([row["bytes"] for row in table["image"].to_pylist()])
    pq.write_table(table.set_column(0, "image", raw), tmp_path / "raw.parquet")
    with pytest.raises(DataError, match="column image: is binary, not struct"):
        read_examples(tmp_path / "raw.parquet")


# Writing whole or not at all


class Interrupted(Shade):
    """Stops after some problems, as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        self.after = iter(range(after))

    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        if next(self.after, None) is None:
            raise KeyboardInterrupt
        return super().generate(rng, spec)


@pytest.mark.parametrize("after", [0, 5, 300])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, task=Interrupted(after), splits={"train": 1000, "test": 10})
    assert list(tmp_path.iterdir()) == []
    before = tree(written(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, task=Interrupted(after), splits={"train": 1000}, overwrite=True)
    assert tree(tmp_path / "data") == before


def test_killed_at_any_moment_a_data_set_is_the_old_one_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_write, "flush", lambda _: None)

    def old(at: Path) -> Path:
        return written(at, splits={"train": 4, "test": 2})

    def new(at: Path) -> Path:
        return written(at, splits={"train": 3, "more": 2}, seed=1, overwrite=True)

    def shown(folder: Path) -> dict[str, bytes]:
        return {name: data for name, data in tree(folder).items() if name[0] != "."}

    whole = [tree(old(tmp_path / "old")), tree(new(tmp_path / "new"))]
    change, died = 0, True
    while died:
        folder = old(tmp_path / str(change))
        died = killed_before(change, lambda folder=folder: new(folder.parent))
        read_dataset(folder)
        assert shown(folder) in whole
        assert shown(new(folder.parent)) == whole[1]
        change += 1
    assert change > 5


def test_a_data_set_is_replaced_only_when_asked(tmp_path: Path) -> None:
    before = tree(written(tmp_path))
    with pytest.raises(DataError, match=r"already holds manifest\.json.*--force"):
        written(tmp_path, seed=1)
    assert tree(tmp_path / "data") == before
    (tmp_path / "data" / "notes.txt").write_text("mine")
    written(tmp_path, seed=1, splits={"test": 5}, overwrite=True)
    # The train split of the old set is gone with it; what was never ours stays.
    assert sorted(tree(tmp_path / "data")) == ["manifest.json", "notes.txt", "test.parquet"]


class WrongTeacher(Shade):
    def demonstrate(self, problem: Problem, style: Style) -> str:
        return compose_response(problem.perception, "", problem.perception)


class BrokenCamera(Shade):
    def generate(self, rng: np.random.Generator, spec: BaseModel) -> Problem:
        problem = super().generate(rng, spec)
        return self._problem(problem.prompt, problem.image[:-5], 1, problem.id)


@pytest.mark.parametrize(
    ("task", "message"),
    [(WrongTeacher(), "demonstration of .* is not right"), (BrokenCamera(), "truncated")],
)
def test_a_task_that_contradicts_itself_writes_nothing(
    tmp_path: Path, task: Shade, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        written(tmp_path, task=task)
    assert tree(tmp_path) == {}


# Import

SOLVED = [[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]]
PUZZLE = [[0, 2, 3, 4], [3, 4, 0, 2], [2, 1, 4, 3], [4, 3, 2, 0]]
DASHED = json.dumps([[cell or "-" for cell in row] for row in PUZZLE])
SUDOKU_ROW = {
    "query": "Complete the Sudoku in the image.",
    "ground_truth": json.dumps(PUZZLE),
    "response": f"The grid is {DASHED}. Each blank has one digit left. {json.dumps(SOLVED)}",
}
GRAPH = {"v": 4, "c": 3, "edges": [[0, 1], [0, 2], [1, 2], [2, 3]]}
GRAPH_ROW = {
    "query": "There are 4 vertices, labeled 0 through 3. Solve the graph coloring problem.",
    "ground_truth": json.dumps(GRAPH),
    "response": "",
}


def source_file(folder: Path, form: str, row: dict[str, Any], name: str = "train_sft") -> Path:
    """A public-style file of three rows in one of the forms an image comes in."""
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = [dict(row) for _ in range(3)]
    for shade, each in enumerate(rows):
        path = f"pictures/{shade}.png"
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(png(shade))
        held = png(shade)
        each["image"] = {
            "struct": {"bytes": held, "path": "no-such.png"},
            "struct_path": {"bytes": None, "path": path},
            "bytes": held,
            "path": path,
            "jsonl": path,
        }[form]
    if form == "jsonl":
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        file = folder / f"{name}-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize("form", ["struct", "struct_path", "bytes", "path", "jsonl"])
@pytest.mark.parametrize(("name", "row"), [("sudoku", SUDOKU_ROW), ("graph_coloring", GRAPH_ROW)])
def test_import_of_public_columns(
    tmp_path: Path, form: str, name: str, row: dict[str, str]
) -> None:
    task = load_task(name)
    source = source_file(tmp_path / "in", form, row)
    manifest = import_rows(source, task, tmp_path / "out")
    assert manifest["splits"]["train_sft"]["rows"] == 3
    assert manifest["imported_from"].keys() == {source.name}
    examples = list(read_examples(tmp_path / "out", "train_sft"))
    assert [e.problem.image for e in examples] == [png(shade) for shade in range(3)]
    for example in examples:
        problem = example.problem
        assert (problem.prompt, example.response) == (row["query"], row["response"])
        perceived = task.parse(task.oracle_prefix(problem)).perception
        assert task.score_perception(problem, perceived) == (True, 1.0)
        assert task.check(problem, task.solve(problem, perceived))
    stored = pq.read_table(tmp_path / "out" / "train_sft.parquet")["ground_truth"].to_pylist()
    assert stored == [row["ground_truth"]] * 3


def test_imported_responses_are_counted_when_right(tmp_path: Path) -> None:
    # The response writes "-" where the truth has 0: the task reads both as a blank.
    source = source_file(tmp_path / "in", "struct", SUDOKU_ROW)
    entry = import_rows(source, load_task("sudoku"), tmp_path / "out")["splits"]["train_sft"]
    assert (entry["responses"], entry["responses_right"]) == (3, 3)


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
    task = load_task(name)
    splits = {"train": 12, "test": 6, "valid": 6}  # small enough that held-out twins occur
    written(tmp_path, task=task, spec=task.spec(**knobs), splits=splits)
    manifest = import_rows(tmp_path / "data", task, tmp_path / "again")
    for split in splits:
        first, again = (
            [replace(e, problem=replace(e.problem, knobs={})) for e in read_examples(f, split)]
            for f in (tmp_path / "data", tmp_path / "again")
        )
        assert first == again  # but for the knobs, which a public row does not tell
        assert manifest["splits"][split]["responses_right"] == splits[split]


def test_equal_rows_keep_their_place_under_new_ids(tmp_path: Path) -> None:
    rows = [{"query": "q", "image": png(), "ground_truth": "7", "response": t} for t in "abc"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    import_rows(tmp_path / "train.parquet", SHADE, tmp_path / "out")
    examples = list(read_examples(tmp_path / "out"))
    assert [e.problem.id for e in examples] == ["shade-7", "shade-7-2", "shade-7-3"]
    assert [e.response for e in examples] == ["a", "b", "c"]


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"image": "gone.png"}, "line 2: image: no file 'gone.png'"),
    ({"image": "short.png"}, "line 2: image: the image is damaged or truncated"),
    ({"image": "huge.png"}, "line 2: image: the image is 20000x20000"),
    ({"image": "/dev/zero"}, "line 2: image: no file '/dev/zero'"),
    ({"image": "a\0b"}, "line 2: image: "),
    ({"image": 5}, "line 2: image: int 5; wanted bytes, a struct of bytes and path, a path"),
    ({"image": None}, "line 2: image: is missing"),
    ({"ground_truth": "red"}, "line 2: ground_truth: 'red' is not a shade"),
    ({"query": 3}, "line 2: query: is a int, not text"),
    ({"response": "\ud800"}, "line 2: response: is not Unicode text"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ROWS)
def test_bad_rows_are_listed_and_nothing_is_written(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "ok.png").write_bytes(png())
    (source / "short.png").write_bytes(png()[:-9])
    (source / "huge.png").write_bytes(png_header(20_000, 20_000))
    good = {"query": "q", "image": "ok.png", "ground_truth": "1"}
    lines = [json.dumps(good), json.dumps(good | change), json.dumps(good), "{"]
    (source / "train.jsonl").write_text("\n".join(lines))
    before = tree(tmp_path)

    with pytest.raises(DataError) as caught:
        import_rows(source, SHADE, tmp_path / "out" / "deep")
    text = str(caught.value)
    assert f"train.jsonl: {message}" in text
    assert "train.jsonl: line 4: not JSON" in text
    assert "2 bad rows, nothing written" in text and "--skip-bad" in text
    assert tree(tmp_path) == before and not (tmp_path / "out").exists()

    manifest = import_rows(source, SHADE, tmp_path / "out", skip_bad=True)
    assert manifest["splits"]["train"]["rows"] == 2
    assert [bad["row"] for bad in manifest["skipped"]] == ["line 2", "line 4"]
    assert len(read_dataset(tmp_path / "out")) == 2


def test_import_names_missing_columns(tmp_path: Path) -> None:
    table = pa.table({"question": ["q"], "image": [png()], "ground_truth": ["1"]})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"no column query; it has question, image, ground_truth"):
        import_rows(tmp_path / "train.parquet", SHADE, tmp_path / "out", skip_bad=True)
    assert not (tmp_path / "out").exists()


def test_import_keeps_held_out_problems_out_of_train(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for split, numbers in {"train": "1234", "test": "45"}.items():
        rows = [{"query": "q", "image": png(), "ground_truth": shade} for shade in numbers]
        pq.write_table(pa.Table.from_pylist(rows), source / f"{split}.parquet")
    with pytest.raises(DataError, match=r"train\.parquet: row 3: .* held-out split"):
        import_rows(source, SHADE, tmp_path / "out")
    import_rows(source, SHADE, tmp_path / "out", skip_bad=True)
    train, test = (read_dataset(tmp_path / "out", split) for split in ("train", "test"))
    assert [p.perception for p in train] == ["1", "2", "3"]
    assert [p.perception for p in test] == ["4", "5"]


def test_import_keeps_a_question_out_of_a_second_held_out_split(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for split, numbers in {"test": "4", "valid": "34"}.items():
        rows = [{"query": "q", "image": png(), "ground_truth": number} for number in numbers]
        pq.write_table(pa.Table.from_pylist(rows), source / f"{split}.parquet")
    with pytest.raises(DataError, match=r"valid\.parquet: row 1: .* held-out split"):
        import_rows(source, SHADE, tmp_path / "out")


def test_import_with_no_good_row_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.parquet or \.jsonl file"):
        import_rows(tmp_path, SHADE, tmp_path / "out")
    (tmp_path / "train.csv").write_text("query")
    with pytest.raises(DataError, match=r"not a \.parquet or \.jsonl file"):
        import_rows(tmp_path / "train.csv", SHADE, tmp_path / "out")
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="no good row is left"):
        import_rows(tmp_path / "train.jsonl", SHADE, tmp_path / "out", skip_bad=True)
    assert not (tmp_path / "out").exists()


# A task of the user's own


def own_module(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)


def test_a_users_own_task_from_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, _, _ = (
        (Path(__file__).parents[1] / "support" / "shade.py")
        .read_text()
        .partition("SHADE = Shade()")
    )
    head = head.replace('name = "shade"', 'name = "own_shade:Shade"')
    own_module(tmp_path, "own_shade", head, monkeypatch)
    task = load_task("own_shade:Shade")
    write_dataset(tmp_path / "data", {"train": 5}, task, task.spec(), 0, "verbose")
    assert {p.task for p in read_dataset(tmp_path / "data")} == {"own_shade:Shade"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sudokku", 'no task "sudokku"; did you mean "sudoku"'),
        ("", "the built-in tasks are"),
        ("no_such_module:Task", 'no module "no_such_module" on the path'),
        ("tasks.no_such:Task", 'no module "tasks.no_such" on the path'),
        ("own_bad:Taks", 'has no class "Taks"; did you mean "Task"'),
        ("own_bad:number", "does not name a class"),
        ("own_bad:Task", "lacks name, spec, generate, parse, check, .*from_row"),
        ("own_bad:Asks", r"Asks\(\) failed .*without arguments"),
        ("own_bad:Task()", "two Python names"),
        ("own_bad:os.system", "two Python names"),
        ("own_deps:Task", "own_deps cannot be imported: No module named 'not_installed'"),
        ("own_crash:Task", "own_crash cannot be imported: ZeroDivisionError"),
        ("own_child:Child", r"its `name` is 'sudoku'; set name = \"own_child:Child\""),
    ],
)
def test_what_is_wrong_with_a_task_name(
    tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {
        "own_bad": "number = 3\nclass Task: pass\nclass Asks:\n    def __init__(self, x): pass\n",
        "own_deps": "import not_installed\n",
        "own_crash": "1 / 0\n",
        "own_child": "from tasks.sudoku import Sudoku\nclass Child(Sudoku): pass\n",
    }
    for module, text in modules.items():
        own_module(tmp_path, module, text, monkeypatch)
    with pytest.raises(ValueError, match=message):
        load_task(name)
