"""Transports `nccl` and `ipc`: the learner sends by vLLM's own trainer engines.

Written against vLLM 0.32 and tested with its engines over stand-ins for the device calls; not run
on a GPU, since none was at hand.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import torch

from rollout.settings import TransferConfig
from rollout.transfer import TransferReport, WeightTransferError


class SamplerClient(Protocol):
    """A sampler as a learner rank sees it."""

    name: str

    def call(self, method: str, *args: Any) -> Any:
        """Start a method on the sampler; returns a future."""

    def wait(self, future: Any, seconds: float) -> Any:
        """Its result; raises TimeoutError after `seconds`, or the sampler's own error."""


class GpuSender:
    """Sends through a vLLM `TrainerWeightTransferEngine`, made on the first transfer.

    Lives in every learner rank: all ranks gather, rank 0 sends.
    """

    def __init__(
        self,
        transfer: TransferConfig,
        samplers: Sequence[SamplerClient],
        ranks_each: int,
    ) -> None:
        """`ranks_each`: tensor-parallel ranks of one sampler."""
        self._transport = transfer.transport
        self._engine_ranks = ranks_each * len(samplers)
        self._bucket = int(transfer.bucket_mib * 2**20)
        self._client = _Client(list(samplers), ranks_each, transfer.deadline_seconds)
        self._engine: Any = None

    def send(self, source: Any, version: int, rank: int) -> TransferReport | None:
        """Send what a learner offers (`learner.weights.OfferedWeights`, which is vLLM's source).

        Raises WeightTransferError naming the sampler that failed or let the deadline pass. By then
        this rank went through all gathers, as the others do, and the communicator is aborted.
        """
        start = time.perf_counter()
        source, client = _Settled(source), self._client
        client.open(version)
        sizes = [m.dtype.itemsize * math.prod(m.shape) for m in source.metadata()]
        if self._engine is None:
            self._engine = self._met(source, rank, max(sizes))
        self._engine.source = source
        client.abort = lambda: _abort(self._engine)
        self._engine.send_weights()
        if client.failed.done():
            raise client.failed.result()
        if rank:
            return None
        return TransferReport(time.perf_counter() - start, sum(sizes), 1, sum(sizes))

    def _met(self, source: Any, rank: int, largest: int) -> Any:
        """The trainer's engine, once it and the samplers' have met."""
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        info = self._init_info(rank, largest)

        def make(info: Any) -> Any:
            return WeightTransferTrainerFactory.trainer_init(
                info, client=self._client, source=source
            )

        if rank or self._transport == "ipc":
            return make(info)
        # A rendezvous cannot be called off: on a thread of its own it can be left alone.
        meeting: Future[Any] = Future()
        threading.Thread(target=_settle, args=(meeting, make, info), daemon=True).start()
        wait([meeting, self._client.failed], return_when=FIRST_COMPLETED)
        if not self._client.failed.done():
            return meeting.result()
        _only_gather(source)
        raise self._client.failed.result()

    def _init_info(self, rank: int, largest: int) -> Any:
        buffer = max(self._bucket, largest)  # `ipc` refuses a tensor that is larger
        if self._transport == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=buffer)
        import ray
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        address = ray.util.get_node_ip_address()  # the host's own name is often 127.0.0.1
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return NCCLTrainerInitInfo(
            master_address=address,
            master_port=port,
            world_size=1 + self._engine_ranks,
            rank=rank,
            packed_buffer_size_bytes=buffer,
        )


class _Settled:
    """A weight source whose tensors are done when they are handed out, and read when it goes on.

    vLLM reads them on side streams: nothing else makes these wait for the optimizer's step, nor
    ZeRO-3 for them before it lets a group's memory go.
    """

    def __init__(self, source: Any) -> None:
        self._source = source

    def metadata(self) -> Any:
        """See `learner.weights.OfferedWeights`."""
        return self._source.metadata()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for names, tensors in self._source.iter_groups():
            _synchronize()
            yield from zip(names, tensors, strict=True)
            _synchronize()


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _settle(future: Future[Any], make: Any, *args: Any) -> None:
    try:
        future.set_result(make(*args))
    except BaseException as error:
        future.set_exception(error)


