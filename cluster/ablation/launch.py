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
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from cluster.ablation.plan import Ablation, Cell, CellCommand, CellName, changes
from cluster.ablation.progress import GridProgress
from cluster.recipe.placement import Machine, plan
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


class Runner(Protocol):
    """How a cell becomes a process, and how one that a dead launcher left behind is ended."""

    def command(self, recipe: Path, run: Path, job: str) -> list[str]:
        """The command that trains by `recipe` into the new folder `run`, as job `job`."""
        ...

    def end(self, job: str) -> None:
        """End a job that may still be running where its process marks cannot be seen."""
        ...


@dataclass(frozen=True)
class LocalRunner:
    """Cells as subprocesses on this machine; arguments are put after the words of `program`."""

    program: tuple[str, ...]

    def command(self, recipe: Path, run: Path, job: str) -> list[str]:
        """`equipoise train RECIPE --output RUN`, or `sft`."""
        return [*self.program, str(recipe), "--output", str(run)]

    def end(self, job: str) -> None:
        """Nothing beyond the marked processes."""


@dataclass(frozen=True)
class RayJobRunner:
    """Each cell as a Ray job on the cluster whose dashboard is at `address`.

    The working directory travels with the job. The ablation's folder and this Python must be at
    the same place on the cluster's head node: shared storage, one image.
    """

    address: str
    program: tuple[str, ...]

    def command(self, recipe: Path, run: Path, job: str) -> list[str]:
        """`ray job submit`, which waits for the job and has its exit code."""
        return [
            *(_ray(), "job", "submit", "--address", self.address, "--submission-id", job),
            *("--working-dir", os.getcwd(), "--"),
            *(*self.program, str(recipe), "--output", str(run)),
        ]

    def end(self, job: str) -> None:
        """`ray job stop`; a job that is over or was never submitted is left as it is."""
        command = [_ray(), "job", "stop", "--address", self.address, job]
        subprocess.run(command, capture_output=True, timeout=120, check=False)


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


def is_finished(folder: Path, cell: CellName) -> bool:
    """Whether the cell has a result."""
    return (cell_folder(folder, cell) / "result.json").is_file()


def read_result(folder: Path, cell: CellName) -> dict[str, Any]:
    """A finished cell's result: `seconds`, `weights` and `first_batch` hashes, who it is."""
    text = (cell_folder(folder, cell) / "result.json").read_text(encoding="utf-8")
    result: dict[str, Any] = json.loads(text)
    return result


def read_failure(folder: Path, cell: CellName) -> str | None:
    """Why a cell failed; None where it did not."""
    file = cell_folder(folder, cell) / "failure.json"
    return json.loads(file.read_text(encoding="utf-8"))["error"] if file.is_file() else None


def cell_folder(folder: Path, cell: CellName) -> Path:
    """Where a cell keeps its files; the run itself is in `run` below it."""
    return folder / "cells" / cell.id


def pairing_faults(folder: Path, cells: Sequence[CellName]) -> list[str]:
    """Finished cells whose initial weights or first batch differ from those of their pairs.

    Pairs have one difficulty and seed. The hashes are of the files read and of the problems that
    the runs really saw.
    """
    faults = []
    first: dict[tuple[str, int], tuple[str, dict[str, Any]]] = {}
    for cell in cells:
        if not is_finished(folder, cell):
            continue
        result = read_result(folder, cell)
        other, reference = first.setdefault((cell.difficulty, cell.seed), (cell.id, result))
        for what, words in (("weights", "initial weights"), ("first_batch", "first batch")):
            if result[what] != reference[what]:
                faults.append(f"{cell.id} and {other}: {words} differ, so they are not paired")
    return faults


