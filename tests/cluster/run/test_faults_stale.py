"""A run with groups in flight between its steps: killed, scaled, robbed of an engine, told to stop.

One run proves it all, since engines are slow to start. It samples a step ahead
(`max_staleness = 1`) and replaces groups without variance (dynamic sampling). What it leaves
behind must be what its seed says, each group once, each token under the weights it names.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch

from cluster.recipe.problems import open_sources, step_problems
from cluster.recipe.recipe import Recipe, load_recipe
from cluster.record.stored import read_metrics, read_rollouts, read_scored, stored_steps
from cluster.run.checkpoints import Position, newest
from cluster.run.refill import extra_requests
from cluster.run.scaling import ask
from cluster.run.stream import free_requests
from learner.batch import TrainSequence
from learner.checkpoint import check, checkpoint_folder, checkpoint_folders
from learner.collate import Collator
from learner.policy import load_policy
from rollout.buffer import BufferState
from tests.support.live_driver import Driver
from tests.support.wordiness import cares_for

EVERY, ROUNDS, EXTRA, PLACES, SIZE = 2, 2, 2, 4, 4
CLOSE = 2e-3
"""Nats between a sampler's log-prob and the learner's own under the same weights."""


def test_a_run_a_step_ahead_loses_nothing_whatever_becomes_of_it(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    term = "tests.support.wordiness:Moody"
    driver = Driver(
        tmp_path,
        tiny_models["qwen3_vl"],
        "algorithm.steps=100000",
        "algorithm.max_staleness=1",
        f"algorithm.dynamic_sampling={{max_rounds={ROUNDS},max_groups={EXTRA}}}",
        f'reward.terms=[{{name="outcome",weight=0.5}},{{name="{term}",weight=0.1}}]',
        f"checkpoint.every={EVERY}",
        "checkpoint.keep=1000",
        "sampler.max_tokens=64",
        "sampler.cpus=0.5",
        "learner.cpus=0.5",
        "sampler.max_restarts=10",
        "sampler.start_timeout_seconds=900.0",
        "eval.problems=4",
        'eval.passes=["greedy"]',
    )
    engines: list[psutil.Process] = []
    try:
        driver.wait("the first step", lambda: driver.steps() >= 1, 900)
        ask(driver.run, 2)
        driver.wait("one more", lambda: "samplers: 1 -> 2" in driver.printed(), pause=0.1)
        # While it starts, the only one there is dies in the middle of its groups: a step that has
        # just begun has some.
        engines = driver.engines()[:1]
        driver.wait_steps(1)
        with stopped(engines):
            engines[0].kill()
        driver.wait("its loss", lambda: driver.metric("sampler/restarts") >= 1, 900)
        driver.wait("two samplers", lambda: driver.metric("sampler/count") == 2, 900)
        driver.wait_steps(4)  # a checkpoint, and a step whose groups were begun under it
        ask(driver.run, 1)
        driver.wait("one sampler", lambda: driver.metric("sampler/asked") == 1, 900)
        driver.wait("the other's end", lambda: len(driver.samplers()) == 1)
        # A step that was never saved is done, and the groups of others are in flight.
        engines = driver.engines()
        driver.wait("an unsaved step", lambda: driver.steps() % EVERY == 1, pause=0.02)
        with stopped(engines):
            below = driver.kill()
        _, alive = psutil.wait_procs(below, timeout=20)
        assert not {p.pid for p in engines} & {p.pid for p in alive}, "ends with its driver"
        for process in alive:  # Ray's agents may take minutes to see it
            process.kill()

        saved, killed_at = newest(driver.run).position, driver.steps()
        assert killed_at > saved.step
        shutil.copytree(driver.run, tmp_path / "before")
        driver.resume()
        driver.wait("new steps", lambda: driver.steps() >= killed_at + 2, 900, pause=0.05)
        driver.stop()
    finally:
        driver.process.kill()
        for engine in engines:
            with contextlib.suppress(psutil.Error):
                engine.kill()

    recipe, before = load_recipe(driver.run / "recipe.toml"), tmp_path / "before"
    done = [Position.from_dict(check(folder)) for folder in checkpoint_folders(driver.run)]
    steps = done[-1].step
    assert stored_steps(driver.run) == [*range(1, steps + 1)]
    assert stored_steps(before) == [*range(1, killed_at + 1)]
    metrics = check_groups(driver.run, recipe)
    # What was done and lost with the driver is done again with the same groups.
    for step in range(saved.step + 1, killed_at + 1):
        assert group_ids(before, step) == group_ids(driver.run, step)
    assert set(metrics["sampler/asked"].values()) == {1, 2}
    assert max(metrics["sampler/restarts"].values()) >= 1
    assert max(metrics["sampler/resampled"].values()) >= 1
    # Each checkpoint names the groups that were begun and not yet used: the next step's.
    for at in done:
        due = PLACES * at.step
        assert at.buffer == BufferState(due + PLACES, tuple(range(due, due + PLACES)))
    # Whoever drew a token, new, started again or resumed: under the weights that it says.
    two = [at for at in done if metrics["sampler/count"][at.step] == 2]
    assert check_weights(driver.run, two[-3:]) == {"sampler-0", "sampler-1"}
    assert check_weights(driver.run, [saved]) == {"sampler-0"}


@contextlib.contextmanager
def stopped(engines: Sequence[psutil.Process]) -> Iterator[None]:
    """Engines that do nothing for a while; by then all groups of the pool wait for them."""
    for engine in engines:
        engine.suspend()
    time.sleep(3)
    try:
        yield
    finally:
        for engine in engines:
            with contextlib.suppress(psutil.Error):
                engine.resume()


def group_ids(run: Path, step: int) -> list[str]:
    """In the order in which the step learnt from them."""
    return list(dict.fromkeys(read_rollouts(run, step)["group_id"].to_pylist()))


def check_groups(run: Path, recipe: Recipe) -> dict[str, dict[int, float]]:
    """Each group that the seed asks for is there once, in its place, and within the bound.

    Returns the run's metrics: name -> step -> value.
    """
    metrics: dict[str, dict[int, float]] = {}
    for row in read_metrics(run).to_pylist():
        metrics.setdefault(row["name"], {})[row["step"]] = row["value"]
    sources, steps = open_sources(recipe.tasks), stored_steps(run)
    for name in ("policy/version", "sampler/count", "refill/missing", "learner/lr"):
        assert sorted(metrics[name]) == steps, "one value a step, none of a life that is over"
    seen: set[str] = set()
    version, lags, budgets = 0, set[int](), set[tuple[bool, bool]]()
    for step in steps:
        scored = read_scored(run, step)
        extra = len(scored) - PLACES
        own = step_problems(sources, recipe.seed, step - 1, PLACES)
        asked = free_requests(recipe, step, own)
        asked += extra_requests(recipe, sources, step, range(extra))
        ids = [one.group.group_id for one in scored]
        assert ids == [request.group_id for request in asked] and not seen & set(ids)
        seen |= set(ids)
        assert all(len(one.group.rollouts) == SIZE for one in scored)
        # Dynamic sampling: what it counts is so, and it gave up for want of budget alone.
        assert [one.has_gradient for one in scored] == [cares_for(name) for name in ids]
        missing = PLACES - sum(cares_for(name) for name in ids)
        rounds = metrics["refill/rounds"][step]
        assert metrics["refill/extra_groups"][step] == extra <= EXTRA and rounds <= ROUNDS
        assert metrics["refill/missing"][step] == missing >= 0
        assert not missing or extra == EXTRA or rounds == ROUNDS
        budgets.add((extra > 0, missing > 0))
        # No token is older than the bound, and there are some of that age.
        found = {version - int(v) for one in scored for r in one.group.rollouts for v in r.versions}
        assert found <= {0, 1} and metrics["policy/lag_max"][step] == max(found)
        lags |= found
        version += any(one.has_gradient for one in scored)
        assert metrics["policy/version"][step] == version
    assert lags == {0, 1}
    assert budgets == {(False, False), (True, False), (True, True)}
    return metrics


def check_weights(run: Path, after: Sequence[Position]) -> set[str]:
    """Tokens of a version were drawn from the weights that a checkpoint of that version holds.

    Looked up on one group of each sampler in the two steps after each of these checkpoints.
    Returns the samplers that were looked at.
    """
    seen: set[str] = set()
    for at in after:
        policy, processor = load_policy(str(checkpoint_folder(run, at.step)))
        collate = Collator(policy.eval(), processor)
        for step in (at.step + 1, at.step + 2):
            groups = {
                one.group.rollouts[0].sampler: one.group
                for one in read_scored(run, step)
                if (one.group.rollouts[0].versions == at.version).any()
            }
            for sampler, group in groups.items():
                rollouts, image = group.rollouts, group.problem.image
                sequences = [
                    TrainSequence(
                        r.prompt_ids, r.response_ids, image, r.segments, r.logprobs, 0 * r.logprobs
                    )
                    for r in rollouts
                ]
                with torch.no_grad():
                    own = policy.run(collate(sequences))[0].numpy()
                theirs = np.concatenate([r.logprobs for r in rollouts])
                drawn = np.concatenate([r.versions for r in rollouts]) == at.version
                assert np.abs(own - theirs)[drawn].max() < CLOSE, (step, sampler)
                seen.add(sampler)
    return seen
