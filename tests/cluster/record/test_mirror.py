"""A run's copy below a URI is its folder, whatever fails on the way, and a run goes on from it."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cluster.recipe.recipe import RunFailed, UserError
from cluster.record.mirror import Mirror, fetch, mirrored, opened, require_mirror
from cluster.run.checkpoints import newest
from learner.checkpoint import checkpoint_folder, prune
from tests.cluster.run.test_resume import make_run
from tests.support.terminal import Equipoise

URI = "memory://bucket/runs"


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    MemoryFileSystem.store.clear()
    yield
    MemoryFileSystem.store.clear()


def copied(root: str = "/bucket/runs/run") -> dict[str, bytes]:
    memory = fsspec.filesystem("memory")
    return {path.removeprefix(f"{root}/"): memory.cat_file(path) for path in memory.find(root)}


def at_home(run: Path) -> dict[str, bytes]:
    files = (file for file in run.rglob("*") if file.is_file() and file.name != "mirror.json")
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def test_after_any_changes_the_copy_is_the_folder(tmp_path: Path) -> None:
    """Files that are new, changed, of the same size, and gone; over two lives of the run. What its
    processes print, while it is read, stays."""
    run, rng = make_run(tmp_path / "run", 3), random.Random(0)
    (run / "rollouts").mkdir()
    (run / "logs").mkdir()
    (run / "logs" / "driver.log").write_text("said")
    for _ in range(2):
        with mirrored(URI, run, print) as copy:
            for n in range(30):
                file = run / "rollouts" / f"step-{rng.randrange(6)}.parquet"
                if file.exists() and rng.random() < 0.3:
                    file.unlink()
                else:
                    file.write_bytes(rng.randbytes(rng.choice((5, 5, 900))))
                if n % 3 == 0:
                    copy()
            # A checkpoint comes, an older one goes.
            make_run(tmp_path / "other", 6)
            if not checkpoint_folder(run, 6).exists():
                checkpoint_folder(tmp_path / "other", 6).rename(checkpoint_folder(run, 6))
                prune(checkpoint_folder(run, 6), keep=1)
            shutil.rmtree(tmp_path / "other")
        assert copied() | {"logs/driver.log": b"said"} == at_home(run)
        assert "logs/driver.log" not in copied()


def test_what_was_copied_in_an_earlier_life_or_fetched_does_not_travel_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, sent = make_run(tmp_path / "run", 3), list[str]()
    put_file = MemoryFileSystem.put_file

    def counted(self: Any, local: str, remote: str, **options: Any) -> None:
        sent.append(Path(local).name)
        put_file(self, local, remote, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", counted)
    with mirrored(URI, run, print):
        pass
    assert len(sent) == len(at_home(run)) > 3
    shutil.rmtree(run)
    fetch(f"{URI}/run", run, print)
    sent.clear()
    (run / "events.parquet").write_text("new")
    with mirrored(URI, run, print):
        pass
    assert sent == ["events.parquet"]


def test_a_checkpoint_that_was_on_its_way_is_refused_and_the_one_before_taken(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run", 3, 6)
    with mirrored(URI, run, print):
        pass
    fsspec.filesystem("memory").rm_file("/bucket/runs/run/checkpoints/step-000006/manifest.json")
    fetch(f"{URI}/run", tmp_path / "fetched", print)
    resumed = newest(tmp_path / "fetched")
    assert resumed.position.step == 3 and len(resumed.refused) == 1


def test_a_copy_that_fails_is_told_once_and_made_good_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, told, failing = make_run(tmp_path / "run", 3), list[str](), [True]
    put_file = MemoryFileSystem.put_file

    def flaky(self: Any, local: str, remote: str, **options: Any) -> None:
        if failing[0] and local.endswith("state.json"):
            raise FileNotFoundError("NoSuchBucket\nand a traceback")
        put_file(self, local, remote, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", flaky)
    whole = r"not whole: FileNotFoundError: NoSuchBucket; all of it"
    with pytest.raises(RunFailed, match=whole), mirrored(URI, run, told.append):
        pass
    assert told == [
        "warning: output.mirror: FileNotFoundError: NoSuchBucket; tried again after the next step"
    ]
    with pytest.raises(KeyError) as own, mirrored(URI, run, told.append):
        raise KeyError("the run's own error")
    assert "the copy of the run is not whole" in own.value.__notes__[0]
    failing[0] = False
    with mirrored(URI, run, told.append):
        pass
    assert copied() == at_home(run) and len(told) == 2


def test_a_copy_that_hangs_does_not_hold_the_end_up_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()
    monkeypatch.setattr(MemoryFileSystem, "put_file", lambda *_, **__: let_go.wait(60))
    monkeypatch.setattr("cluster.record.mirror.STILL_SECONDS", 0.2)
    mirror = Mirror(URI, make_run(tmp_path / "run"), print)
    with pytest.raises(RunFailed, match=r"nothing moved for 0.2 s"):
        mirror.close()
    let_go.set()


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("nosuch://bucket", "output.mirror: nosuch://bucket: Protocol not known: nosuch"),
        ("s3://key:word@bucket/runs", "output.mirror: keys in a URI would be stored with the run"),
        ("file:///proc/runs", "output.mirror: file:///proc/runs cannot be written to: "),
        ("file://RUN/copies", "output.mirror: file://RUN/copies is in the run's own folder"),
    ],
)
def test_a_place_that_cannot_be_used_is_refused_in_a_line(
    tmp_path: Path, uri: str, says: str
) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError) as refused:
        require_mirror(uri.replace("RUN", str(run)), run, resumed=False)
    assert str(refused.value).startswith(says.replace("RUN", str(run)))
    assert "\n" not in str(refused.value)


def test_another_runs_copy_is_not_written_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    require_mirror(URI, run, resumed=False)
    with mirrored(URI, run, print):
        pass
    require_mirror(URI, run, resumed=True)
    with pytest.raises(UserError, match=r"memory://bucket/runs/run is another run's; choose"):
        require_mirror(URI, run, resumed=False)
    assert copied() == at_home(run), "and the probe is gone"


def test_the_command_line_goes_on_from_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equipoise: Equipoise
) -> None:
    run = make_run(tmp_path / "run", 3)
    with mirrored(URI, run, print):
        pass
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    code, printed, error = equipoise("train", "--resume", f"{URI}/run", "--dry-run")
    assert code == 0 and "checkpoint" in printed, error
    assert newest(here / "runs" / "run").position == newest(run).position
    for arguments, says in (
        (["--resume", f"{URI}/run"], "runs/run is there already; --resume runs/run goes on"),
        (["--resume", f"{URI}/none"], "no run there: it has no recipe.toml"),
        (["--resume", "nosuch://x/y"], "Protocol not known: nosuch"),
    ):
        code, _, error = equipoise("train", *arguments)
        assert code == 2 and says in error


def test_a_bucket_cannot_write_beside_the_folder(tmp_path: Path) -> None:
    memory, root = opened(URI, "x")
    memory.pipe_file(f"{root}/run/recipe.toml", b"")
    memory.pipe_file(f"{root}/run/../../../escaped", b"x")
    memory.pipe_file(f"{root}/run/a/../../escaped", b"x")
    try:
        fetch(f"{URI}/run", tmp_path / "deep" / "run", print)
    except UserError as error:
        assert "no run there" in str(error)
    assert not [*tmp_path.rglob("escaped")]
