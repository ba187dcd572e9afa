"""Steps of a live run taken in turns: the loop of `cluster.run.train`, without its evaluations."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace

from cluster.recipe.recipe import Recipe
from cluster.run.run_log import Metrics, RunLog
from cluster.run.runtime import Run
from cluster.run.step_metrics import step_metrics
from cluster.run.stream import GroupStream
from cluster.run.train import learn, renew
from rewards.scored import ScoredGroup


def take_turn(
    run: Run, log: RunLog, recipe: Recipe, first: int, steps: int
) -> tuple[list[Metrics], Sequence[ScoredGroup]]:
    """Steps `first` (from 1) and on by a recipe that may differ from the run's in [algorithm].

    Returns each step's metrics, with `wall` (seconds, its record written) among them, and the
    groups of the last. In the end nothing is in flight. With staleness the first step of a turn
    fills its pipeline, and `steps_ahead` more are drawn than are taken: the next turn's steps must
    lie beyond them.
    """
    log.at = replace(log.at, step=first - 1)
    stream = GroupStream(recipe, lambda: run.sources, run.samplers, log.at.step)
    metrics_of_steps: list[Metrics] = []
    scored: Sequence[ScoredGroup] = ()
    begin = time.perf_counter()
    for step in itertools.islice(log.steps(run.counts), steps):
        groups = step.part("sample", stream.take(log.at.version))
        scored = step.part("score", *run.scoring.score(groups, step.share))
        step.metrics |= step_metrics(scored, log.at.version)
        updates = step.part("learn", *learn(recipe, step.number, scored, run.learner))
        step.part("transfer", *renew(stream, run, log.at.version + updates))
        log.end(step, scored, updates)
        now = time.perf_counter()
        metrics_of_steps.append(step.metrics | {"wall": now - begin})
        begin = now
    stream.end()
    return metrics_of_steps, scored
