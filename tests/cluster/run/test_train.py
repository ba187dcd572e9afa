"""The driver's own arithmetic: which groups are learnt from, in which minibatch, at which rate."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cluster.recipe.problems import held_out, open_sources, step_problems
from cluster.recipe.recipe import Recipe, RunFailed, load_recipe
from cluster.record.evaluation import EvalTable
from cluster.record.mismatch import mismatch
from cluster.record.terminal import Progress
from cluster.run.budget import Spent, is_over, run_share
from cluster.run.keeping import Keeper
from cluster.run.run_log import tell_mismatch
from cluster.run.stream import free_requests
from cluster.run.train import (
    anchored,
    learner_metrics,
    policy_loss,
    report_change,
    save_and_measure,
    train_batches,
)
from learner.batch import TrainBatch
from learner.loss_settings import CorrectionConfig, EntropyWeights, LossConfig, PapoConfig
from learner.policy_loss import PolicyLoss
from rewards.settings import RewardTermConfig
from tasks.core import DataError
from tasks.splits import split_of
from tests.support.recipes import GRAPH, SUDOKU, made_recipe
from tests.support.toys import graded


def two_tasks(*overrides: str) -> Recipe:
    """Problems of both tasks, three of one for one of the other, and a rate that warms up."""
    rate = ("learner.learning_rate=1e-4", "learner.warmup_steps=4")
    return made_recipe("seed=5", "tasks[0].weight=3", *rate, *overrides, tasks=f"{SUDOKU}, {GRAPH}")


@pytest.fixture
def recipe() -> Recipe:
    return two_tasks()


def test_the_loss_is_what_the_recipe_names(recipe: Recipe) -> None:
    # Without a word about it: GRPO's clipped surrogate, token mean, no KL, no bonus, one view.
    default = policy_loss(recipe)
    assert asked_for(default) == (LossConfig(), 256)
    assert LossConfig().papo is None and LossConfig().correction.kind == "none"
    assert LossConfig().loss == "clip"
    assert LossConfig().kl_weight == LossConfig().entropy_weight == 0
    assert not default.uses_entropy
    found = policy_loss(
        two_tasks(
            "algorithm.loss=gspo",
            "algorithm.clip_high=0.01",
            "algorithm.updates_per_step=2",
            "algorithm.kl_weight=0.5",
            "algorithm.kl_estimator=k2",
            "algorithm.entropy_weight=0.25",
            "algorithm.entropy_weights.perception=0.125",
            "algorithm.papo={weight = 0.01, entropy_weight = 0.03, share = 0.5}",
            "sampler.max_tokens=99",
        )
    )
    expected = LossConfig(
        loss="gspo", clip_low=3e-4, clip_high=0.01, aggregation="sequence_mean", kl_weight=0.5,
        kl_estimator="k2", entropy_weight=0.25, entropy_weights=EntropyWeights(perception=0.125),
        papo=PapoConfig(weight=0.01, entropy_weight=0.03, share=0.5),
    )  # fmt: skip
    assert asked_for(found) == (expected, 99)


def asked_for(loss: PolicyLoss) -> tuple[LossConfig, int]:
    """What a loss reads of [algorithm], and its longest response."""
    fields = loss.config.model_dump(include=set(LossConfig.model_fields))
    return LossConfig.model_validate(fields), loss.max_tokens


def test_groups_without_a_gradient_are_left_out(recipe: Recipe) -> None:
    groups = [graded([True, False], "a"), graded([True, True], "b"), graded([False, True], "c")]
    (batch,) = train_batches(recipe.algorithm, groups)
    assert len(batch.sequences) == 4
    advantages = [float(s.advantages[0]) for s in batch.sequences]
    assert advantages == pytest.approx([1, -1, -1, 1], abs=1e-5)
    assert train_batches(recipe.algorithm, [graded([True, True], "b")]) == []


def test_zero_variance_groups_count_as_tokens_where_the_recipe_keeps_them(recipe: Recipe) -> None:
    algorithm = recipe.algorithm.model_copy(update={"drop_zero_variance": False})
    kept = recipe.model_copy(update={"algorithm": algorithm})
    groups = [graded([True, False], "a"), graded([True, True], "b")]
    (batch,) = train_batches(kept.algorithm, groups)
    assert len(batch.sequences) == 4
    assert all((s.advantages == 0).all() for s in batch.sequences[2:])


def test_dropped_groups_never_reach_the_learner(recipe: Recipe) -> None:
    bad = replace(graded([True, False], "a"), dropped=True)
    (batch,) = train_batches(recipe.algorithm, [bad, graded([True, False], "b")])
    assert len(batch.sequences) == 2


def test_minibatches_hold_whole_groups_and_every_group_once(recipe: Recipe) -> None:
    algorithm = recipe.algorithm.model_copy(update={"updates_per_step": 2})
    split = recipe.model_copy(update={"algorithm": algorithm})
    groups = [graded([True, False, False], name) for name in "abcde"]
    batches = train_batches(split.algorithm, groups)
    assert [len(b.sequences) for b in batches] == [9, 6]
    for batch in batches:
        total = sum(float(s.advantages[0]) for s in batch.sequences)
        assert total == pytest.approx(0, abs=1e-5)


def test_step_metrics_of_several_updates_keep_the_first_ratio() -> None:
    updates = [
        {"loss": 1.0, "ratio_gap": 1e-6, "logprob_gap": 1e-6, "seconds": 2.0},
        {"loss": 3.0, "ratio_gap": 0.4, "logprob_gap": 0.3, "seconds": 1.0},
    ]
    assert learner_metrics(updates) == {
        "learner/loss": 2.0,
        "learner/ratio_gap": 1e-6,
        "learner/logprob_gap": 1e-6,
        "learner/seconds": 3.0,
    }
    assert learner_metrics([]) == {}


class FixedLearner:
    """Log-probs of a policy that finds a token the less likely the later it comes."""

    def __init__(self) -> None:
        self.asked: list[TrainBatch] = []

    def logprobs(self, batch: TrainBatch) -> list[np.ndarray]:
        self.asked.append(batch)
        return [-np.arange(len(s.response_ids), dtype=np.float32) for s in batch.sequences]


def test_later_minibatches_get_the_log_probs_that_the_step_begins_with(recipe: Recipe) -> None:
    chosen = CorrectionConfig(kind="icepop")
    update = {"updates_per_step": 3, "correction": chosen}
    corrected = recipe.model_copy(update={"algorithm": recipe.algorithm.model_copy(update=update)})
    assert policy_loss(corrected).config.correction == chosen
    assert policy_loss(recipe).config.correction.kind == "none"
    groups = [graded([True, False, False], name) for name in "abcde"]
    batches = train_batches(corrected.algorithm, groups)
    learner: Any = FixedLearner()
    found = anchored(corrected.algorithm, batches, learner)
    assert found[0] is batches[0] and learner.asked == batches[1:]
    for old, new in zip(batches[1:], found[1:], strict=True):
        for before, after in zip(old.sequences, new.sequences, strict=True):
            assert after.response_ids is before.response_ids
            assert after.old_logprobs is not None
            assert after.old_logprobs.tolist() == [-i for i in range(len(before.response_ids))]
    assert anchored(recipe.algorithm, batches, learner) is batches


def test_a_mismatch_is_told_or_ends_the_run(recipe: Recipe) -> None:
    said: list[str] = []
    progress: Any = SimpleNamespace(say=said.append)
    fine = {"learner/logprob_gap": 1e-5, "policy/lag_max": 0.0}
    stale = {"learner/logprob_gap": 3.0, "learner/mismatch/k3": 0.02, "policy/lag_max": 1.0}
    for metrics in ({}, fine, stale):
        tell_mismatch(recipe, metrics, progress)
    assert said == []
    algorithm = recipe.algorithm.model_copy(update={"on_mismatch": "stop"})
    strict = recipe.model_copy(update={"algorithm": algorithm})
    for metrics in (
        fine | {"learner/logprob_gap": 0.01},
        fine | {"learner/logprob_gap": math.nan},
        stale | {"learner/mismatch/k3": 0.3},
    ):
        said.clear()
        tell_mismatch(recipe, metrics, progress)
        assert len(said) == 1 and said[0].startswith("warning: sampler and learner")
        with pytest.raises(RunFailed, match=r"sampler and learner.*on_mismatch"):
            tell_mismatch(strict, metrics, progress)


def test_what_rounding_explains_depends_on_type_and_device() -> None:
    # Seen on CPUs with a pretrained model in bfloat16, and no mismatch.
    rounding = {"learner/logprob_gap": 0.79, "learner/mismatch/k3": 6e-4}
    assert mismatch(rounding, "bfloat16") is None
    assert mismatch(rounding, "float32") and mismatch(rounding, "float32", on_gpu=True)
    assert mismatch({"learner/logprob_gap": 0.02}, "float32", on_gpu=True) is None
    wrong = {"learner/logprob_gap": 0.79, "learner/mismatch/k3": 0.05}
    assert mismatch(wrong, "bfloat16", on_gpu=True)
    assert mismatch(wrong | {"policy/lag_max": 1.0}, "bfloat16") is None


def test_the_learning_rate_warms_up_and_stays(recipe: Recipe) -> None:
    rates = [recipe.learner.rate_at(step) for step in range(1, 8)]
    assert rates == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4, 1e-4, 1e-4, 1e-4])


def test_problems_are_the_same_for_every_run_with_a_seed(recipe: Recipe) -> None:
    sources = open_sources(recipe.tasks)

    def ids(seed: int) -> list[str]:
        opened = open_sources(recipe.tasks)
        return [p.id for step in range(3) for p in step_problems(opened, seed, step, 16)]

    first, again, other = ids(5), ids(5), ids(6)
    assert first == again
    assert first != other
    problems = step_problems(sources, 5, 0, 400)
    share = np.mean([p.task == "sudoku" for p in problems])
    assert 0.68 < share < 0.82  # 3 of 4, within 3 standard errors
    assert {split_of(p) for p in problems} == {"train"}
    requests = free_requests(recipe, 1, problems)
    assert len({r.group_id for r in requests}) == 400
    assert {r.n for r in requests} == {8}


def test_held_out_problems_are_of_the_test_split_and_differ(recipe: Recipe) -> None:
    for source in open_sources(recipe.tasks):
        problems = held_out(source, 1, 60)
        assert {split_of(p) for p in problems} == {"test"}
        assert len({p.id for p in problems}) == 60


def test_too_few_held_out_problems_are_an_error_with_a_remedy() -> None:
    source = open_sources(two_tasks("tasks[1].knobs.vertices=4").tasks)[1]
    with pytest.raises(DataError, match=r"eval\.problems.*lower eval\.problems"):
        held_out(source, 1, 500)


def test_two_entries_of_one_task_have_names_of_their_own() -> None:
    twice = made_recipe(tasks=f"{GRAPH}, {GRAPH}").tasks
    assert [s.label for s in open_sources(twice)] == ["graph_coloring", "graph_coloring-2"]


def test_a_scheduled_weight_is_reached_at_the_last_step() -> None:
    base = load_recipe(Path(__file__).parents[3] / "recipes" / "tiny" / "demo.toml")
    term = RewardTermConfig(name="format", weight=1.0, final_weight=0.25, schedule="linear")
    steps = base.algorithm.steps
    weights = [term.weight_at(run_share(base.algorithm, done, Spent())) for done in range(steps)]
    assert (weights[0], weights[-1]) == (1.0, 0.25)
    assert weights == sorted(weights, reverse=True)
    single = base.algorithm.model_copy(update={"steps": 1})
    assert run_share(single, 0, Spent()) == 0.0


def test_a_budget_ends_the_run_with_the_step_that_spends_it_and_times_its_schedules() -> None:
    for kind, costs in (("tokens", (300, 0.0)), ("seconds", (0, 300.0))):
        recipe = made_recipe(f'algorithm.budget={{kind="{kind}", amount=1000}}')
        spent, shares = Spent(), []
        while not is_over(recipe.algorithm, len(shares), spent):
            shares.append(run_share(recipe.algorithm, len(shares), spent))
            spent = spent.plus(*costs)
        # 300, 600, 900, and the fourth step goes past 1,000.
        assert shares == pytest.approx([0.0, 0.3, 0.6, 0.9])
        assert run_share(recipe.algorithm, 4, spent) == 1.0
        few = recipe.algorithm.model_copy(update={"steps": 2})
        assert [is_over(few, done, Spent()) for done in (0, 1, 2, 3)] == [False, False, True, True]


def test_what_was_measured_is_kept_before_it_is_pooled_printed_or_drawn(tmp_path: Path) -> None:
    # Two [[tasks]] entries of one task with other knobs may hold the same problem.
    before = {
        label: EvalTable({"a": {"p": 0.0, "q": 0.0}}) for label in ("dots:Dots", "dots:Dots-2")
    }
    after = before | {"dots:Dots-2": EvalTable({"a": {"p": 1.0, "q": 1.0}})}

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="terminal"):
        report_change(tmp_path, before, after, Progress(1, Console(file=Closed(), width=100)))
    kept = json.loads((tmp_path / "evaluation.json").read_text())
    assert kept["dots:Dots-2"]["after"]["per_problem"] == {"a": {"p": 1.0, "q": 1.0}}
    (pooled,) = kept["all tasks"]["change"]["rows"]
    assert (pooled["after"]["value"], pooled["after"]["n"], pooled["gained"]) == (0.5, 4, 2)


def test_a_policy_that_cannot_be_saved_is_still_measured(tmp_path: Path) -> None:
    done: list[str] = []

    def save(path: Path) -> None:
        done.append(path.name)
        raise ValueError("no such tensor")

    def measured() -> dict[str, EvalTable]:
        done.append("measured")
        return {}

    with pytest.raises(ValueError, match="no such tensor"):
        save_and_measure(SimpleNamespace(save=save), Keeper(tmp_path), 3, measured)  # type: ignore[arg-type]
    assert done == ["checkpoint", "measured"]
    assert (tmp_path / "evaluations" / "step-000003.json").exists()
