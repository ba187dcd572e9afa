"""`equipoise diagnose RUN --tool`: a run's last policy with its environment and without."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cluster.recipe.recipe import Recipe, Say, UserError, load_recipe
from cluster.record.evaluation import EvalTable
from cluster.record.folder import TOOL_FILE
from cluster.run.engines import sampling_from
from cluster.run.evaluate import evaluate_all
from cluster.run.passes import tool_passes
from cluster.run.session import session
from rollout.models import require_model
from tasks.files import put_text


def recipe_with_tool(run: Path, problems: int | None = None) -> Recipe:
    """A run's recipe as it is to be evaluated: its last policy, what concerns the tool.

    `problems`: how many of its held-out ones, fewer than it says. Raises UserError where the run
    has no tool or no policy.
    """
    recipe = load_recipe(run / "recipe.toml")
    if recipe.environment is None:
        raise UserError(
            f"{run}: --tool compares with [environment], and its recipe has none; give the folder "
            "of a run that has one, or add that section to a recipe and measure a checkpoint with "
            "`equipoise eval CHECKPOINT --recipe RECIPE`"
        )
    checkpoint = run / "checkpoint"
    require_model(str(checkpoint), "--tool")
    passes = ("greedy", "oracle", *tool_passes(recipe.environment))
    chosen = {"passes": passes, "reader": "", "problems": problems or recipe.eval.problems}
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"path": str(checkpoint)}),
            "eval": recipe.eval.model_copy(update=chosen),
        }
    )


def measure_tool(
    run: Path, recipe: Recipe, address: str | None, say: Say
) -> Mapping[str, EvalTable]:
    """Evaluate, and keep the tables in the run's folder; a table a task.

    Raises DataError for input that cannot be used, RunFailed where an engine ends it.
    """
    with session(recipe, "eval", address, None, say) as ready:
        say(f"{recipe.eval.problems} problems a task; starting the sampler (vLLM) ...")
        recipe = ready.recipe
        with sampling_from(recipe, recipe.model.path, "eval") as (pool, frozen, _):
            tables = evaluate_all(pool, ready.sources, recipe, frozen)
    tables_json = {task: table.to_dict() for task, table in tables.items()}
    put_text(run / TOOL_FILE, json.dumps(tables_json, indent=1))
    return tables
