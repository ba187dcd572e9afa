"""`make pretrained`: from a language model that others trained to RL, stage by stage.

Each stage leaves a folder and is a command of its own (docs/pretrained.md), run as a process of its
own. One that is done is not made again, and one that was stopped goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.recipe.hardware import Machine, gib
from cluster.recipe.recipe import RunFailed, UserError
from cluster.record.evaluation import EvalTable
from cluster.record.table import Table
from learner.checkpoint import checkpoint_folders
from tasks.files import put_text

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "pretrained"
TIMES = "stages.json"
SHOWN = ("a", "a_p", "a_p_graded", "a_r", "text_loss", "text_right")
MINUTES = {"smollm2": 1.0, "model": 0.5, "tower": 12.0, "first": 8.0,
           "align": 22.0, "sft": 36.0, "rl": 28.0}  # fmt: skip
"""Of each stage on two cores at `GFLOPS`: a third of align was timed, the rest worked out."""
GFLOPS = 830.0
"""What `speed` says of such a machine, an EPYC with AVX512-BF16."""


@dataclass(frozen=True)
class Stage:
    """A folder below `out` and the command that makes it.

    command: `models fetch`, `models graft`, `sft` or `train`; needs: what else it is told.
    """

    name: str
    what: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def is_run(self) -> bool:
        """Whether it is a run, which can be gone on with."""
        return self.command[0] != "models"

    def done(self, out: Path) -> bool:
        """Whether its folder holds all that it is to leave."""
        last = "evaluation.json" if self.is_run else "README.md"
        return (out / self.name / last).is_file()

    def words(self, out: Path) -> list[str]:
        """The command that makes it, or goes on with it.

        Raises UserError where its folder holds something that cannot be gone on with.
        """
        folder = out / self.name
        if self.is_run and checkpoint_folders(folder):
            return [self.command[0], "--resume", str(folder)]
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"{folder}: holds a stage that ended before there was anything to go on from; "
                "remove it to begin that stage again"
            )
        place = "--output" if self.is_run else "--out"
        return [*self.command, place, str(folder), *self.needs]


def stages(out: Path, dtype: str) -> tuple[Stage, ...]:
    """All stages, in order; `dtype` is that of their runs (`model.dtype`)."""

    def run(name: str, what: str, command: str, model: Path) -> Stage:
        settings = (f"model.path={json.dumps(str(model))}", f"model.dtype={dtype}")
        needs = tuple(word for one in settings for word in ("--set", one))
        return Stage(name, what, (command, str(RECIPES / f"{name}.toml")), needs)

    def after(stage: str) -> Path:
        return out / stage / "checkpoint"

    language, model = out / "smollm2", out / "model"
    return (
        Stage("smollm2", "fetch SmolLM2 (93 MB)", ("models", "fetch", "smollm2")),
        Stage("model", "graft a tower", ("models", "graft", "--language", str(language))),
        run("tower", "the new tower learns what is where, as labels", "sft", model),
        run("first", "tower and connector, to write down one kind", "sft", after("tower")),
        run("align", "the same, whole scenes", "sft", after("first")),
        run("sft", "all weights learn to answer", "sft", after("align")),
        run("rl", "all weights learn from rewards", "train", after("sft")),
    )


def run_pretrained(out: Path, dry_run: bool = False) -> None:
    """Make what is missing of all stages below `out`, and print what each has changed.

    Raises UserError when it is not run from a checkout, or a stage's folder is in the way;
    RunFailed where a stage ends otherwise than well: the same call then goes on with it.
    """
    if not RECIPES.is_dir():
        raise UserError(f"{RECIPES}: no such folder; this needs a checkout of the repository")
    machine, console = Machine.detect(), Console()
    dtype = "mixed" if machine.bfloat16 else "float32"
    chain = stages(out, dtype)
    left = [stage for stage in chain if not stage.done(out)]
    slower = GFLOPS / speed(dtype)
    console.print(plan_table(chain, out, slower, dtype).to_rich())
    if dry_run:
        return
    for stage in left:
        words = stage.words(out)
        place = f"stage {chain.index(stage) + 1} of {len(chain)}"
        console.print(f"{place}: equipoise {' '.join(words)}", highlight=False, soft_wrap=True)
        began = time.perf_counter()
        code, peak = _run([sys.executable, "-m", "cluster", *words])
        _note(out, stage.name, time.perf_counter() - began, peak)
        if code or not stage.done(out):
            how = f"ended with code {code}" if code else "was stopped"
            raise RunFailed(
                f"stage {stage.name}: `equipoise {words[0]}` {how}; "
                f"the same call goes on from {out}"
            )
    console.print(results_table(read_results(out, chain), _noted(out)).to_rich())


def plan_table(chain: tuple[Stage, ...], out: Path, slower: float, dtype: str) -> Table:
    """What is there and what is to come; `slower`: than the machine of `GFLOPS`."""
    rows, total = [], 0.0
    for stage in chain:
        minutes = 0.0 if stage.done(out) else MINUTES[stage.name] * slower
        total += minutes
        left = "done" if stage.done(out) else f"{minutes:.0f} min"
        if stage.is_run and not stage.done(out) and checkpoint_folders(out / stage.name):
            left = f"goes on, at most {left}"
        rows.append((stage.name, stage.what, left))
    return Table(
        f"{out}: about {total:.0f} minutes in all",
        ("stage", "what", "left"),
        tuple(rows),
        f"model.dtype = {dtype}; by one product of matrices this machine takes {slower:.2f} times "
        "as long as the one that the minutes were worked out for",
        align="llr",
    )


def speed(dtype: str) -> float:
    """GFLOP/s of products as the language model's layers have them, on all cores; a second."""
    import torch

    held = torch.bfloat16 if dtype == "mixed" else torch.float32
    tokens, weight = torch.ones(2048, 576, dtype=held), torch.ones(1536, 576, dtype=held)
    tokens @ weight.T
    began, times = time.perf_counter(), 0
    while time.perf_counter() - began < 0.5:
        tokens @ weight.T
        times += 1
    return times * 2 * 2048 * 576 * 1536 / (time.perf_counter() - began) / 1e9


