"""A text-only reader on a run's stored rollouts: what `equipoise diagnose --reader` asks."""

from __future__ import annotations

import sys
from pathlib import Path

from cluster.recipe.placement import Actor
from cluster.recipe.recipe import load_recipe
from cluster.record.stored import read_groups, stored_steps
from cluster.run.engines import sampler_pool
from cluster.run.places import places_of
from cluster.run.session import actor_errors, connected
from rewards.reader import Reader, Reading, readings
from rewards.settings import Place
from rollout.models import require_model
from tasks.load import load_task


def read_run(
    run: Path, model: str, place: Place = "prompt", address: str | None = None
) -> dict[tuple[int, str], Reading]:
    """The reading of every stored group that has one, by step and group id.

    The engine is that of a frozen model of the run's own recipe. Raises DataError for a folder that
    holds no readable run, ModelError for a checkpoint that cannot be used, RunFailed where the
    engine ends it. How far it is goes to stderr.
    """
    steps, recipe = stored_steps(run), load_recipe(run / "recipe.toml")
    require_model(model, "--reader")
    reader = Reader(model, place, recipe.sampler.max_tokens)
    by_group = {}
    engine = Actor("frozen model", 0, recipe.sampler.cpus, recipe.sampler.gpus)
    with actor_errors(None), connected(address), places_of(recipe, [engine]) as places:
        pool = sampler_pool(recipe, places, model, frozen=0)
        try:
            _say(f"starting the reader {model} (vLLM) ...")
            pool.wait_ready(recipe.sampler.start_timeout_seconds)
            for step in steps:
                groups = [stored.group for stored in read_groups(run, step)]
                named = [(load_task(group.problem.task), group) for group in groups]
                for group, reading in zip(groups, readings(reader, pool, named), strict=True):
                    if reading is not None:
                        by_group[step, group.group_id] = reading
                _say(f"step {step}: read {len(groups)} groups")
        finally:
            pool.stop()
    return by_group


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
