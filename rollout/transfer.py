"""The learner's end of weight transfer: one call sends a policy version to every sampler.

Algorithm code sees `WeightSender.send(source, version)` and never branches on transport. A
`WeightSource` yields `(name, tensor)` by layer group (the shape of vLLM's `WeightSource`), so a
ZeRO-3 learner holds one gathered group at a time. Every step has the deadline of the whole
transfer, and its error names the sampler.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

FOLDER = "equipoise-weights-"
"""What the folders of transfers under way are called, in shared memory."""


class WeightTransferError(RuntimeError):
    """A transfer that failed or passed its deadline; names the sampler and the step.

    `sampler` is that sampler's name, "" where the fault is none of a sampler's.
    """

    def __init__(self, message: str, sampler: str = "") -> None:
        super().__init__(message)
        self.sampler = sampler


class ParameterMeta(Protocol):
    """Name, wire dtype and whole shape of one parameter (vLLM's `ParamMeta` fits)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightSource(Protocol):
    """What a learner offers: its weights under checkpoint names, group by group.

    Iteration may be a collective (ZeRO-3 gathers), so every learner rank iterates, in the same
    order. `metadata` says beforehand what iteration will yield.
    """

    def metadata(self) -> list[Any]:
        """A `ParameterMeta` for each parameter, in the order of iteration."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor), one at a time."""

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        """(names, whole tensors) of one layer group at a time, valid until the next."""


class SamplerClient(Protocol):
    """A sampler as the sender sees it: named, and answering with futures."""

    name: str

    def call(self, method: str, *args: Any) -> Any:
        """Start a method on the sampler; returns a future."""

    def wait(self, future: Any, seconds: float) -> Any:
        """Its result; raises TimeoutError after `seconds`, or the sampler's own error."""


@dataclass(frozen=True)
class TransferReport:
    """What a transfer cost. seconds: wall time; bytes: sent to each sampler; groups: buckets."""

    seconds: float
    bytes: int
    groups: int
    largest_group_bytes: int


class WeightSender(Protocol):
    """Sends a source's weights to all samplers and commits them as a policy version.

    Each learner rank holds one and calls it with its own rank; rank 0 sends and gets a report.
    """

    def send(self, source: WeightSource, version: int, rank: int) -> TransferReport | None: ...


class BackgroundSender(WeightSender, Protocol):
    """One that can also send beside whatever its learner does next."""

    def begin(self, source: WeightSource, version: int, rank: int) -> None:
        """Copy the weights, pause the samplers, and return; they read the copy meanwhile.

        From here on every new token is of this version, or of a later one.
        """

    def finish(self) -> TransferReport | None:
        """Wait for what was begun, and raise its error; rank 0 gets the report."""


class HostSender:
    """Transport `host`: one safetensors file in shared memory per layer group.

    A group is written while samplers read the one before it, whose file is then removed: the
    extra memory is two groups. What `begin` sends is held as a whole beside that, in host memory
    of rank 0.
    """

    def __init__(
        self,
        samplers: Sequence[SamplerClient],
        deadline_seconds: float,
        folder: Path | None = None,
    ) -> None:
        shared = Path("/dev/shm")
        self._folder = folder or (shared if shared.is_dir() else Path(tempfile.gettempdir()))
        self._samplers = list(samplers)
        self._deadline = deadline_seconds
        self._begun: Future[TransferReport] | None = None

    def send(self, source: WeightSource, version: int, rank: int) -> TransferReport | None:
        if rank:
            for _ in source.iter_groups():
                pass
            return None
        start = time.perf_counter()
        buckets = source.iter_groups()
        try:
            self._all("begin_weight_update", start + self._deadline)
            return self._pour(buckets, version, start)
        except WeightTransferError:
            # The other ranks gather to the end; a rank that stops would leave them waiting, and
            # the next transfer's gathers would meet these.
            for _ in buckets:
                pass
            raise

    def begin(self, source: WeightSource, version: int, rank: int) -> None:
        """See `BackgroundSender`."""
        if rank:
            self.send(source, version, rank)
            return
        held = [(names, [host_copy(t) for t in tensors]) for names, tensors in source.iter_groups()]
        start = time.perf_counter()
        self._all("begin_weight_update", start + self._deadline)
        thread = ThreadPoolExecutor(1, "weights")
        self._begun = thread.submit(self._pour, held, version, start)
        thread.shutdown(wait=False)

    def finish(self) -> TransferReport | None:
        """See `BackgroundSender`."""
        begun, self._begun = self._begun, None
        return begun.result() if begun else None

    def _pour(
        self, buckets: Iterable[tuple[list[str], list[torch.Tensor]]], version: int, start: float
    ) -> TransferReport:
        """Everything after the pause."""
        until = start + self._deadline
        sizes: list[int] = []
        with shared_folder(self._folder) as folder:
            reading: tuple[str, list[tuple[SamplerClient, Any]]] | None = None
            for names, tensors in buckets:
                path = os.path.join(folder, f"group-{len(sizes):05d}.safetensors")
                bucket = {
                    name: t.detach().cpu().contiguous()
                    for name, t in zip(names, tensors, strict=True)
                }
                save_file(bucket, path)
                self._read(reading, until)
                update = {"path": path, "names": names}
                reading = path, [(s, s.call("load_weights", update)) for s in self._samplers]
                sizes.append(sum(t.numel() * t.element_size() for t in bucket.values()))
            self._read(reading, until)
        self._all("finish_weight_update", until, version)
        seconds = time.perf_counter() - start
        return TransferReport(seconds, sum(sizes), len(sizes), max(sizes, default=0))

    def _all(self, method: str, until: float, *args: Any) -> None:
        call_all(self._samplers, method, args, until, self._deadline)

    def _read(
        self, reading: tuple[str, list[tuple[SamplerClient, Any]]] | None, until: float
    ) -> None:
        """Wait until every sampler has read a file, and remove it."""
        if reading:
            path, futures = reading
            wait_all(futures, "load_weights", until, self._deadline)
            os.unlink(path)


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, whatever becomes of the tensor."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


@contextmanager
def shared_folder(parent: Path) -> Iterator[str]:
    """A folder for the files of one transfer, removed after it.

    A process that is killed leaves its own behind, and where `parent` is in memory that memory
    with it: whoever sends next removes it. The living hold a lock, which the kernel drops with
    its process.
    """
    for left in parent.glob(f"{FOLDER}*"):
        with suppress(OSError):  # at work, of another user, or removed meanwhile
            held = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(held)
    folder, held = _locked_folder(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        os.close(held)


def _locked_folder(parent: Path) -> tuple[str, int]:
    """A fresh folder and the descriptor that holds its lock."""
    while True:
        folder = tempfile.mkdtemp(prefix=FOLDER, dir=parent)
        # Until it is locked, another sender may take it for one that was left.
        with suppress(FileNotFoundError):
            held = os.open(folder, os.O_RDONLY)
            fcntl.flock(held, fcntl.LOCK_EX)
            if os.path.isdir(folder):
                return folder, held
            os.close(held)


def call_all(
    samplers: Sequence[SamplerClient],
    method: str,
    args: Sequence[Any],
    until: float,
    deadline_seconds: float,
) -> None:
    """Call a method on every sampler at once and wait for all; see `wait_all` for errors."""
    futures = [(sampler, sampler.call(method, *args)) for sampler in samplers]
    wait_all(futures, method, until, deadline_seconds)


def wait_all(
    futures: Sequence[tuple[SamplerClient, Any]],
    method: str,
    until: float,
    deadline_seconds: float,
) -> None:
    """Wait for every sampler's answer until `until` (`time.perf_counter` seconds).

    Raises WeightTransferError naming the sampler that failed or let the deadline pass.
    """
    for sampler, future in futures:
        try:
            sampler.wait(future, max(0.0, until - time.perf_counter()))
        except TimeoutError as error:
            raise WeightTransferError(
                f"weight transfer: sampler {sampler.name!r} did not finish {method} within "
                f"the deadline of {deadline_seconds:g} s (transfer.deadline_seconds)",
                sampler.name,
            ) from error
        except Exception as error:
            # Ray wraps what the sampler raised; the sampler's own words belong on the first line.
            own = getattr(error, "cause", None) or error
            raise WeightTransferError(
                f"weight transfer: sampler {sampler.name!r} failed in {method}: "
                f"{type(own).__name__}: {own}",
                sampler.name,
            ) from error
