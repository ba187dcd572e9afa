"""What `equipoise ablate` does around the cells: the plan, the run, the tables at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from cluster.ablate import (
    LocalRunner,
    RayJobRunner,
    Runner,
    is_finished,
    pairing_faults,
    program,
    read_result,
    run_ablation,
    slots_for,
)
from cluster.ablation_config import Ablation
from cluster.ablation_progress import GridProgress, cost_table
from cluster.placement import Machine, plan
from cluster.terminal import printable

INTERRUPTED = 130
"""Exit code after SIGINT or SIGTERM, as shells have it."""


def ablate_to_the_end(
    ablation: Ablation,
    output: Path | None = None,
    address: str | None = None,
    dry_run: bool = False,
    runner: Runner | None = None,
) -> int:
    """Print the plan, run what is not finished, write and print the tables; the exit code.

    `runner` stands in for the one that `address` chooses. Raises UserError for what the user can
    put right: a folder in use or of another ablation, a machine that is too small.
    """
    console = Console(soft_wrap=True)
    folder = output or Path(ablation.base.output.folder) / ablation.name
    machine = Machine.detect()
    slots = ablation.config.parallel if address else slots_for(ablation, machine)
    finished = {
        cell.id: float(read_result(folder, cell)["seconds"])
        for cell in ablation.cells
        if is_finished(folder, cell)
    }
    console.print(cost_table(ablation, machine, finished, slots), markup=False, highlight=False)
    if dry_run:
        return 0
    if address is None:
        for cell in ablation.cells:
            plan(cell.recipe, machine, cell.command).require()
    words = program(ablation.config.command)
    chosen = runner or (RayJobRunner(address, words) if address else LocalRunner(words))
    try:
        with GridProgress(ablation.cells, console) as progress:
            failed = run_ablation(ablation, folder, chosen, slots, progress)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here", highlight=False)
        return INTERRUPTED
    faults = pairing_faults(folder, ablation.cells)
    # As in `write_results`: seconds of imports.
    from cluster.report_ablation import write_ablation_report

    report = write_results(ablation, folder, faults)
    console.print(
        Markdown(printable(report)) if console.is_terminal else printable(report), markup=False
    )
    console.print(f"report: {write_ablation_report(folder)}", markup=False, highlight=False)
    console.print(f"ablation folder: {folder}", markup=False, highlight=False)
    return 1 if failed or faults else 0


def write_results(ablation: Ablation, folder: Path, faults: list[str]) -> str:
    """Write `results.parquet`, `summary.json` and `summary.md`; return the last one's text."""
    # Seconds of imports (SciPy, PyArrow) that launching does not need.
    import pyarrow.parquet as pq

    from cluster.ablation_results import collect, in_words, summarise

    table = collect(ablation.cells, folder)
    arms = [arm.name for arm in ablation.config.arms]
    summary = summarise(table, ablation.config.question, arms, ablation.config.target)
    report = in_words(summary, ablation, folder)
    if faults:
        report += "\n## Not paired\n\n" + "\n".join(f"- {fault}" for fault in faults) + "\n"
    _replace(folder / "results.parquet", lambda path: pq.write_table(table, path))
    numbers = json.dumps(summary.to_dict() | {"pairing_faults": faults}, indent=1)
    _replace(folder / "summary.json", lambda path: path.write_text(numbers, encoding="utf-8"))
    _replace(folder / "summary.md", lambda path: path.write_text(report, encoding="utf-8"))
    return report


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    write(beside)
    os.replace(beside, path)
