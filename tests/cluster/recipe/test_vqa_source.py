"""`name = "vqa"` in a recipe: what its problems are, what is refused, what stays on the disk."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.recipe.preflight import preflight
from cluster.recipe.problems import ProblemSource, held_out, open_sources, step_problems
from cluster.recipe.recipe import Recipe, RecipeError, load_recipe
from tasks.core import CanLeak, DataError, ScoresPerception, labelled
from tasks.free_text import instructions
from tasks.load import load_task
from tests.support.recipes import TINY_POLICY, made_recipe, recipe_file
from tests.support.terminal import Equipoise
from tests.support.vqa_files import bars as row
from tests.support.vqa_files import picture, write_lines, write_parquet

pytestmark = pytest.mark.usefixtures("own_cache")

FITS = "model.max_model_len = 512\nsampler.max_tokens = 128\neval.problems = 2\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "bars/train.parquet", [row(n, level=n % 2) for n in range(6)])
    write_parquet(tmp_path / "bars/test.parquet", [row(n, level=n % 2) for n in range(6, 10)])
    return tmp_path / "bars"


def entry(data: Path | str, more: str = "") -> str:
    return f'{{ name = "vqa", data = "{data}"{more and ", "}{more} }}'


def source(data: Path | str, more: str = "") -> ProblemSource:
    (opened,) = open_sources(made_recipe(tasks=entry(data, more)).tasks)
    return opened


@pytest.mark.parametrize("form", ["segments", "think_answer", "boxed"])
def test_problems_are_the_rows_asked_in_the_form_and_checked(data: Path, form: str) -> None:
    opened = source(data, f'form = "{form}"')
    drawn = step_problems([opened], 0, 0, 6)
    assert sorted(p.truth["answers"][0] for p in drawn) == list("012345")
    said = {
        "segments": "<perception>\nBars\n</perception>\n<reasoning>\n\n</reasoning>\n"
        "<answer>\n{}\n</answer>",
        "think_answer": "<think>\nBars\n</think>\n<answer>\n{}\n</answer>",
        "boxed": r"Bars: \boxed{{{}}}",
    }[form]
    for problem in drawn:
        number = int(problem.truth["answers"][0])
        assert problem.images == (picture(number),)
        assert problem.prompt == f"<image>How many bars?\n\n{instructions(form)}"
        assert problem.extra == {"level": number % 2}
        task = load_task(problem.task)  # as a sampler finds it
        for answer, right in ((number, True), (number + 1, False)):
            parsed = task.parse(said.format(answer))
            assert not parsed.defects and task.check(problem, parsed.answer) is right
        assert (parsed.perception is not None) is (form == "segments")
        assert (
            isinstance(task, ScoresPerception) is isinstance(task, CanLeak) is (form == "segments")
        )
    asked = source(data, f"form = \"{form}\", prompt = 'Say: {{question}} Go.'")
    assert asked.test[0].problem.prompt == "Say: <image>How many bars? Go."


def test_a_perception_column_is_a_label_where_it_is_filled(tmp_path: Path) -> None:
    rows = [row(1, perception="one  bar"), row(2, perception=None)]
    write_parquet(tmp_path / "a/train.parquet", rows)
    write_parquet(tmp_path / "a/test.parquet", [row(3, perception="3 bars")])
    opened = source(tmp_path / "a")
    first, second = (example.problem for example in opened.train)
    task = opened.task
    assert labelled(task, first) and not labelled(task, second)
    assert task.score_perception(first, "one bar") == (True, 1.0)
    exact, graded = task.score_perception(first, "one car")
    assert not exact and 0.5 < graded < 1
    assert task.parse(task.oracle_prefix(first)).perception == "one  bar"
    assert task.states_answer(first, "The answer is 1.")
    assert not task.states_answer(first, "There are some bars.")


def test_what_cannot_be_used_is_refused_or_skipped_by_the_recipes_word(data: Path) -> None:
    rows = [row(0), row(7), row(1, answer=""), row(2, images=[{"bytes": b"x", "path": None}])]
    write_parquet(data / "train.parquet", rows)
    with pytest.raises(DataError) as caught:
        source(data)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[1] for line in lines[:-1]] == ["row 2", "row 3", "row 1"]
    assert lines[-1].startswith("3 rows of tasks[0].data: ") and "bad_rows" in lines[-1]
    opened = source(data, 'bad_rows = "skip"')
    assert len(opened.train) == 1 and len(opened.test) == 4
    assert opened.notes[-1].endswith("are left out") and len(opened.notes) == 4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('checker = "expresion"', "tasks[0].checker: no checker 'expresion'"),
        ('checker = { name = "number", tolerance = 3 }', "tolerance must lie from 0 to 1"),
        ('checker = { name = "number", nearly = 1 }', "'nearly' is not one of this checker's"),
        ('prompt = "Look."', "tasks[0].prompt: "),
        ('prompt = "<image>{question}"', "tasks[0].prompt: "),
        ('form = "json"', "tasks[0].form: "),
        ("knobs = { size = 4 }", "tasks[0].knobs: "),
        ("data = { tarin = 'x' }", "tasks[0].data"),
    ],
)
def test_a_recipe_says_what_is_wrong_with_its_entry(data: Path, more: str, said: str) -> None:
    tasks = entry(data, more) if "data =" not in more else f'{{ name = "vqa", {more} }}'
    with pytest.raises(RecipeError) as caught:
        made_recipe(tasks=tasks)
    assert said in str(caught.value)


def test_what_is_of_vqa_alone_is_refused_elsewhere() -> None:
    for more in (
        'form = "boxed"',
        'checker = "text"',
        'bad_rows = "skip"',
        'prompt = "{question}"',
    ):
        with pytest.raises(RecipeError, match='is of name = "vqa"'):
            made_recipe(tasks=f'{{ name = "sudoku", {more} }}')
    with pytest.raises(RecipeError, match='write name = "vqa" and form = "boxed"'):
        made_recipe(tasks='{ name = "vqa/boxed", data = "x" }')


def test_each_row_may_name_its_checker(tmp_path: Path) -> None:
    rows = [
        {"question": "1?", "answer": "0.5", "verifier": "number"},
        {"question": "2?", "answer": "B", "verifier": "mcq"},
        {"question": "3?", "answer": "B", "verifier": "oracle"},
    ]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    named = f'{{ test = "{file}" }}'
    tasks = f'{{ name = "vqa", data = {named}, checker = {{ column = "verifier" }} }}'
    with pytest.raises(DataError, match="line 3: verifier: 'oracle' names no checker"):
        open_sources(made_recipe(tasks=tasks).tasks)
    (opened,) = open_sources(made_recipe("tasks[0].bad_rows='skip'", tasks=tasks).tasks)
    assert [e.problem.truth["checker"] for e in opened.test] == ["number", "choice"]


def test_rows_travel_without_their_pictures(data: Path) -> None:
    opened = source(data)
    sent = pickle.dumps(opened.train)
    assert len(sent) < 10_000 and all(picture(n) not in sent for n in range(6))
    again = pickle.loads(sent)
    assert list(again) == list(opened.train)
    assert [e.problem.prompt for e in again.without_images()] == [e.problem.prompt for e in again]
    assert all(e.problem.images == () for e in again.without_images())


def wanted(tmp_path: Path, data: Path, *settings: str) -> Recipe:
    path = recipe_file(tmp_path, FITS, model=TINY_POLICY, tasks=entry(data))
    return load_recipe(path, settings)


def test_rows_that_do_not_fit_the_policy_are_named_with_their_column(
    data: Path, tmp_path: Path
) -> None:
    rows = [row(n, problem="<image>" + "How many bars? " * (1 + 300 * (n == 2))) for n in range(4)]
    write_parquet(data / "train.parquet", rows)
    with pytest.raises(DataError, match=r"train.parquet: row 2: problem: [\d,]+ tokens"):
        preflight(wanted(tmp_path, data), "train", print)
    told: list[str] = []
    settings = ("tasks[0].too_long='drop'",)
    (ready,) = preflight(wanted(tmp_path, data, *settings), "train", told.append).sources
    assert len(ready.train) == 3 and any("left out" in line for line in told)
    assert {p.truth["answers"][0] for p in step_problems([ready], 0, 0, 3)} == {"0", "1", "3"}
    assert len(held_out(ready, 0, 2)) == 2


def test_a_data_set_that_is_all_held_out_is_for_evaluation_alone(
    data: Path, tmp_path: Path
) -> None:
    (data / "train.parquet").unlink()
    with pytest.raises(DataError, match=r"tasks\[0\].data: split train has no rows"):
        preflight(wanted(tmp_path, data), "train", print)
    (ready,) = preflight(wanted(tmp_path, data), "eval", print).sources
    assert len(ready.test) == 4


def test_a_dry_run_tells_what_is_held_out(data: Path, tmp_path: Path, equipoise: Equipoise) -> None:
    (data / "test.parquet").unlink()
    write_parquet(data / "train.parquet", [row(n) for n in range(9)])
    recipe_file(tmp_path, FITS, model=TINY_POLICY, tasks=entry(data))
    words = ("train", tmp_path / "x.toml", "--dry-run", "--set", "eval.problems=1")
    code, printed, _ = equipoise(*words)
    assert code == 0 and "# note: tasks[0].data: nothing is held out by name" in printed


def test_a_test_split_of_no_row_is_named(data: Path) -> None:
    opened = source(data)
    with pytest.raises(DataError, match=r"^vqa: data: no row is left in the test split"):
        held_out(replace(opened, test=opened.test.chosen([])), 0, 2)


def test_fewer_held_out_rows_than_asked_for_are_all_taken(data: Path, tmp_path: Path) -> None:
    told: list[str] = []
    (ready,) = preflight(wanted(tmp_path, data, "eval.problems=512"), "train", told.append).sources
    assert len(held_out(ready, 0, 512)) == 4
    assert "vqa: eval.problems = 512, and 4 rows are held out: all are taken" in told
