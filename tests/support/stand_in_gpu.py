"""Stand-ins for the device calls under vLLM's transfer engines: everything above them is real.

Device memory is main memory, a handle names a tensor of this process, a communicator hands
tensors over between threads, and aborting it ends whoever waits in it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor as real_rebuild

UUID = "GPU-0"
ARGUMENTS = real_rebuild.__code__.co_varnames[: real_rebuild.__code__.co_argcount]


class Group:
    """A communicator of `size` threads; the broadcasts of each, in order, belong together."""

    rooms: ClassVar[dict[tuple[str, int], Group]] = {}

    def __init__(self, size: int) -> None:
        self.size, self.changed = size, threading.Condition()
        self.there: dict[tuple[str, int], set[int]] = defaultdict(set)
        self.sent: dict[int, torch.Tensor] = {}
        self.members: list[Communicator] = []

    def meet(self, what: str, call: int, member: Communicator) -> bool:
        """Wait until all ranks are at one place; False where this rank was called off."""
        with self.changed:
            here = self.there[what, call]
            here.add(member.rank)
            self.changed.notify_all()
            self.changed.wait_for(lambda: member.disabled or len(here) == self.size)
            return not member.disabled


class Communicator:
    """One rank of a `Group`. As vLLM's, it does nothing more once it is destroyed."""

    def __init__(self, group: Group, rank: int) -> None:
        self.group, self.rank, self.disabled, self.calls = group, rank, False, 0

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        if self.disabled:
            return
        self.calls += 1
        if self.rank == src:
            self.group.sent[self.calls] = tensor
        if self.group.meet("sent", self.calls, self):
            if self.rank != src:
                tensor.copy_(self.group.sent[self.calls])
            self.group.meet("taken", self.calls, self)

    def destroy(self) -> None:
        """End this rank's own calls; other ranks go on waiting, the worst that NCCL does."""
        with self.group.changed:
            self.disabled = True
            self.group.changed.notify_all()


def join(host: str, port: int, rank: int, world_size: int, device: Any) -> Communicator:
    """`stateless_init_process_group`: returns when all ranks are there."""
    group = Group.rooms.setdefault((host, port), Group(world_size))
    member = Communicator(group, rank)
    group.members.append(member)
    group.meet("joined", 0, member)
    return member


class Source:
    """A learner's weights, by group; `passes` counts how often all of them were gone through."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.passes = tensors, 0

    def metadata(self) -> list[Any]:
        return [
            SimpleNamespace(name=name, dtype=t.dtype, shape=tuple(t.shape))
            for name, t in self.tensors.items()
        ]

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        for name, tensor in self.tensors.items():
            yield [name], [tensor]
        self.passes += 1


@pytest.fixture
def stand_in_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, vLLM's transfer engines run between threads of this process."""
    # Not at the top: vLLM takes seconds, and every worker of pytest imports all modules of tests.
    import vllm.distributed.weight_transfer.base as base
    import vllm.distributed.weight_transfer.ipc_engine as ipc
    import vllm.distributed.weight_transfer.nccl_common as nccl_common
    import vllm.distributed.weight_transfer.nccl_engine as nccl
    import vllm.distributed.weight_transfer.packed_tensor as packed

    import rollout.transports  # noqa: F401  (registers the engines)

    exported: dict[bytes, torch.Tensor] = {}

    def reduce_tensor(tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
        handle = len(exported).to_bytes(8, "big")
        exported[handle] = tensor
        given = {
            "tensor_cls": type(tensor),
            "tensor_size": tensor.size(),
            "tensor_stride": tensor.stride(),
            "tensor_offset": 0,
            "storage_cls": type(tensor.untyped_storage()),
            "dtype": tensor.dtype,
            "storage_device": 0,
            "storage_handle": handle,
            "storage_size_bytes": tensor.untyped_storage().nbytes(),
            "storage_offset_bytes": 0,
            "requires_grad": False,
            "ref_counter_handle": b"counter",
            "ref_counter_offset": 0,
            "event_handle": b"event",
            "event_sync_required": True,
        }
        return real_rebuild, tuple(given[name] for name in ARGUMENTS)

    def rebuild(*args: Any) -> torch.Tensor:
        given = dict(zip(ARGUMENTS, args, strict=True))
        tensor = exported[given["storage_handle"]]
        assert given["tensor_cls"] is torch.Tensor and given["dtype"] is tensor.dtype
        assert given["storage_cls"] is torch.storage.UntypedStorage
        assert given["tensor_size"] == tensor.size() and given["storage_device"] == 0
        return tensor

    def empty(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, **options)

    stream = SimpleNamespace(synchronize=lambda: None)
    cuda = SimpleNamespace(
        stream=lambda stream: nullcontext(),
        current_stream=lambda: stream,
        ipc_collect=lambda: None,
        is_available=lambda: False,
        get_device_properties=lambda index: SimpleNamespace(uuid=UUID),
    )
    accelerator = SimpleNamespace(current_device_index=lambda: 0, synchronize=lambda: None)
    for module in (base, packed, ipc, nccl, nccl_common):
        shown = _Torch(cuda=cuda, accelerator=accelerator, empty=empty)
        monkeypatch.setattr(module, "torch", shown)
    monkeypatch.setattr(packed, "_get_streams", lambda device, count: (stream,) * count)
    monkeypatch.setattr(packed, "reduce_tensor", reduce_tensor)
    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", rebuild)
    monkeypatch.setattr(nccl_common, "stateless_init_process_group", join)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.7")
    for step in ("initialize_layerwise_reload", "finalize_layerwise_reload"):
        monkeypatch.setattr(f"vllm.model_executor.model_loader.reload.{step}", _noted(step))
    yield
    for group in Group.rooms.values():
        for member in group.members:  # threads that still wait would outlive the tests
            member.destroy()
    Group.rooms.clear()


def _noted(step: str) -> Any:
    """A step of vLLM's reload, which changes a real model's layers, noted in a `Model`."""
    return lambda model, *rest: model.steps.append(step.split("_")[0])


class Model:
    """What an engine loads weights into; `steps` are the calls that reached it."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.tensors: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Any) -> None:
        self.steps.append("load")
        self.tensors |= {name: tensor.clone() for name, tensor in weights}


class _Torch:
    """torch, but for the device calls that it is given instead."""

    def __init__(self, **instead: Any) -> None:
        self.__dict__.update(instead)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