def _only_gather(source: Any) -> None:
    """What a rank does that sends nothing, so that the others are not left in a gather."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    nobody: Any = None
    NCCLTrainerWeightTransferEngine(client=nobody, source=source, is_sender=False).send_weights()


def _abort(engine: Any) -> None:
    """End the NCCL calls that an engine is in; it makes none from here on."""
    group = getattr(engine, "model_update_group", None)
    if group is not None:
        group.destroy()


def plain_handles(handles: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """GPU UUID -> the arguments of `rebuild_cuda_tensor` for a buffer of bytes, as plain values.

    vLLM's own encoder refuses the classes among them. `with_classes` puts them back.
    """
    return {
        gpu: [list(size), list(stride), offset, *rest]
        for gpu, (_, size, stride, offset, _, _, *rest) in handles.items()
    }


def with_classes(handles: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
    """What `plain_handles` was made of."""
    storage = torch.storage.UntypedStorage
    return {
        gpu: (torch.Tensor, torch.Size(size), tuple(stride), offset, storage, torch.uint8, *rest)
        for gpu, (size, stride, offset, *rest) in handles.items()
    }


class _Client:
    """vLLM's `VLLMWeightSyncClient` over our samplers, under one deadline a transfer.

    The first failure is kept in `failed`, and what an engine is blocked in is aborted; later calls
    do nothing, so that the engine goes through the rest of its gathers with the other ranks.
    """

    def __init__(
        self, samplers: list[SamplerClient], ranks_each: int, deadline_seconds: float
    ) -> None:
        self._samplers, self._ranks_each = samplers, ranks_each
        self._deadline = deadline_seconds
        self.open(0)

    def open(self, version: int) -> None:
        self._version, self._until = version, time.perf_counter() + self._deadline
        self.failed: Future[WeightTransferError] = Future()
        self.abort: Any = lambda: None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [dict(init_info) for _ in self._samplers]
        if "rank_offset" in init_info:
            for index, info in enumerate(infos):
                info["rank_offset"] += index * self._ranks_each
                info["deadline_seconds"] = self._deadline
        # Engines rendezvous together: all are called before any is waited for.
        self._all("init_weight_transfer", infos)

    def start_weight_update(self) -> None:
        self._all("begin_weight_update")

    def update_weights(self, update_info: Any) -> None:
        if "ipc_handles" in update_info:
            handles = plain_handles(update_info["ipc_handles"])
            update_info = update_info | {"ipc_handles": handles}
        self._all("load_weights", [update_info] * len(self._samplers))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish_weight_update", [self._version] * len(self._samplers))

    def _all(self, method: str, arguments: Sequence[Any] | None = None) -> None:
        """Call a method on every sampler, with one value each, and wait for all, or one failure."""
        if self.failed.done():
            return
        args = (
            [()] * len(self._samplers) if arguments is None else [(value,) for value in arguments]
        )
        futures = [s.call(method, *each) for s, each in zip(self._samplers, args, strict=True)]
        pool = ThreadPoolExecutor(len(futures))
        waits = [
            pool.submit(self._wait, sampler, future, method)
            for sampler, future in zip(self._samplers, futures, strict=True)
        ]
        finished, _ = wait(waits, return_when=FIRST_EXCEPTION)
        pool.shutdown(wait=False)
        failures = [error for each in waits if each in finished and (error := each.exception())]
        if failures:
            assert isinstance(failures[0], WeightTransferError)
            self.failed.set_result(failures[0])
            self.abort()

    def _wait(self, sampler: SamplerClient, future: Any, method: str) -> None:
        try:
            sampler.wait(future, max(0.0, self._until - time.perf_counter()))
        except TimeoutError as error:
            raise WeightTransferError(
                f"weight transfer: sampler {sampler.name!r} did not finish {method} within "
                f"the deadline of {self._deadline:g} s (transfer.deadline_seconds)",
                sampler.name,
            ) from error
        except Exception as error:
            # Ray wraps what the sampler raised; its own words belong on the first line.
            cause = getattr(error, "cause", None) or error
            raise WeightTransferError(
                f"weight transfer: sampler {sampler.name!r} failed in {method}: "
                f"{type(cause).__name__}: {cause}",
                sampler.name,
            ) from error
