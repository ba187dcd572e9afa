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

import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
from cluster.ablation.progress import GridProgress
from cluster.ablation.settings import CellCommand
from cluster.recipe.hardware import Machine
from cluster.recipe.placement import plan
from cluster.recipe.recipe import RecipeError, UserError, load_recipe, resolved_toml
from tasks.files import put_text

MARK = "EQUIPOISE_CELL"
"""Environment variable that a cell's processes carry: the folder of the cell."""

POLL_SECONDS = 0.1
GRACE_SECONDS = 20.0
"""What a cell gets to end after SIGTERM, before SIGKILL."""


def program(command: CellCommand) -> tuple[str, ...]:
    """The words that run one of our commands with this Python."""
    return (sys.executable, "-m", "cluster", command)


@dataclass(frozen=True)
class Runner:
    """How a cell becomes a process, and how one that a dead launcher left behind is ended.

    Attributes:
        program: the words that arguments are put after.
        address: of a Ray cluster's dashboard: each cell is a job there, else a process here. The
            working directory travels with the job. The ablation's folder and this Python must be
            at the same place on the cluster's head node: shared storage, one image.
    """

    program: tuple[str, ...]
    address: str | None = None

    def command(self, recipe: Path, run: Path, job: str) -> list[str]:
        """The command that trains by `recipe` into the new folder `run`, as job `job`.

        `ray job submit` waits for the job and has its exit code.
        """
        words = [*self.program, str(recipe), "--output", str(run)]
        if self.address is None:
            return words
        submit = [*_ray_job("submit", self.address), "--submission-id", job]
        return [*submit, "--working-dir", os.getcwd(), "--", *words]

    def end(self, job: str) -> None:
        """End a job whose process marks cannot be seen here; one that is over stays as it is."""
        if self.address is not None:
            command = [*_ray_job("stop", self.address), job]
            subprocess.run(command, capture_output=True, timeout=120, check=False)


def _ray_job(subcommand: str, address: str) -> list[str]:
    beside = Path(sys.executable).parent / "ray"
    return [str(beside) if beside.is_file() else "ray", "job", subcommand, "--address", address]


@dataclass
class _Running:
    cell: Cell
    job: str
    process: subprocess.Popen[bytes]
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
        failed: list[str] = []
        running: list[_Running] = []
        try:
            while waiting or running:
                while waiting and len(running) < slots:
                    running.append(_start(folder, waiting.pop(0), runner))
                    progress.started(running[-1].cell.id)
                for item in list(running):
                    code = item.process.poll()
                    if code is None:
                        run = cell_folder(folder, item.cell) / "run"
                        progress.at_step(item.cell.id, last_step_of(run, item.cell.command))
                        continue
                    running.remove(item)
                    seconds = time.monotonic() - item.started
                    _end_marked(folder, item.cell)
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
                _end(folder, item, runner)
    return failed


def _start(folder: Path, cell: Cell, runner: Runner) -> _Running:
    cell_path = cell_folder(folder, cell)
    cell_path.mkdir(parents=True)
    job = f"equipoise-{uuid4().hex[:16]}"
    recipe = cell_path / "recipe.toml"
    put_text(recipe, resolved_toml(cell.recipe))
    started = {"job": job, "weights": hash_weights(cell.recipe.model.path), "time": time.time()}
    write_json(cell_path / "started.json", started)
    with (cell_path / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            runner.command(recipe, cell_path / "run", job),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {MARK: str(cell_path), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            # Safe between fork and exec: this process has one thread.
            preexec_fn=_die_with(os.getpid()),
        )
    return _Running(cell, job, process)


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
    _end_marked(folder, cell)
    if not (cell_path / "failure.json").is_file():
        shutil.rmtree(cell_path)
        return
    aside = folder / "aside"
    aside.mkdir(exist_ok=True)
    tries = len(list(aside.glob(f"{cell.id}-try-*")))
    cell_path.rename(aside / f"{cell.id}-try-{tries + 1}")


def _die_with(parent: int) -> Callable[[], None] | None:
    """What a child runs before its command: have the kernel end it when this launcher dies."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    set_death_signal = 1  # PR_SET_PDEATHSIG

    def before() -> None:
        libc.prctl(set_death_signal, signal.SIGTERM)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return before


def _end(folder: Path, item: _Running, runner: Runner) -> None:
    """End a running cell: ask its processes, then insist."""
    runner.end(item.job)
    try:
        os.killpg(item.process.pid, signal.SIGTERM)
        item.process.wait(GRACE_SECONDS)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass  # `_end_marked` sees to the rest
    _end_marked(folder, item.cell)
    item.process.wait()


def _end_marked(folder: Path, cell: Cell) -> None:
    """SIGKILL every process that carries the cell's mark, until there is none.

    Ray and vLLM start processes of their own, which outlive a driver that was killed by a little
    while. Without /proc (not Linux) there is nothing to see, and they end by themselves.
    """
    mark = f"{MARK}={cell_folder(folder, cell)}".encode()
    deadline = time.monotonic() + 60
    while pids := list(_carrying(mark)):
        if time.monotonic() > deadline:
            raise UserError(f"{cell.id}: processes {pids} of an earlier try do not end; end them")
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def _carrying(mark: bytes) -> Iterator[int]:
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            carries_mark = mark in environ.read_bytes().split(b"\0")
            zombie = carries_mark and b") Z " in (environ.parent / "stat").read_bytes()
        except OSError:
            continue  # another user's, or gone meanwhile
        if carries_mark and not zombie and int(environ.parent.name) != os.getpid():
            yield int(environ.parent.name)


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
