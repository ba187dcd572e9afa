"""Machines that recipes are planned for, and the recipes."""

from __future__ import annotations

from cluster.recipe.hardware import GIB, Gpu, Machine
from cluster.recipe.recipe import Recipe, load_recipe
from tests.support.recipes import ROOT

TWO_CORES = Machine(cores=2, memory=24 * GIB)
EIGHT_GPUS = Machine(cores=64, memory=512 * GIB, gpus=(Gpu("test", 80 * GIB),) * 8)


def tiny(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/tiny/sudoku.toml", overrides)


def gpu(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/gpu/qwen3_vl_4b_sudoku.toml", overrides)
