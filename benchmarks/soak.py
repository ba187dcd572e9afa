"""Does a long run with a fault every so many steps keep its size, and lose nothing?

    python -m benchmarks.soak                       # 300 steps, a fault every 20
    python -m benchmarks.soak --steps 40 --every 10

A run of the tiny policy below its own supervisor. By turns its sampler is killed, its reward
worker, its learner, its sampler stopped until it is found to hang, and its driver killed. After
each step memory, file descriptors, threads and processes of all that runs below the supervisor are
counted, and what lies in /dev/shm, in Ray's sessions and in the run's folder. At the end the group
ids must be those of the seed, each once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks import machine, tables
from cluster.recipe.problems import open_sources, step_problems
from cluster.recipe.recipe import load_recipe
from cluster.record.events import read_events
from cluster.record.stored import read_rollouts, stored_steps
from cluster.run.stream import free_requests

SETTLED = 30
"""Steps after which nothing may grow."""
PATIENCE = 900.0
"""Seconds until a step must have followed the last, whatever happened."""
RECIPE = """
name = "soak"
seed = 11

[[tasks]]
name = "sudoku"
knobs = {{ size = 4, blanks = 6, cell_size = 16, font_size = 12, margin = 0, prompt = "brief" }}

[model]
path = "models/tiny-qwen3-vl"
max_model_len = 256

[sampler]
max_tokens = 100
cpus = 0.5
heartbeat_seconds = 30.0
max_restarts = 1000

[reward]
terms = [{{ name = "outcome" }}]

[algorithm]
group_size = 4
problems_per_step = 4
steps = {steps}
max_staleness = 1

[learner]
learning_rate = 1e-5
cpus = 0.5

[eval]
problems = 8
passes = ["greedy"]

[output]
rollouts_every = 1
rollouts_keep = 0
rollout_tokens = false

