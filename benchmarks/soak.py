"""Does a long run with a fault every so many steps keep its size, and lose nothing?

    python -m benchmarks.soak                       # 300 steps, a fault every 20
    python -m benchmarks.soak --steps 40 --every 10 --to FILE

A run of the tiny policy below its own supervisor. By turns its sampler is killed, its reward
worker, its learner, its sampler stopped until it is found to hang, and its driver killed. After
each step all that the run takes is counted. It has a folder for temporary files, and as root a
/dev/shm, of its own, so that nothing of others is in the numbers. At the end nothing may have
grown, and the group ids must be those of the seed, each once.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
GROWN = 1.1
"""Times of a median that is growth, and no noise of who was started when."""
NOISE = {"descriptors": 20.0, "threads": 10.0, "processes": 2.0}
"""Differences that are none; of sizes 16 MiB."""
OWN_SHM = 'mount -t tmpfs -o size=8g tmpfs /dev/shm && exec "$@"'
RECORDS = ("rollouts", "images", "metrics", "metrics.parquet", "events.parquet", "logs")
"""What a run's folder has of each step; by design it grows with them."""
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
heartbeat_seconds = 60.0
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
    """A run, maybe below its supervisor, and all that it takes."""

    def __init__(self, folder: Path, recipe: str) -> None:
        """`recipe`: its text, with all that is not the default."""
        file = folder / "recipe.toml"
        file.write_text(recipe, encoding="utf-8")
        self.folder, self.run, self.log = folder, folder / "run", folder / "out.log"
        command = [sys.executable, "-m", "cluster", "train", str(file), "--output", str(self.run)]
        own = {
            name: value
            for name, value in os.environ.items()
            if name != "RAY_ADDRESS" and not name.startswith("RAY_AUTH")
        }
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*_own_shm(), *command],
                cwd=tables.ROOT,
                env=own | {"TMPDIR": str(folder), "RAY_TMPDIR": str(folder)},
                stdout=log,
                stderr=subprocess.STDOUT,
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
        """What the run takes now: numbers of things, and MiB.

        Of the records of its steps the mean a step. The object store is what Ray's node holds open
        in /dev/shm; what anything has there is in `shm`. `disk` is all of the run's files but
        records and Ray's logs, of which each life of the driver has its own: `ray_a_life`.
        """
        row = dict.fromkeys(("descriptors", "threads", "processes", "object_store_mib"), 0.0)
        for process in self.below():
            with suppress(psutil.Error):
                row["descriptors"] += process.num_fds()
                row["threads"] += process.num_threads()
                row["processes"] += 1
                if "raylet" in process.name():
                    row["object_store_mib"] += _open_in_shm(process) / 2**20
        records = sum(_used(self.run / name) for name in RECORDS)
        logs, lives = _used(self.folder / "ray"), len(_went_on(self.run)) + 1
        shm = os.statvfs(f"/proc/{self._process.pid}/root/dev/shm")
        return row | {
            "memory_mib": 1024 * machine.resident_gib([self._process.pid]),
            "shm_mib": (shm.f_blocks - shm.f_bfree) * shm.f_frsize / 2**20,
            "disk_mib": (_used(self.folder) - records - logs) / 2**20,
            "ray_a_life_mib": logs / lives / 2**20,
            "records_a_step_mib": records / max(1, self.steps()) / 2**20,
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

    def is_over(self) -> bool:
        """Whether its last step is done, and only its end is to come."""
        recipe = self.run / "recipe.toml"
        return self.steps() >= load_recipe(recipe).algorithm.steps

    def end(self) -> None:
        """Nothing of it is left."""
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


def soaked(
    folder: Path, recipe: str, every: int, only: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], Path]:
    """Train by a recipe with a fault every so many steps; a row a step, and the run's folder.

    `only`: names of the faults that come, all where there is none. Raises SystemExit where the run
    ends badly, or stands still.
    """
    soak, rows, step = Soak(folder, recipe), list[dict[str, Any]](), 0
    coming = (fault for fault in faults(soak) if not only or fault[0] in only)
    next_fault = every
    try:
        while (step := soak.wait_beyond(step)) != 0:
            row: dict[str, Any] = {"step": step, "at": time.time(), "fault": ""}
            with suppress(OSError):  # it has just ended
                row |= soak.counted()
                rows.append(row)
            if step >= next_fault and not soak.is_over():
                next_fault += every
                row["fault"], happen = next(coming)
                happen()
                print(f"step {step}: {row['fault']}", flush=True)
                # A run that goes on from a checkpoint does its last steps again.
                if row["fault"] in ("learner killed", "driver killed"):
                    soak_again(soak)
                    step = soak.steps()
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


def growth(rows: Sequence[Mapping[str, Any]]) -> list[tables.Row]:
    """A row a thing: its medians over thirds of the steps after SETTLED, and whether it grew."""
    settled = [row for row in rows if row["step"] > SETTLED] or [*rows]
    third = max(1, len(settled) // 3)
    parts = {
        "first third": settled[:third],
        "second": settled[third:-third],
        "last": settled[-third:],
    }
    found: list[tables.Row] = []
    for name in [key for key in rows[0] if key not in ("step", "at", "fault")]:
        medians = {
            part: statistics.median(row[name] for row in of or settled)
            for part, of in parts.items()
        }
        first, last = medians["first third"], medians["last"]
        grew = last > GROWN * first and last - first > NOISE.get(name, 16.0)
        digits = 2 if name.endswith("_step_mib") else 0
        shown = {part: f"{median:.{digits}f}" for part, median in medians.items()}
        found.append({"what": name, **shown, "grew": "yes" if grew else "no"})
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


def _own_shm() -> list[str]:
    """Words before a command that give it a /dev/shm of its own, where that is allowed."""
    words = ["unshare", "--mount", "--propagation=private", "sh", "-c", OWN_SHM, "sh"]
    allowed = shutil.which("unshare") and not subprocess.run([*words, "true"], stderr=-3).returncode
    return words if allowed else []


def _open_in_shm(process: psutil.Process) -> int:
    """Bytes of the files in /dev/shm that a process holds open; most of them have no name."""
    sizes = dict[int, int]()
    with suppress(OSError):
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(OSError):
                if os.readlink(link).startswith("/dev/shm/"):
                    status = link.stat()
                    sizes[status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())


def _used(folder: Path) -> int:
    """Bytes that a file, or the files of a folder, take on the disk."""
    total = 0
    if folder.is_file():
        with suppress(OSError):
            return folder.stat().st_blocks * 512
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=20, help="steps between faults")
    parser.add_argument("--to", type=Path, help="a JSON file for the rows; docs/ is left alone")
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as folder:
        rows, run = soaked(Path(folder), RECIPE.format(steps=given.steps), given.every)
        wrong = lost_groups(run)
        events = [f"{event.who}: {event.what}" for event in read_events(run)]
    happened = [row["fault"] for row in rows if row["fault"]]
    found = growth(rows)
    note = {"machine": machine.where(), "command": machine.command("benchmarks.soak")}
    tables.keep("soak", ["what"], [row | note for row in found], given.to)
    wrong += [f"{row['what']} grew" for row in found if row["grew"] == "yes"]
    for name in sorted({*happened, *events}):
        print(f"{name}: {(happened + events).count(name)}")
    told = wrong or "every group once, in its place; nothing grew"
    print(f"{len(happened)} faults, {time.monotonic() - began:.0f} s; {told}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
