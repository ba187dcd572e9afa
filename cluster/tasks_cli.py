"""`equipoise tasks`: make, import and look at problems."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from cluster.recipe.fetching import pinned_recipe
from cluster.recipe.machine import require_free
from cluster.recipe.problems import opened_rows
from cluster.recipe.recipe import Recipe, UserError, load_recipe, task_of
from cluster.record.terminal import printable
from tasks.contract import check_task
from tasks.core import DataError, Demonstrates, Generates, Problem, Task, labelled, need
from tasks.dataset_import import import_rows
from tasks.dataset_write import ResponseStyle, write_dataset
from tasks.datasets import read_examples
from tasks.files import put
from tasks.images import check_image, content_hash
from tasks.load import BUILT_IN, load_task
from tasks.split_names import side_of, tells_side
from tasks.splits import draw_problem

app = typer.Typer(
    help="Make, import and look at problems.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

TaskName = Annotated[
    str, typer.Argument(help='"sudoku", "graph_coloring", "scenes" or your own "module:Class".')
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A knob of the task, knob=value; repeatable.")
]
Style = Annotated[ResponseStyle, typer.Option(help="How the teacher writes the responses.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the data set in the folder.")]


@app.command("generate")
def generate_command(
    task: TaskName,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    train: Annotated[int, typer.Option(min=0, help="Problems of the train split.")] = 1000,
    test: Annotated[int, typer.Option(min=0, help="Problems of the test split.")] = 200,
    split: Annotated[
        list[str] | None, typer.Option(help="Another split, name=problems; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    settings: Settings = None,
    style: Style = "terse",
    force: Force = False,
) -> None:
    """Draw problems and write them as a data set: Parquet files and a manifest."""
    with _for_the_user():
        maker, spec = _generator(task, settings)
        splits = {"train": train, "test": test} | _more_splits(split or [])
        splits = {name: rows for name, rows in splits.items() if rows}
        if not splits:
            raise UserError("--train, --test: nothing to draw; ask for at least one problem")
        with _progress(splits) as on_row:
            manifest = write_dataset(
                out, splits, maker, spec, seed, style, overwrite=force, on_row=on_row
            )
    _echo(_summary(out, manifest))


@app.command("import")
def import_command(
    task: TaskName,
    source: Annotated[
        Path, typer.Argument(help="A .parquet or .jsonl file, or a folder: one file a split.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad rows out and list them in the manifest.")
    ] = False,
    force: Force = False,
) -> None:
    """Make a data set from files with the columns query, image, ground_truth[, response]."""
    with _for_the_user():
        reader = load_task(task_of(task).name)
        with _progress({}) as on_row:
            manifest = import_rows(
                source, reader, out, skip_bad=skip_bad, overwrite=force, on_row=on_row
            )
    _echo(_summary(out, manifest))


@app.command("show")
def show_command(
    source: Annotated[
        str, typer.Argument(help="A data set's folder or file, a recipe with data, or a task.")
    ],
    row: Annotated[int, typer.Option(min=0, help="Which problem of the split, from 0.")] = 0,
    split: Annotated[str, typer.Option(help="Which split of a folder or task.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="Draw a task's problem with this seed.")] = 0,
    settings: Settings = None,
    style: Annotated[
        ResponseStyle | None,
        typer.Option(help="Have the teacher respond so; of a task's name, terse."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task that reads a data set of your own task.")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option("--image", "--out", help="Save the image here; of several, x-1.png, x-2.png."),
    ] = None,
) -> None:
    """Print one problem as the policy and the checker see it."""
    with _for_the_user():
        reader: Task | None
        if source.endswith(".toml"):
            configs = _recipe(source, settings).tasks
            index = next((at for at, c in enumerate(configs) if c.data is not None), None)
            if index is None:
                raise UserError(f"{source}: tasks: none has data; show a task by its name")
            rows = opened_rows(configs[index], index).rows[side_of(split)]
            if row >= len(rows):
                raise UserError(f"{source}: --row {row}: split {split} has {len(rows)} good rows")
            reader = load_task(configs[index].task_name)
            problem, response, *_ = rows[row]
        elif Path(source).exists():
            if settings:
                raise UserError("--set: the rows of a data set are drawn already; leave it out")
            example = next(islice(read_examples(source, split), row, None), None)
            if example is None:
                raise UserError(f"{source}: --row {row}: the split has fewer rows")
            problem, response = example.problem, example.response
            # A data file may name any module; only what the user names is imported.
            name = task or (problem.task if problem.task in BUILT_IN else None)
            reader = load_task(task_of(name).name) if name else None
        else:
            if "/" in source or "\\" in source:
                raise UserError(f"{source}: no such file or folder")
            reader, spec = _generator(source, settings)
            problem, response = draw_problem(reader, spec, side_of(split), seed, row), ""
            if style is None and isinstance(reader, Demonstrates):
                style = "terse"
        if not response and reader is not None and style is not None and style != "none":
            teacher = need(reader, Demonstrates, f"--style {style}", "leave it out")
            response = teacher.demonstrate(problem, style)
        _echo(_shown_problem(problem, response, reader))
        if image is not None:
            for file, picture in _image_files(image, problem):
                require_free(file, "--image")
                put(file, partial(Path.write_bytes, data=picture))
                _echo(f"image saved to {file}")


@app.command("check")
def check_command(
    task: Annotated[
        str, typer.Argument(metavar="TASK | RECIPE", help="A task's name, or a recipe with data.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A knob of the task, or a field of the recipe; repeatable."),
    ] = None,
    problems: Annotated[int, typer.Option(min=2, help="Fresh problems to try it on.")] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Try each ability of a task, or look at each data set of a recipe; say what is wrong."""
    with _for_the_user():
        if task.endswith(".toml"):
            from cluster.recipe.data_check import check_data

            wrong = check_data(_recipe(task, settings), _echo)
            if wrong:
                raise UserError("\n".join(["a run would refuse this:", *wrong]))
            return
        checked, spec = _generator(task, settings)
        wrong = check_task(checked, spec, problems, seed)
        if wrong:
            raise UserError("\n".join(f"{task}: {line}" for line in wrong))
    _echo(f"{task}: all its abilities keep the contract on {problems} fresh problems")


