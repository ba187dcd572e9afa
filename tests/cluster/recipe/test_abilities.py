"""A recipe that asks of its tasks what they cannot do is refused in a line, before anything starts;
one that asks for what they can do goes on, and says what will not be measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.recipe.placement import Command
from cluster.recipe.preflight import glance, preflight
from cluster.recipe.recipe import Recipe, UserError, load_recipe
from rewards.leaks import WITHOUT
from tasks.core import DataError
from tasks.load import load_task
from tests.support.prose import GuardedProse, LabelledProse, Prose, says, stored, write_prose
from tests.support.recipes import SUDOKU, TINY_POLICY, recipe_file
from tests.support.vqa_files import cell, write_parquet

pytestmark = pytest.mark.usefixtures("own_cache")

SMALL = "model.max_model_len = 512\nsampler.max_tokens = 128\neval.problems = 4\n"


def recipe(folder: Path, tasks: str, *settings: str) -> Recipe:
    path = recipe_file(folder, SMALL, model=TINY_POLICY, tasks=tasks)
    return load_recipe(path, settings)


def told(wanted: Recipe, command: Command = "train") -> list[str]:
    """What preflight says of the tasks' abilities."""
    said: list[str] = []
    preflight(wanted, command, said.append, dry_run=True)
    return [line for line in said if "label" in line or "leak" in line]


UNLABELLED = f"{Prose.name}: no perception labels, so no a_p, a_r, leak or reliability"
TERMS = 'reward.terms=[{name="outcome"}, {name="%s"%s}]'


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("reward.alpha=0.5",), 'reward.alpha: "perception" needs score_perception, oracle_prefix'),
        ((TERMS % ("perception_graded", ""),), 'reward.terms[1]: "perception_graded" needs score'),
        (
            (TERMS % ("self_consistency", ""),),
            'reward.terms[1]: "self_consistency" needs solve, co',
        ),
        ((TERMS % ("blind_solver", ""),), 'reward.terms[1]: "blind_solver" needs solve'),
        (
            (TERMS % ("group_agreement", ', args={mode="soft"}'),),
            'reward.terms[1]: "group_agreement" needs perception_items',
        ),
        (  # of no task it can tell
            (TERMS % ("perception", ', on_failure="zero"'),),
            'reward.terms[1]: "perception" needs score_perception',
        ),
    ],
)
def test_a_term_is_refused_on_a_task_that_cannot_give_what_it_needs(
    tmp_path: Path, settings: tuple[str, ...], said: str
) -> None:
    data = write_prose(tmp_path / "data", range(8), range(8, 14))
    wanted = recipe(tmp_path, stored(data), *settings)
    for ask in (lambda: glance(wanted, "train"), lambda: told(wanted)):
        with pytest.raises(DataError) as caught:
            ask()
        line = str(caught.value)
        assert line.startswith(said) and "\n" not in line
        assert f'which task "{Prose.name}" lacks; remove the term' in line


def test_what_asks_for_no_label_goes_on_and_says_what_is_not_measured(tmp_path: Path) -> None:
    data = write_prose(tmp_path / "data", range(8), range(8, 14))
    terms = 'reward.terms=[{name="outcome"}, {name="group_agreement"}, {name="blind_policy"}]'
    said = told(recipe(tmp_path, stored(data), terms))
    assert said[1:] == [UNLABELLED]
    assert said[0].startswith('reward.terms[2]: "blind_policy": task "') and WITHOUT in said[0]
    unguarded = terms.replace('policy"', 'policy", args={leakage_check=false}')
    assert told(recipe(tmp_path, stored(data), unguarded)) == [UNLABELLED]
    assert told(recipe(tmp_path, SUDOKU, terms)) == []
    mixed = recipe(tmp_path, f"{SUDOKU}, {stored(data)}")
    assert UNLABELLED in told(mixed)
    assert told(recipe(tmp_path, SUDOKU)) == []


def test_a_term_may_be_left_to_those_tasks_that_have_labels(tmp_path: Path) -> None:
    data = write_prose(tmp_path / "data", range(8), range(8, 14))
    both = f"{SUDOKU}, {stored(data)}"
    with pytest.raises(DataError, match=r'which task ".*Prose" lacks; .* on_failure = "zero"'):
        told(recipe(tmp_path, both, TERMS % ("perception", "")))
    left = TERMS % ("perception", ', on_failure="zero"')
    assert told(recipe(tmp_path, both, left))
    # A gate of 0 would be shut: what it guards would earn nothing without a label.
    gate = left.replace('"outcome"', '"outcome", gate="perception"')
    with pytest.raises(DataError, match="as a gate it would be shut for these problems"):
        told(recipe(tmp_path, both, gate))
    assert told(recipe(tmp_path, both, gate.replace("zero", "drop_group")))