[checkpoint]
every = 5
keep = 2
restarts = 1000
"""
Row = dict[str, float]


class Soak:
    """The run's supervisor, and all that runs below it."""

    def __init__(self, folder: Path, steps: int) -> None:
        recipe = folder / "recipe.toml"
        recipe.write_text(RECIPE.format(steps=steps), encoding="utf-8")
        self.run, self.log = folder / "run", folder / "out.log"
        command = [sys.executable, "-m", "cluster", "train", str(recipe), "--output", str(self.run)]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=tables.ROOT, stdout=log, stderr=subprocess.STDOUT
            )

    def below(self, title: str = "") -> list[psutil.Process]:
        """The supervisor and the processes below it, or those with a word in their title."""
        with suppress(psutil.Error):
            own = psutil.Process(self._process.pid)
            return [p for p in (own, *own.children(recursive=True)) if title in _title(p)]
        return []

    def driver(self) -> list[psutil.Process]:
        """The driver: the child of the supervisor that trains."""
        with suppress(psutil.Error):
            return [p for p in psutil.Process(self._process.pid).children() if "train" in _title(p)]
        return []

    def steps(self) -> int:
        return len([*(self.run / "rollouts").glob("step-*.parquet")])

    def counted(self) -> Row:
        """What the run takes now: GiB, and numbers of things."""
        row = dict.fromkeys(("descriptors", "threads", "processes"), 0.0)
        for process in self.below():
            with suppress(psutil.Error):
                row["descriptors"] += process.num_fds()
                row["threads"] += process.num_threads()
                row["processes"] += 1
        return row | {
            "memory_gib": machine.resident_gib([self._process.pid]),
            "shm_gib": _used(Path("/dev/shm")) / 2**30,
            "ray_gib": _used(Path("/tmp/ray")) / 2**30,
            "run_gib": _used(self.run) / 2**30,
        }

    def wait_beyond(self, step: int) -> int:
        """The number of steps once there are more than `step`; 0 once the run has ended well."""
        until = time.monotonic() + PATIENCE
        while self.steps() <= step:
            if (code := self._process.poll()) is not None:
                if code == 0:
                    return 0
                raise SystemExit(f"the run ended with {code}:\n{self.log.read_text()[-3000:]}")
            if time.monotonic() > until:
                raise SystemExit(f"no step after {step}:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)
        return self.steps()

    def end(self) -> None:
        for process in reversed(self.below()):
            with suppress(psutil.Error):
                process.kill()


def faults(soak: Soak) -> Iterator[tuple[str, Callable[[], None]]]:
    """One after the other, again and again: its name, and what makes it happen."""

    def kill(title: str) -> Callable[[], None]:
        return lambda: [p.kill() for p in soak.below(title)[:1]] and None

    def stop() -> None:
        for process in soak.below("ray::Sampler")[:1]:
            process.send_signal(signal.SIGSTOP)

    def kill_driver() -> None:
        for process in soak.driver():
            process.kill()

    yield from itertools.cycle(
        [
            ("sampler killed", kill("ray::Sampler")),
            ("reward worker killed", kill("ray::RewardWorker")),
            ("learner killed", kill("ray::LearnerRank")),
            ("sampler hangs", stop),
            ("driver killed", kill_driver),
        ]
    )


def soaked(folder: Path, steps: int, every: int) -> tuple[list[dict[str, Any]], Path]:
    """A row a step, and the run's folder."""
    soak, rows, step = Soak(folder, steps), list[dict[str, Any]](), 0
    coming = faults(soak)
    next_fault = every
    try:
        while (step := soak.wait_beyond(step)) != 0:
            row: dict[str, Any] = {"step": step, "at": time.time(), "fault": "", **soak.counted()}
            if step >= next_fault and step < steps:
                next_fault += every
                row["fault"], happen = next(coming)
                happen()
                print(f"step {step}: {row['fault']}", flush=True)
                # A run that goes on from a checkpoint does its last steps again.
                if row["fault"] in ("learner killed", "driver killed"):
                    soak_again(soak)
                    step = soak.steps()
            rows.append(row)
    finally:
        soak.end()
    return rows, soak.run


def soak_again(soak: Soak) -> None:
    """Return once a run that was killed goes on: what came after its checkpoint is removed."""
    lives, until = len(_went_on(soak.run)), time.monotonic() + PATIENCE
    while len(_went_on(soak.run)) <= lives:
        if time.monotonic() > until:
            raise SystemExit(f"it did not go on:\n{soak.log.read_text()[-3000:]}")
        time.sleep(0.2)


def lost_groups(run: Path) -> list[str]:
    """What is wrong with the groups of a run's steps; nothing where they are those of its seed."""
    recipe, wrong = load_recipe(run / "recipe.toml"), list[str]()
    sources, places = open_sources(recipe.tasks), recipe.algorithm.problems_per_step
    steps = stored_steps(run)
    if steps != [*range(1, recipe.algorithm.steps + 1)]:
        wrong.append(f"steps stored: {len(steps)} of {recipe.algorithm.steps}")
    for step in steps:
        wanted = free_requests(recipe, step, step_problems(sources, recipe.seed, step - 1, places))
        stored = dict.fromkeys(read_rollouts(run, step)["group_id"].to_pylist())
        if [*stored] != [request.group_id for request in wanted]:
            wrong.append(f"step {step}: {[*stored]}")
    return wrong


def growth(rows: list[dict[str, Any]]) -> list[tables.Row]:
    """Each thing's median over the steps from `SETTLED` on: the first third's, and the last's."""
    settled = [row for row in rows if row["step"] > SETTLED] or rows
    third = max(1, len(settled) // 3)
    found: list[tables.Row] = []
    for name in [key for key in rows[0] if key not in ("step", "at", "fault")]:
        first, last = (
            statistics.median(row[name] for row in part)
            for part in (settled[:third], settled[-third:])
        )
        digits = 3 if name.endswith("gib") else 0
        found.append(
            {"what": name, "first third": f"{first:.{digits}f}", "last third": f"{last:.{digits}f}"}
        )
    return found


def _went_on(run: Path) -> list[float]:
    with suppress(FileNotFoundError, OSError):
        return [
            e.wall_seconds for e in read_events(run) if (e.who, e.what) == ("driver", "went on")
        ]
    return []


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        if process.status() != psutil.STATUS_ZOMBIE:
            return " ".join(process.cmdline())
    return "\0"


def _used(folder: Path) -> int:
    """Bytes that the files of a folder take on the disk."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=20, help="steps between faults")
    parser.add_argument(
        "--to", type=Path, help="a JSON file for the rows; docs/ is left alone then"
    )
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        rows, run = soaked(Path(folder), given.steps, given.every)
        wrong = lost_groups(run)
        events = [f"{event.who}: {event.what}" for event in read_events(run)]
    happened = [row["fault"] for row in rows if row["fault"]]
    result = {
        "machine": machine.where(),
        "command": machine.command("benchmarks.soak"),
        "seconds": round(time.monotonic() - began),
        "faults": {name: happened.count(name) for name in dict.fromkeys(happened)},
        "events": {name: events.count(name) for name in sorted(set(events))},
        "wrong": wrong,
        "rows": rows,
    }
    path = given.to or tables.FOLDER.parent / "soak.json"
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    for row in growth(rows):
        print(f"{row['what']:>12}  {row['first third']:>10}  {row['last third']:>10}")
    told = wrong or "every group once, in its place"
    print(f"{len(happened)} faults, {result['seconds']} s; {told}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
