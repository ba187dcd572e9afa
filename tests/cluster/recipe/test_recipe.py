"""Recipes: every error at once, each with field and remedy; a resolved recipe loads as itself."""

from __future__ import annotations

import datetime
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.recipe.recipe import (
    Recipe,
    RecipeError,
    load_recipe,
    parse_setting,
    resolved_toml,
    task_of,
)
from cluster.recipe.toml_writer import table_lines
from tests.support.recipes import SHIPPED, error, errors

ROOT = Path(__file__).resolve().parents[3]


def test_a_small_recipe_gets_the_defaults_of_the_design(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert (loaded.algorithm.clip_low, loaded.algorithm.clip_high) == (0.2, 0.28)
    assert loaded.algorithm.group_size == 8
    assert loaded.algorithm.drop_zero_variance and loaded.model.lm_head_float32
    assert loaded.algorithm.max_staleness == 0
    assert [term.name for term in loaded.reward.effective_terms()] == ["outcome"]


def test_every_error_is_reported_at_once_with_file_and_field(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(
        """
        name = "x"
        sede = 3
        [model]
        path = 3
        [[tasks]]
        name = "sudoku"
        knobs = { blankz = 3, noise = "much" }
        [[tasks]]
        name = "sudokoo"
        [sampler]
        cout = 3
        zero_stage = 3
        temperature = 0
        [[reward.terms]]
        name = "outcome"
        [[reward.terms]]
        name = "percption"
        [algorithm]
        steps = "40"
        [learner]
        betas = [0.9, "a"]
        [sft]
        balance = "fix"
        """
    )
    lines = errors(path, "eval.problms=3")
    assert all(line.startswith(f"{path}: ") for line in lines)
    said = dict(line.removeprefix(f"{path}: ").split(": ", 1) for line in lines)
    assert said["tasks[1].name"].startswith('no task "sudokoo"; did you mean "sudoku"?')
    del said["tasks[1].name"]
    assert said == {
        "sede": 'no such key; did you mean "seed"?',
        "model.path": 'expected text in quotes ("..."), got 3',
        "tasks[0].knobs.blankz": 'no such key; did you mean "blanks"?',
        "tasks[0].knobs.noise": 'expected a number, got "much"',
        "sampler.cout": 'no such key; did you mean "count"?',
        "sampler.zero_stage": 'no such key; did you mean "learner.zero_stage"?',
        "sampler.temperature": "must be more than 0, got 0",
        "reward.terms[1].name": 'no reward term "percption"; did you mean "perception"?',
        "algorithm.steps": 'expected a whole number, got "40"',
        "learner.betas[1]": 'expected a number, got "a"',
        "sft.balance": (
            'expected "token_mean", "fixed", "ngdiff" or "ngdiff_sum", got "fix"; '
            'did you mean "fixed"?'
        ),
        "sft.steps": "is required and missing; add it",
        "eval.problms": 'no such key; did you mean "problems"? (from --set)',
    }


@pytest.mark.parametrize("value", ["true", '"2"', "2.0", "[2]", "{ a = 2 }"])
def test_nothing_is_coerced_to_a_count(recipe: Path, value: str) -> None:
    assert "learner.ranks: expected a whole number, got" in error(recipe, f"learner.ranks={value}")


def test_what_a_task_says_of_its_own_knobs_is_placed_at_the_knob(recipe: Path) -> None:
    line = error(recipe, "tasks[0].knobs.blanks=16")
    assert line.startswith(f"{recipe}: tasks[0].knobs.blanks: 16 leave no unique solution")


@pytest.mark.parametrize("name", ["mine.rewards:Term", "rewards:T"])
def test_a_reward_term_of_ones_own_is_taken_as_named(recipe: Path, name: str) -> None:
    (term,) = load_recipe(recipe, [f'reward.terms=[{{ name = "{name}" }}]']).reward.terms
    assert term.name == name


def test_overrides_reach_into_lists_and_tables(recipe: Path) -> None:
    loaded = load_recipe(
        recipe,
        ["tasks[0].knobs.noise=70", "tasks.0.knobs.blanks=5", "model.path=a/b", "eval.every = 3"],
    )
    assert loaded.tasks[0].knobs["noise"] == 70.0
    assert loaded.tasks[0].knobs["blanks"] == 5
    assert (loaded.model.path, loaded.eval.every) == ("a/b", 3)


def test_an_override_of_an_unknown_path_says_what_was_meant(recipe: Path) -> None:
    assert 'smpler: no such key; did you mean "sampler"?' in error(recipe, "smpler.count=2")
    assert "tasks is a list with 1 entries" in error(recipe, "tasks[1].weight=2")
    assert "name has nothing below it" in error(recipe, "name.x=2")
    assert "expected key=value" in error(recipe, "seed")
    assert len(errors(recipe, "seed", "a..b=1", "learner.ranks=0")) == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=1e-5", 1e-5),
        ("a=true", True),
        ("a='t'", "t"),
        ("a=[1, 2]", [1, 2]),
        ("a=plain words", "plain words"),
        ("a=b=c", "b=c"),
        ("a=", ""),
        ("a=1\nb = 2", "1\nb = 2"),
    ],
)
def test_setting_values_are_toml_or_else_text(text: str, value: object) -> None:
    assert parse_setting(text) == ("a", value)


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_any_override_is_applied_or_a_recipe_error(text: str) -> None:
    try:
        loaded = load_recipe(ROOT / "recipes/tiny/sudoku.toml", [text, f"question={text}"])
    except RecipeError:
        return
    assert tomllib.loads(resolved_toml(loaded))


