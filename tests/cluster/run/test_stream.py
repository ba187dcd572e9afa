"""The way of the groups under a recipe: what is started when, and what a transfer does to it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from cluster.recipe.problems import open_sources, step_problems
from cluster.recipe.recipe import Recipe
from cluster.run.budget import Spent
from cluster.run.checkpoints import Position
from cluster.run.stream import GroupStream, free_requests
from rollout.buffer import BufferState, GroupBufferError
from rollout.record import Group, SampleRequest
from tasks.core import Problem
from tests.support.recipes import TOY, made_recipe
from tests.support.simulated_pool import SimulatedPool
from tests.support.toys import problem


def recipe(*overrides: str, tasks: str = TOY) -> Recipe:
    """Five problems of the toy task a step, two answers each."""
    small = ("seed=5", "algorithm.group_size=2", "algorithm.problems_per_step=5")
    return made_recipe(*small, *overrides, tasks=tasks)


def run(
    chosen: Recipe, pool: SimulatedPool, at: Position, stop: int, learning: float = 4.0
) -> Iterator[tuple[int, list[Group], GroupStream, Position]]:
    """The driver's loop with a learner that only takes time: (version, groups, ...) a step."""
    version, steps = at.version, at.step
    sources = open_sources(chosen.tasks)
    stream = GroupStream(chosen, lambda: sources, pool, steps, at.buffer)
    pool.send(version)
    while steps < stop:
        groups = stream.take(version)
        used_at, steps, version = version, steps + 1, version + 1
        pool.sleep_until(pool.now + learning)
        stream.renew(pool.send, version)
        done = Position(steps, version, Spent(), {}, stream.state())
        yield used_at, groups, stream, Position.from_dict(json.loads(json.dumps(done.to_dict())))


def lags(version: int, groups: list[Group]) -> list[int]:
    return [version - int(v) for g in groups for r in g.rollouts for v in r.versions]


def mixed(groups: list[Group]) -> bool:
    return any(len(set(r.versions.tolist())) > 1 for g in groups for r in g.rollouts)


def test_without_staleness_each_step_is_what_the_synchronous_loop_asks_for() -> None:
    chosen = recipe()
    pool = SimulatedPool(3, [3.0, 1.0, 7.0, 2.0], death=0.05)
    sources = open_sources(chosen.tasks)
    for step, (version, groups, stream, at) in enumerate(run(chosen, pool, Position(), 40)):
        asked = free_requests(chosen, step + 1, step_problems(sources, chosen.seed, step, 5))
        assert [g.group_id for g in groups] == [r.group_id for r in asked]
        assert [g.problem for g in groups] == [r.problem for r in asked]
        assert version == step and set(lags(version, groups)) == {0}
        # Nothing is sampled beside the learner, so a checkpoint has nothing in flight.
        assert pool.pending() == 0
        assert at.buffer == BufferState(5 * (step + 1))
        assert stream.metrics() == dict.fromkeys(stream.metrics(), 0.0)
    assert pool.deaths > 0


@pytest.mark.parametrize("in_flight", ["keep", "abort", "wait"])
@pytest.mark.parametrize("order", ["problem", "completion"])
def test_with_staleness_sampling_goes_on_and_the_bound_holds(in_flight: str, order: str) -> None:
    settings = (f"transfer.in_flight={in_flight}", f"algorithm.order={order}")
    chosen = recipe("algorithm.max_staleness=1", *settings)
    seconds = np.random.default_rng(1).lognormal(0, 1, 900)
    pool = SimulatedPool(2, seconds, death=0.03)
    found = list(run(chosen, pool, Position(), 40))
    used = [g.group_id for _, groups, _, _ in found for g in groups]
    assert len(used) == len(set(used)) == 200
    assert max(max(lags(version, groups)) for version, groups, _, _ in found) == 1
    metrics = found[-1][2].metrics()
    assert metrics["buffer/dropped"] == 0
    assert any(mixed(groups) for _, groups, _, _ in found) == (in_flight == "keep")
    assert metrics["buffer/in_flight"] >= 0 and pool.deaths > 3
    assert (metrics["buffer/aborted"] > 0) == (in_flight == "abort")
    if order == "problem":
        ids = [int(name.split("/")[0].removeprefix("step-")) for name in used]
        assert ids == sorted(ids), "a step learns from the problems drawn for it"
        assert metrics["buffer/resampled"] == 0


