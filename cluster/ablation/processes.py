"""The processes that cells of an ablation run in, and how whatever they started is ended."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from cluster.ablation.settings import CellCommand
from cluster.recipe.recipe import UserError

MARK = "EQUIPOISE_CELL"
"""Environment variable that a cell's processes carry: `mark_of` it."""
ONE_BY_ONE = "one by one"
"""Instead of a cell's name, of processes that run several."""
GRACE_SECONDS = 20.0
"""What a cell gets to end after SIGTERM, before SIGKILL."""


@dataclass(frozen=True)
class Runner:
    """How a cell becomes a process, and how one that a dead launcher left behind is ended.

    Attributes:
        program: the words that arguments are put after.
        address: of a Ray cluster's dashboard: each cell is a job there, else a process here. The
            working directory travels with the job. The ablation's folder and this Python must be
            at the same place on the cluster's head node: shared storage, one image.
        in_a_row: the words of a process that runs one cell after another, each a line of JSON on
            its standard input: `words`, what the command line would be, and `log`, where output
            goes. It answers on standard output with the exit code, and ends after one that is not
            0. Empty: each cell has a process of its own.
    """

    program: tuple[str, ...]
    address: str | None = None
    in_a_row: tuple[str, ...] = ()

    def command(self, recipe: Path, run: Path, job: str) -> list[str]:
        """The process that trains by `recipe` into the new folder `run`, as job `job`.

        `ray job submit` waits for the job and has its exit code.
        """
        words = [*self.program, *arguments(recipe, run)]
        if self.address is None:
            return words
        submit = [*_ray_job("submit", self.address), "--submission-id", job]
        return [*submit, "--working-dir", os.getcwd(), "--", *words]

    def end(self, job: str) -> None:
        """End a job whose process marks cannot be seen here; one that is over stays as it is."""
        if self.address is not None:
            command = [*_ray_job("stop", self.address), job]
            subprocess.run(command, capture_output=True, timeout=120, check=False)


def arguments(recipe: Path, run: Path) -> list[str]:
    """Of a command that trains by `recipe` into the new folder `run`."""
    return [str(recipe), "--output", str(run)]


def program(command: CellCommand) -> tuple[str, ...]:
    """The words that run one of our commands with this Python."""
    return (sys.executable, "-m", "cluster", command)


def runner_of(command: CellCommand, address: str | None) -> Runner:
    """How cells of an ablation run: on this machine one after another in one process."""
    words = (sys.executable, "-m", "cluster", "cells")
    return Runner(program(command), address, () if address else words)


def _ray_job(subcommand: str, address: str) -> list[str]:
    beside = Path(sys.executable).parent / "ray"
    return [str(beside) if beside.is_file() else "ray", "job", subcommand, "--address", address]


@dataclass
class CellProcess:
    """A process that runs a cell. `many`: it may run another when that has ended well."""

    process: subprocess.Popen[bytes]
    mark: str
    many: bool

    def begin(self, words: Sequence[str], log: Path) -> None:
        """Have a process of many cells run one."""
        assert self.process.stdin is not None
        line = json.dumps({"words": [*words], "log": str(log)})
        with suppress(BrokenPipeError):  # it has died, which `code` tells
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()

    def code(self) -> int | None:
        """The exit code of the cell, once it is over."""
        if not self.many:
            return self.process.poll()
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], 0)[0]:
            return None
        answer = self.process.stdout.readline()
        return int(answer) if answer else self.process.wait() or 1

    def end(self) -> None:
        """End it: ask its processes, then insist."""
        try:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(GRACE_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass  # `end_marked` sees to the rest
        end_marked(self.mark)
        self.process.wait()


@dataclass
class CellProcesses:
    """Processes of an ablation's cells, and those that wait for another cell."""

    folder: Path
    runner: Runner
    waiting: list[CellProcess] = field(default_factory=list)

    def start(self, recipe: Path, job: str) -> CellProcess:
        """Begin the cell whose recipe is in its folder; its output goes to `log.txt` there."""
        cell, runner = recipe.parent, self.runner
        log, run = cell / "log.txt", cell / "run"
        if not runner.in_a_row:
            alone = _process(runner.command(recipe, run, job), log, str(cell))
            return CellProcess(alone, str(cell), many=False)
        if self.waiting:
            process = self.waiting.pop()
        else:
            mark = f"{mark_of_many(self.folder)}/{uuid4().hex[:8]}"
            process = CellProcess(_process(runner.in_a_row, log, mark, many=True), mark, True)
        process.begin([runner.program[-1], *arguments(recipe, run)], log)
        return process

    def ended(self, process: CellProcess, code: int) -> None:
        """Its cell is over: one of many that ended well waits, of any other nothing stays."""
        if process.many and code == 0:
            self.waiting.append(process)
        else:
            end_marked(process.mark)

    def close(self) -> None:
        """End those that wait."""
        for process in self.waiting:
            assert process.process.stdin is not None
            process.process.stdin.close()  # nothing more to do: it ends by itself
        for process in self.waiting:
            with suppress(subprocess.TimeoutExpired):
                process.process.wait(GRACE_SECONDS)
            end_marked(process.mark)


def _process(
    command: Sequence[str], log: Path, mark: str, many: bool = False
) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE if many else subprocess.DEVNULL,
            stdout=subprocess.PIPE if many else output,
            stderr=output if many else subprocess.STDOUT,
            env=os.environ | {MARK: mark, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            # Safe between fork and exec: this process has one thread.
            preexec_fn=_die_with(os.getpid()),
        )


def mark_of_many(folder: Path) -> str:
    """What the marks of all processes begin with that run several cells of an ablation."""
    return str(folder / ONE_BY_ONE)


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


def end_marked(mark: str) -> None:
    """SIGKILL every process that carries a mark, or one below it, until there is none.

    Ray and vLLM start processes of their own, which outlive a driver that was killed by a little
    while. Without /proc (not Linux) there is nothing to see, and they end by themselves.
    """
    deadline = time.monotonic() + 60
    while pids := list(_carrying(mark)):
        if time.monotonic() > deadline:
            raise UserError(f"{mark}: processes {pids} of an earlier try do not end; end them")
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def _carrying(mark: str) -> Iterator[int]:
    carried = f"{MARK}={mark}".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = environ.read_bytes().split(b"\0")
            carries_mark = any(v == carried or v.startswith(carried + b"/") for v in variables)
            zombie = carries_mark and b") Z " in (environ.parent / "stat").read_bytes()
        except OSError:
            continue  # another user's, or gone meanwhile
        if carries_mark and not zombie and int(environ.parent.name) != os.getpid():
            yield int(environ.parent.name)
