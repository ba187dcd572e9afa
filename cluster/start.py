"""How a command starts: the recipe of its run, what is asked before the imports of a run, and how
what the user can put right is told."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.recipe.fetching import pinned_recipe
from cluster.recipe.hardware import Machine
from cluster.recipe.machine import new_run_folder, os_error_text, require_free
from cluster.recipe.nodes import describe_nodes, seated_for
from cluster.recipe.placement import Command, Placement, describe, plan
from cluster.recipe.preflight import glance, preflight
from cluster.recipe.recipe import (
    Recipe,
    RecipeError,
    RunFailed,
    UserError,
    load_recipe,
    resolved_toml,
)
from cluster.record.terminal import printable
from rollout.models import ModelError
from tasks.core import DataError

if TYPE_CHECKING:
    from cluster.run.checkpoints import Resumable, Resumed


def tell(line: str) -> None:
    """Say it beside what a command prints."""
    print(printable(line), file=sys.stderr, flush=True)


def refuse(wrong: bool, message: str) -> None:
    """Raise UserError where options do not go together."""
    if wrong:
        raise UserError(message)


def loaded(
    command: Resumable,
    recipe: Path | None,
    overrides: list[str] | None,
    output: Path | None,
    resume: str | None,
) -> tuple[Recipe, Resumed | None]:
    """The recipe of a new run, or that of a run to go on with and where it goes on.

    The copy of a run that `resume` names by URI is fetched first, into `output` or `runs/NAME`.
    """
    if resume is not None:
        copied = "://" in resume
        refuse(
            recipe is not None or (output is not None and not copied),
            "--resume RUN: the run has its recipe and its folder; give neither",
        )
        from cluster.run.checkpoints import resume as go_on

        folder = Path(resume)
        if copied:
            from cluster.record.mirror import fetch

            folder = output or Path("runs") / folder.name
            fetch(resume, folder, tell)
        return go_on(folder, overrides or (), command)
    if recipe is None:
        raise UserError(f"equipoise {command}: give a recipe, or --resume RUN to go on with a run")
    return load_recipe(recipe, overrides or ()), None


def supervised(
    command: Resumable,
    recipe: Recipe,
    file: Path | None,
    overrides: list[str] | None,
    address: str | None,
    output: Path | None,
    resumed: Resumed | None,
) -> int | None:
    """Run it below a supervisor and return its exit code; None where this process is to run it."""
    from cluster.run.supervise import SUPERVISED, supervise

    budget = recipe.checkpoint.restarts
    if not budget or os.environ.get(SUPERVISED):
        return None
    settings = [word for override in overrides or () for word in ("--set", override)]
    where = ["--address", address] if address else []
    run = resumed.run if resumed else new_run_folder(recipe, output)
    again = [command, "--resume", str(run), *where]
    if resumed:  # a life that dies before it begins has not written down what it was told
        return supervise([*again, *settings], [*again, *settings], run, budget)
    first = [command, str(file), "--output", str(run), *settings, *where]
    return supervise(first, again, run, budget)


def ready(
    recipe: Recipe,
    command: Command,
    address: str | None,
    dry_run: bool,
    source: Path | str | None,
    output: Path | None,
) -> Recipe | None:
    """The recipe to run, its URIs pinned. A dry run prints it and the placement, and returns None.

    The placement comes as comments, so that all that is printed is a recipe again; with `address`
    also which node of the cluster has room for whom. Raises
    PlacementError where this machine lacks what the recipe asks for and no cluster is given,
    RecipeError, which names `source`, where it names parts that the policy does not have, and what
    `pinned_recipe`, `glance` and `require_free` raise.
    """
    notes: list[str] = []
    recipe = pinned_recipe(recipe, notes.append if dry_run else tell, dry_run=dry_run)
    if not dry_run:
        if output is not None:
            require_free(output, "--output")
        glance(recipe, command)
    try:
        placement = plan(recipe, Machine.detect(), command)
    except ModelError as error:
        raise RecipeError(f"{source}: {error}") from error
    if dry_run:
        print(resolved_toml(preflight(recipe, command, notes.append, dry_run=True).recipe))
        lines = [*describe(placement).splitlines(), *(f"note: {note}" for note in notes)]
        if address is not None:
            lines += ["", f"the cluster at {address}, with what its nodes have left now:"]
            lines += _on_cluster(recipe, placement, address).splitlines()
        print("\n".join(f"# {line}".rstrip() for line in lines))
        return None
    if address is None:
        placement.require()
    return recipe


def _on_cluster(recipe: Recipe, placement: Placement, address: str) -> str:
    """Node by node of the cluster as it is now, who would go there, and who cannot."""
    from cluster.run.nodes import free_nodes
    from cluster.run.session import connected

    with connected(address):
        nodes = free_nodes()
    return describe_nodes(seated_for(recipe, placement.actors, nodes))


def in_words(error: Exception) -> tuple[str, int]:
    """The message and exit code of an error that is told without a traceback; code 0: it is not."""
    if isinstance(error, UserError | DataError | ModelError):
        return str(error), 2
    if isinstance(error, OSError):
        return printable(os_error_text(error)), 2
    if isinstance(error, RunFailed):
        return f"the run failed: {error}", 1
    return "", 0
