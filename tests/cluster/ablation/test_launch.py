"""The launcher of ablations on light cells: killed, side by side, failing, locked, changed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.ablate_cli import ablate_to_the_end
from cluster.ablation.cells import (
    hash_weights,
    is_finished,
    pairing_faults,
    read_failure,
    read_result,
)
from cluster.ablation.grid import load_ablation
from cluster.ablation.launch import slots_for
from cluster.ablation.processes import MARK, Runner
from cluster.ablation.progress import cost_table
from cluster.recipe.hardware import Machine
from cluster.recipe.recipe import UserError
from cluster.report.ablation_report import read_ablation
from tests.support.ray_heads import RAY, environment, ray_head
from tests.support.recipes import TINY_POLICY
from tests.support.toy_runs import (
    TOY_BASE,
    TOY_CELLS,
    TOY_ROW,
    Launcher,
    make_runs,
    marked,
    outcome,
    results_of,
    run_cells,
)
from tests.support.waiting import until

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

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a base recipe, and the runs that toy cells of seeds 1, 2 and 5 take."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_bytes(b"\1\2\3")
    (folder / "base.toml").write_text(BASE.format(model=folder / "model"))
    (folder / "grid.toml").write_text(GRID.format(parallel=1, seeds=[1, 2, 5]))
    make_runs(folder / "runs", load_ablation(folder / "grid.toml").cells)
    return folder


@pytest.fixture
def write(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes an ablation of two arms whose cells take the runs of `made`; returns its file."""
    monkeypatch.setenv("TOY_RUNS", str(made / "runs"))
    shutil.copy(made / "base.toml", tmp_path)

    def written(parallel: int = 1, seeds: tuple[int, ...] = (1,)) -> Path:
        path = tmp_path / "grid.toml"
        path.write_text(GRID.format(parallel=parallel, seeds=list(seeds)))
        return path

    return written


@pytest.fixture(params=[TOY_CELLS, TOY_ROW], ids=["apart", "in a row"])
def runner(request: pytest.FixtureRequest) -> Runner:
    """Each cell in a process of its own, or one after another in one."""
    runner: Runner = request.param
    return runner


