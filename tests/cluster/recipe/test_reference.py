"""The page and the schema of recipes are those of the sections, and true of the shipped ones."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from cluster.recipe.recipe import Recipe
from cluster.recipe.reference import page, schema_text
from tests.support.recipes import GRAPH, ROOT, SHIPPED, SUDOKU, TOY, recipe_text

SCHEMA = ROOT / "recipes" / "recipe.schema.json"


def test_page_and_schema_are_up_to_date() -> None:
    for made, file in ((page(), ROOT / "docs" / "recipe.md"), (schema_text(), SCHEMA)):
        assert made == file.read_text(encoding="utf-8"), "make them again: make reference"


def test_every_field_has_a_meaning() -> None:
    made = Recipe.model_json_schema()
    sections = [made, *made["$defs"].values()]
    silent = [
        f"{section['title']}.{name}"
        for section in sections
        for name, field in section["properties"].items()
        if not field.get("description")
    ]
    assert silent == [], "write a docstring below them"
    assert all(section["description"].startswith("[") for section in sections[1:])


def faults(recipe: dict[str, Any]) -> list[str]:
    """What an independent validator says of a recipe: where, and what."""
    validator = Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    validator.check_schema(validator.schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(recipe)]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_recipe_names_the_schema_and_fits_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    directive, _, place = text.splitlines()[0].partition(" ")
    assert (directive, (path.parent / place).resolve()) == ("#:schema", SCHEMA)
    assert faults(tomllib.loads(text)) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("", ""),
        ("algorithm.papo = { share = 1 }\nlearner.rates = { vision = 0.5 }", ""),
        ("sede = 3", "$: Additional properties are not allowed ('sede' was unexpected)"),
        ("learner.ranks = 0", "$.learner.ranks: 0 is less than the minimum of 1"),
        ('learner.rates = { vision = "low" }', "$.learner.rates.vision: 'low' is not of type 'num"),
        ("[sft]", "$.sft: {} is not valid under any of the given schemas"),
        ('reward.compose = "sum"', "$.reward.compose: 'sum' is not one of ['sum_then_normalize', "),
    ],
)
def test_the_schema_refuses_what_a_field_does_not_take(more: str, said: str) -> None:
    found = faults(tomllib.loads(recipe_text(more, tasks=f"{SUDOKU}, {GRAPH}, {TOY}")))
    assert len(found) == bool(said) and all(line.startswith(said) for line in found)


def test_the_schema_knows_the_knobs_of_built_in_tasks() -> None:
    odd = SUDOKU.replace("blanks", "blankz"), TOY.replace(" }", ", knobs = { any = 1 } }")
    (said,) = faults(tomllib.loads(recipe_text(tasks=", ".join(odd))))
    assert said.startswith("$.tasks[0].knobs: Additional properties are not allowed ('blankz' was")
