"""The table of metrics: it is the page, and has every name that is made and no other."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cluster.recipe.algorithm import DynamicSamplingConfig
from cluster.recipe.problems import left_out, open_sources
from cluster.recipe.recipe import Recipe
from cluster.record.evaluation import eval_table, with_language, with_readings
from cluster.record.metric_table import all_metrics, page, pattern, unlisted
from cluster.record.stored import read_metrics
from cluster.record.tracker import Tracker, UnlistedMetric
from cluster.run.budget import Spent
from cluster.run.curriculum import Curriculum
from cluster.run.passes import ASKS
from cluster.run.refill import refill
from cluster.run.run_log import StepLog
from cluster.run.runtime import sampler_metrics
from cluster.run.sft import balance_metrics
from cluster.run.step_metrics import step_metrics
from cluster.run.stream import GroupStream
from cluster.run.train import learner_metrics, transfer_metrics
from cluster.run.turns import Turns
from learner.balance import SegmentGradients
from learner.batch import Tokens, TrainBatch
from learner.loss_settings import LossConfig
from learner.losses import BalancedLoss, TokenMeanLoss
from learner.policy_loss import PolicyLoss
from rewards.compose import Composition, compose_groups
from rewards.reader import Reading
from rewards.terms import Outcome
from rollout.dispatch import Dispatch
from rollout.jobs import Job
from rollout.record import Turn
from rollout.settings import SamplerConfig
from rollout.transfer import TransferReport
from tasks.core import SEGMENTS
from tests.support.pretend import request
from tests.support.simulated_pool import SimulatedPool
from tests.support.toys import TASK, Misbehaves, group, score

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_is_that_of_the_table_and_the_files_it_names_are_there() -> None:
    made = page()
    assert made == (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), (
        "make it again: python -m cluster.record.metric_table > docs/metrics.md"
    )
    rows = all_metrics()
    assert len({row.name for row in rows}) == len(rows) > 120
    assert {row.writer for row in rows if not (ROOT / row.writer).is_file()} == set()


def test_a_name_that_is_not_in_the_table_is_refused_at_once_but_ends_no_run_late(
    tmp_path: Path,
) -> None:
    names = {"acc/b": 1.0, "acc/a": 0.5, "sft/share/tokens/[bad]": 1.0}
    with Tracker(tmp_path, after_step=4) as tracker:
        for step in (0, 5):
            with pytest.raises(UnlistedMetric, match=r"acc/b, sft/share/tokens/\[bad\]$"):
                tracker.log(step, names)
        with pytest.warns(UserWarning, match=r"acc/b, sft/share"):
            tracker.log(6, names)
    assert [row["name"] for row in read_metrics(tmp_path).to_pylist()] == ["acc/a"]


def test_names_that_users_give_are_in_the_table_whatever_they_are() -> None:
    for name in ("a/b", "my.terms:Close", "\n", "mean"):
        found = (f"reward/{name}/mean", f"defects/{name}", f"reward/{name}/calls/{name}",
                 f"eval/{name}/a pass@16", f"eval/x/defect/{name}")  # fmt: skip
        assert unlisted(found) == []
    for name in ("acc/a ", "learner/nll/seeing", "eval/x/a pass@k", "time", "reward/x/mean/y"):
        assert unlisted([name]) == [name]


def made_by_scoring() -> set[str]:
    """Names of a step's metrics and of an evaluation with every pass, on hand-made groups."""
    groups = [group(1, "1;2;", "1;3;", "2;4;x"), group(2, "2;4;", "3;6;"), group(0, "0;0;")]
    without_label = group(4, "4;8;")
    bare = replace(without_label.problem, perception="")
    groups.append(replace(without_label, problem=bare))
    looked: dict[str, Any] = {"turns": (Turn("a", True, defects=("x",)),), "failure": "died: so"}
    first, *others = groups[0].rollouts
    groups[0] = replace(groups[0], rollouts=(replace(first, **looked), *others))
    composition = Composition({"outcome": 1.0, "nan": 0.0}, on_failure={"nan": "drop_group"})
    terms = (Outcome(), Misbehaves("nan"))
    scored = compose_groups(groups, [score(g, *terms) for g in groups], composition)
    passes = {name: [group(1, "1;2;x", "1;3;")] for name in ASKS}
    passes["greedy"] = [replace(groups[0], problem=passes["greedy"][0].problem)]
    reading = Reading(np.ones(1, bool), False, True, np.zeros(1, bool))
    table = with_readings(eval_table(TASK, passes), {"n1": replace(reading, kind="sum")})
    text = {"text_loss": {"passage 1": 3.0}, "text_right": {"Who?": 1.0}}
    rows = with_language({TASK.name: table}, text)[TASK.name].rows
    return set(step_metrics(scored, 7)) | {f"eval/{TASK.name}/{row.metric}" for row in rows}


