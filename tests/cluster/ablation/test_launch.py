"""The launcher of ablations on light cells: killed, side by side, failing, locked, changed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.ablate_cli import ablate_to_the_end
from cluster.ablation.launch import (
    MARK,
    LocalRunner,
    RayJobRunner,
    hash_weights,
    is_finished,
    pairing_faults,
    read_failure,
    read_result,
    run_ablation,
    slots_for,
)
from cluster.ablation.plan import Ablation, load_ablation
from cluster.ablation.progress import GridProgress, cost_table
from cluster.recipe.placement import Machine
from cluster.recipe.recipe import UserError
from tests.support.ray_heads import RAY, environment, ray_head
from tests.support.toy_runs import TOY_BASE, TOY_CELLS, make_runs

ROOT = Path(__file__).resolve().parents[3]
TOY = ROOT / "tests" / "cluster" / "toy_cell.py"
CHANGE = """
def change(path):
    path.write_text(path.read_text().replace("seed = 1", "seed = 2"))
"""
BASE = TOY_BASE + "[algorithm]\nproblems_per_step = 3\n"
GRID = """
question = "Does seeing pay?"
base = "base.toml"
seeds = {seeds}
parallel = {parallel}
[budget]
kind = "updates"
amount = 6
[[arms]]
name = "outcome"
[[arms]]
name = "half"
reward = {{ alpha = 0.5 }}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes an ablation of two arms and the runs that its toy cells take; returns its file."""
    monkeypatch.setenv("TOY_RUNS", str(tmp_path / "runs"))

    def made(parallel: int = 1, seeds: tuple[int, ...] = (1,)) -> Path:
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
        (model / "weights").write_bytes(b"\1\2\3")
        (tmp_path / "base.toml").write_text(BASE.format(model=model))
        path = tmp_path / "grid.toml"
        path.write_text(GRID.format(parallel=parallel, seeds=list(seeds)))
        cells = load_ablation(path).cells
        make_runs(tmp_path / "runs", [c for c in cells if not (tmp_path / "runs" / c.id).exists()])
        return path

    return made


class Launcher:
    """A launcher in a process of its own, forked so that it starts at once; prints to a file."""

    def __init__(self, path: Path, folder: Path, **environment: str) -> None:
        self._log = path.with_suffix(".log")
        self._log.write_text("")

        def work() -> None:
            os.environ.update(environment)
            sys.stdout = self._log.open("w", buffering=1)
            raise SystemExit(ablate_to_the_end(load_ablation(path), folder, runner=TOY_CELLS))

        self.process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
        self.process.start()

    def printed(self) -> str:
        return self._log.read_text()

    def wait_for_any(self, lines: tuple[str, ...]) -> None:
        wait_for(lambda: any(line in self.printed() for line in lines), f"none of {lines}")

    def end(self, number: int) -> int | None:
        """Send a signal and return the exit code."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        self.process.join(60)
        return self.process.exitcode


def outcome(folder: Path) -> tuple[list[object], dict[str, object], list[object]]:
    """All that an ablation concludes: rows, summary, and each cell's hashes."""
    cells = []
    for file in sorted(folder.glob("cells/*/result.json")):
        cells.append({k: v for k, v in json.loads(file.read_text()).items() if k != "seconds"})
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    return rows, json.loads((folder / "summary.json").read_text()), cells


