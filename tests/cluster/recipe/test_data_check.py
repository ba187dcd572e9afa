"""`equipoise tasks check RECIPE`: numbers against what was put into the file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.recipe.data_check import check_data, judges_itself
from tasks.core import Problem
from tests.support.recipes import TINY_POLICY, made_recipe, recipe_file
from tests.support.terminal import Equipoise, with_set
from tests.support.vqa_files import bars as row
from tests.support.vqa_files import cell, write_parquet

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_data_set_is_told_as_it_is(tmp_path: Path, equipoise: Equipoise) -> None:
    train = [
        row(1),
        row(1, answer="one"),
        row(2, images=[cell(2), cell(3)], problem="<image><image>Both?"),
        row(3, images=[], problem="2 + 2?"),
        row(4, answer=""),
        row(5, answer=""),
        row(8),
        row(6, problem="<image>" + "How many? " * 400),
    ]
    write_parquet(tmp_path / "bars/train.parquet", train)
    write_parquet(tmp_path / "bars/test.parquet", [row(8), row(9)])
    fits = "model.max_model_len = 512\nsampler.max_tokens = 128\n"
    tasks = f'{{ name = "vqa", data = "{tmp_path / "bars"}", form = "boxed" }}'
    recipe_file(tmp_path, fits, model=TINY_POLICY, tasks=tasks)
    code, told, refused = equipoise("tasks", "check", tmp_path / "x.toml")
    assert code == 2
    for said in (
        "splits     test 2, train 6",
        "rows       5 to train on, 2 held out",
        "repeats    1 rows of train",
        "bad rows   2: answer: is empty",
        "bad rows   1: images and question are those of ",
        "images     1 rows with none, 5 rows with 1, 1 rows with 2",
        "smallest 24x16, middle 24x16, largest 24x16",
        "too long   1 rows do not fit",
        "train.parquet: row 7: problem: ",
        "room for 384",
        "checkers   expression 7",
        "golds      7 of 7",
        'form = "boxed" has no perception',
    ):
        assert said in told, said
    assert len(re.findall("tasks\\[0\\]: (?:bad rows|too long)", refused)) == 3
    skips = with_set("tasks[0].bad_rows=skip", "tasks[0].too_long=drop")
    assert equipoise("tasks", "check", tmp_path / "x.toml", *skips).code == 0


def test_a_policy_that_is_not_here_leaves_tokens_out(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "train.parquet", [row(n) for n in range(9)])
    recipe = made_recipe(model="owner/model", tasks=f'{{ name = "vqa", data = "{file}" }}')
    told: list[str] = []
    assert check_data(recipe, told.append) == []
    assert any("tokens     not measured: owner/model" in line for line in told)


def problem(checker: str, answers: list[str], **truth: object) -> Problem:
    told = {"checker": checker, "answers": answers, "choices": [], "options": {}} | truth
    return Problem("p", "vqa", "?", "", told, {}, "k")


def test_golds_are_judged_by_their_own_checker() -> None:
    assert judges_itself(problem("point", ["[0.1, 0.2, 0.3, 0.4]"]))
    assert judges_itself(problem("choice", ["the second"], choices=["the first", "the second"]))
    assert not judges_itself(problem("choice", ["C"], choices=["the first", "the second"]))