def test_sampling_and_learning_overlap() -> None:
    """Steps take the longer of the two, where without staleness they take both."""
    spent = {}
    for k in (0, 1):
        pool = SimulatedPool(5, [6.0])
        list(run(recipe(f"algorithm.max_staleness={k}"), pool, Position(), 40, 8.0))
        spent[k] = pool.now
    assert spent == {0: 40 * (6.0 + 8.0), 1: 6.0 + 40 * 8.0}


@pytest.mark.parametrize("order", ["problem", "completion"])
def test_a_run_that_goes_on_repeats_no_group_and_loses_none(order: str) -> None:
    chosen = recipe("algorithm.max_staleness=2", f"algorithm.order={order}")
    seconds = np.random.default_rng(2).lognormal(0, 1, 900)
    used, at = [], Position()
    for stop in (7, 8, 20, 40):
        # New engines each time: what was in flight, or waited for its step, is sampled again.
        for _, groups, _, position in run(chosen, SimulatedPool(3, seconds, 0.05), at, stop):
            used += [g.group_id for g in groups]
            at = position
        assert at.buffer is not None and (stop == 40 or len(at.buffer.open) > 0)
    assert at.buffer == BufferState(200, ())
    sources = open_sources(chosen.tasks)
    asked = [
        request.group_id
        for step in range(40)
        for request in free_requests(chosen, step + 1, step_problems(sources, 5, step, 5))
    ]
    assert sorted(used) == sorted(asked)


@dataclass(frozen=True)
class Named:
    """A problem source whose problems say where they are from."""

    label: str
    weight: float

    def problem(self, split: str, seed: int, index: int) -> Problem:
        return replace(problem(index % 10), id=f"{self.label}-{index}")


def test_a_curriculum_draws_a_step_by_what_is_known_when_it_begins() -> None:
    chosen = recipe("algorithm.curriculum.strategy=success_band", tasks=f"{TOY}, {TOY}")
    sources: list[Any] = []
    pool = SimulatedPool(2, [1.0])
    stream = GroupStream(chosen, lambda: sources, pool)
    for step in range(20):
        # As a curriculum does after every step: the same sources, weighed anew.
        sources[:] = [Named("a", 0.1 + 0.8 * (step % 2)), Named("b", 0.9 - 0.8 * (step % 2))]
        asked = free_requests(chosen, step + 1, step_problems(sources, chosen.seed, step, 5))
        assert [g.group_id for g in stream.take(step)] == [r.group_id for r in asked]
        time.sleep(0.01)  # what is drawn too early is drawn by now
        stream.renew(pool.send, step + 1)


def test_the_checkpoint_of_an_older_version_goes_on_after_its_steps() -> None:
    state = Position(7, 7).to_dict()
    assert "buffer" not in state
    (_, groups, _, at), *_ = run(recipe(), SimulatedPool(2, [1.0]), Position(7, 7), 8)
    assert {name.group_id.split("/")[0] for name in groups} == {"step-8"}
    assert at.buffer == BufferState(40)


def test_a_pool_that_loses_groups_is_found_out() -> None:
    class Forgetful(SimulatedPool):
        def submit(self, requests: list[SampleRequest]) -> None:  # type: ignore[override]
            super().submit(requests[:-1])

    with pytest.raises(GroupBufferError, match="1 groups are missing, and no sampler has them"):
        list(run(recipe(), Forgetful(2, [1.0]), Position(), 1))


def test_what_is_in_flight_at_the_end_is_dropped() -> None:
    pool = SimulatedPool(2, [3.0])
    (*_, (_, _, stream, _)) = run(recipe("algorithm.max_staleness=1"), pool, Position(), 10)
    assert pool.pending() > 0 and stream.metrics()["buffer/in_flight"] > 0
    stream.end()
    assert pool.pending() == 0
