"""What hangs on a row and the policy together is found before anything is started, by all alike."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel

from cluster.recipe.placement import Command
from cluster.recipe.preflight import crowded_threads, preflight
from cluster.recipe.problems import held_out, left_out, open_sources, step_problems
from cluster.recipe.recipe import Recipe, UserError, load_recipe
from cluster.run.checkpoints import MAY_CHANGE, changed_fields
from cluster.run.replay import run_sampling
from cluster.run.sft import run_sft
from cluster.run.train import run_training
from rollout.models import ModelError
from tasks.core import DataError, Problem
from tasks.datasets import read_examples
from tasks.sudoku import Sudoku
from tests.support.recipes import (
    NARROW,
    SUDOKU,
    TINY_POLICY,
    change,
    made_recipe,
    recipe_file,
    stored,
)
from tests.support.terminal import Equipoise, with_set

LONG, THIN, FITTING = (640, 480), (10, 2500), (64, 64)


pytestmark = pytest.mark.usefixtures("no_ray", "own_cache")


def recipe(tmp_path: Path, data: Path | str, *settings: str) -> Recipe:
    more = NARROW + "eval.problems = 4\nsft.steps = 1\n"
    path = recipe_file(tmp_path, more, model=TINY_POLICY, tasks=stored(data))
    return load_recipe(path, settings)


BAD_ROWS: dict[str, tuple[Callable[[Path], None], str]] = {
    "long in train": (
        lambda folder: change(folder, "train", 3, image=LONG),
        "train.parquet: row 3: image: 998 tokens, 972 of them of the image",
    ),
    "long in test": (
        lambda folder: change(folder, "test", 5, image=LONG),
        "test.parquet: row 5: image: 998 tokens, 972 of them of the image",
    ),
    "thin in train": (
        lambda folder: change(folder, "train", 0, image=THIN),
        "train.parquet: row 0: image: 10x2500 pixels, which the policy's image processor refuses",
    ),
    "thin in test": (
        lambda folder: change(folder, "test", 1, image=THIN),
        "test.parquet: row 1: image: 10x2500 pixels",
    ),
    "wordy": (
        lambda folder: change(folder, "test", 2, query="Solve this. " * 100),
        "test.parquet: row 2: query: ",
    ),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_row_that_does_not_fit_is_refused_by_every_command_in_the_same_words(
    kind: str, data: Path, tmp_path: Path, equipoise: Equipoise
) -> None:
    spoil, words = BAD_ROWS[kind]
    spoil(data)
    wanted, out = recipe(tmp_path, data), tmp_path / "out"
    code, printed, message = equipoise("train", tmp_path / "x.toml", "--dry-run")
    assert (code, printed) == (2, "") and words in message
    assert 'or leave them out by tasks[0].too_long = "drop"' in message
    for start in (
        lambda: run_training(wanted, output=out),
        lambda: run_sampling(wanted, 1, output=out),
    ):
        with pytest.raises(DataError) as caught:
            start()
        assert str(caught.value) == message.rstrip("\n")
    if "test" in kind or "thin" in kind:  # a prompt to learn behind needs no room for sampling
        with pytest.raises(DataError, match=words.split(":")[1].strip()):
            run_sft(wanted, output=out)
    assert not out.exists()


def test_rows_that_do_not_fit_are_left_out_on_request_counted_and_never_drawn(
    data: Path, tmp_path: Path, equipoise: Equipoise
) -> None:
    bad = [("train", 3, LONG), ("train", 6, THIN), ("test", 0, LONG), ("test", 4, THIN)]
    ids = {split: [e.problem.id for e in read_examples(data, split)] for split in ("train", "test")}
    for split, row, size in bad:
        change(data, split, row, image=size)
    wanted = recipe(tmp_path, data, 'tasks[0].too_long="drop"')
    told: list[str] = []
    (source,) = preflight(wanted, "train", told.append).sources
    left = {split: set(ids[split]) - {ids[s][r] for s, r, _ in bad} for split in ids}
    drawn = {p.id for step in range(6) for p in step_problems([source], 0, step, 4)}
    assert drawn == left["train"]
    assert {p.id for p in held_out(source, 1, 4)} == left["test"]
    assert told[-1].endswith("data do not fit the policy and are left out")
    assert left_out([source]) == {"problems/sudoku/left_out": 2.0}
    # A run that met such a problem may go on without it.
    changed = changed_fields(recipe(tmp_path, data).model_dump(), wanted.model_dump())
    assert changed == ["tasks.too_long"] and set(changed) <= set(MAY_CHANGE)
    code, printed, _ = equipoise(
        "train", tmp_path / "x.toml", "--dry-run", *with_set('tasks[0].too_long="drop"')
    )
    assert code == 0 and all(f"# note: {line}\n" in printed for line in told)
    # What is held out is counted without them, too.
    settings = ['tasks[0].too_long="drop"', "eval.problems=5"]
    code, printed, _ = equipoise("train", tmp_path / "x.toml", "--dry-run", *with_set(*settings))
    assert code == 0 and "eval.problems = 5, and 4 rows are held out: all are taken" in printed
    assert {p.id for p in held_out(source, 1, 5)} == left["test"]


def test_epochs_are_of_the_rows_that_fit_and_each_comes_once_in_each(
    data: Path, tmp_path: Path, equipoise: Equipoise
) -> None:
    rows = [e.problem.id for e in read_examples(data, "train")]
    change(data, "train", 3, image=LONG)
    settings = ['tasks[0].too_long="drop"', "algorithm.epochs=2", "algorithm.problems_per_step=4"]
    told: list[str] = []
    found = preflight(recipe(tmp_path, data, *settings), "train", told.append)
    assert found.recipe.algorithm.steps == 4  # of 2 * 7 rows, 4 a step
    assert told[-1] == "algorithm.epochs = 2: 7 rows, 4 a step, are 4 steps"
    drawn = [p.id for step in range(4) for p in step_problems(found.sources, 0, step, 4)]
    first, second, rest = drawn[:7], drawn[7:14], drawn[14:]
    assert sorted(first) == sorted(second) == sorted({*rows} - {rows[3]})
    assert first != second and len({*rest}) == 2
    code, printed, _ = equipoise("train", tmp_path / "x.toml", "--dry-run", *with_set(*settings))
    assert code == 0 and "\nsteps = 4\nepochs = 2\n" in printed
    plain = recipe(tmp_path, data, 'tasks[0].too_long="drop"')
    assert preflight(plain, "train", told.append).recipe == plain


def test_images_that_are_swapped_fit_behind_every_query(data: Path, tmp_path: Path) -> None:
    change(data, "train", 2, query="Solve.", image=(160, 128))
    change(data, "train", 5, query="Solve the 4x4 Sudoku." + " Solve this." * 8)
    terms = 'reward.terms=[{name="image_dependence", args={view="%s"}}]'
    preflight(recipe(tmp_path, data, terms % "blank"), "train", print)
    with pytest.raises(DataError, match=r'view = "swapped" .*: 80 and 74 tokens and .* do not fit'):
        preflight(recipe(tmp_path, data, terms % "swapped"), "train", print)


def test_only_the_first_bad_rows_are_listed(data: Path, tmp_path: Path) -> None:
    for row in range(8):
        change(data, "train", row, image=THIN)
    with pytest.raises(DataError) as caught:
        preflight(recipe(tmp_path, data), "train", print)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[1] for line in lines[:5]] == [f"row {n}" for n in range(5)]
    assert lines[5] == "... and 3 more" and len(lines) == 7
    settings = 'tasks[0].too_long="drop"'
    with pytest.raises(DataError, match=r"8 rows of .* do not fit, and none of train is left"):
        preflight(recipe(tmp_path, data, settings), "train", print)


def test_a_damaged_image_is_no_row_to_leave_out(data: Path, tmp_path: Path) -> None:
    """Nor for any command. What else can be wrong with a row: tests/tasks/test_datasets.py."""
    file = data / "test.parquet"
    rows = pq.read_table(file).to_pylist()
    rows[2]["image"]["bytes"] = rows[2]["image"]["bytes"][:-20]
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(file)), file)
    (data / "manifest.json").unlink()
    wanted, out = recipe(tmp_path, data, 'tasks[0].too_long="drop"'), tmp_path / "out"
    for command in (run_training, run_sft):
        with pytest.raises(DataError, match=r"test\.parquet: row 2: image: the image is damaged"):
            command(wanted, output=out)
        assert not out.exists()


def test_a_training_row_of_a_held_out_problem_is_refused(data: Path, tmp_path: Path) -> None:
    train, test = (pq.read_table(data / f"{split}.parquet") for split in ("train", "test"))
    pq.write_table(pa.concat_tables([train, test.slice(2, 1)]), data / "train.parquet")
    (data / "manifest.json").unlink()
    problem = test["id"][2].as_py()
    with pytest.raises(DataError, match=rf"{data}: problem {problem} of split train is, up to sym"):
        open_sources(recipe(tmp_path, data).tasks)


def test_a_model_folder_without_a_processor_is_refused(data: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    files = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")
    shutil.copytree(TINY_POLICY, model, ignore=shutil.ignore_patterns(*files))
    wanted = recipe(tmp_path, data, f'model.path="{model}"')
    for command in (run_training, run_sft):
        with pytest.raises(ModelError, match=rf"{model}: .*processor"):
            command(wanted, output=out)
        assert not out.exists()


@pytest.mark.parametrize(
    ("response", "words"),
    [
        ("<answer>\n1\n</answer>", "response: has defect"),
        ("{good}", ""),
        ("long", "response: "),
    ],
)
def test_a_response_that_cannot_be_learnt_from_is_found_before_the_learner_starts(
    data: Path, tmp_path: Path, response: str, words: str
) -> None:
    good = [e.response for e in read_examples(data, "train")][1]
    if response == "long":
        response = good.replace("<reasoning>", "<reasoning>" + "\nthink again" * 200)
    change(data, "train", 1, response=response.replace("{good}", good))
    wanted = recipe(tmp_path, data)
    if not words:
        preflight(wanted, "sft", print)
        return
    with pytest.raises(DataError, match=rf"train\.parquet: row 1: {words}"):
        run_sft(wanted, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    preflight(wanted, "train", print)  # RL reads no responses


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (['tasks[0].data="nowhere"'], "tasks[0].data: nowhere: "),
        (['tasks[0].data="org/some-data"'], "tasks[0].data: org/some-data: "),
        (['tasks[0].data="{data}/train.parquet"'], "train.parquet: "),
        (
            ['reward.terms=[{{name="format", args={{penalty=3}}}}]'],
            "reward.terms: reward term 'format': args: ",
        ),
        (["model.max_model_len=1000000"], "model.max_model_len"),
        (['reward.terms=[{{name="outcome", scope="step"}}]'], 'scope = "step" is for a plain'),
        (
            ['output.trackers=["trackio"]'],
            'output.trackers: "trackio" is not installed; pip install "equipoise[trackio]"',
        ),
        (['algorithm.advantage="no/file.py:own"'], 'algorithm.advantage: no file "no/file.py"'),
        (['algorithm.loss="json:loads"'], 'algorithm.loss: "json:loads": TypeError: '),
    ],
)
def test_a_dry_run_refuses_what_cannot_run(
    data: Path, tmp_path: Path, settings: list[str], words: str, equipoise: Equipoise
) -> None:
    filled = [setting.format(data=data) for setting in settings]
    wanted = recipe(tmp_path, data, *filled)
    code, _, message = equipoise("train", tmp_path / "x.toml", "--dry-run", *with_set(*filled))
    assert code == 2 and words in message and message.count("\n") == 1
    with pytest.raises((DataError, UserError)) as caught:
        run_training(wanted, output=tmp_path / "out")
    assert str(caught.value) == message.rstrip("\n")
    assert not (tmp_path / "out").exists()


class WordySudoku(Sudoku):
    """Every third puzzle or so is asked about at length."""

    name = "tests.cluster.recipe.test_preflight:WordySudoku"

    def begin(self, rng: np.random.Generator, spec: BaseModel) -> tuple[str, Callable[[], Problem]]:
        key, finish = super().begin(rng, spec)
        more = " Think well." * (200 if rng.random() < 0.3 else 0)

        def made() -> Problem:
            problem = finish()
            return replace(problem, prompt=problem.prompt + more, task=self.name)

        return key, made

    def from_row(self, query: str, image: bytes, ground_truth: str) -> Problem:
        return replace(super().from_row(query, image, ground_truth), task=self.name)


def test_generated_problems_that_do_not_fit_are_refused_or_drawn_anew(tmp_path: Path) -> None:
    tasks = SUDOKU.replace("sudoku", WordySudoku.name)
    more = NARROW + "eval.problems = 12\n"
    path = recipe_file(tmp_path, more, model=TINY_POLICY, tasks=tasks)
    with pytest.raises(DataError, match=r"do not fit in model\.max_model_len = 256"):
        preflight(load_recipe(path), "train", print)
    wanted = load_recipe(path, ['tasks[0].too_long="drop"'])
    (source,) = preflight(wanted, "train", print).sources
    problems = step_problems([source], 3, 0, 30)
    assert all("Think well" not in p.prompt for p in [*problems, *held_out(source, 1, 12)])
    assert left_out([source])[f"problems/{WordySudoku.name}/left_out"] > 0
    (plain,) = open_sources(wanted.tasks)
    usual = step_problems([plain], 3, 0, 30)
    kept = [a == b for a, b in zip(problems, usual, strict=True)]
    # The others are drawn in their places, and as before.
    assert kept == ["Think well" not in p.prompt for p in usual]
    (again,) = preflight(wanted, "train", print).sources
    assert step_problems([again], 3, 0, 30) == problems


def test_knobs_that_never_fit_are_refused(tmp_path: Path, equipoise: Equipoise) -> None:
    recipe_file(tmp_path, NARROW.replace("256", "130"), model=TINY_POLICY)
    for setting in ("error", "drop"):
        code, _, message = equipoise(
            "train", tmp_path / "x.toml", "--dry-run", *with_set(f'tasks[0].too_long="{setting}"')
        )
        assert code == 2 and "do not fit in model.max_model_len = 130" in message
        assert message.count("\n") == 1


AHEAD = "algorithm.max_staleness=1"


@pytest.mark.parametrize(
    ("settings", "command", "roles"),
    [
        (["sampler.threads=2", "learner.threads=2"], "train", []),  # by turns
        ([AHEAD], "train", []),
        ([AHEAD, "sampler.threads=1", "learner.threads=1"], "train", []),
        ([AHEAD, "learner.threads=2"], "train", ["learner"]),
        ([AHEAD, "sampler.threads=2", "learner.threads=3"], "train", ["sampler", "learner"]),
        ([AHEAD, "sampler.threads=2", "sampler.cpus=2"], "train", []),
        ([AHEAD, "sampler.threads=1", "sampler.cpus=0.5"], "train", []),  # it needs one
        ([AHEAD, "learner.threads=2"], "sft", []),
        ([AHEAD, "learner.threads=2", "learner.gpus=1"], "train", []),
    ],
)
def test_more_threads_than_cores_are_named_where_both_roles_work_at_once(
    settings: list[str], command: Command, roles: list[str]
) -> None:
    lines = crowded_threads(made_recipe(*settings), command)
    assert [line.partition(".")[0] for line in lines] == roles
    for line, role in zip(lines, roles, strict=True):
        assert f"leave {role}.threads out" in line
