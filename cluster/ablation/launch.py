"""`equipoise ablate`: the cells of an ablation as runs of their own, resumable at any point.

    ABLATION/ablation.json          what decides the results; a changed file is refused
    ABLATION/lock                   held by the one launcher at work (flock: gone when it dies)
    ABLATION/cells/<cell>/recipe.toml, started.json, log.txt, run/
    ABLATION/cells/<cell>/result.json    written whole, last: the cell is finished
    ABLATION/cells/<cell>/failure.json   instead of it: how the cell failed
    ABLATION/aside/<cell>-try-1/    an earlier try that failed
    ABLATION/results.parquet, summary.json, report.html    what was found, made at the end

There is no state but these files. A cell with a result is never run again; any other cell that
has a folder was interrupted or failed and starts anew, after its leftover processes are ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from cluster.ablation.cells import (
    cell_folder,
    hash_first_batch,
    hash_weights,
    is_finished,
    last_step_of,
    read_result,
    write_json,
)
from cluster.ablation.grid import Ablation, Cell, changes
from cluster.ablation.processes import (
    CellProcess,
    CellProcesses,
    Runner,
    end_marked,
    mark_of_many,
)
from cluster.ablation.progress import GridProgress
from cluster.recipe.hardware import Machine
from cluster.recipe.placement import plan
from cluster.recipe.recipe import RecipeError, UserError, load_recipe, resolved_toml
from tasks.files import put_text

POLL_SECONDS = 0.1


@dataclass
class _Running:
    cell: Cell
    job: str
    process: CellProcess
    started: float = field(default_factory=time.monotonic)


def run_ablation(
    ablation: Ablation, folder: Path, runner: Runner, slots: int, progress: GridProgress
) -> list[str]:
    """Run every cell that has no result yet, `slots` at a time; return the ids of failed cells.

    Raises UserError where another launcher is at work on `folder` or where it holds another
    ablation. On SIGINT or SIGTERM running cells are ended, to be started anew next time.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder), _signals():
        _adopt(ablation, folder)
        waiting = []
        for cell in ablation.cells:
            if is_finished(folder, cell):
                progress.finished(cell.id, read_result(folder, cell)["seconds"], ran=False)
            else:
                _clear(folder, cell, runner)
                waiting.append(cell)
        end_marked(mark_of_many(folder))
        failed: list[str] = []
        running: list[_Running] = []
        processes = CellProcesses(folder, runner)
        try:
            while waiting or running:
                while waiting and len(running) < slots:
                    running.append(_start(folder, waiting.pop(0), processes))
                    progress.started(running[-1].cell.id)
                for item in list(running):
                    code = item.process.code()
                    if code is None:
                        run = cell_folder(folder, item.cell) / "run"
                        progress.at_step(item.cell.id, last_step_of(run, item.cell.command))
                        continue
                    running.remove(item)
                    seconds = time.monotonic() - item.started
                    processes.ended(item.process, code)
                    error = _conclude(folder, item.cell, code, seconds)
                    if error is None:
                        progress.finished(item.cell.id, seconds)
                    else:
                        failed.append(item.cell.id)
                        progress.failed(item.cell.id, seconds, error)
                progress.refresh()
                time.sleep(POLL_SECONDS)
        finally:
            for item in running:
                runner.end(item.job)
                item.process.end()
            processes.close()
    return failed


def _start(folder: Path, cell: Cell, processes: CellProcesses) -> _Running:
    cell_path = cell_folder(folder, cell)
    cell_path.mkdir(parents=True)
    job = f"equipoise-{uuid4().hex[:16]}"
    recipe = cell_path / "recipe.toml"
    put_text(recipe, resolved_toml(cell.recipe))
    started = {"job": job, "weights": hash_weights(cell.recipe.model.path), "time": time.time()}
    write_json(cell_path / "started.json", started)
    return _Running(cell, job, processes.start(recipe, job))


