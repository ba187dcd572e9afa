"""A training run whose processes are killed and stopped while it trains: it goes on.

One run proves it all, since engines are slow to start: a sampler's process and another's engine
killed in the middle of their groups (both samplers are gone then), a reward worker killed, and a
sampler stopped. What is left behind must be as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cluster.metrics import MISMATCH_LIMIT
from cluster.tracking import read_metrics, read_rollouts
from tests.cluster.ray_heads import environment
from tests.cluster.test_resume import RECIPE, ROOT

GROUPS, SIZE = 4, 4
HANGING = ("sampler/restarts/silent", "sampler/restarts/transfer")


class Driver:
    """A run in a process of its own, and the processes below it."""

    def __init__(self, folder: Path, model: Path, *overrides: str) -> None:
        recipe = folder / "recipe.toml"
        recipe.write_text(RECIPE.format(model=model), encoding="utf-8")
        self.run, self._log = folder / "run", folder / "out.log"
        command = [sys.executable, "-m", "cluster", "train", str(recipe)]
        command += ["--output", str(self.run)]
        for override in overrides:
            command += ["--set", override]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT
            )

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

    def metric(self, name: str) -> float:
        rows = [r for r in read_metrics(self.run).to_pylist() if r["name"] == name]
        return max(rows, key=lambda r: r["step"])["value"] if rows else 0.0


def test_a_run_goes_on_whatever_dies_or_hangs(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    driver = Driver(
        tmp_path,
        tiny_models["qwen3_vl"],
        "algorithm.steps=100000",
        "sampler.count=2",
        "sampler.max_tokens=100",
        "sampler.cpus=0.5",
        "learner.cpus=0.5",
        "sampler.max_restarts=10",
        "sampler.start_timeout_seconds=900.0",
        # Longer than an engine's first tokens take where other work has the cores.
        "sampler.heartbeat_seconds=60.0",
        "eval.problems=4",
        'eval.passes=["greedy"]',
    )
    engines: list[psutil.Process] = []
    try:
        driver.wait("the first step", lambda: driver.steps() >= 1, 900)
        first, second = driver.samplers()
        engines = [driver.below("EngineCore", sampler)[0] for sampler in (first, second)]
        # A step is written: the next one samples. Groups of a stopped engine are half done for as
        # long as it takes to kill something.
        driver.wait_steps(1)
        for engine in engines:
            engine.suspend()
        time.sleep(5)
        stands = driver.steps()
        first.kill()
        engines[1].kill()
        driver.wait("engines started again", lambda: driver.steps() >= stands + 2, 900)
        (worker,) = driver.below("ray::RewardWorker")
        worker.suspend()
        time.sleep(5)  # until groups wait for it
        worker.kill()
        driver.wait_steps(2)
        driver.wait("both samplers at work", lambda: driver.metric("sampler/count") == 2, 900)
        hanging = driver.samplers()[0]
        driver.wait_steps(1)
        hanging.suspend()
        # Met by its silence, or by the deadline of a transfer where it had no time to sample.
        driver.wait("a hanging one", lambda: sum(map(driver.metric, HANGING)) >= 1, 900)
        driver.wait("both again", lambda: driver.metric("sampler/count") == 2, 900)
        driver.wait_steps(2)
        driver.process.send_signal(signal.SIGTERM)
        assert driver.process.wait(300) == 0, driver.printed()
    finally:
        driver.process.kill()
        for engine in engines:
            with contextlib.suppress(psutil.Error):
                engine.kill()
    assert driver.metric("sampler/restarts/actor") >= 1
    assert driver.metric("sampler/restarts/engine") >= 1
    assert driver.metric("sampler/resampled") >= GROUPS, "all groups of one step, at least"
    assert driver.metric("reward/worker_restarts") >= 1
    seen: set[str] = set()
    for step in range(1, driver.steps() + 1):
        rows = read_rollouts(driver.run, step).to_pylist()
        ids = {row["rollout_id"] for row in rows}
        groups = {row["group_id"] for row in rows}
        assert len(rows) == len(ids) == GROUPS * SIZE and len(groups) == GROUPS
        assert not groups & seen
        seen |= groups
        # On-policy, whoever sampled it: one started again had the weights of its time.
        assert {v for row in rows for v in row["versions"]} == {step - 1}
    gaps = [r for r in read_metrics(driver.run).to_pylist() if r["name"] == "learner/logprob_gap"]
    assert len(gaps) == driver.steps() and max(r["value"] for r in gaps) < MISMATCH_LIMIT["float32"]
