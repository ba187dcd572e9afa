"""Our side of the race: a run as `equipoise train` starts it, its steps taken in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.race_work import (
    GROUP,
    KNOBS,
    TASK,
    Fixed,
    Save,
    Step,
    Turn,
    Work,
    policy_beside,
    write,
)
from benchmarks.turns import take_turn
from cluster.recipe.recipe import Recipe, check_recipe
from cluster.record.terminal import Progress
from cluster.run.run_log import Metrics, run_log
from cluster.run.runtime import Run, running
from cluster.run.train import policy_loss, train_batches
from learner.batch import TrainBatch
from rewards.scored import ScoredGroup

FIXED_GROUPS = 2
NOISE = 0.1
"""Nats that the fixed batch's old log-probs are off by: with none the loss says nothing of them."""


def race_recipe(work: Work, settings: Sequence[str] = ()) -> Recipe:
    """What we are started with: recipes/tiny/sudoku.toml on the race's policy and reward."""
    data: dict[str, Any] = {
        "name": "race",
        "seed": work.seed,
        "model": {
            "path": work.model,
            "max_model_len": work.max_tokens + 160,
            "dtype": "mixed" if work.mixed else "float32",
        },
        "tasks": [{"name": TASK, "knobs": KNOBS}],
        "sampler": {"max_tokens": work.max_tokens},
        "reward": {"terms": [{"name": "benchmarks.race_work:Score"}]},
        "algorithm": {
            "group_size": GROUP,
            "problems_per_step": work.problems,
            "steps": 10**6,
            "drop_zero_variance": False,  # TRL learns from all
        },
        "learner": {
            "learning_rate": work.rate,
            "zero_stage": 0,  # one rank
            "threads": 2,
            "micro_batch_tokens": 16384,
        },
        "eval": {"problems": 2},
    }
    return check_recipe(data, [*work.settings, *settings], "race")


def ours(connection: Any, work: Work) -> None:
    """See `race_work.Side`."""
    recipe, progress = race_recipe(work), Progress(0)
    folder = Path(work.folder) / "run"
    with (
        running(recipe, None, folder, progress) as run,
        run_log(run.recipe, folder, progress) as log,
    ):
        run.send_weights(0)
        connection.send("ready")
        scored: Sequence[ScoredGroup] = ()
        while (message := connection.recv()) is not None:
            if isinstance(message, Turn):
                chosen = race_recipe(work, message.settings)
                metrics_of_steps, scored = take_turn(run, log, chosen, message.first, message.steps)
                connection.send([step_of(metrics) for metrics in metrics_of_steps])
            elif isinstance(message, Save):
                run.learner.save(Path(message.folder))
                connection.send("saved")
            else:
                connection.send(fixed(run, message, scored))


def step_of(metrics: Metrics) -> Step:
    """A step's record as the race compares it."""
    names = ("wall", "time/sample", "time/learn", "response/tokens")
    wall, sampling, learning, tokens = (metrics[name] for name in names)
    return Step(wall, sampling, learning, int(tokens))


def fixed(run: Run, path: str, scored: Sequence[ScoredGroup]) -> Fixed:
    """Write some groups as a batch, their old log-probs off by a little, and the policy; learn.

    At a learning rate of 0: the weights stay.
    """
    chosen = [group for group in scored if group.has_gradient][:FIXED_GROUPS]
    if not chosen:
        raise SystemExit("no group of the last step has a gradient; take more --problems")
    (batch,) = train_batches(run.recipe.algorithm, chosen)
    rng = np.random.default_rng(0)
    known = run.learner.logprobs(batch)
    batch = TrainBatch(
        tuple(
            replace(
                s,
                sampler_logprobs=(p + NOISE * rng.normal(size=len(p))).astype(np.float32),
                advantages=s.advantages + 1,  # or they cancel, and so does the loss
            )
            for s, p in zip(batch.sequences, known, strict=True)
        )
    )
    write(path, batch.sequences)
    run.learner.save(policy_beside(path))
    metrics = run.learner.update(batch, policy_loss(run.recipe), 0.0)
    return Fixed(metrics["loss"], metrics["grad_norm"])
