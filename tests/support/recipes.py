"""One head for the recipes of tests: a policy, tasks that cost nothing, and what a test adds."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.recipe.recipe import (
    Recipe,
    RecipeError,
    check_recipe,
    load_recipe,
)
from tasks.dataset_write import write_dataset
from tasks.load import load_task
from tests.support.image_files import encoded

ROOT = Path(__file__).resolve().parents[2]
TINY_POLICY = ROOT / "models" / "tiny-qwen3-vl"
SMALL = 'size = 4, blanks = 6, cell_size = 16, font_size = 12, margin = 0, prompt = "brief"'
SUDOKU = f'{{ name = "sudoku", knobs = {{ {SMALL} }} }}'
GRAPH = (
    '{ name = "graph_coloring", '
    'knobs = { vertices = 6, canvas = 64, label_size = 0, prompt = "brief" } }'
)
TOY = '{ name = "tests.support.toys:Doubling" }'
UNLABELLED = '{ name = "tests.support.toys:Unlabelled" }'


def recipe_text(
    more: str = "", *, name: str = "x", model: Path | str = "m", tasks: str = SUDOKU
) -> str:
    """A recipe as TOML: its head, then `more`, which may begin with fields such as `seed = 3`
    or `model.dtype = "bfloat16"` before its sections. `tasks`: entries, joined by commas."""
    return f'name = "{name}"\nmodel.path = "{model}"\ntasks = [{tasks}]\n{more}\n'


def made_recipe(*overrides: str, model: Path | str = "m", tasks: str = SUDOKU) -> Recipe:
    """The head, read with `overrides` as after `--set`; raises RecipeError as a file would."""
    return check_recipe(tomllib.loads(recipe_text(model=model, tasks=tasks)), overrides, "x.toml")


def write_problems(folder: Path, train: int, test: int) -> Path:
    """A data set of the problems that `SUDOKU` generates, with demonstrations."""
    task = load_task("sudoku")
    spec = task.spec.model_validate(tomllib.loads(f"knobs = {{ {SMALL} }}")["knobs"])
    write_dataset(folder, {"train": train, "test": test}, task, spec, seed=0, style="terse")
    return folder


def stored(data: Path | str) -> str:
    """An entry of stored problems."""
    return f'{{ name = "sudoku", data = "{data}" }}'


def recipe_file(
    folder: Path, more: str = "", *, model: Path | str = "m", tasks: str = SUDOKU
) -> Path:
    """As `recipe_text`, in a file: `folder/x.toml`."""
    path = folder / "x.toml"
    path.write_text(recipe_text(more, model=model, tasks=tasks), encoding="utf-8")
    return path


SHIPPED = sorted(p for p in (ROOT / "recipes").rglob("*.toml") if p.parent.name != "ablations")


def errors(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).splitlines()


def error(path: Path, *overrides: str) -> str:
    (line,) = errors(path, *overrides)
    return line


NARROW = "model.max_model_len = 256\nsampler.max_tokens = 128\n"


def change(folder: Path, split: str, row: int, **values: object) -> None:
    """Give a stored row other values; an image by its size in pixels. The manifest is dropped."""
    file = folder / f"{split}.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    if "image" in values:
        values["image"] = {
            "bytes": encoded(Image.new("RGB", values["image"], "white")),  # type: ignore[arg-type]
            "path": None,
        }
    rows[row] |= values
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    (folder / "manifest.json").unlink(missing_ok=True)
