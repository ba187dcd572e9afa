"""Data sets: their layout, that they can be drawn again, that splits stay apart, bad input."""

import hashlib
import io
import json
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
from tasks.dataset_write import write_dataset
from tasks.datasets import NEWER_COLUMNS, SCHEMA, read_examples
from tasks.images import check_image
from tasks.load import load_task
from tasks.responses import compose_response
from tasks.splits import draw_problem, split_of
from tests.support.image_files import png_header
from tests.support.killed import killed_before
from tests.support.shade import SHADE, SPEC, Shade, ShadeSpec, png, read_dataset, shades, tree


def written(tmp_path: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = dict(
        splits={"train": 40, "test": 10}, task=SHADE, spec=SPEC, seed=0, style="terse"
    )
    write_dataset(tmp_path / "data", **(arguments | changes))
    return tmp_path / "data"


# Drawing


def test_a_split_is_its_side_of_the_endless_stream(tmp_path: Path) -> None:
    folder = written(tmp_path, splits={"train_rl": 30, "test": 20, "train": 30, "valid": 10})
    for side, splits in {"train": ("train", "train_rl"), "test": ("test", "valid")}.items():
        examples = [e for split in splits for e in read_examples(folder, split)]
        stored = [e.problem for e in examples]
        assert [e.response for e in examples] == [SHADE.demonstrate(p, "terse") for p in stored]
        drawn = [draw_problem(SHADE, SPEC, side, 0, index) for index in range(100)]
        seen: set[Any] = set()
        different = []
        for problem in drawn:
            name = problem.perception if side == "test" else problem.id
            if name not in seen:
                different.append(problem)
            seen.add(name)
        assert stored == different[: len(stored)]
    assert read_dataset(folder / "test.parquet") == read_dataset(folder, "test")


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


def test_the_layout_and_a_manifest_with_hashes_and_no_path(tmp_path: Path) -> None:
    folder = written(tmp_path)
    text = (folder / "manifest.json").read_text()
    manifest = json.loads(text)
    for split in ("train", "test"):
        data = (folder / f"{split}.parquet").read_bytes()
        assert manifest["splits"][split]["sha256"] == hashlib.sha256(data).hexdigest()
    assert str(tmp_path) not in text
    assert manifest["seed"] == 0 and manifest["knobs"] == {"shades": 200, "grain": 1000}
    assert manifest["command"].startswith("equipoise tasks generate shade --train 40 --test 10")
    table = pq.read_table(folder / "train.parquet")
    image = table.schema.field("image").type
    assert image == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features.pop("image") == {"_type": "Image"}
    assert features.pop("images") == {"_type": "List", "feature": {"_type": "Image"}}
    assert list(features) == [n for n in table.column_names if n not in ("image", "images")]
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


class Album(Shade):
    """As many pictures as the shade says, modulo three, and a column of its own."""

    name = "tests.tasks.test_datasets:Album"

    def _problem(self, prompt: str, image: bytes, shade: int, name: str) -> Problem:
        images = tuple(self.picture(shade, n) for n in range(shade % 3))
        extra = {"source": ["é", {"n": shade}]} if shade % 2 else {}
        return replace(super()._problem(prompt, image, shade, name), images=images, extra=extra)


def test_rows_of_no_image_and_of_several_come_back_and_hugging_face_reads_them(
    tmp_path: Path,
) -> None:
    from datasets import load_dataset

    folder = written(tmp_path, task=Album())
    found = [example.problem for example in read_examples(folder)]
    assert {len(problem.images) for problem in found} == {0, 1, 2}
    for problem in found:
        again = Album()._problem(problem.prompt, b"", problem.truth["shade"], problem.id)
        assert problem == again
    table = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["train"]
    for row, problem in zip(table, found, strict=True):
        pictures = [row["image"]] if row["images"] is None else row["images"]
        seen = [picture.convert("RGB").tobytes() for picture in pictures]
        assert seen == [check_image(image, "test").tobytes() for image in problem.images]


def test_a_file_from_before_a_row_had_several_images_is_read(tmp_path: Path) -> None:
    folder = written(tmp_path)
    found = list(read_examples(folder))
    file = tmp_path / "old.parquet"
    old = pq.read_table(folder / "train.parquet").drop_columns(list(NEWER_COLUMNS))
    pq.write_table(old, file)
    assert list(read_examples(file)) == found


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_dataset(tmp_path / "nowhere")
    folder = written(tmp_path)
    with pytest.raises(DataError, match=r"no split 'valid'.*test, train"):
        read_dataset(folder, "valid")
    file = folder / "train.parquet"
    whole = file.read_bytes()
    file.write_bytes((folder / "test.parquet").read_bytes())
    with pytest.raises(DataError, match=r"train\.parquet: its hash is not the one"):
        read_dataset(folder)
    (folder / "manifest.json").unlink()
    file.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"train\.parquet: not a whole Parquet file"):
        read_dataset(folder)


def test_missing_and_wrong_columns_are_named_with_those_that_are_there(tmp_path: Path) -> None:
    table, file = pq.read_table(written(tmp_path) / "train.parquet"), tmp_path / "train.parquet"
    for column in (name for name in SCHEMA.names if name not in NEWER_COLUMNS):
        fewer = table.drop_columns([column])
        pq.write_table(fewer, file)
        said = rf"train\.parquet: no column {column}; it has {', '.join(fewer.column_names)}"
        with pytest.raises(DataError, match=said):
            read_examples(file)
    raw = pa.array([row["bytes"] for row in table["image"].to_pylist()])
    pq.write_table(table.set_column(0, "image", raw), file)
    with pytest.raises(DataError, match="column image: is binary, not struct"):
        read_examples(file)


HUGE = png_header(20_000, 20_000)
BAD_VALUES: list[tuple[str, Any, str]] = [
    ("image", {"bytes": png()[:-15], "path": None}, "image: the image is damaged or truncated"),
    ("image", {"bytes": HUGE, "path": None}, "image: the image is 20000x20000"),
    ("image", {"bytes": b"text", "path": None}, "image: not an image"),
    ("image", {"bytes": None, "path": "a.png"}, "image: has no bytes"),
    ("image", None, "image: has no bytes"),
    ("query", None, "query: is empty"),
    ("truth", "{", "truth: not JSON"),
    ("truth", "[" * 100_000, "truth: not JSON"),
    ("knobs", "[1]", "knobs: not a JSON object"),
    ("id", "shade-dup", "id: 'shade-dup' occurs twice"),
]


def test_bad_row_is_named_with_its_field(tmp_path: Path) -> None:
    rows = pq.read_table(written(tmp_path) / "train.parquet").to_pylist()
    file = tmp_path / "train.parquet"
    for field, value, message in BAD_VALUES:
        spoilt = [dict(row) for row in rows]
        spoilt[6][field] = value
        if field == "id":
            spoilt[2][field] = value
        pq.write_table(pa.Table.from_pylist(spoilt, schema=SCHEMA), file)
        with pytest.raises(DataError) as caught:
            read_dataset(file)
        assert str(caught.value).startswith(f"{file}: row 6: {message}")


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
        return self._problem(problem.prompt, problem.images[0][:-5], 1, problem.id)


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
