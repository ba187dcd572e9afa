"""What people's machines, folders and paths are like: used as they are, or one line at once."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from cluster.recipe import machine
from cluster.recipe.machine import claimed, require_room
from cluster.recipe.recipe import RunFailed, UserError, load_recipe
from cluster.record.evaluation import EvalTable
from cluster.run.keeping import Keeper
from cluster.run.session import connected
from cluster.run.train import save_and_measure
from rollout.models import why_missing
from tasks.files import put, replacing
from tasks.settings import TaskConfig
from tests.support.killed import contents
from tests.support.recipes import TINY_POLICY, made_recipe, recipe_file
from tests.support.terminal import Equipoise

# Paths


def test_paths_of_a_recipe_are_those_of_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/big")
    read = load_recipe(recipe_file(tmp_path, model="~/a model"), ['output.folder="~/runs"'])
    assert read.model.path == str(tmp_path / "a model")
    assert read.output.folder == str(tmp_path / "runs")
    assert TaskConfig(name="sudoku", data="$SCRATCH/sudoku").data == "/big/sudoku"


def test_a_home_that_the_shell_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equipoise: Equipoise
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for words in (("--out=~/made",), ("--out", "~/made as well")):
        knobs = ("--train", 1, "--test", 0, "--set", "size=4", "--set", "blanks=6")
        assert equipoise("tasks", "generate", "sudoku", *knobs, *words).code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "made as well"]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("~/policy", "no such folder: looked for HOME/policy"),
        ("./policy", "no such folder: looked for HERE/policy"),
        ("build/policy", "no such folder: looked for HERE/build/policy"),
        ("a/b/c", "no such folder: looked for HERE/a/b/c"),
        ("org/policy", "no such folder: looked for HERE/org/policy; not in the hub's cache either"),
        ("build", "no config.json in HERE/build;"),
        ("x.toml", "is a file; give the folder"),
    ],
)
def test_a_missing_model_is_said_at_once_with_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, said: str, equipoise: Equipoise
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    (home / "x").mkdir(parents=True)
    (here / "build").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    start = time.monotonic()
    found = equipoise("train", recipe_file(here, model=model), "--output", tmp_path / "run")
    assert time.monotonic() - start < 60  # it was 157 s, and 10 at most are a wait for the hub
    printed = found.err.splitlines()
    assert found.code == 2
    said = said.replace("HOME", str(home)).replace("HERE", str(here))
    assert len(printed) == 1 and re.match(r"model\.path: [^ ]+: ", printed[0])
    assert said in printed[0]
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_here_is_not_asked_of_the_hub() -> None:
    assert why_missing(str(TINY_POLICY)) == ""


# Writing over what is there


def test_a_model_is_not_made_over_anything(tmp_path: Path, equipoise: Equipoise) -> None:
    trained = tmp_path / "checkpoint"
    trained.mkdir()
    (trained / "model.safetensors").write_text("trained for a week")
    before = contents(tmp_path)
    code, _, said = equipoise("models", "make", "qwen3_vl", "--out", trained)
    assert (code, said) == (2, f"--out {trained}: already holds something; name a new one\n")
    assert contents(tmp_path) == before


def test_a_file_of_the_users_own_is_not_written_over(tmp_path: Path, equipoise: Equipoise) -> None:
    mine = tmp_path / "mine.png"
    mine.write_text("a photograph")
    for words in (("report", tmp_path, "--output"), ("tasks", "show", "sudoku", "--image")):
        code, _, said = equipoise(*words, mine)
        assert code == 2 and f"{words[-1]} {mine}: is there already; name a new one" in said
    assert mine.read_text() == "a photograph"


# The folder of a run


def test_of_many_that_are_told_one_folder_at_once_one_gets_it(tmp_path: Path) -> None:
    folder, begin, end = tmp_path / "runs" / "x", os.pipe(), os.pipe()
    children = []
    for _ in range(12):
        if not (child := os.fork()):
            os.close(end[1])
            try:
                os.read(begin[0], 1)
                with claimed(folder, new=True):
                    (folder / f"written by {os.getpid()}").touch()
                    os.read(end[0], 1)  # holds it until all have tried
                os._exit(0)
            except UserError:
                os._exit(2)
            finally:
                os._exit(1)
        children.append(child)
    os.write(begin[1], b"x" * 12)
    waiting, codes = set(children), []
    while len(codes) < 11:
        # Not of any child: this process has others, which earlier tests left it.
        for child in [*waiting]:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                waiting.discard(child)
                codes.append(os.WEXITSTATUS(status))
        time.sleep(0.01)
    assert codes == [2] * 11
    assert len([p for p in folder.iterdir() if p.name != ".lock"]) == 1
    os.close(end[1])
    assert os.WEXITSTATUS(os.waitpid(waiting.pop(), 0)[1]) == 0


def test_a_run_that_another_has_is_refused_before_anything_is_started_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equipoise: Equipoise
) -> None:
    folder, file = tmp_path / "run", recipe_file(tmp_path, model=TINY_POLICY)
    with claimed(folder):
        before = contents(tmp_path)
        for command in ("train", "sample"):
            code, _, said = equipoise(command, file, "--output", folder)
            assert code == 2 and said.splitlines()[-1].startswith(
                f"--output {folder}: already holds something"
            )
        monkeypatch.setattr("cluster.run.train.new_run_folder", lambda *_: folder)  # told at once
        code, _, said = equipoise("train", file)
        assert (code, said) == (2, f"{folder}: another process is still running it\n")
        assert contents(tmp_path) == before
    assert not ray.is_initialized()


def test_a_claim_goes_with_what_was_not_written_and_takes_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with pytest.raises(KeyError), claimed(folder, new=True):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with claimed(folder, new=True):
        (folder / "error.txt").write_text("why")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="already holds something"), claimed(folder, new=True):
        pass
    assert contents(tmp_path) == before
    refused = pytest.raises(UserError, match=r"/proc/x: cannot be written to .*; choose another")
    with refused, claimed(Path("/proc/x"), new=True):
        pass


# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_without_room_for_the_checkpoints_is_refused_at_the_start(
    tmp_path: Path, small_disk: Path, equipoise: Equipoise
) -> None:
    file = recipe_file(
        tmp_path,
        f'output.folder = "{small_disk}"\ncheckpoint.every = 2',
        model=TINY_POLICY,
    )
    code, _, said = equipoise("train", file)
    assert code == 2 and said.startswith(f"{small_disk}/x-") and said.count("\n") == 1
    needs = ": 1 MiB are free there, and the run needs 0.1 GiB for its records, "
    assert needs in said and "3 training checkpoints" in said
    code, printed, _ = equipoise("train", file, "--dry-run")  # the recipe may be for another
    assert code == 0 and f"# note: {small_disk}{needs}" in printed
    assert list(small_disk.iterdir()) == []


def test_weights_that_fit_neither_shared_memory_nor_its_disk_are_refused_at_the_start(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = made_recipe(model=TINY_POLICY)
    require_room(read, "train", tmp_path / "run")
    monkeypatch.setattr(machine, "SHARED", small_disk)
    require_room(read, "train", tmp_path / "run")  # Ray keeps on the disk what does not fit
    sizes = {machine.stored_weights(read, kind) for kind in ("sample", "train")}  # type: ignore[arg-type]
    assert 0 in sizes and max(sizes) > 2**20
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    said = rf"{small_disk}: 1 MiB are free .* for what {small_disk} has no room .*--shm-size=2g"
    with pytest.raises(UserError, match=said):
        require_room(read, "train", tmp_path / "run")


class Learner:
    """Saves two megabytes, as a learner does."""

    def save(self, folder: Path) -> None:
        with replacing(folder) as fresh:
            save_file({"weight": torch.ones(2**19)}, fresh / "model.safetensors")


def test_policy_and_evaluation_outlive_a_full_disk(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    table = EvalTable({"a": {"p1": 1.0}})
    learner, run_folder = Learner(), small_disk / "run"
    run_folder.mkdir()
    with pytest.raises(RunFailed) as failed:
        keeper = Keeper(run_folder)
        with keeper.keeping(learner):  # type: ignore[arg-type]
            save_and_measure(learner, keeper, 7, lambda: {"sudoku": table})  # type: ignore[arg-type]
            keeper.end()
    (kept,) = spare.iterdir()
    assert str(failed.value) == (
        f"{run_folder}/checkpoint: No space left on device; free some, or choose another place: "
        f"--output, or output.folder in the recipe; the policy, as far as it was trained, is in "
        f"{kept}"
    )
    assert len(load_file(kept / "checkpoint" / "model.safetensors")["weight"]) == 2**19
    assert "p1" in (kept / "evaluations" / "step-000007.json").read_text()
    assert (kept / "error.txt").read_text().startswith(str(failed.value))
    assert contents(run_folder) == {}


def test_a_disk_that_fills_on_the_way_ends_the_run_with_its_policy_kept(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    table = pa.table({"text": ["a" * 2**22]})
    ended = pytest.raises(RunFailed, match=r"rollouts\.parquet: No space left on device; .* is in ")
    with ended, Keeper(small_disk).keeping(Learner()):  # type: ignore[arg-type]
        to = small_disk / "rollouts.parquet"
        put(to, lambda path: pq.write_table(table, path, compression="none"))
    (kept,) = spare.iterdir()
    assert (kept / "checkpoint" / "model.safetensors").exists()


# Home, temporary files, a cluster


@pytest.mark.parametrize(
    ("given", "changed", "said"),
    [
        ({}, set(), ""),
        ({"TMPDIR": "LONG"}, {"TMPDIR"}, "is too long for the paths of sockets"),
        ({"TMPDIR": "/proc"}, {"TMPDIR"}, "cannot be written to; using /tmp"),
        ({"TMPDIR": "MIDDLE"}, {"RAY_TMPDIR"}, ""),
        ({"HOME": "/proc"}, {*machine.CACHES, "HF_HOME"}, "HOME: /proc cannot be written to"),
    ],
)
def test_places_that_will_not_do_are_replaced_and_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    changed: set[str],
    said: str,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    lengths = {"LONG": 77, "MIDDLE": 50}
    before = {"HOME": str(tmp_path), "TMPDIR": "/tmp", "USER": "me"} | given
    if before["TMPDIR"] in lengths:
        name = "t" * (lengths[before["TMPDIR"]] - len("/tmp/"))
        before["TMPDIR"] = f"/tmp/{name}"
        Path(before["TMPDIR"]).mkdir(exist_ok=True)
    after = dict(before)
    told = machine.settle_environment(after)
    assert {name for name in after if after[name] != before.get(name)} == changed
    assert said in " ".join(told) and len(told) == bool(said)
    assert not machine.too_long(after.get("RAY_TMPDIR", after["TMPDIR"]), machine.RAY_SOCKET)
    assert machine.settle_environment(after) == (told if "HOME" in given else [])


def test_a_cluster_that_is_dead_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for scheme in ("", "ray://"):
            refused = pytest.raises(UserError, match=r"nobody answers there .*is the head of the")
            with refused, connected(scheme + address):
                pass
            assert capsys.readouterr().err == f"connecting to {scheme}{address} ...\n"
        taken.listen()  # answers, and is no head of a cluster
        monkeypatch.setattr(machine, "HEAD_SECONDS", 3.0)
        with pytest.raises(UserError, match=r"no head of a cluster in 3 s"), connected(address):
            pass


def test_errors_of_the_system_are_one_line(tmp_path: Path, equipoise: Equipoise) -> None:
    for words in (
        ("tasks", "generate", "sudoku", "--train", 1, "--out", "/proc/x"),
        ("train", tmp_path / ("x" * 300)),
    ):
        code, _, printed = equipoise(*words)
        said = printed.strip().splitlines()
        assert code == 2
        assert "/proc" in said[-1] or "xxx" in said[-1]
        assert not any("Traceback" in line for line in said)