def made_by_the_learner() -> set[str]:
    """Names of an update's metrics under every loss, on one hand-made micro-batch."""
    values = torch.linspace(-2, -1, 4)
    one = torch.zeros(4, dtype=torch.long)
    segments = torch.tensor([0, 1, 3, -1])
    tokens = Tokens(
        torch.arange(4), segments, values, torch.ones(4), one, reference_logprobs=values
    )
    config = LossConfig.model_validate(
        {
            "entropy_weight": 1, "kl_weight": 1, "reference_kl_weight": 1,
            "entropy_weights": dict.fromkeys(SEGMENTS, 1.0), "papo": {"entropy_weight": 1},
            "correction": {"kind": "icepop"},
        }
    )  # fmt: skip
    of_update = ("loss", "seconds", "grad_norm", "padding_share", "shared_share")
    names = set()
    every_term = PolicyLoss(config)
    for loss in (every_term, BalancedLoss(), TokenMeanLoss()):
        terms = (f"loss/{name}" for name in loss.denominators(TrainBatch(())))
        update = dict.fromkeys((*terms, *loss.metrics((values, -values), tokens), *of_update), 1.0)
        if loss is every_term:
            names |= set(learner_metrics([update])) | {"learner/lr"}
        else:
            names |= {f"sft/{name}" for name in update} | {"sft/lr"}
    return names


def made_by_the_driver() -> set[str]:
    """Names that the parts of a step give, each asked alone."""
    step = StepLog(1, counts=dict)
    for phase in ("sample", "score", "refill", "learn", "transfer"):
        step.part(phase, None, transfer_metrics(TransferReport(1.0, 1, 1, 1)))
    step.close()
    names = set(step.metrics)
    narrow: Any = SimpleNamespace(label="sudoku", left_out={"train": 1})
    names |= set(left_out([narrow])) | {"policy/version"}
    names |= set(Spent().metrics()) | set(refill([], DynamicSamplingConfig(max_groups=1), list)[1])
    pool = Dispatch(["sampler-0"], SamplerConfig(), 0.0)
    pool.add([Job(request("g"), submitted=True)], 0.0)
    pool.started("sampler-0", 0, 50, None, 0.0)
    pool.lost("sampler-0", 0, "actor", "gone", 1.0)
    counted: Any = SimpleNamespace(counts=lambda: pool.counts(2.0))
    names |= set(sampler_metrics(counted, {"m": counted})) | set(Turns(counted, counted).counts())
    plain = {"name": "x", "model": {"path": "m"}, "tasks": [{"name": "sudoku"}] * 2}
    recipe = Recipe.model_validate(plain)
    sources = open_sources(recipe.tasks)
    names |= set(GroupStream(recipe, list, SimulatedPool(1, [1.0])).metrics())
    names |= set(Curriculum(recipe, sources, {s.label: [1.0, 1.0] for s in sources}).metrics())
    counts = dict.fromkeys(("perception", "reasoning", "answer", "other"), 4.0)
    updated = {f"tokens/{name}": n for name, n in counts.items()}
    names |= set(balance_metrics(updated, 0.5, SegmentGradients(1.0, 1.0, 0.0)))
    names.add("throughput/learner_tokens_per_second")
    names |= {"reward/worker_restarts", "reward/judge/calls/requests"}
    names |= {"reward/judge/calls/failures/timeout", "warmup/sudoku/loss", "warmup/sudoku/accuracy"}
    return names


def test_every_name_that_is_made_is_in_the_table_and_no_other() -> None:
    made = made_by_scoring() | made_by_the_learner() | made_by_the_driver()
    assert unlisted(made) == []
    patterns = {row.name: re.compile(pattern(row.name), re.DOTALL) for row in all_metrics()}
    assert {d for d, p in patterns.items() if not any(p.fullmatch(n) for n in made)} == set()
