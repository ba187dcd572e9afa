"""Input that cannot be used: one clear error each, and nothing written or started."""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.recipe.hardware import Machine
from cluster.recipe.placement import PlacementError, plan
from cluster.recipe.problems import ProblemSource
from cluster.recipe.recipe import Recipe
from cluster.run.sft import run_sft
from cluster.run.train import run_training
from rollout.tokens import ModelError
from tasks.core import DataError
from tasks.settings import TaskConfig
from tests.support.recipes import SUDOKU, made_recipe, stored, write_problems

pytestmark = pytest.mark.usefixtures("no_ray")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_problems(tmp_path / "data", 6, 4)


def recipe(model: Path | str, data: Path | None = None) -> Recipe:
    return made_recipe("sft.steps=1", model=model, tasks=stored(data) if data else SUDOKU)


def refuse(recipe: Recipe, out: Path, error: type[Exception]) -> str:
    """The message with which both commands refuse; neither may write or start anything."""
    messages = []
    for command in (run_training, run_sft):
        with pytest.raises(error) as caught:
            command(recipe, output=out)
        messages.append(str(caught.value))
        assert not out.exists()
    return messages[0]


def rewrite(file: Path, column: str, values: list[object] | None) -> None:
    """Replace a column of a Parquet file (None removes it) and forget the manifest's hash."""
    table = pq.read_table(file)
    index = table.schema.get_field_index(column)
    if values is None:
        table = table.remove_column(index)
    else:
        table = table.set_column(index, column, pa.array(values, table.schema.field(index).type))
    pq.write_table(table, file)
    (file.parent / "manifest.json").unlink()


def huge_png() -> bytes:
    """A valid header of a 20,000 x 20,000 image, and no pixels to speak of."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 64)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", ("image",)),
        ("truncated", ("image", "truncated")),
        ("huge", ("20000", "20000")),
        ("text", ("image",)),
    ],
)
def test_images(
    data: Path, tmp_path: Path, tiny_models: dict[str, Path], kind: str, words: tuple[str, ...]
) -> None:
    good = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(good, "PNG")
    image = {
        "missing": {"bytes": None, "path": "nowhere.png"},
        "truncated": {"bytes": good.getvalue()[:-20], "path": None},
        "huge": {"bytes": huge_png(), "path": None},
        "text": {"bytes": b"not an image", "path": None},
    }[kind]
    file = data / "train.parquet"
    rows = pq.read_table(file).column("image").to_pylist()
    rewrite(file, "image", [*rows[:2], image, *rows[3:]])
    message = refuse(recipe(tiny_models["qwen3_vl"], data), tmp_path / "out", DataError)
    assert "train.parquet" in message and "row 2" in message
    assert all(word in message for word in words), message


def test_a_column_that_is_not_there(
    data: Path, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    rewrite(data / "train.parquet", "ground_truth", None)
    message = refuse(recipe(tiny_models["qwen3_vl"], data), tmp_path / "out", DataError)
    assert "train.parquet" in message and "ground_truth" in message


def test_a_training_row_of_a_held_out_problem(data: Path) -> None:
    train, test = (pq.read_table(data / f"{split}.parquet") for split in ("train", "test"))
    pq.write_table(pa.concat_tables([train, test.slice(2, 1)]), data / "train.parquet")
    (data / "manifest.json").unlink()
    problem = test["id"][2].as_py()
    with pytest.raises(DataError, match=rf"{data}: problem {problem} of split train is, up to sym"):
        ProblemSource.open(TaskConfig(name="sudoku", data=str(data)), 0, "sudoku")


def test_a_model_folder_without_a_processor(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_models["qwen3_vl"], model)
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    message = refuse(recipe(model), tmp_path / "out", ModelError)
    assert str(model) in message and "processor" in message


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    message = refuse(recipe(tmp_path / "nowhere"), tmp_path / "out", ModelError)
    assert "nowhere" in message


@pytest.mark.parametrize(("field", "unit"), [("cpus", "cores"), ("gpus", "GPUs")])
def test_more_than_the_machine_has(field: str, unit: str) -> None:
    asked = made_recipe(f"sampler.{field}=1000", "sampler.tensor_parallel=1000")
    with pytest.raises(PlacementError, match=rf"sampler\.{field}.*100\d+ {unit}"):
        plan(asked, Machine.detect()).require()
