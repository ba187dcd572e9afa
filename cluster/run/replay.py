"""Half a run: the learner on stored rollouts without samplers, or the samplers without a learner.

`run_replay` is what `run_training` does to its learner, step by step, from what a run left in
`rollouts/` and `images/`: the same groups in the same order with the advantages that were stored
(not scored again), the same minibatches, learning rates and initial weights. So without a change
its losses are those of the run, up to rounding; with another loss or learning rate the difference
is that change's alone. The policy that learns is then no more the one that sampled: from the
second step on tokens are off-policy, which the ratio, or `[algorithm.correction]`, sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.recipe.machine import new_run_folder
from cluster.recipe.problems import step_problems
from cluster.recipe.recipe import Recipe, RecipeError, UserError, load_recipe
from cluster.record.stored import not_kept, read_metrics, read_scored, stored_steps
from cluster.record.terminal import Progress
from cluster.run.checkpoints import changed_fields
from cluster.run.run_log import run_log
from cluster.run.runtime import learner_setup, learning, sampling_and_scoring
from cluster.run.session import session
from cluster.run.step_metrics import step_metrics
from cluster.run.stream import free_requests
from cluster.run.train import learn

LEARNT = ("algorithm.", "learner.", "model.dtype", "model.attention", "model.lm_head_float32")
SAMPLED = (
    "algorithm.advantage", "algorithm.group_size", "algorithm.problems_per_step",
    "algorithm.budget", "algorithm.dynamic_sampling", "algorithm.max_staleness",
)  # fmt: skip
"""A replay may set the fields that start like the first, but for the second: those decided what
was sampled or what it earned, and would do nothing."""


@dataclass(frozen=True)
class Recorded:
    """A run to learn from again: its folder, its steps with rollouts, and its losses by step."""

    run: Path
    steps: tuple[int, ...]
    losses: dict[int, float]


def recorded(run: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Recorded]:
    """A run's recipe, with `overrides` as after `--set`, and what it left to learn from.

    Raises UserError for a folder that is no run, DataError for one without rollouts or with a step
    missing, RecipeError for an override that a replay cannot follow.
    """
    stored = run / "recipe.toml"
    if not stored.is_file():
        raise UserError(f"--replay {run}: no run folder: it has no recipe.toml")
    recipe = load_recipe(stored, overrides)
    changed = changed_fields(load_recipe(stored).model_dump(), recipe.model_dump())
    if wrong := [n for n in changed if not n.startswith(LEARNT) or n.startswith(SAMPLED)]:
        raise RecipeError(
            f"--replay {run}: --set changes {', '.join(wrong)}; the rollouts are those of the "
            "run, so a replay may change [algorithm] but for what decides sampling and "
            "advantages, [learner], and model.dtype, attention and lm_head_float32"
        )
    if lacking := not_kept(run):
        raise UserError(f"--replay {run}: {lacking}; a replay needs all of them")
    steps = stored_steps(run)
    rows = read_metrics(run).to_pylist()
    losses = {row["step"]: row["value"] for row in rows if row["name"] == "learner/loss"}
    return recipe, Recorded(run, tuple(steps[: recipe.algorithm.steps]), losses)


def run_replay(
    recipe: Recipe, source: Recorded, address: str | None = None, output: Path | None = None
) -> Path:
    """Learn from a run's stored rollouts; return the new run folder.

    It holds the learner's metrics and the last policy in `checkpoint`; rollouts stay where they
    are. The largest difference to the losses of the run is printed. Raises as `run_training`.
    """
    folder, progress = new_run_folder(recipe, output), Progress(len(source.steps))
    with session(recipe, "replay", address, folder, progress.say) as ready:
        progress.say("starting learner (DeepSpeed) ...")
        recipe = ready.recipe
        setup = learner_setup(recipe)
        with (
            learning(recipe, setup) as learner,
            run_log(recipe, folder, progress, source.steps[-1]) as log,
        ):
            gaps = {}
            for step in log.steps():
                scored = read_scored(source.run, step.number)
                step.metrics |= step_metrics(scored, log.at.version)
                updates = step.part("learn", *learn(recipe, step.number, scored, learner))
                log.end(step, updates=updates)
                if updates and step.number in source.losses:
                    loss = step.metrics["learner/loss"]
                    gaps[step.number] = abs(loss - source.losses[step.number])
            log.keeper.keep(lambda target: learner.save(target / "checkpoint"))
            if gaps:
                worst = max(gaps, key=lambda number: gaps[number])
                gap_text = f"{gaps[worst]:.2g} in step {worst}"
                log.say(f"largest difference to the loss of the run: {gap_text}")
            log.say(f"checkpoint: {log.keeper.folder / 'checkpoint'}")
            log.end_run()
    return folder


def recipe_to_sample(where: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of `equipoise sample WHERE`: a recipe file, or a checkpoint of a run.

    Of a checkpoint (`RUN/checkpoint`, `RUN/checkpoints/step-000010`) it is that of its run, with
    the checkpoint as its policy. Raises UserError where there is none.
    """
    if where.is_file():
        return load_recipe(where, overrides)
    run = where.resolve().parent
    run = run.parent if run.name == "checkpoints" else run
    if not (where / "config.json").is_file() or not (run / "recipe.toml").is_file():
        raise UserError(
            f"equipoise sample {where}: expected a recipe, or a checkpoint within its run folder; "
            "for another checkpoint give a recipe and --set model.path=FOLDER"
        )
    recipe = load_recipe(run / "recipe.toml", overrides)
    model = recipe.model.model_copy(update={"path": str(where)})
    return recipe.model_copy(update={"model": model})


def run_sampling(
    recipe: Recipe, steps: int, address: str | None = None, output: Path | None = None
) -> Path:
    """Sample and score `steps` steps of a recipe, as training would if it learnt nothing.

    The same requests as a training run makes, all at version 0; the run folder has rollouts,
    images and the metrics of scoring. Raises as `run_training`.
    """
    folder, progress = new_run_folder(recipe, output), Progress(steps)
    count = recipe.algorithm.problems_per_step
    with session(recipe, "sample", address, folder, progress.say) as ready:
        progress.say("starting samplers (vLLM) and reward workers ...")
        recipe = ready.recipe
        with (
            sampling_and_scoring(recipe) as (samplers, scoring),
            run_log(recipe, folder, progress, steps) as log,
        ):
            for step in log.steps():
                problems = step_problems(ready.sources, recipe.seed, step.number - 1, count)
                requests = free_requests(recipe, step.number, problems)
                groups = step.part("sample", samplers.sample(requests))
                scored = step.part("score", *scoring.score(groups, 0.0))
                step.metrics |= step_metrics(scored, 0)
                log.end(step, scored)
    progress.say(f"what the rollouts tell: equipoise diagnose {folder}")
    return folder
