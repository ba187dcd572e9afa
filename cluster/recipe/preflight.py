"""Everything that is asked of recipe, data, model and machine before anything is started.

`train`, `sft`, `sample` and `eval` call `preflight` before Ray, vLLM or DeepSpeed start, resumed
runs too, and so does `--dry-run`: what one refuses, all refuse, in the same words.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.recipe.abilities import ask_labels, ask_tasks
from cluster.recipe.context import Context
from cluster.recipe.environment_check import glance_at_environment, try_environment
from cluster.recipe.fitting import fitting_draws, fitting_rows
from cluster.recipe.machine import require_room, settle_environment
from cluster.recipe.placement import Command, frozen_models, reward_models
from cluster.recipe.problems import ProblemSource, open_sources, require_data
from cluster.recipe.recipe import Recipe, Say, UserError
from cluster.recipe.strategies import make_strategy
from learner.loss_settings import LOSS_DEFAULTS
from rewards.advantages import find_advantage
from rewards.scored import RewardError, TermError
from rewards.terms import facts_of
from rollout.models import require_model, why_missing
from rollout.tokens import load_reader
from tasks.contract import check_problems, check_task
from tasks.core import DataError, TellsHeldOut
from tasks.fetched import is_uri, local
from tasks.load import BUILT_IN
from tasks.splits import SPLITS

TRIED = 3
"""Problems that a user's own task is tried on."""


@dataclass(frozen=True)
class Ready:
    """What a command goes on with: problems that fit the policy, and the policy's processor.

    recipe: with the steps that its epochs come to.
    """

    sources: list[ProblemSource]
    processor: Any
    recipe: Recipe


def preflight(recipe: Recipe, command: Command, say: Say, *, dry_run: bool = False) -> Ready:
    """Ask all that can be asked; `say` is told what was left out, and what could not be asked.

    A dry run fetches no model, and of one that is not here nothing is measured; nor does it
    draw all problems to evaluate on. Raises DataError, ModelError or UserError, a line a fault.
    """
    ask_machine(recipe, command, say, dry_run=dry_run)
    return ask_input(recipe, command, say, dry_run=dry_run)


def ask_machine(
    recipe: Recipe,
    command: Command,
    say: Say,
    *,
    dry_run: bool = False,
    folder: Path | None = None,
) -> None:
    """The first half of `preflight`: what takes no time, and what Ray is started with.

    `folder`: what the run will write, where it has a name already.
    """
    glance(recipe, command, _is_measured(recipe, dry_run))
    for line in (*settle_environment(os.environ), *crowded_threads(recipe, command)):
        say(line)
    try:
        if command != "eval":
            require_room(recipe, command, folder or Path(recipe.output.folder))
    except UserError as error:
        if not dry_run:  # which may be of a recipe for another machine
            raise
        say(str(error))


def crowded_threads(recipe: Recipe, command: Command) -> list[str]:
    """A line for a role on CPUs with more threads than cores while the other role works too.

    Threads of one operation wait for each other, so the slowest core decides. On-policy the
    roles take turns, and each may have all cores.
    """
    staleness = recipe.algorithm.max_staleness
    if command != "train" or not staleness:
        return []
    sampler, learner = recipe.sampler, recipe.learner
    roles = (
        ("sampler", sampler.engine_threads, sampler.cpus, sampler.gpus),
        ("learner", learner.intra_op_threads, learner.cpus, learner.gpus),
    )
    return [
        f"{role}.threads = {threads} is more than {role}.cpus = {cpus:g} while samplers and "
        f"learner work at once (algorithm.max_staleness = {staleness}), which is slower; leave "
        f"{role}.threads out"
        for role, threads, cpus, gpus in roles
        if not gpus and threads > max(1, cpus)
    ]


def ask_input(recipe: Recipe, command: Command, say: Say, *, dry_run: bool = False) -> Ready:
    """The second half: the policy's processor, and all rows by it."""
    sources = [] if command == "replay" else open_sources(recipe.tasks)
    for index, source in enumerate(sources):
        for line in source.notes:
            say(line)
        source.require_rows(("test",) if command == "eval" else SPLITS, index)
        if source.spec is not None:
            _ask_contract(index, source)
    for source in sources if command != "sample" else ():
        if source.spec is not None and isinstance(source.task, TellsHeldOut):
            say(f"{source.label}: held out: {source.task.held_out(source.spec)}")
    if not _is_measured(recipe, dry_run):
        say(f"model.path = {recipe.model.path} is not on this machine, so no row was measured")
        return Ready(sources, None, _in_steps(recipe, sources, say))
    context = Context.of(recipe)
    if recipe.eval.text and command in ("train", "sft"):
        context.require_own_text()
    for model in frozen_models(recipe, command):
        if is_here(model) or not dry_run:
            load_reader(model)
    for facts in reward_models(recipe) if command in ("train", "sample") else ():
        if (is_here(facts.weights) or not dry_run) and (wrong := why_missing(facts.weights)):
            raise UserError(f"reward.terms: reward_model: args.model: {facts.weights}: {wrong}")
    fitting = [
        fitting_rows(recipe, command, index, source, context, say)
        if source.spec is None
        else fitting_draws(recipe, command, index, source, context)
        for index, source in enumerate(sources)
    ]
    for index, source in enumerate(fitting):
        if source.spec is None:
            _ask_contract(index, source)
    if command != "replay":
        try_environment(recipe, fitting, context, say)
    ask_labels(recipe, command, fitting, say, draw=not dry_run)
    for source in fitting if command in ("train", "sft") else ():
        if source.spec is None and len(source.test) < recipe.eval.problems:
            say(
                f"{source.label}: eval.problems = {recipe.eval.problems}, and {len(source.test)} "
                "rows are held out: all are taken"
            )
        if source.spec is not None and source.left_out:
            say(
                f"task {source.label}: {source.left_out.total():,} problems did not fit the policy "
                "so far, and others were drawn"
            )
    return Ready(fitting, context.processor, _in_steps(recipe, fitting, say))


