"""A run's rollouts are what its learner saw: read back, they make the same batches."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.recipe.recipe import RecipeError, UserError, load_recipe, resolved_toml
from cluster.record.stored import read_scored
from cluster.record.tracker import Tracker
from cluster.run.replay import recipe_to_sample, recorded
from cluster.run.step_metrics import step_metrics
from cluster.run.train import train_batches
from rewards.advantages import CREDIT_COLUMNS, NO_CALL_COLUMNS
from rewards.compose import Composition, compose_groups
from rewards.scored import ScoredGroup
from rewards.terms import load_term
from tasks.core import DataError
from tests.support.recipes import made_recipe
from tests.support.toys import group, score


def step(number: int) -> list[ScoredGroup]:
    """Groups with and without variance, and one that was dropped; advantages no float32 holds."""
    terms = [load_term("outcome"), load_term("perception_graded")]
    composition = Composition({"outcome": 1.0, "perception_graded": 1 / 3})
    texts = (("3;6;", "3;5;", "2;6;"), ("3;5;", "3;5;", "3;5;"), ("1;2;", ";;", "3;6;"))
    groups = [group(3, *found, name=f"{number}-{i}") for i, found in enumerate(texts)]
    scored = compose_groups(groups, [score(g, *terms) for g in groups], composition)
    none = np.zeros_like(scored[2].advantages)
    totals = np.full(3, math.nan)
    return [
        *scored[:2],
        replace(scored[2], dropped=True, advantages=none, totals=totals),
        scored[2],
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    recipe = made_recipe("algorithm.group_size=3", "algorithm.steps=3")
    with Tracker(tmp_path / "run", resolved_toml(recipe)) as tracker:
        for number in (1, 2, 3):
            found = step(number)
            found[3] = replace(found[3], group=replace(found[3].group, group_id="another"))
            tracker.log(number, {"learner/loss": 0.5 * number})
            tracker.log_rollouts(number, found)
    return tmp_path / "run"


def test_stored_groups_make_the_batches_that_the_learner_saw(run: Path) -> None:
    recipe, source = recorded(run)
    stored_too = np.isin(CREDIT_COLUMNS, NO_CALL_COLUMNS)
    assert source.steps == (1, 2, 3) and source.losses == {1: 0.5, 2: 1.0, 3: 1.5}
    for number in source.steps:
        seen, found = step(number), read_scored(run, number)
        assert [g.has_gradient for g in found] == [g.has_gradient for g in seen]
        assert [g.dropped for g in found] == [False, False, True, False]
        for old, new in zip(seen, found, strict=True):
            np.testing.assert_array_equal(
                new.advantages[:, stored_too], old.advantages[:, stored_too]
            )
            assert not new.advantages[:, ~stored_too].any(), "no token is of a call"
            np.testing.assert_array_equal(new.totals, old.totals)
        assert step_metrics(found, 0)["group/zero_variance"] == pytest.approx(1 / 3)
        for recipe_ in (recipe, load_recipe(run / "recipe.toml", ["algorithm.updates_per_step=2"])):
            expected, batches = (
                train_batches(recipe_.algorithm, groups) for groups in (seen, found)
            )
            assert len(batches) == len(expected) > 0
            for batch, other in zip(batches, expected, strict=True):
                for a, b in zip(batch.sequences, other.sequences, strict=True):
                    assert a.images == b.images
                    for name in ("prompt_ids", "response_ids", "segments", "sampler_logprobs",
                                 "advantages"):  # fmt: skip
                        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
                        assert getattr(a, name).dtype == getattr(b, name).dtype


def test_a_replay_may_change_how_it_learns_and_nothing_else(run: Path) -> None:
    recipe, source = recorded(
        run, ["algorithm.loss=cispo", "learner.learning_rate=1e-4", "algorithm.steps=2"]
    )
    assert recipe.algorithm.loss == "cispo" and source.steps == (1, 2)
    for override in (
        "seed=4",
        "algorithm.group_size=4",
        "sampler.temperature=0.5",
        "reward.alpha=1",
        "model.path=other",
        "tasks[0].knobs.blanks=5",
    ):
        with pytest.raises(RecipeError, match="a replay may change") as wrong:
            recorded(run, [override])
        assert override.partition("=")[0].partition("[")[0] in str(wrong.value)


def test_what_cannot_be_replayed_says_why(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run folder: it has no recipe\.toml"):
        recorded(tmp_path / "nothing")
    (run / "rollouts" / "step-000002.parquet").unlink()
    with pytest.raises(UserError, match=r"1 of 3 steps \(2\) are not there"):
        recorded(run)
    file = run / "rollouts" / "step-000001.parquet"
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["advantages"]), file)
    with pytest.raises(DataError, match=r"step-000001\.parquet: column 'advantages' is missing"):
        read_scored(run, 1)


def test_a_checkpoint_samples_by_the_recipe_of_its_run(run: Path) -> None:
    for name in ("checkpoint", "checkpoints/step-000010"):
        folder = run / name
        folder.mkdir(parents=True)
        with pytest.raises(UserError, match="expected a recipe, or a checkpoint"):
            recipe_to_sample(folder)
        (folder / "config.json").write_text(json.dumps({}))
        recipe = recipe_to_sample(folder, ["algorithm.group_size=5"])
        assert (recipe.model.path, recipe.algorithm.group_size) == (str(folder), 5)
    assert recipe_to_sample(run / "recipe.toml").model.path == "m"
