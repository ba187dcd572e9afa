"""`make demo`: RL from the shipped tiny policy on both tasks, then the table before and after."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from cluster.recipe.hardware import Machine
from cluster.recipe.placement import plan
from cluster.recipe.recipe import UserError, load_recipe
from cluster.report.run_report import draw_report
from cluster.run.train import run_training

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "tiny" / "demo.toml"


def run_demo() -> Path:
    """Run the demo recipe on this machine and return the run folder.

    Raises UserError when it is not run from a checkout, which holds the recipe and the policy.
    """
    if not RECIPE.exists():
        raise UserError(
            f"{RECIPE}: no such file; the demo needs a checkout of the repository, with recipes/ "
            "and models/ beside the code"
        )
    model = ROOT / "models" / "tiny-qwen3-vl"
    recipe = load_recipe(RECIPE, [f'model.path="{model}"'])
    plan(recipe, Machine.detect()).require()
    start = time.perf_counter()
    folder = run_training(recipe)
    draw_report(folder)
    Console().print(f"demo: {time.perf_counter() - start:.0f} s", highlight=False)
    return folder