def _is_measured(recipe: Recipe, dry_run: bool) -> bool:
    return not dry_run or is_here(recipe.model.path)


def _in_steps(recipe: Recipe, sources: Sequence[ProblemSource], say: Say) -> Recipe:
    """The recipe with `algorithm.steps` worked out where it says how many epochs."""
    algorithm = recipe.algorithm
    if algorithm.epochs is None or not sources:
        return recipe
    rows = len(sources[0].rows("train"))
    steps = -(-algorithm.epochs * rows // algorithm.problems_per_step)
    say(
        f"algorithm.epochs = {algorithm.epochs}: {rows:,} rows, {algorithm.problems_per_step} a "
        f"step, are {steps:,} steps"
    )
    return recipe.model_copy(update={"algorithm": algorithm.model_copy(update={"steps": steps})})


def glance(recipe: Recipe, command: Command, model_here: bool = True) -> None:
    """Ask what files tell in milliseconds: before the imports of a run, which take seconds.

    The model's own files (unless it is not `model_here`) and its positions, the folders of data,
    the classes of reward terms. Raises DataError, ModelError or UserError.
    """
    if model_here:
        require_model(recipe.model.path)
    _ask_context(recipe)
    for index, config in enumerate(recipe.tasks if command != "replay" else ()):
        require_data(config, index)
    for tracker in recipe.output.trackers if command != "eval" else ():
        if find_spec(tracker) is None:
            raise UserError(
                f'output.trackers: "{tracker}" is not installed; pip install '
                f'"equipoise[{tracker}]", or leave it out'
            )
    if command in ("train", "sample"):
        _ask_terms(recipe)
    if command != "replay":
        ask_tasks(recipe, command)
        glance_at_environment(recipe)
    if command in ("train", "replay"):
        _ask_loss(recipe)


def _ask_contract(index: int, source: ProblemSource) -> None:
    """Try a user's own task on a few problems, as `equipoise tasks check` does on more."""
    if source.task.name in BUILT_IN:
        return
    if source.spec is None:
        wrong = check_problems(source.task, [row.problem for row in source.train[:TRIED]])
    else:
        wrong = check_task(source.task, source.spec, TRIED)
    if wrong:
        raise DataError("\n".join(f"tasks[{index}]: {source.task.name}: {line}" for line in wrong))


def _ask_terms(recipe: Recipe) -> None:
    algorithm = recipe.algorithm
    try:
        facts_of(recipe.reward.effective_terms())
        find_advantage(algorithm.advantage, algorithm.advantage_args)
    except TermError as error:
        raise UserError(f"reward.terms: {error}") from error
    except RewardError as error:
        raise UserError(str(error)) from error
    make_strategy(recipe.algorithm.curriculum.strategy, recipe.algorithm.curriculum.args)


def _ask_loss(recipe: Recipe) -> None:
    if recipe.algorithm.loss in LOSS_DEFAULTS:
        return
    from learner.own_loss import try_loss  # imports torch, which takes seconds

    try:
        try_loss(recipe.algorithm)
    except ValueError as error:
        raise UserError(str(error)) from error


def _ask_context(recipe: Recipe) -> None:
    """Raise UserError where a policy in a folder has fewer positions than the recipe asks for."""
    try:
        config = json.loads(
            (Path(local(recipe.model.path)) / "config.json").read_text(encoding="utf-8")
        )
        text = config.get("text_config", config)
        scaled = "factor" in (text.get("rope_parameters") or text.get("rope_scaling") or {})
        positions = int(text["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # a hub's name, or the engine knows better
    if recipe.model.max_model_len > positions and not scaled:
        raise UserError(
            f"model.max_model_len = {recipe.model.max_model_len:,}: {recipe.model.path} has "
            f"{positions:,} positions (max_position_embeddings in config.json); lower it"
        )


def is_here(model: str) -> bool:
    """Whether a model is on this machine, or is neither a URI nor a name of the hub's."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if is_uri(model):
        return local(model) != model
    try:
        return Path(model).exists() or isinstance(try_to_load_from_cache(model, "config.json"), str)
    except HFValidationError:
        return True