def read_results(out: Path, chain: tuple[Stage, ...]) -> dict[str, EvalTable]:
    """Of each run that is done the last evaluation; of the first the one before too, `before`."""
    found: dict[str, EvalTable] = {}
    for stage in chain:
        if not (stage.is_run and stage.done(out)):
            continue
        text = (out / stage.name / "evaluation.json").read_text(encoding="utf-8")
        (tables,) = json.loads(text).values()
        if not found and "before" in tables:
            found["before"] = EvalTable.from_dict(tables["before"])
        found[stage.name] = EvalTable.from_dict(tables.get("after", tables))
    return found


def results_table(results: Mapping[str, EvalTable], times: Mapping[str, Any]) -> Table:
    """A row a metric, a column a stage, and what each stage took."""

    def cell(table: EvalTable, metric: str) -> str:
        if metric not in table.per_problem:
            return ""
        row = table[metric]
        return f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"

    rows = [(m, *(cell(table, m) for table in results.values())) for m in SHOWN]
    for name, written in (("seconds", "{:.0f}".format), ("memory", gib)):
        rows.append((name, *(written(times[s][name]) if s in times else "" for s in results)))
    return Table("after each stage, held-out scenes", ("", *results), tuple(rows))


def _noted(out: Path) -> dict[str, Any]:
    file = out / TIMES
    times: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return times


def _note(out: Path, stage: str, seconds: float, peak: int) -> None:
    """Keep what a stage took; of one that went on, all its lives together."""
    times = _noted(out)
    before = times.get(stage, {"seconds": 0.0, "memory": 0})
    times[stage] = {
        "seconds": before["seconds"] + seconds,
        "memory": max(before["memory"], peak),
    }
    put_text(out / TIMES, json.dumps(times, indent=1))


def _run(command: list[str]) -> tuple[int, int]:
    """(exit code, the most bytes that it and all below it held at one time)."""
    process = subprocess.Popen(command)
    peak, over = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(2):
            peak = max(peak, held_below(process.pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        return process.wait(), peak
    except KeyboardInterrupt:  # the stage has it too, and leaves a checkpoint
        return process.wait(), peak
    finally:
        over.set()


def held_below(pid: int, proc: Path = Path("/proc")) -> int:
    """Bytes of memory of a process and all below it, without what they share; 0 without /proc."""
    parents, held = {}, {}
    for folder in proc.glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            _, resident, shared, *_ = map(int, (folder / "statm").read_text().split())
        except (OSError, ValueError):  # it has ended
            continue
        parents[int(folder.name)], held[int(folder.name)] = parent, (resident - shared) * 4096
    below = {pid}
    while more := {p for p, parent in parents.items() if parent in below} - below:
        below |= more
    return sum(size for p, size in held.items() if p in below)
