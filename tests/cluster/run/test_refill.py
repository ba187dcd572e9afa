"""Dynamic sampling: what is asked for, how often, and that nothing is lost or counted twice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.recipe.algorithm import DynamicSamplingConfig
from cluster.recipe.problems import open_sources, step_problems
from cluster.recipe.recipe import Recipe, RecipeError
from cluster.run.refill import extra_requests, refill, refill_step
from cluster.run.stream import free_requests
from cluster.run.train import train_batches
from rewards.scored import ScoredGroup
from rollout.record import Group, SampleRequest
from tests.cluster.run.test_train import two_tasks
from tests.support.toys import graded, group

REFILL = "algorithm.dynamic_sampling={max_rounds=3, max_groups=7}"


@pytest.fixture
def recipe() -> Recipe:
    return two_tasks(REFILL)


USEFUL, USELESS = graded([True, False], "useful"), graded([True, True], "useless")


@given(
    own=st.lists(st.booleans(), min_size=1, max_size=8),
    luck=st.lists(st.booleans(), min_size=40, max_size=40),
    max_rounds=st.integers(1, 5),
    max_groups=st.integers(1, 30),
)
@settings(max_examples=200)
def test_it_asks_for_what_is_missing_until_the_budget_is_spent(
    own: list[bool], luck: list[bool], max_rounds: int, max_groups: int
) -> None:
    asked: list[range] = []

    def more(numbers: range) -> list[ScoredGroup]:
        asked.append(numbers)
        return [USEFUL if luck[n] else USELESS for n in numbers]

    start = [USEFUL if good else USELESS for good in own]
    rule = DynamicSamplingConfig(max_rounds=max_rounds, max_groups=max_groups)
    found, told = refill(start, rule, more)
    rounds, extra, missing = told.values()
    numbers = [n for part in asked for n in part]
    assert numbers == list(range(int(extra))) and extra <= max_groups
    assert rounds == len(asked) <= max_rounds and all(asked)
    assert found == start + [USEFUL if luck[n] else USELESS for n in numbers]
    useful = sum(own) + sum(luck[n] for n in numbers)
    assert useful <= len(own)  # no step learns from more than it was to
    assert missing == len(own) - useful
    if missing:
        assert rounds == max_rounds or extra == max_groups
    elif not asked:
        assert all(own)


def test_extra_problems_have_ids_and_a_stream_of_their_own(recipe: Recipe) -> None:
    sources = open_sources(recipe.tasks)
    ids: Counter[str] = Counter()
    problems: set[str] = set()
    for step in (1, 2, 3):
        own = step_problems(sources, recipe.seed, step - 1, recipe.algorithm.problems_per_step)
        requests = free_requests(recipe, step, own)
        # However the numbers are asked for, they are the same requests.
        parts = [r for part in (range(0, 2), range(2, 7)) for r in
                 extra_requests(recipe, sources, step, part)]  # fmt: skip
        whole = extra_requests(recipe, sources, step, range(7))
        assert [r.group_id for r in parts] == [r.group_id for r in whole]
        assert [r.problem for r in parts] == [r.problem for r in whole]
        assert {r.n for r in whole} == {recipe.algorithm.group_size}
        assert {r.sampling for r in whole} == {requests[0].sampling}
        ids.update(r.group_id for r in requests + whole)
        problems |= {r.problem.id for r in whole}
    assert max(ids.values()) == 1
    assert len(problems) > 15


def test_a_step_learns_from_its_extra_groups_and_counts_them(recipe: Recipe) -> None:
    wanted = recipe.model_copy(
        update={"algorithm": recipe.algorithm.model_copy(update={"problems_per_step": 3})}
    )
    asked: list[SampleRequest] = []

    def sample(requests: Sequence[SampleRequest]) -> list[Group]:
        asked.extend(requests)
        return [group(3, "3;6;", "3;5;", name=r.group_id) for r in requests]

    def score(groups: Sequence[Group], share: float) -> tuple[list[ScoredGroup], dict[str, float]]:
        assert share == 0.25
        counts = {"reward/worker_restarts": float(len(asked))}
        return [graded([True, len(asked) > 2], g.group_id) for g in groups], counts

    run: Any = SimpleNamespace(
        recipe=wanted,
        sources=open_sources(wanted.tasks),
        samplers=SimpleNamespace(sample=sample),
        scoring=SimpleNamespace(score=score),
    )
    start = [USEFUL, USELESS, USELESS]
    found, metrics = refill_step(run, 4, start, 0.25)
    assert [r.group_id.split("/")[:2] for r in asked] == [["step-4", "3"], ["step-4", "4"]]
    assert metrics == {
        "reward/worker_restarts": 2.0,
        "refill/rounds": 1.0,
        "refill/extra_groups": 2.0,
        "refill/missing": 0.0,
    }
    assert found[:3] == start and len(found) == 5
    (batch,) = train_batches(wanted.algorithm, found)
    assert len(batch.sequences) == 6
    assert all(np.abs(s.advantages).sum() > 0 for s in batch.sequences)
    plain = wanted.model_copy(
        update={"algorithm": wanted.algorithm.model_copy(update={"dynamic_sampling": None})}
    )
    run.recipe = plain
    asked.clear()
    assert refill_step(run, 4, start, 0.25) == (start, {}) and not asked


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ('algorithm.advantage="reinforce_pp"', "algorithm.advantage"),
        ("algorithm.drop_zero_variance=false", "algorithm.drop_zero_variance"),
        ('reward.compose="normalize_then_sum"', "reward.compose"),
        ("algorithm.dynamic_sampling={max_rounds=2}", "algorithm.dynamic_sampling.max_groups"),
    ],
)
def test_what_extra_groups_do_not_go_with_is_refused(override: str, field: str) -> None:
    with pytest.raises(RecipeError, match=rf"^x\.toml: {re.escape(field)}: "):
        two_tasks(REFILL, override)