@pytest.fixture(scope="module")
def row(made: Path) -> Path:
    """The finished ablation of two arms and two seeds, its cells in a row; not to be changed."""
    folder = made / "row"
    path = made / "two.toml"
    path.write_text(GRID.format(parallel=1, seeds=[1, 2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOY_RUNS", str(made / "runs"))
        assert run_cells(path, folder) == []
    return folder


def test_a_launcher_killed_three_times_ends_with_what_an_undisturbed_one_finds(
    write: Write, tmp_path: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    path, killed = write(seeds=(1, 2, 5)), tmp_path / "killed"
    chance = random.Random(4)
    finished: dict[Path, int] = {}
    for least in range(3):
        launcher = Launcher(path, killed, runner, TOY_SLEEP="1.2")
        started = [f"[{done}/6] started" for done in range(least, 6)]
        until(lambda: any(s in launcher.printed() for s in started), 60, "none started")  # noqa: B023
        time.sleep(chance.uniform(0.0, 0.5))
        assert launcher.end(signal.SIGKILL) == -signal.SIGKILL
        assert {file: file.stat().st_mtime_ns for file in finished} == finished
        finished = {f: f.stat().st_mtime_ns for f in killed.glob("cells/*/result.json")}
    assert 0 < len(finished) < 6, "nothing to keep, or nothing left to do"
    assert run_cells(path, killed, runner) == []
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert capsys.readouterr().out.count("had result") == len(finished)
    assert run_cells(path, tmp_path / "calm") == []
    assert outcome(killed) == outcome(tmp_path / "calm")
    assert len(outcome(killed)[2]) == 6
    assert not marked(killed)


def test_a_launcher_holds_its_folder_and_its_cells_die_with_it(
    write: Write, tmp_path: Path, runner: Runner
) -> None:
    path, folder = write(), tmp_path / "out"
    first = Launcher(path, folder, runner, TOY_SLEEP="600")
    until(lambda: list(folder.glob("cells/*/run/rollouts/*")), 60, "no cell began")
    with pytest.raises(UserError, match=rf"process {first.process.pid}\) is at work"):
        run_cells(path, folder)
    assert first.process.is_alive() and marked(folder)
    first.end(signal.SIGKILL)
    until(lambda: not marked(folder), 60, "the cell outlived its launcher")
    (started,) = folder.glob("cells/*")
    assert not (started / "result.json").exists()
    # The lock died with its holder, whatever the file says, and the cell starts from nothing.
    assert run_cells(path, folder) == []
    assert not list(folder.glob("aside/*"))


def test_a_process_that_a_cell_left_behind_is_ended_before_the_cell_starts_again(
    write: Write, tmp_path: Path
) -> None:
    path, folder = write(), tmp_path / "out"
    ablation = load_ablation(path)
    here = folder / "cells" / ablation.cells[0].id
    here.mkdir(parents=True)
    (folder / "ablation.json").write_text(json.dumps(ablation.identity()))
    (here / ".result.json.tmp").write_text("{")
    assert not is_finished(folder, ablation.cells[0])
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    stray = subprocess.Popen(sleep, env=os.environ | {MARK: str(here)}, start_new_session=True)
    bystander = subprocess.Popen(sleep, env=os.environ | {MARK: f"{here}-other"})
    try:
        alive = []

        class Watching(Runner):
            def command(self, recipe: Path, run: Path, job: str) -> list[str]:
                alive.append(stray.poll() is None)
                return super().command(recipe, run, job)

        assert run_cells(path, folder, Watching(TOY_CELLS.program)) == []
        assert alive == [False, False]
        assert stray.wait(10) == -signal.SIGKILL
        assert bystander.poll() is None
        assert not (here / ".result.json.tmp").exists()
    finally:
        bystander.kill()
        bystander.wait()


def test_ctrl_c_ends_the_cells_and_goes_on_later(
    write: Write, tmp_path: Path, runner: Runner
) -> None:
    path, folder = write(parallel=2), tmp_path / "out"
    launcher = Launcher(path, folder, runner, TOY_SLEEP="600")
    until(lambda: len(list(folder.glob("cells/*/run/rollouts/*"))) == 2, 60, "no two cells")
    assert launcher.end(signal.SIGTERM) == 130
    assert "goes on from here" in launcher.printed()
    assert not marked(folder)
    assert run_cells(path, folder) == []


def test_cells_side_by_side_find_what_cells_in_a_row_find(
    write: Write, tmp_path: Path, runner: Runner, row: Path
) -> None:
    path = write(parallel=3, seeds=(1, 2))
    assert slots_for(load_ablation(path), Machine(cores=8, memory=1)) == 3
    assert run_cells(path, tmp_path / "together", runner, slots=3) == []
    assert outcome(tmp_path / "together") == outcome(row)


def test_slots_follow_the_cores(write: Write) -> None:
    path = write(parallel=4)
    base = path.with_name("base.toml")
    base.write_text(base.read_text().replace("cpus = 0", "cpus = 1.5"))
    loaded = load_ablation(path)
    assert [slots_for(loaded, Machine(cores=c, memory=1)) for c in (2, 6, 100)] == [1, 2, 4]


def test_a_failed_cell_stops_no_other_and_is_tried_again(
    write: Write,
    tmp_path: Path,
    runner: Runner,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, folder = write(seeds=(1, 2, 5)), tmp_path / "out"
    monkeypatch.setenv("TOY_FAILS", "half--seed-2")
    assert ablate_to_the_end(load_ablation(path), folder, runner=runner) == 1
    printed = capsys.readouterr().out
    assert "FAILED    half--seed-2" in printed and "ToyError: no luck today" in printed
    assert "5 of 6 cells finished" in printed
    assert "! half--seed-2 failed: " in printed and "exit code 3" in printed
    assert "half" in (folder / "report.html").read_text("utf-8")
    rows, summary, cells = outcome(folder)
    assert len(cells) == 5 and len({row["cell"] for row in rows}) == 5  # type: ignore[index]
    # Differences rest on the seeds that both arms have.
    assert {c["difference"]["seeds"] for c in summary["comparisons"]} == {2}  # type: ignore[attr-defined]
    monkeypatch.delenv("TOY_FAILS")
    assert run_cells(path, folder, runner) == []
    assert not marked(folder)
    assert (folder / "aside" / "half--seed-2-try-1" / "failure.json").is_file()
    assert "had result outcome--seed-1" in capsys.readouterr().out


def test_a_cell_that_leaves_no_whole_run_has_failed(write: Write, tmp_path: Path) -> None:
    path = write()
    other = (
        Path(TOY_CELLS.program[-1]).read_text().replace("recipe, run =", CHANGE + "recipe, run =")
    )
    copied = 'shutil.copy(recipe, run / "recipe.toml")\n'
    assert copied in other
    other = other.replace(copied, f'{copied}change(run / "recipe.toml")\n')
    for name, said, script in (
        ("nothing", "recipe.toml: no such file", ""),
        ("other", "is not the recipe of this cell", other),
    ):
        cell = tmp_path / f"{name}.py"
        cell.write_text(script)
        failed = run_cells(path, tmp_path / name, Runner((sys.executable, str(cell))), slots=6)
        assert set(failed) == {c.id for c in load_ablation(path).cells}
        failure = json.loads(next((tmp_path / name).glob("cells/*/failure.json")).read_text())
        assert said in failure["error"]


def test_a_grid_grows_by_what_is_new_and_any_other_change_is_refused(
    write: Write, tmp_path: Path, row: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(row, folder)
    first = {cell.id: read_result(folder, cell) for cell in read_ablation(folder).cells}
    path = write(seeds=(1, 2, 5))
    assert run_cells(path, folder) == []
    results = {cell.id: read_result(folder, cell) for cell in load_ablation(path).cells}
    assert len(results) == 6 and {name: results[name] for name in first} == first
    # What is there stays: neither fewer seeds nor others in their place.
    for seeds, said in (((1,), "seeds"), ((2, 1), r"seeds\[0\]: 1 -> 2")):
        with pytest.raises(UserError, match=said):
            run_cells(write(seeds=seeds), folder)
    path = write(seeds=(7, 2, 5))
    path.write_text(path.read_text().replace("alpha = 0.5", "alpha = 0.6"))
    with pytest.raises(UserError, match=r"arms\[1\]\.reward\.alpha: 0\.5 -> 0\.6") as refused:
        run_cells(path, folder)
    assert "seeds[0]: 1 -> 7" in str(refused.value)
    # How many cells run at a time changes no result.
    path = write(parallel=2, seeds=(1, 2, 5))
    assert run_cells(path, folder) == []
    base = path.with_name("base.toml")
    base.write_text(base.read_text() + "group_size = 4\n")
    with pytest.raises(UserError, match=r"base\.algorithm\.group_size: 8 -> 4"):
        run_cells(path, folder)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds 'thesis\.tex' and no ablation"):
        run_cells(path, foreign)


def test_cells_as_ray_jobs_find_what_local_ones_find(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, failing = write(parallel=2, seeds=(1, 2)), "half--seed-2"
    monkeypatch.setenv("TOY_FAILS", failing)
    local, jobs = tmp_path / "local", tmp_path / "jobs"
    assert run_cells(path, local) == [failing]
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    with ray_head(tmp_path / "head.log") as address:
        runner = Runner(TOY_CELLS.program, address)
        assert run_cells(path, jobs, runner, slots=2) == [failing]
        job = json.loads((jobs / "cells" / failing / "started.json").read_text())["job"]
        # Ended twice, and by a launcher that cannot know: both are all right.
        runner.end(job)
        status = [RAY, "job", "status", "--address", address, job]
        said = subprocess.run(status, capture_output=True, text=True, timeout=120, check=True)
    assert "failed" in (said.stdout + said.stderr).lower()
    cell = next(c for c in load_ablation(path).cells if c.id == failing)
    assert "no luck today" in str(read_failure(jobs, cell))
    assert outcome(local)[0] and outcome(local) == outcome(jobs)


def test_arms_prove_that_they_are_paired(
    made: Path, row: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablation, folder = load_ablation(made / "two.toml"), tmp_path / "out"
    shutil.copytree(row, folder)
    hashes = {c.id: read_result(folder, c)["first_batch"] for c in ablation.cells}
    assert hashes["outcome--seed-1"] == hashes["half--seed-1"] != hashes["half--seed-2"]
    weights = {read_result(folder, c)["weights"] for c in ablation.cells}
    assert weights == {hash_weights(ablation.base.model.path)}
    assert pairing_faults(ablation.cells, results_of(folder, ablation)) == []

    file = folder / "cells" / "half--seed-2" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"first_batch": "another"}))
    (fault,) = pairing_faults(ablation.cells, results_of(folder, ablation))
    assert "half--seed-2 and outcome--seed-2: first batch differ" in fault
    assert ablate_to_the_end(ablation, folder, runner=TOY_CELLS) == 1
    assert f"Not paired: {fault}." in capsys.readouterr().out

    shutil.copytree(ablation.base.model.path, tmp_path / "model")
    assert hash_weights(str(tmp_path / "model")) in weights
    (tmp_path / "model" / "weights").write_bytes(b"\1\2\4")
    assert hash_weights(str(tmp_path / "model")) not in weights
    assert hash_weights("org/model") != hash_weights("org/other")


def test_the_plan_counts_and_learns_from_finished_cells(
    write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, out = write(seeds=(1, 2, 5)), tmp_path / "out"
    shipped = BASE.format(model=TINY_POLICY)
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
    measured = {"outcome--seed-1": 60.0, "half--seed-1": 120.0}
    everything = {c.id: 60.0 for c in loaded.cells}
    for finished, slots, said in (
        ({}, 1, "about 42 minutes"),
        ({}, 2, "about 21 minutes"),
        (measured, 1, "about 6 minutes"),  # 2 × 1 minute of the one arm and 2 × 2 of the other
        (everything, 1, "nothing to do"),
    ):
        assert said in cost_table(loaded, machine, finished, slots)


def test_a_part_that_the_policy_lacks_is_refused_with_its_cell(
    write: Write, tiny_models: dict[str, Path], tmp_path: Path
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
