"""Builds of extensions: one at a time, and none is waited for whose builder is gone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from learner import builds
from learner.builds import HeldBaton, watch_builds


def build(lock: str, begun: Event, go_on: Event) -> None:
    """Hold a build's lock until told otherwise."""
    baton = HeldBaton(lock)
    assert baton.try_acquire()
    begun.set()
    go_on.wait(60)
    baton.release()


@pytest.fixture
def builder(tmp_path: Path) -> multiprocessing.context.ForkProcess:
    """A process that is building, told to end by its `go_on`."""
    context = multiprocessing.get_context("fork")
    begun, go_on = context.Event(), context.Event()
    process = context.Process(target=build, args=(str(tmp_path / "lock"), begun, go_on))
    process.start()
    assert begun.wait(60)
    process.go_on = go_on  # type: ignore[attr-defined]
    return process


def taken(folder: Path) -> float:
    """Seconds until the build is ours; it is given back."""
    start, baton = time.monotonic(), HeldBaton(str(folder / "lock"), wait_seconds=0.01)
    assert baton.try_acquire()
    assert (folder / "lock").exists()
    baton.release()
    assert not (folder / "lock").exists()
    return time.monotonic() - start


def test_a_build_whose_builder_was_killed_is_taken_over_at_once(
    builder: multiprocessing.context.ForkProcess, tmp_path: Path
) -> None:
    assert builder.pid is not None
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    assert (tmp_path / "lock").exists()  # what torch alone would wait for without end
    assert taken(tmp_path) < 60  # not FOREIGN_SECONDS, nor for ever
    assert taken(tmp_path) < 60  # not FOREIGN_SECONDS, nor for ever


def test_a_living_builder_is_waited_for_and_told(
    builder: multiprocessing.context.ForkProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(builds, "SILENT_SECONDS", 0.1)

    class Ends(HeldBaton):
        """Has the builder end once the waiting was told of."""

        looks = 0

        def _acquired(self) -> bool:
            self.looks += 1
            if self.looks == 30:
                builder.go_on.set()  # type: ignore[attr-defined]
            return super()._acquired()

    baton = Ends(str(tmp_path / "lock"), wait_seconds=0.02)
    assert baton.try_acquire() and baton.looks >= 30
    baton.release()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"waiting for another process to compile {tmp_path.name} in {tmp_path}"


def test_a_lock_without_an_flock_is_anothers_until_it_is_old(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    assert not HeldBaton(str(lock))._acquired()
    long_ago = time.time() - 2 * builds.FOREIGN_SECONDS
    os.utime(lock, (long_ago, long_ago))
    assert taken(tmp_path) < 60  # not FOREIGN_SECONDS, nor for ever


def test_torch_builds_under_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_extension, "FileBaton", cpp_extension.FileBaton)
    watch_builds()
    assert "FileBaton(" in Path(cpp_extension.__file__).read_text()
    assert cpp_extension.FileBaton is HeldBaton
