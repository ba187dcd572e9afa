"""Weight transfer: deadlines, names in errors, two groups in memory at most."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError
from safetensors.torch import load_file

from rollout.transfer import HostSender, WeightTransferError

ROOT = Path(__file__).resolve().parents[2]


class Sampler:
    """A sampler in a thread that keeps what it loaded, or hangs or fails in one method."""

    def __init__(self, name: str, hangs_in: str = "", fails_in: str = "") -> None:
        self.name, self.hangs_in, self.fails_in = name, hangs_in, fails_in
        self.loaded: dict[str, torch.Tensor] = {}
        self.version: int | None = None
        self.files_seen: list[int] = []
        self.waits_in: dict[str, threading.Event] = {}
        self._thread = ThreadPoolExecutor(1)

    def call(self, method: str, *args: Any) -> Future[None]:
        return self._thread.submit(self._run, method, *args)

    def wait(self, future: Future[None], seconds: float) -> None:
        future.result(seconds)

    def _run(self, method: str, *args: Any) -> None:
        if method == self.hangs_in:
            time.sleep(1.5)
        if method in self.waits_in:
            assert self.waits_in[method].wait(60)
        if method == self.fails_in:
            raise ValueError("out of cheese")
        if method == "load_weights":
            path = Path(args[0]["path"])
            self.files_seen.append(len(os.listdir(path.parent)))
            tensors = load_file(path)
            assert list(tensors) and set(tensors) == set(args[0]["names"])
            self.loaded |= tensors
        if method == "finish_weight_update":
            self.version = args[0]


class Source:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.groups = [
            {f"layers.{i}.weight": torch.randn(4, 8, generator=generator).t()} for i in range(5)
        ]

    def metadata(self) -> list[Any]:
        return []

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return (item for group in self.groups for item in group.items())

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        for group in self.groups:
            yield list(group), list(group.values())


def test_every_sampler_gets_every_tensor_and_two_files_live_at_most(tmp_path: Path) -> None:
    samplers = [Sampler("a"), Sampler("b")]
    report = HostSender(samplers, 30, tmp_path).send(Source(), 7, rank=0)
    assert report is not None
    for sampler in samplers:
        for name, tensor in Source():
            assert torch.equal(sampler.loaded[name], tensor)
        assert sampler.version == 7
        assert len(sampler.files_seen) == 5 and set(sampler.files_seen) <= {1, 2}
    assert (report.groups, report.bytes) == (5, 5 * 4 * 8 * 4)
    assert report.largest_group_bytes == 4 * 8 * 4
    assert os.listdir(tmp_path) == []


def test_what_was_begun_is_sent_as_it_was_whatever_the_learner_does_then(tmp_path: Path) -> None:
    samplers, source = [Sampler("a"), Sampler("b")], Source()
    for sampler in samplers:
        sampler.waits_in["load_weights"] = threading.Event()
    sender = pickle.loads(pickle.dumps(HostSender([], 30, tmp_path)))
    sender._samplers = samplers
    sender.begin(source, 7, rank=0)
    assert [sampler.version for sampler in samplers] == [None, None]
    for group in source.groups:
        for tensor in group.values():
            tensor.zero_()
    for sampler in samplers:
        sampler.waits_in["load_weights"].set()
    report = sender.finish()
    assert report.groups == 5
    for sampler in samplers:
        assert sampler.version == 7
        for name, tensor in Source():
            assert torch.equal(sampler.loaded[name], tensor)
    assert os.listdir(tmp_path) == [] and sender.finish() is None


def test_what_was_begun_and_failed_says_so_when_it_is_finished(tmp_path: Path) -> None:
    sender = HostSender([Sampler("fine"), Sampler("broken", fails_in="load_weights")], 30, tmp_path)
    sender.begin(Source(), 1, rank=0)
    with pytest.raises(WeightTransferError, match="'broken' failed in load_weights"):
        sender.finish()
    sleepy = HostSender([Sampler("sleepy", hangs_in="begin_weight_update")], 0.5, tmp_path)
    with pytest.raises(WeightTransferError, match="'sleepy' did not finish begin_weight_update"):
        sleepy.begin(Source(), 1, rank=0)


@pytest.mark.parametrize("method", ["begin_weight_update", "load_weights", "finish_weight_update"])
def test_a_sampler_that_hangs_is_named_at_the_deadline(tmp_path: Path, method: str) -> None:
    samplers = [Sampler("quick"), Sampler("sleepy", hangs_in=method)]
    with pytest.raises(WeightTransferError, match=rf"'sleepy' did not finish {method}.*0\.5 s"):
        HostSender(samplers, 0.5, tmp_path).send(Source(), 1, rank=0)
    assert os.listdir(tmp_path) == []


def test_a_sampler_that_fails_is_named_with_its_own_error(tmp_path: Path) -> None:
    samplers = [Sampler("fine"), Sampler("broken", fails_in="load_weights")]
    named = "'broken' failed in load_weights: ValueError: out of cheese"
    with pytest.raises(WeightTransferError, match=named):
        HostSender(samplers, 30, tmp_path).send(Source(), 1, rank=0)


def test_what_a_killed_sender_left_in_memory_goes_with_the_next_transfer(tmp_path: Path) -> None:
    left = tmp_path / "of-something-else"
    left.mkdir()
    code = "import sys; from pathlib import Path; from rollout.transfer import shared_folder\n"
    code += "with shared_folder(Path(sys.argv[1])) as folder:\n"
    code += "    Path(folder, 'group').write_text('x' * 99); print(folder, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other:  # type: ignore[call-overload]
        folder = Path(other.stdout.readline().strip())
        sampler = Sampler("a")
        # One whose process lives is at work.
        assert HostSender([sampler], 30, tmp_path).send(Source(), 1, rank=0)
        assert (folder / "group").exists()
        other.kill()
        other.wait()
    assert (folder / "group").exists()
    assert HostSender([sampler], 30, tmp_path).send(Source(), 2, rank=0)
    assert sampler.version == 2 and os.listdir(tmp_path) == [left.name]


def test_senders_that_begin_at_once_leave_each_other_alone(tmp_path: Path) -> None:
    samplers = [Sampler(str(i)) for i in range(8)]

    def send(sampler: Sampler) -> None:
        for version in range(25):
            assert HostSender([sampler], 30, tmp_path).send(Source(), version, rank=0)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(send, samplers))
    assert [sampler.version for sampler in samplers] == [24] * 8
    assert os.listdir(tmp_path) == []


class RaySampler(Sampler):
    """Wraps what its method raised as Ray does: the error itself is the `cause`."""

    def wait(self, future: Future[None], seconds: float) -> None:
        try:
            future.result(seconds)
        except ValueError as error:
            raise RayTaskError("load_weights", "many lines", error) from error


def test_the_error_a_remote_sampler_raised_is_on_the_first_line(tmp_path: Path) -> None:
    broken = RaySampler("broken", fails_in="load_weights")
    with pytest.raises(WeightTransferError) as raised:
        HostSender([broken], 30, tmp_path).send(Source(), 1, rank=0)
    assert str(raised.value).splitlines()[0].endswith("ValueError: out of cheese")


def test_other_ranks_gather_and_send_nothing(tmp_path: Path) -> None:
    sampler = Sampler("a")
    assert HostSender([sampler], 30, tmp_path).send(Source(), 1, rank=1) is None
    assert not sampler.loaded and sampler.version is None