def marked(folder: Path) -> list[str]:
    """Living processes of the cells of an ablation."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={folder}".encode() in environ.read_bytes():
                found.append((environ.parent / "cmdline").read_text())
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_a_launcher_killed_three_times_ends_with_what_an_undisturbed_one_finds(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path, calm, killed = write(seeds=(1, 2, 5)), tmp_path / "calm", tmp_path / "killed"
    chance = random.Random(4)
    finished: dict[Path, int] = {}
    for least in range(3):
        launcher = Launcher(path, killed, TOY_SLEEP="0.6")
        started = tuple(f"[{done}/6] started" for done in range(least, 6))
        launcher.wait_for_any(started)
        time.sleep(chance.uniform(0.0, 0.5))
        assert launcher.end(signal.SIGKILL) == -signal.SIGKILL
        assert {file: file.stat().st_mtime_ns for file in finished} == finished
        finished = {f: f.stat().st_mtime_ns for f in killed.glob("cells/*/result.json")}
    assert 0 < len(finished) < 6, "nothing to keep, or nothing left to do"
    last = Launcher(path, killed)
    last.process.join(120)
    assert last.process.exitcode == 0, last.printed()
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert last.printed().count("had result") == len(finished)
    assert ablate_to_the_end(load_ablation(path), calm, runner=TOY_CELLS) == 0
    assert outcome(killed) == outcome(calm)
    assert len(outcome(calm)[2]) == 6
    assert not marked(killed)


def test_a_killed_launchers_cell_dies_with_it_and_starts_from_nothing(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path, folder = write(), tmp_path / "out"
    launcher = Launcher(path, folder, TOY_SLEEP="600")
    wait_for(lambda: list(folder.glob("cells/*/run/rollouts/*")), "no cell began")
    assert marked(folder)
    launcher.end(signal.SIGKILL)
    wait_for(lambda: not marked(folder), "the cell outlived its launcher")
    (started,) = folder.glob("cells/*")
    assert not (started / "result.json").exists()
    assert ablate_to_the_end(load_ablation(path), folder, runner=TOY_CELLS) == 0
    assert not list(folder.glob("aside/*"))


def test_a_process_that_a_cell_left_behind_is_ended_before_the_cell_starts_again(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    ablation, folder = load_ablation(write()), tmp_path / "out"
    cell = ablation.cells[0]
    here = folder / "cells" / cell.id
    here.mkdir(parents=True)
    (folder / "ablation.json").write_text(json.dumps(ablation.identity()))
    (here / "half-written").touch()
    stray = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        env=os.environ | {MARK: str(here)},
        start_new_session=True,
    )
    bystander = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        env=os.environ | {MARK: f"{here}-other"},
    )
    try:
        alive = []

        class Watching(LocalRunner):
            def command(self, recipe: Path, run: Path, job: str) -> list[str]:
                alive.append(stray.poll() is None)
                return super().command(recipe, run, job)

        assert ablate_to_the_end(ablation, folder, runner=Watching(TOY_CELLS.program)) == 0
        assert alive == [False, False]
        assert stray.wait(10) == -signal.SIGKILL
        assert bystander.poll() is None
        assert not (here / "half-written").exists()
    finally:
        bystander.kill()
        bystander.wait()


def test_ctrl_c_ends_the_cells_and_goes_on_later(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path, folder = write(parallel=2), tmp_path / "out"
    launcher = Launcher(path, folder, TOY_SLEEP="600")
    wait_for(lambda: len(list(folder.glob("cells/*/run/rollouts/*"))) == 2, "no two cells")
    assert launcher.end(signal.SIGTERM) == 130
    assert "goes on from here" in launcher.printed()
    assert not marked(folder)
    assert ablate_to_the_end(load_ablation(path), folder, runner=TOY_CELLS) == 0


def test_cells_side_by_side_find_what_cells_in_a_row_find(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    together = load_ablation(write(parallel=3, seeds=(1, 2)))
    assert slots_for(together, Machine(cores=8, memory=1)) == 3
    assert ablate_to_the_end(together, tmp_path / "together", runner=TOY_CELLS) == 0
    assert (
        ablate_to_the_end(load_ablation(write(seeds=(1, 2))), tmp_path / "row", runner=TOY_CELLS)
        == 0
    )
    assert outcome(tmp_path / "together") == outcome(tmp_path / "row")
    assert "half" in (tmp_path / "row" / "report.html").read_text("utf-8")


def test_slots_follow_the_cores(write: Callable[..., Path]) -> None:
    path = write(parallel=4)
    base = path.with_name("base.toml")
    base.write_text(base.read_text().replace("cpus = 0", "cpus = 1.5"))
    loaded = load_ablation(path)
    assert [slots_for(loaded, Machine(cores=c, memory=1)) for c in (2, 6, 100)] == [1, 2, 4]


def test_a_failed_cell_stops_no_other_and_is_tried_again(
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ablation, folder = load_ablation(write(seeds=(1, 2, 5))), tmp_path / "out"
    monkeypatch.setenv("TOY_FAILS", "half--seed-2")
    assert ablate_to_the_end(ablation, folder, runner=TOY_CELLS) == 1
    printed = capsys.readouterr().out
    assert "FAILED    half--seed-2" in printed and "ToyError: no luck today" in printed
    assert "5 of 6 cells finished" in printed
    assert "! half--seed-2 failed: " in printed and "exit code 3" in printed
    rows, summary, cells = outcome(folder)
    assert len(cells) == 5 and len({row["cell"] for row in rows}) == 5  # type: ignore[index]
    # Differences rest on the seeds that both arms have.
    assert {c["difference"]["seeds"] for c in summary["comparisons"]} == {2}  # type: ignore[attr-defined]
    monkeypatch.delenv("TOY_FAILS")
    assert ablate_to_the_end(ablation, folder, runner=TOY_CELLS) == 0
    assert (folder / "aside" / "half--seed-2-try-1" / "failure.json").is_file()
    assert "had result outcome--seed-1" in capsys.readouterr().out


def test_a_cell_that_leaves_no_whole_run_has_failed(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    ablation = load_ablation(write())
    other = TOY.read_text().replace("recipe, run =", CHANGE + "recipe, run =")
    copied = 'shutil.copy(recipe, run / "recipe.toml")\n'
    assert copied in other
    other = other.replace(copied, f'{copied}change(run / "recipe.toml")\n')
    for name, said, script in (
        ("nothing", "recipe.toml: no such file", ""),
        ("other", "is not the recipe of this cell", other),
    ):
        cell = tmp_path / f"{name}.py"
        cell.write_text(script)
        runner = LocalRunner((sys.executable, str(cell)))
        with GridProgress(ablation.cells) as progress:
            failed = run_ablation(ablation, tmp_path / name, runner, 6, progress)
        assert failed and set(failed) == {c.id for c in ablation.cells}
        failure = json.loads(next((tmp_path / name).glob("cells/*/failure.json")).read_text())
        assert said in failure["error"]


def test_two_launchers_never_share_a_folder(write: Callable[..., Path], tmp_path: Path) -> None:
    path, folder = write(), tmp_path / "out"
    first = Launcher(path, folder, TOY_SLEEP="600")
    wait_for(lambda: list(folder.glob("cells/*/run")), "no cell began")
    with pytest.raises(UserError, match=rf"process {first.process.pid}\) is at work"):
        ablate_to_the_end(load_ablation(path), folder, runner=TOY_CELLS)
    assert first.process.is_alive() and marked(folder)
    first.end(signal.SIGKILL)
    # The lock died with its holder, whatever the file says.
    assert ablate_to_the_end(load_ablation(path), folder, runner=TOY_CELLS) == 0


def test_a_changed_ablation_is_refused_with_what_changed(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path, folder = write(), tmp_path / "out"
    assert ablate_to_the_end(load_ablation(path), folder, runner=TOY_CELLS) == 0
    path.write_text(path.read_text().replace("alpha = 0.5", "alpha = 0.6").replace("[1]", "[7]"))
    with pytest.raises(UserError) as refused:
        ablate_to_the_end(load_ablation(path), folder, runner=TOY_CELLS)
    assert "arms[1].reward.alpha: 0.5 -> 0.6" in str(refused.value)
    assert "seeds[0]: 1 -> 7" in str(refused.value)
    write()
    base = path.with_name("base.toml")
    base.write_text(base.read_text() + "group_size = 4\n")
    with pytest.raises(UserError, match=r"base\.algorithm\.group_size: 8 -> 4"):
        ablate_to_the_end(load_ablation(path), folder, runner=TOY_CELLS)
    # How many cells run at a time changes no result.
    assert ablate_to_the_end(load_ablation(write(parallel=2)), folder, runner=TOY_CELLS) == 0
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds 'thesis\.tex' and no ablation"):
        ablate_to_the_end(load_ablation(path), foreign, runner=TOY_CELLS)


def test_a_grid_grows_by_seeds_and_arms_and_runs_only_what_is_new(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path, folder = write(seeds=(1,)), tmp_path / "out"
    assert ablate_to_the_end(load_ablation(path), folder, runner=TOY_CELLS) == 0
    first = {cell.id: read_result(folder, cell) for cell in load_ablation(path).cells}
    grown = load_ablation(write(seeds=(1, 2)))
    assert ablate_to_the_end(grown, folder, runner=TOY_CELLS) == 0
    assert len(grown.cells) > len(first)
    results = {cell.id: read_result(folder, cell) for cell in grown.cells}
    assert {name: results[name] for name in first} == first
    # What is there stays: neither fewer seeds nor others in their place.
    for seeds, said in (((1,), "seeds"), ((2, 1), r"seeds\[0\]: 1 -> 2")):
        with pytest.raises(UserError, match=said):
            ablate_to_the_end(load_ablation(write(seeds=seeds)), folder, runner=TOY_CELLS)


def test_cells_as_ray_jobs_find_what_local_ones_find(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, failing = write(parallel=2, seeds=(1, 2)), "half--seed-2"
    monkeypatch.setenv("TOY_FAILS", failing)
    local, jobs = load_ablation(path), tmp_path / "jobs"
    assert ablate_to_the_end(local, tmp_path / "local", runner=TOY_CELLS) == 1
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    with ray_head(tmp_path / "head.log") as address:
        runner = RayJobRunner(address, TOY_CELLS.program)
        assert ablate_to_the_end(load_ablation(path), jobs, address, runner=runner) == 1
        job = json.loads((jobs / "cells" / failing / "started.json").read_text())["job"]
        # Ended twice, and by a launcher that cannot know: both are all right.
        runner.end(job)
        status = [RAY, "job", "status", "--address", address, job]
        said = subprocess.run(status, capture_output=True, text=True, timeout=120, check=True)
    assert "failed" in (said.stdout + said.stderr).lower()
    assert "no luck today" in str(
        read_failure(jobs, next(c for c in local.cells if c.id == failing))
    )
    tables = [pq.read_table(f / "results.parquet") for f in (tmp_path / "local", jobs)]
    assert tables[0].num_rows and tables[0].equals(tables[1])


def test_arms_prove_that_they_are_paired(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablation, folder = load_ablation(write(seeds=(1, 2))), tmp_path / "out"
    assert ablate_to_the_end(ablation, folder, runner=TOY_CELLS) == 0
    hashes = {c.id: read_result(folder, c)["first_batch"] for c in ablation.cells}
    assert hashes["outcome--seed-1"] == hashes["half--seed-1"] != hashes["half--seed-2"]
    model = ablation.base.model.path
    weights = {read_result(folder, c)["weights"] for c in ablation.cells}
    assert weights == {hash_weights(model)}
    assert pairing_faults(folder, ablation.cells) == []

    half = next(c for c in ablation.cells if c.id == "half--seed-2")
    file = folder / "cells" / half.id / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"first_batch": "another"}))
    (fault,) = pairing_faults(folder, ablation.cells)
    assert "half--seed-2 and outcome--seed-2: first batch differ" in fault
    assert ablate_to_the_end(ablation, folder, runner=TOY_CELLS) == 1
    assert f"Not paired: {fault}." in capsys.readouterr().out

    (Path(model) / "weights").write_bytes(b"\1\2\4")
    assert hash_weights(model) not in weights
    assert hash_weights("org/model") != hash_weights("org/other")


def test_the_plan_counts_and_learns_from_finished_cells(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, out = write(seeds=(1, 2, 5)), tmp_path / "out"
    shipped = BASE.format(model=ROOT / "models" / "tiny-qwen3-vl")
    short = shipped.replace("[[tasks]]", "max_model_len = 300\n[[tasks]]")
    path.with_name("base.toml").write_text(short)
    with pytest.raises(UserError, match=r"cell outcome--seed-1: .* do not fit in model\.max_model"):
        ablate_to_the_end(load_ablation(path), out, dry_run=True)
    path.with_name("base.toml").write_text(shipped)
    assert ablate_to_the_end(load_ablation(path), out, dry_run=True) == 0
    assert not out.exists()
    printed = capsys.readouterr().out
    # 6 updates of 3 problems with 8 responses; 512 problems twice, greedy and oracle.
    row = next(line for line in printed.splitlines() if line.startswith("half--seed-5"))
    assert row.split()[:5] == ["half--seed-5", "6", "144", "2048", "0"]
    assert "6 cells, 0 finished, 6 to run, 1 at a time" in printed and "time unknown" in printed

    machine = Machine(cores=2, memory=1)
    path.write_text(path.read_text().replace("amount = 6", "amount = 6\nexpected_minutes = 7"))
    loaded = load_ablation(path)
    assert "about 42 minutes" in cost_table(loaded, machine, {}, 1)
    assert "about 21 minutes" in cost_table(loaded, machine, {}, 2)
    measured = {"outcome--seed-1": 60.0, "half--seed-1": 120.0}
    # 2 × 1 minute of the one arm and 2 × 2 of the other.
    assert "about 6 minutes" in cost_table(loaded, machine, measured, 1)
    everything = {c.id: 60.0 for c in loaded.cells}
    assert "nothing to do" in cost_table(loaded, machine, everything, 1)


def test_a_part_that_the_policy_lacks_is_refused_with_its_cell(
    write: Callable[..., Path], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    path = write()
    path.with_name("base.toml").write_text(BASE.format(model=tiny_models["internvl"]))
    arm = '[[arms]]\nname = "frozen"\nset = { "learner.freeze" = ["visoin"] }\n'
    path.write_text(path.read_text() + arm)
    with pytest.raises(
        UserError, match=r"cell frozen--seed-1: learner\.freeze: 'visoin' matches no"
    ):
        ablate_to_the_end(load_ablation(path), tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()


def test_no_cell_is_finished_by_a_half_written_file(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    ablation: Ablation = load_ablation(write())
    cell = ablation.cells[0]
    here = tmp_path / "out" / "cells" / cell.id
    here.mkdir(parents=True)
    (here / ".result.json.tmp").write_text("{")
    assert not is_finished(tmp_path / "out", cell)
