"""A run on real parts in a process of its own, watched from outside: its folder, its processes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import psutil
import pyarrow.parquet as pq

from learner.checkpoint import checkpoint_folders
from tests.support.ray_heads import environment
from tests.support.recipes import ROOT

PATIENCE = 900
"""Seconds; for what takes a few on a quiet machine."""


ACTORS = ("ray::Sampler", "ray::LearnerRank", "ray::RewardWorker")
"""Titles of what must not outlive its driver."""


class Driver:
    """A run's driver, through all its lives, and the processes below it."""

    def __init__(
        self,
        folder: Path,
        recipe: str,
        *overrides: str,
        command: Literal["train", "sft"] = "train",
        **variables: str,
    ) -> None:
        """`variables`: of its environment, in all its lives."""
        file = folder / "recipe.toml"
        file.write_text(recipe, encoding="utf-8")
        self.run, self.before = folder / "run", folder / "before"
        self.extensions = folder / "extensions"
        self._log, self._command, self._variables = folder / "out.log", command, variables
        self._start([str(file), "--output", str(self.run)], overrides)

    def resume(self, *overrides: str) -> None:
        """Go on with the run in a new process; what it prints begins anew."""
        self._start(["--resume", str(self.run)], overrides)

    def _start(self, arguments: list[str], overrides: tuple[str, ...]) -> None:
        command = [sys.executable, "-m", "cluster", self._command, *arguments]
        for override in overrides:
            command += ["--set", override]
        own = environment(TORCH_EXTENSIONS_DIR=str(self.extensions), **self._variables)
        # Its Ray makes a token of its own.
        own = {name: value for name, value in own.items() if not name.startswith("RAY_AUTH")}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=own, stdout=log, stderr=subprocess.STDOUT
            )

    def end(self) -> int:
        """Wait for it to end of itself; returns its exit code."""
        return self.process.wait(PATIENCE)

    def stop(self) -> None:
        """SIGTERM, which lets the step end; it must end well."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(300) == 0, self.printed()

    def kill(self) -> list[psutil.Process]:
        """SIGKILL; returns what lives on when its actors have ended, or for a while at most."""
        below = self.below("")
        actors = [p for title in ACTORS for p in self.below(title)]
        self.process.kill()
        self.process.wait()
        psutil.wait_procs(actors, timeout=20)
        _, alive = psutil.wait_procs(below, timeout=0)
        for process in alive:  # Ray's agents may take minutes to see it
            process.kill()
        return alive

    def clean_up(self) -> None:
        """Nothing of it is left, whatever a test met."""
        self.process.kill()
        self.process.wait()

    def keep_and_tear(self) -> Path:
        """Keep the folder's copy in `before`; tear its last checkpoint; returns the torn file."""
        shutil.copytree(self.run, self.before)
        torn = checkpoint_folders(self.run)[-1] / "training" / "optimizer-0000.safetensors"
        torn.write_bytes(torn.read_bytes()[:-100])
        return torn

    def wait(self, what: str, until: Callable[[], object], pause: float = 1.0) -> None:
        deadline = time.monotonic() + PATIENCE
        while not until():
            assert self.process.poll() is None, self.printed()
            assert time.monotonic() < deadline, f"{what}\n{self.printed()}"
            time.sleep(pause)

    def printed(self) -> str:
        return self._log.read_text()

    def steps(self) -> int:
        """Steps whose rollouts are written: their weights have been sent."""
        return len(list((self.run / "rollouts").glob("step-*.parquet")))

    def logged(self) -> int:
        """Updates of SFT since the run was last started."""
        return len(list((self.run / "metrics").glob("part-*.parquet")))

    def wait_steps(self, more: int) -> None:
        start = self.steps()
        self.wait(f"{more} steps after {start}", lambda: self.steps() >= start + more, pause=0.05)

    def below(self, title: str, of: psutil.Process | None = None) -> list[psutil.Process]:
        """Processes below the driver, or one of them, with a word in their title."""
        found = []
        for process in (of or psutil.Process(self.process.pid)).children(recursive=True):
            with suppress(psutil.Error):  # it ended meanwhile
                if title in " ".join(process.cmdline()) and process.status() != "zombie":
                    found.append(process)
        return found

    def training(self) -> psutil.Process:
        """What trains, where this is its supervisor."""
        (one,) = [
            p for p in psutil.Process(self.process.pid).children() if p in self.below("train")
        ]
        return one

    def samplers(self) -> list[psutil.Process]:
        """Sampler actors, oldest first; some may still start."""
        return sorted(self.below("ray::Sampler"), key=lambda process: process.create_time())

    def metric(self, name: str) -> float:
        """Its value in the last step that logged it; 0 where none did."""
        # In the last parts of a run that goes on: to read all of them at each look costs a core.
        files = [*self.run.glob("metrics.parquet"), *sorted((self.run / "metrics").glob("part-*"))]
        for file in reversed(files):
            found = pq.read_table(file, filters=[("name", "==", name)]).to_pylist()
            if found:
                return float(max(found, key=lambda row: row["step"])["value"])
        return 0.0


@contextmanager
def stopped(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """Processes that do nothing for a while; by then all that needs them waits for them."""
    for process in processes:
        process.suspend()
    time.sleep(3)
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.Error):
                process.resume()