def test_a_column_labelled_on_some_rows_is_told_and_refused_where_all_are_needed(
    tmp_path: Path,
) -> None:
    data = write_prose(
        tmp_path / "data", range(8), range(8, 14), LabelledProse,
        label=lambda number: f"{number} dots" if number % 3 else "",
    )  # fmt: skip
    entry = stored(data, LabelledProse)
    (line,) = told(recipe(tmp_path, entry, "eval.problems=6"))
    assert line.endswith(
        "4 of 6 held-out problems have a perception label; a_p, a_r and leak are of these"
    )
    with pytest.raises(DataError, match=r"problem prose-0 of tasks\[0\].data has none; .*zero"):
        told(recipe(tmp_path, entry, "reward.alpha=0.5"))
    told(recipe(tmp_path, entry, TERMS % ("perception", ', on_failure="zero"')))


def test_a_pass_that_begins_with_the_truth_needs_a_label(tmp_path: Path) -> None:
    data = write_prose(tmp_path / "data", range(8), range(8, 14))
    passes = 'eval.passes=["greedy", "oracle_blank"]'
    with pytest.raises(DataError, match=r'eval.passes: "oracle_blank" .*; leave it out'):
        told(recipe(tmp_path, stored(data), passes))
    assert told(recipe(tmp_path, f"{SUDOKU}, {stored(data)}", passes)) == [UNLABELLED]
    assert told(recipe(tmp_path, stored(data), passes), "eval") == [UNLABELLED]


def test_without_data_a_task_must_draw_and_teach(tmp_path: Path) -> None:
    bare = f'{{ name = "{Prose.name}" }}'
    needs = r"tasks\[0\].data: without a data set it needs spec, generate, .*; name one"
    with pytest.raises(DataError, match=needs):
        glance(recipe(tmp_path, bare), "train")
    with pytest.raises(UserError, match="draws no problems, so it has no knobs"):
        recipe(tmp_path, f'{{ name = "{Prose.name}", knobs = {{ size = 4 }} }}')


def test_sft_learns_from_responses_and_says_where_there_are_none(tmp_path: Path) -> None:
    bare = write_prose(tmp_path / "bare", range(8), range(8, 14))
    with pytest.raises(DataError, match="no row of split train has a response"):
        told(recipe(tmp_path, stored(bare), "sft.steps=1"), "sft")
    taught = write_prose(
        tmp_path / "taught", range(8), range(8, 14), respond=lambda n: says(f"{n} dots", 2 * n)
    )
    assert told(recipe(tmp_path, stored(taught), "sft.steps=1"), "sft") == [UNLABELLED]
    warm = recipe(tmp_path, stored(taught), "sft.steps=1", "sft.vision_warmup_steps=3")
    with pytest.raises(DataError, match=r"sft.vision_warmup_steps needs vision_labels, .* to 0"):
        glance(warm, "sft")


def test_a_form_without_perceptions_loses_what_reads_them(tmp_path: Path) -> None:
    rows = [
        {"question": f"How many bars? {n}", "image": cell(n), "answer": str(n)} for n in range(12)
    ]
    for split, part in (("train", rows[:8]), ("test", rows[8:])):
        write_parquet(tmp_path / "data" / f"{split}.parquet", part)
    data = f'name = "vqa", data = "{tmp_path / "data"}", checker = "number"'
    boxed, segments = f'{{ {data}, form = "boxed" }}', f"{{ {data} }}"
    for term in ("group_agreement", "blind_policy", "image_dependence"):
        wanted = recipe(tmp_path, boxed, TERMS % (term, ""))
        with pytest.raises(DataError, match=r'"vqa/boxed" have none; .* form = "segments"'):
            glance(wanted, "train")
    (line,) = told(recipe(tmp_path, boxed))
    assert line.endswith(
        "responses have no perception, so no a_p, a_r, leak, sufficiency, reliability"
    )
    said = told(recipe(tmp_path, segments, TERMS % ("blind_policy", "")))
    assert said == ["vqa: no perception labels, so no a_p, a_r, leak or reliability"]


def test_the_test_tasks_are_what_they_say() -> None:
    for task in (Prose, LabelledProse, GuardedProse):
        assert load_task(task.name).name == task.name
