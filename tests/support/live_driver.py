"""A training run in a process of its own, watched from outside: by its folder, and by processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from tests.cluster.run.test_resume import RECIPE, ROOT
from tests.support.ray_heads import environment


class Driver:
    """A run's driver, through all its lives, and the processes below it."""

    def __init__(self, folder: Path, model: Path, *overrides: str) -> None:
        recipe = folder / "recipe.toml"
        recipe.write_text(RECIPE.format(model=model), encoding="utf-8")
        self.run, self._log = folder / "run", folder / "out.log"
        self._start([str(recipe), "--output", str(self.run)], overrides)

    def resume(self, *overrides: str) -> None:
        """Go on with the run in a new process; what it prints begins anew."""
        self._start(["--resume", str(self.run)], overrides)

    def _start(self, arguments: list[str], overrides: tuple[str, ...]) -> None:
        command = [sys.executable, "-m", "cluster", "train", *arguments]
        for override in overrides:
            command += ["--set", override]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT
            )

    def stop(self) -> None:
        """SIGTERM, which lets the step end; it must end well."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(300) == 0, self.printed()

    def kill(self) -> list[psutil.Process]:
        """SIGKILL; the processes that were below it, which should end of themselves."""
        below = self.below("")
        self.process.kill()
        self.process.wait()
        return below

    def wait(
        self, what: str, until: Callable[[], object], seconds: float = 600, pause: float = 1.0
    ) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            assert self.process.poll() is None, self.printed()
            assert time.monotonic() < deadline, f"{what}\n{self.printed()}"
            time.sleep(pause)

    def printed(self) -> str:
        return self._log.read_text()[-3000:]

    def steps(self) -> int:
        """Steps whose rollouts are written: their weights have been sent."""
        return len(list((self.run / "rollouts").glob("step-*.parquet")))

    def wait_steps(self, more: int) -> None:
        start = self.steps()
        self.wait(f"{more} steps after {start}", lambda: self.steps() >= start + more, pause=0.05)

    def below(self, title: str, of: psutil.Process | None = None) -> list[psutil.Process]:
        """Processes below the driver, or one of them, with a word in their title."""
        found = []
        for process in (of or psutil.Process(self.process.pid)).children(recursive=True):
            try:
                if title in " ".join(process.cmdline()) and process.status() != "zombie":
                    found.append(process)
            except psutil.Error:  # it ended meanwhile
                continue
        return found

    def samplers(self) -> list[psutil.Process]:
        """Sampler actors whose engine has a process."""
        return [p for p in self.below("ray::Sampler") if self.below("EngineCore", p)]

    def engines(self) -> list[psutil.Process]:
        """The engines' processes, oldest first."""
        engines = [self.below("EngineCore", sampler)[0] for sampler in self.samplers()]
        return sorted(engines, key=lambda process: process.create_time())

    def metric(self, name: str) -> float:
        """Its value in the last step that logged it; 0 where none did."""
        # In the last parts of a run that goes on: to read all of them at each look costs a core.
        files = [*self.run.glob("metrics.parquet"), *sorted((self.run / "metrics").glob("part-*"))]
        for file in reversed(files):
            found = pq.read_table(file, filters=[("name", "==", name)]).to_pylist()
            if found:
                return float(max(found, key=lambda row: row["step"])["value"])
        return 0.0