def test_toml_syntax_errors_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('name = "x"\n[model\n')
    assert "bad.toml: not valid TOML: " in error(path) and "line 2" in error(path)


def test_a_byte_order_mark_is_no_part_of_a_recipe_and_utf_16_is_named(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    plain = load_recipe(recipe)
    recipe.write_text(text, encoding="utf-8-sig")
    assert load_recipe(recipe) == plain
    recipe.write_text(text, encoding="utf-16")
    assert error(recipe).startswith(f"{recipe}: is UTF-16 or no text (")


def test_a_missing_file_suggests_its_neighbour(recipe: Path) -> None:
    assert error(recipe.with_name("xx.toml")).endswith(f"did you mean {recipe}?")


def test_knobs_given_on_the_command_line_are_checked_the_same_way() -> None:
    assert task_of("sudoku", ["size=4", "blanks=3"]).knobs["blanks"] == 3
    with pytest.raises(RecipeError, match=r'^--set blankz: no such key; did you mean "blanks"\?$'):
        task_of("sudoku", ["blankz=3"])
    with pytest.raises(RecipeError, match=r'^--task: no task "sudokoo"'):
        task_of("sudokoo")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_resolved_recipe_loads_to_an_equal_one(path: Path, tmp_path: Path) -> None:
    loaded = load_recipe(path)
    again = tmp_path / "resolved.toml"
    again.write_text(resolved_toml(loaded), encoding="utf-8")
    assert load_recipe(again) == loaded
    opening = path.read_text().splitlines()[1]
    assert opening.startswith("# "), "behind its schema a recipe opens with the question it answers"


def test_rates_by_pattern_keep_their_order_since_the_last_match_counts(
    recipe: Path, tmp_path: Path
) -> None:
    patterns = {"vision": 0.1, "model.visual.blocks.*": 0.5, '*."q_proj"*': 2.0, "merger": 0.3}
    loaded = load_recipe(recipe).model_dump()
    made = Recipe.model_validate(loaded | {"learner": {"rates": patterns, "freeze": ("head",)}})
    again = tmp_path / "resolved.toml"
    again.write_text(resolved_toml(made), encoding="utf-8")
    found = load_recipe(again).learner
    assert list(found.rates.items()) == list(patterns.items())
    assert (found.freeze, found.lora) == (("head",), None)


def test_a_resolved_recipe_keeps_awkward_values(recipe: Path, tmp_path: Path) -> None:
    odd = {
        "quote": 'a "b" \\ \n\t\x7f é',
        "day": datetime.date(2026, 5, 28),
        "list": [{"x": 1}, 2],
        "dotted.key": {"": [0.1, 1e22]},
    }
    term = {"name": "mine:Term", "args": odd}
    loaded = load_recipe(recipe).model_dump()
    made = Recipe.model_validate(loaded | {"reward": {"terms": [term]}, "question": "a\nb"})
    again = tmp_path / "resolved.toml"
    again.write_text(resolved_toml(made), encoding="utf-8")
    assert load_recipe(again) == made


scalars = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
    | st.dates()
)
keys = st.text(st.characters(codec="utf-8"), max_size=8)
values = st.recursive(
    scalars,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(keys, below, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(keys, values, max_size=4))
@settings(max_examples=150)
def test_the_writer_writes_what_tomllib_reads(table: dict[str, Any]) -> None:
    assert tomllib.loads("\n".join(table_lines(table, ()))) == table