def _conclude(folder: Path, cell: Cell, code: int, seconds: float) -> str | None:
    """Write the cell's result, or its failure and return what it was."""
    cell_path = cell_folder(folder, cell)
    run = cell_path / "run"
    error = None if code == 0 else _why(cell_path, code)
    if error is None:
        try:
            recorded = load_recipe(run / "recipe.toml")
            json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
            batch = hash_first_batch(run, cell.command)
            made_with = json.loads((run / "versions.json").read_text(encoding="utf-8"))
            if recorded != cell.recipe:
                error = f"{run / 'recipe.toml'} is not the recipe of this cell"
        except (OSError, ValueError, RecipeError) as problem:
            error = f"it ended without an error but its run folder is not whole: {problem}"
    if error is not None:
        write_json(
            cell_path / "failure.json", {"exit_code": code, "seconds": seconds, "error": error}
        )
        return error
    started = json.loads((cell_path / "started.json").read_text(encoding="utf-8"))
    result = {
        "cell": cell.id,
        "arm": cell.arm,
        "difficulty": cell.difficulty,
        "seed": cell.seed,
        "seconds": seconds,
        "weights": started["weights"],
        "first_batch": batch,
        "made_with": made_with,
    }
    write_json(cell_path / "result.json", result)
    return None


def _why(cell_path: Path, code: int) -> str:
    """The run's own error, or the end of what it printed."""
    ending = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    error = cell_path / "run" / "error.txt"
    if error.is_file():
        first = error.read_text(encoding="utf-8", errors="replace").splitlines()[:1]
        return f"{ending}: {''.join(first)}"
    printed = (cell_path / "log.txt").read_text(encoding="utf-8", errors="replace").strip()
    return f"{ending}: {' | '.join(printed.splitlines()[-3:]) or 'it printed nothing'}"


def _clear(folder: Path, cell: Cell, runner: Runner) -> None:
    """End what an earlier try left running, then remove its folder; one that failed is kept."""
    cell_path = cell_folder(folder, cell)
    if not cell_path.exists():
        return
    started = cell_path / "started.json"
    if started.is_file() and not (cell_path / "failure.json").is_file():
        runner.end(json.loads(started.read_text(encoding="utf-8"))["job"])
    end_marked(str(cell_path))
    if not (cell_path / "failure.json").is_file():
        shutil.rmtree(cell_path)
        return
    aside = folder / "aside"
    aside.mkdir(exist_ok=True)
    tries = len(list(aside.glob(f"{cell.id}-try-*")))
    cell_path.rename(aside / f"{cell.id}-try-{tries + 1}")


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM ends the launcher as Ctrl-C does: through `finally`."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this process. The kernel drops an flock when its holder dies."""
    with (folder / "lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder}: another launcher (process {file.read().strip() or 'unknown'}) is at "
                "work on this ablation; wait for it, or give --output another folder"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _adopt(ablation: Ablation, folder: Path) -> None:
    """Write down what is run here, or check that it is what was run here before.

    More arms or seeds after those that were there only add cells, so the grid may grow by them.
    """
    identity_file, now = folder / "ablation.json", json.loads(json.dumps(ablation.identity()))
    if identity_file.is_file():
        before = json.loads(identity_file.read_text(encoding="utf-8"))
        known = {name: now[name][: len(before.get(name, ()))] for name in ("arms", "seeds")}
        differences = changes(before, now | known)
        if differences:
            raise UserError(
                f"{folder}: holds an ablation that differs from this one:\n"
                + "\n".join(f"  {line}" for line in differences[:20])
                + "\nchange it back, or give --output a new folder"
            )
        if now != before:
            write_json(identity_file, now)
        return
    others = [p.name for p in folder.iterdir() if p.name != "lock" and p.name[0] != "."]
    if others:
        raise UserError(
            f"{folder}: holds {others[0]!r} and no ablation; give --output a new folder"
        )
    write_json(identity_file, now)


def slots_for(ablation: Ablation, machine: Machine) -> int:
    """Cells at a time on one machine: as many as asked for and as its cores hold, at least one."""
    most = max(plan(cell.recipe, machine, cell.command).cpus for cell in ablation.cells)
    return max(1, min(ablation.config.parallel, int(machine.cores // max(most, 1e-9))))
