"""What `equipoise ablate` does around the cells: the plan, the run, the results at the end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from cluster.ablation.cells import is_finished, read_result
from cluster.ablation.grid import Ablation, Cell
from cluster.ablation.launch import run_ablation, slots_for
from cluster.ablation.processes import Runner, runner_of
from cluster.ablation.progress import GridProgress, cost_table
from cluster.recipe.fetching import pinned_recipe
from cluster.recipe.hardware import Machine
from cluster.recipe.memory import trained_of
from cluster.recipe.placement import plan
from cluster.recipe.preflight import preflight
from cluster.recipe.recipe import UserError
from rollout.tokens import ModelError
from tasks.core import DataError

INTERRUPTED = 130
"""Exit code after SIGINT or SIGTERM, as shells have it."""


def _pinned(ablation: Ablation, dry_run: bool, console: Console) -> Ablation:
    """What cells name by URI is of one content in all of them."""

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    pin = partial(pinned_recipe, say=say, dry_run=dry_run, known={})
    cells = tuple(replace(cell, recipe=pin(cell.recipe)) for cell in ablation.cells)
    return replace(ablation, base=pin(ablation.base), cells=cells)


def _ask_all(ablation: Ablation, cells: Sequence[Cell], console: Console) -> None:
    """Ask for each cell what it would ask itself; cells that differ in other things ask once."""
    checked: set[str] = set()
    for cell in cells:
        recipe = cell.recipe
        of = (recipe.model, recipe.tasks, recipe.sampler, recipe.reward, recipe.eval, recipe.sft)
        if repr(of) in checked:
            continue
        checked.add(repr(of))
        notes: list[str] = []
        try:
            preflight(recipe, cell.command, notes.append, dry_run=True)
        except (DataError, ModelError, UserError) as error:
            raise UserError(f"{ablation.name}: cell {cell.id}: {error}") from error
        for note in notes:
            console.print(f"{cell.id}: {note}", markup=False, highlight=False)


def ablate_to_the_end(
    ablation: Ablation,
    output: Path | None = None,
    address: str | None = None,
    dry_run: bool = False,
    runner: Runner | None = None,
    pilot: Path | None = None,
    difference: float = 0.03,
) -> int:
    """Print the plan, run what is not finished, write and print the results; the exit code.

    `runner` stands in for the one that `address` chooses. What its cells would find before they
    start is asked first, but for a model that is not here. A dry run tells the power of the plan to
    show `difference`, from the spread in `pilot`, an ablation's folder, or in what is finished
    here. Raises UserError for what the user can put right: a folder in use or of another ablation,
    a machine that is too small, parts that the policy of a cell does not have, a pilot without a
    dry run.
    """
    if pilot and not dry_run:
        raise UserError(f"--pilot {pilot}: tells the power of a plan; give it with --dry-run")
    if not 0 < difference <= 1:
        raise UserError(f"--difference {difference:g}: expected a difference of accuracies, 0 to 1")
    console = Console(soft_wrap=True)
    if address is None and runner is None:
        ablation = _pinned(ablation, dry_run, console)
    folder = output or Path(ablation.base.output.folder) / ablation.name
    machine = Machine.detect()
    # Cells of a launcher that is a job itself join its cluster.
    elsewhere = address or os.environ.get("RAY_ADDRESS")
    for cell in ablation.cells:
        try:
            trained_of(cell.recipe.model.path, cell.recipe.learner)
        except ModelError as error:
            raise UserError(f"{ablation.name}: cell {cell.id}: {error}") from error
    slots = ablation.config.parallel if elsewhere else slots_for(ablation, machine)
    finished = {
        cell.id: float(read_result(folder, cell)["seconds"])
        for cell in ablation.cells
        if is_finished(folder, cell)
    }
    if address is None and runner is None:
        _ask_all(ablation, [c for c in ablation.cells if c.id not in finished], console)
    console.print(cost_table(ablation, machine, finished, slots), markup=False, highlight=False)
    if dry_run:
        if pilot or finished:
            print_power(ablation, pilot or folder, difference, console)
        return 0
    if not elsewhere:
        for cell in ablation.cells:
            plan(cell.recipe, machine, cell.command).require()
    chosen = runner or runner_of(ablation.config.command, address)
    try:
        with GridProgress(ablation.cells, console) as progress:
            failed = run_ablation(ablation, folder, chosen, slots, progress)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here", highlight=False)
        return INTERRUPTED
    # Seconds of imports (SciPy, PyArrow) that launching does not need.
    from cluster.report.ablation_report import write_results

    record, report = write_results(folder)
    console.print(report.to_text("outcome"), markup=False, highlight=False)
    console.print(f"report: {folder / 'report.html'}", markup=False, highlight=False)
    console.print(f"ablation folder: {folder}", markup=False, highlight=False)
    return 1 if failed or record.faults else 0


def print_power(ablation: Ablation, pilot: Path, difference: float, console: Console) -> None:
    """Print what the planned seeds and problems can show (`cluster.ablation.power`)."""
    from cluster.ablation.power import power_words
    from cluster.ablation.results import pilot_differences
    from cluster.report.ablation_report import read_ablation

    record = read_ablation(pilot)
    # The reference is the first arm, whether it has finished or not.
    differences, share = pilot_differences(
        record.table, list(dict.fromkeys(cell.arm for cell in record.cells))
    )
    recipe = ablation.base
    compared = max(1, len({cell.arm for cell in ablation.cells}) - 1)
    seeds = len({cell.seed for cell in ablation.cells})
    planned = max(2, round(recipe.eval.problems * len(recipe.tasks) * share))
    unit = "problems" if share == 1 else "puzzles"
    for line in power_words(differences, compared, seeds, planned, difference, unit):
        console.print(line, markup=False, highlight=False)