def _recipe(file: str, settings: list[str] | None) -> Recipe:
    """A recipe whose data is here; its model may not be."""
    return pinned_recipe(load_recipe(Path(file), settings or ()), _echo, dry_run=True)


def _generator(name: str, settings: list[str] | None) -> tuple[Generates, BaseModel]:
    chosen = task_of(name, settings or ())
    task = need(load_task(chosen.name), Generates, "drawing problems", "its problems are in files")
    return task, task.spec.model_validate(chosen.knobs)


@contextmanager
def _for_the_user() -> Iterator[None]:
    """Turn what the user can put right into a `UserError`, safe to print."""
    try:
        yield
    except (UserError, DataError, OSError) as error:
        raise UserError(printable(str(error))) from error


@contextmanager
def _progress(splits: Mapping[str, int]) -> Iterator[Callable[[str], None]]:
    """A bar a split on standard error; splits of unknown length are counted."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        bar_of: dict[str, TaskID] = {}

        def on_row(split: str) -> None:
            if split not in bar_of:
                bar_of[split] = bars.add_task(split, total=splits.get(split))
            bars.advance(bar_of[split])

        yield on_row


def _more_splits(settings: list[str]) -> dict[str, int]:
    splits: dict[str, int] = {}
    for setting in settings:
        name, _, rows = setting.partition("=")
        if not rows.isdecimal() or len(rows) > 9:
            raise UserError(f"--split {setting}: expected name=problems, such as train_rl=1000")
        splits[name] = int(rows)
    return splits


def _summary(folder: Path, manifest: Mapping[str, Any]) -> str:
    lines = []
    for name, entry in manifest["splits"].items():
        line = f"{name}: {entry['rows']} problems, "
        line += f"{entry['distinct_up_to_symmetry']} different up to symmetry"
        if "draws" in entry:
            line += f" ({entry['skipped_repeats']} repeats left out of {entry['draws']} draws)"
        lines.append(line)
        if not tells_side(name):
            side = "held out" if entry["side"] == "test" else "training data"
            lines.append(f"  taken as {side}: its name says neither train nor test, val, dev, ...")
        if entry["responses"]:
            share = entry["perception_chars"] / max(entry["response_chars"], 1)
            lines.append(
                f"  responses: {entry['responses']}, {entry['responses_right']} right by the "
                f"task's own checker; perception is {share:.1%} of their characters"
            )
    if unread := manifest.get("not_read"):
        lines.append(
            f"not read, neither .parquet nor .jsonl: {', '.join(unread[:5])} ({len(unread)})"
        )
    if manifest.get("skipped"):
        lines.append(f"bad rows left out: {len(manifest['skipped'])} (listed in the manifest)")
    lines.append(f"wrote {folder}")
    return "\n".join(lines)


def _shown_problem(problem: Problem, response: str, task: Task | None) -> str:
    knobs = ", ".join(f"{name}={value}" for name, value in problem.knobs.items()) or "none"
    parts = [
        f"id            {problem.id}",
        f"task          {problem.task}",
        f"knobs         {knobs}",
        f"symmetry key  {problem.symmetry_key}",
        *map(_shown_image, problem.images),
        f"\n[prompt]\n{problem.prompt}",
    ]
    if problem.perception:
        parts.append(f"\n[p*]\n{problem.perception}")
    if problem.extra or "checker" in problem.truth:
        parts.append(f"\n[truth]\n{json.dumps(dict(problem.truth), ensure_ascii=False)}")
        parts.append(f"\n[extra]\n{json.dumps(dict(problem.extra), ensure_ascii=False)}")
    if response:
        parts.append(f"\n[response]\n{response}")
        parts.append(f"\n[reads as]\n{_verdict(problem, response, task)}")
    return "\n".join(parts)


def _image_files(file: Path, problem: Problem) -> list[tuple[Path, bytes]]:
    """Where to save each image of a problem, of several numbered from 1."""
    if not problem.images:
        raise UserError(f"--image: problem {problem.id} has no image; leave it out")
    if len(problem.images) == 1:
        return [(file, problem.images[0])]
    names = [file.with_stem(f"{file.stem}-{n + 1}") for n in range(len(problem.images))]
    return list(zip(names, problem.images, strict=True))


def _shown_image(image: bytes) -> str:
    picture = check_image(image, "image")
    return (
        f"image         {picture.width}x{picture.height}, {len(image)} bytes, "
        f"sha256 {content_hash(image)}"
    )


def _verdict(problem: Problem, response: str, task: Task | None) -> str:
    if task is None:
        return f"not read: it is of {problem.task!r}; name its task with --task module:Class"
    parsed = task.parse(response)
    perception = "no label"
    if labelled(task, problem):
        exact, graded = False, 0.0
        if parsed.perception is not None:
            exact, graded = task.score_perception(problem, parsed.perception)
        perception = f"{'exact' if exact else 'wrong'} (graded {graded:.3f})"
    right = parsed.answer is not None and task.check(problem, parsed.answer)
    start, end = parsed.spans.get("perception", (0, 0))
    return (
        f"perception    {perception}, {(end - start) / len(response):.1%} of the characters\n"
        f"answer        {'right' if right else 'wrong'}\n"
        f"defects       {', '.join(parsed.defects) or 'none'}"
    )


def _echo(text: str) -> None:
    sys.stdout.write(printable(text) + "\n")