def hash_weights(model: str) -> str:
    """SHA-256 over the files of a checkpoint folder, names included; of the name of a hub model."""
    digest = hashlib.sha256()
    path = Path(model)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    for file in files:
        digest.update(f"{file.relative_to(path)}\0".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    if not files:
        digest.update(f"hub:{model}".encode())
    return digest.hexdigest()


def hash_first_batch(run: Path, command: CellCommand = "train") -> str:
    """SHA-256 over what a run learnt from first, in order.

    Of RL the problems of step 1: ids, prompts, images. Of SFT the demonstrations of update 1: token
    ids, segments, images. Raises OSError where the run left no record of them.
    """
    import pyarrow.parquet as pq

    if command == "sft":
        rows = pq.read_table(run / "demonstrations" / "step-000001.parquet").to_pylist()
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()

    columns = ["group_id", "problem_id", "prompt", "image_sha256"]
    table = pq.read_table(run / "rollouts" / "step-000001.parquet", columns=columns)
    problems = {row["group_id"]: row for row in table.to_pylist()}
    # A group's id starts with its place in the step; scoring may return groups in another order.
    ordered = sorted(problems.values(), key=lambda row: int(row["group_id"].split("/")[1]))
    text = json.dumps([[row[name] for name in columns[1:]] for row in ordered])
    return hashlib.sha256(text.encode()).hexdigest()


# --- one cell ----------------------------------------------------------------------------------


def _start(folder: Path, cell: Cell, runner: Runner) -> _Running:
    here = cell_folder(folder, cell)
    here.mkdir(parents=True)
    job = f"equipoise-{uuid4().hex[:16]}"
    recipe = here / "recipe.toml"
    put_text(recipe, resolved_toml(cell.recipe))
    started = {"job": job, "weights": hash_weights(cell.recipe.model.path), "time": time.time()}
    _write_json(here / "started.json", started)
    with (here / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            runner.command(recipe, here / "run", job),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {MARK: str(here), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            # Safe between fork and exec: this process has one thread.
            preexec_fn=_die_with(os.getpid()),
        )
    return _Running(cell, job, process)


def _conclude(folder: Path, cell: Cell, code: int, seconds: float) -> str | None:
    """Write the cell's result, or its failure and return what it was."""
    here = cell_folder(folder, cell)
    run = here / "run"
    error = None if code == 0 else _why(here, code)
    if error is None:
        try:
            left = load_recipe(run / "recipe.toml")
            json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
            batch = hash_first_batch(run, cell.command)
            if left != cell.recipe:
                error = f"{run / 'recipe.toml'} is not the recipe of this cell"
        except (OSError, ValueError, RecipeError) as problem:
            error = f"it ended without an error but its run folder is not whole: {problem}"
    if error is not None:
        _write_json(here / "failure.json", {"exit_code": code, "seconds": seconds, "error": error})
        return error
    started = json.loads((here / "started.json").read_text(encoding="utf-8"))
    result = {
        "cell": cell.id,
        "arm": cell.arm,
        "difficulty": cell.difficulty,
        "seed": cell.seed,
        "seconds": seconds,
        "weights": started["weights"],
        "first_batch": batch,
    }
    _write_json(here / "result.json", result)
    return None


def _why(here: Path, code: int) -> str:
    """The run's own error, or the end of what it printed."""
    ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    error = here / "run" / "error.txt"
    if error.is_file():
        first = error.read_text(encoding="utf-8", errors="replace").splitlines()[:1]
        return f"{ended}: {''.join(first)}"
    printed = (here / "log.txt").read_text(encoding="utf-8", errors="replace").strip()
    return f"{ended}: {' | '.join(printed.splitlines()[-3:]) or 'it printed nothing'}"


def _clear(folder: Path, cell: Cell, runner: Runner) -> None:
    """End what an earlier try left running, then remove its folder; one that failed is kept."""
    here = cell_folder(folder, cell)
    if not here.exists():
        return
    started = here / "started.json"
    if started.is_file() and not (here / "failure.json").is_file():
        runner.end(json.loads(started.read_text(encoding="utf-8"))["job"])
    _end_marked(folder, cell)
    if not (here / "failure.json").is_file():
        shutil.rmtree(here)
        return
    aside = folder / "aside"
    aside.mkdir(exist_ok=True)
    tries = len(list(aside.glob(f"{cell.id}-try-*")))
    here.rename(aside / f"{cell.id}-try-{tries + 1}")


def last_step_of(run: Path, command: CellCommand) -> int:
    """The last step that a run which goes on has left something of."""
    from cluster.record.stored import last_logged_step

    try:
        if command == "train":
            return len([n for n in os.listdir(run / "rollouts") if n.startswith("step-")])
        return last_logged_step(run)
    except OSError:
        return 0


# --- processes ---------------------------------------------------------------------------------


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
            found = mark in environ.read_bytes().split(b"\0")
            zombie = found and b") Z " in (environ.parent / "stat").read_bytes()
        except OSError:
            continue  # another user's, or gone meanwhile
        if found and not zombie and int(environ.parent.name) != os.getpid():
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


# --- the folder --------------------------------------------------------------------------------


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
    kept, now = folder / "ablation.json", json.loads(json.dumps(ablation.identity()))
    if kept.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
        known = {name: now[name][: len(before.get(name, ()))] for name in ("arms", "seeds")}
        found = changes(before, now | known)
        if found:
            raise UserError(
                f"{folder}: holds an ablation that differs from this one:\n"
                + "\n".join(f"  {line}" for line in found[:20])
                + "\nchange it back, or give --output a new folder"
            )
        if now != before:
            _write_json(kept, now)
        return
    others = [p.name for p in folder.iterdir() if p.name != "lock" and p.name[0] != "."]
    if others:
        raise UserError(
            f"{folder}: holds {others[0]!r} and no ablation; give --output a new folder"
        )
    _write_json(kept, now)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all, also when the machine stops."""
    put_text(path, json.dumps(value, indent=1))


def slots_for(ablation: Ablation, machine: Machine) -> int:
    """Cells at a time on one machine: as many as asked for and as its cores hold, at least one."""
    most = max(plan(cell.recipe, machine, cell.command).cpus for cell in ablation.cells)
    return max(1, min(ablation.config.parallel, int(machine.cores // max(most, 1e-9))))


def _ray() -> str:
    beside = Path(sys.executable).parent / "ray"
    return str(beside) if beside.is_file() else "ray"
