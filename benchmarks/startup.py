"""Where do the seconds before the first step go, by cause?

    python -m benchmarks.startup [RECIPE] [--repeats 3]

A run's own parts, started as `equipoise train` starts them, in a fresh process each time. Actors
start side by side: `learner up` and `samplers up` are each from their common begin, and the later
of them counts. `import ...` are of a process that does nothing else: what an actor's start has in
it. Compiled kernels and the page cache are warm from the first, uncounted time on.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine, tables
from benchmarks.sides import side

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("torch", "ray", "transformers", "vllm.v1.engine.llm_engine", "deepspeed")


@dataclass(frozen=True)
class Start:
    """What to start."""

    recipe: str
    settings: tuple[str, ...]
    folder: str = ""


def start(connection: Any, request: Start) -> None:
    """Run until the first step is over; sends the seconds of each cause, in order."""
    last = time.perf_counter()
    seconds_of: dict[str, float] = {}

    def over(cause: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds_of[cause] = now - last
        last = now

    from benchmarks.turns import take_turn
    from cluster.recipe.recipe import load_recipe
    from cluster.record.terminal import Progress
    from cluster.run.run_log import run_log
    from cluster.run.runtime import Run
    from cluster.run.session import session

    over("import of the driver")
    progress, folder = Progress(0), Path(request.folder) / "run"
    recipe = load_recipe(request.recipe, request.settings)
    with ExitStack() as stack:
        ready = stack.enter_context(session(recipe, "train", None, folder, progress.say))
        over("machine and data asked, Ray up")

        class Watched(Run):
            def wait_ready(self) -> None:
                over("actors asked for")
                begin = time.perf_counter()

                def up(cause: str, wait: Any) -> None:
                    wait()
                    seconds_of[cause] = time.perf_counter() - begin

                with ThreadPoolExecutor() as threads:
                    waits = {
                        "learner up": lambda: self.learner.wait(self._starting),
                        "samplers up": self._samplers_up,
                    }
                    for future in [threads.submit(up, *wait) for wait in waits.items()]:
                        future.result()
                over("both up")

            def _samplers_up(self) -> None:
                for pool in (self.samplers, *self.frozen.values()):
                    pool.wait_ready(recipe.sampler.start_timeout_seconds)

        run = Watched(ready.recipe, ready.sources, progress)
        stack.callback(run.stop)
        log = stack.enter_context(run_log(run.recipe, folder, progress))
        over("run folder")
        run.send_weights(0)
        over("first transfer")
        log.begin(run.evaluate)
        over("first evaluation")
        take_turn(run, log, run.recipe, 1, 1)
        over("first step")
        connection.send(seconds_of)
        connection.recv()


def imported(module: str) -> float:
    """Seconds that a fresh process takes to import a module, its own start left out."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return float(completed.stdout.split()[-1])


def main() -> None:
    """Measure, and write the table of docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    recipe = str(ROOT / "recipes" / "tiny" / "sudoku.toml")
    parser.add_argument("recipe", nargs="?", default=recipe)
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--to", type=Path, help="a JSON file; without it docs/ is written")
    parser.add_argument("--busy-ok", action="store_true", help="run beside other work all the same")
    args = parser.parse_args()
    machine.refuse_if_busy(args.busy_ok)
    shares, repeats = [], []
    for repeat in range(args.repeats + 1):
        share, seconds_of = measured(args.recipe, tuple(args.settings))
        shares.append(share)
        repeats.append(seconds_of)
        print(f"{repeat}: {repeats[-1]}", flush=True)
    rows = rows_of(repeats[1:] or repeats)
    of_all = {
        "foreign": f"{statistics.median(shares):.0%}",
        "machine": machine.where(),
        "command": machine.command("benchmarks.startup"),
    }
    tables.keep("startup", ("recipe", "place"), [
        {"recipe": Path(args.recipe).stem, "place": position, **row, **of_all}
        for position, row in enumerate(rows)
    ], args.to)  # fmt: skip


def measured(recipe: str, settings: tuple[str, ...]) -> tuple[float, dict[str, float]]:
    """What others took of the cores, and seconds by cause, of one start.

    What they took is asked while all that was started lives: a raylet leaves its workers' ends
    unheeded, so that what these took is nobody's then.
    """
    with tempfile.TemporaryDirectory(prefix="equipoise-startup-") as scratch:
        begin, shared = time.perf_counter(), machine.Shared()
        work = Start(recipe, settings)
        with side("start", "benchmarks.startup:start", work, Path(scratch)) as racer:
            seconds_of: dict[str, float] = racer.answer()
            seconds_of["all, to the end of the first step"] = time.perf_counter() - begin
            share = shared.foreign()
    return share, seconds_of | {f"import {name}": imported(name) for name in MODULES}


def rows_of(repeats: Sequence[dict[str, float]]) -> list[tables.Row]:
    """A row a cause, in the order of the first."""
    total = "all, to the end of the first step"
    whole = statistics.median(r[total] for r in repeats)
    rows = []
    for cause in repeats[0]:
        seconds = [r[cause] for r in repeats]
        share = (
            ""
            if cause.removeprefix("import ") in MODULES
            else f"{statistics.median(seconds) / whole:.0%}"
        )
        rows.append({"cause": cause, "share": share, "seconds": tables.spread(seconds)})
    return rows


if __name__ == "__main__":
    main()
