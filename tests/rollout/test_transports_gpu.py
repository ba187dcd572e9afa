"""The life of a transfer by `ipc` and `nccl`: vLLM's own engines, device calls stood in for."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError

from rollout.settings import TransferConfig
from rollout.starting import ENGINE_BACKENDS
from rollout.transfer import WeightTransferError
from rollout.transports_gpu import GpuSender, plain_handles, with_classes
from tests.support.stand_in_gpu import UUID, Group, Model, Source, stand_in_gpu

pytestmark = pytest.mark.usefixtures("stand_in_gpu")
assert stand_in_gpu  # the fixture
DEADLINE = 3.0
"""Seconds, where something is late or lost; else there is time."""
HANGING = threading.Event()
"""Set when what hangs need no longer."""


class Sampler:
    """As a learner rank sees one: vLLM's engine on a thread, behind vLLM's own encoder."""

    def __init__(self, name: str, transport: str, hangs_in: str = "", dies_in: str = "") -> None:
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory

        self.name, self._hangs_in, self._dies_in = name, hangs_in, dies_in
        self.model, self.versions = Model(), list[int]()
        parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        self.engine = WeightTransferEngineFactory.create_engine(
            SimpleNamespace(backend=ENGINE_BACKENDS[transport]),  # type: ignore[arg-type]
            SimpleNamespace(parallel_config=parallel, model_config=None),  # type: ignore[arg-type]
            torch.device("cpu", 0),
            self.model,  # type: ignore[arg-type]
        )
        self._thread = ThreadPoolExecutor(1)

    def call(self, method: str, *args: Any) -> Future[None]:
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        sent = MsgpackDecoder().decode(MsgpackEncoder().encode([method, *args]))
        return self._thread.submit(self._run, *sent)

    def _run(self, method: str, *args: Any) -> None:
        if method == self._hangs_in:
            HANGING.wait()
        if method == self._dies_in:
            raise RayTaskError(method, "many lines", ValueError("out of cheese"))
        engine = self.engine
        if method == "init_weight_transfer":
            engine.init_transfer_engine(engine.parse_init_info(*args))
        elif method == "begin_weight_update":
            engine.start_weight_update()
        elif method == "load_weights":
            engine.update_weights(*args)
        else:
            engine.finish_weight_update()
            self.versions += args

    def wait(self, future: Future[None], seconds: float) -> None:
        future.result(seconds)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Of several types and shapes; the second is larger than the buckets of these tests."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 2, generator=generator),
        "b": torch.randn(40, generator=generator).bfloat16(),
        "c": torch.randn(2, 5, generator=generator).t(),
        "d": torch.tensor(float(seed)),
    }


def sender(transport: str, samplers: list[Sampler], deadline: float = 100.0) -> GpuSender:
    transfer = TransferConfig(
        transport=transport,  # type: ignore[arg-type]
        deadline_seconds=deadline,
        bucket_mib=32 / 2**20,
    )
    return GpuSender(transfer, samplers, 1)


@pytest.mark.parametrize("transport", ["ipc", "nccl"])
def test_weights_arrive_at_all_samplers_version_after_version(transport: str) -> None:
    samplers = [Sampler(f"sampler-{i}", transport) for i in range(2)]
    sends = sender(transport, samplers)
    for version in (1, 2):
        expected = tensors(version)
        report = sends.send(Source(expected), version, 0)
        assert report is not None
        assert report.bytes == sum(t.nbytes for t in expected.values())
        for sampler in samplers:
            assert sampler.versions[-1] == version
            for name, tensor in expected.items():
                assert torch.equal(sampler.model.tensors[name], tensor), name
            steps = sampler.model.steps
            assert steps[0] == "initialize" and steps[-1] == "finalize" and "load" in steps
            steps.clear()
    assert [host for host, _ in Group.rooms] == (["10.0.0.7"] if transport == "nccl" else [])


def test_handles_pass_the_encoder_that_refuses_them_as_they_are() -> None:
    from vllm.distributed.weight_transfer import packed_tensor as packed
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    (chunk,) = packed.packed_ipc_producer(iter(tensors(0).items()), UUID, lambda item: item[1])
    with pytest.raises(TypeError, match="not serializable"):
        MsgpackEncoder().encode(chunk.ipc_handle)
    sent = MsgpackDecoder().decode(MsgpackEncoder().encode(plain_handles(chunk.ipc_handle)))
    assert with_classes(sent) == chunk.ipc_handle


@pytest.mark.parametrize("transport", ["ipc", "nccl"])
def test_a_buffer_holds_the_largest_tensor_whatever_its_size(transport: str) -> None:
    largest = math.prod((151_936, 4096)) * 4
    info = sender(transport, [Sampler("sampler-0", transport)])._init_info(0, largest)
    assert info.packed and info.packed_buffer_size_bytes == largest > 2**30


@pytest.fixture
def hanging() -> Iterator[None]:
    """Lets go of what hangs when the test is over."""
    HANGING.clear()
    yield
    HANGING.set()


LOST = [
    ("hangs_in", "begin_weight_update"),
    ("hangs_in", "load_weights"),
    ("dies_in", "begin_weight_update"),
    ("dies_in", "load_weights"),
    ("dies_in", "finish_weight_update"),
]


@pytest.mark.usefixtures("hanging")
@pytest.mark.parametrize("transport", ["ipc", "nccl"])
@pytest.mark.parametrize(("how", "method"), LOST)
def test_a_sampler_lost_on_the_way_is_named_and_the_others_go_on(
    transport: str, how: str, method: str
) -> None:
    sender(transport, [Sampler("warm", transport)]).send(Source(tensors(0)), 0, 0)  # imports
    good, bad = Sampler("good", transport), Sampler("bad", transport, **{how: method})
    source = Source(tensors(1))
    said = (
        f"did not finish {method} within"
        if how == "hangs_in"
        else f"in {method}: ValueError: out of cheese$"
    )
    with pytest.raises(WeightTransferError, match=said) as failed:
        sender(transport, [good, bad], DEADLINE).send(source, 1, 0)
    # In a broadcast that one never joins all are late, and none can say who holds it up.
    all_late = (transport, how, method) == ("nccl", "hangs_in", "load_weights")
    assert failed.value.sampler in ({"good", "bad"} if all_late else {"bad"})
    assert source.passes == 1, "the other ranks' gathers need this one"
    # Without the dead one, in a new group; the other's engine may still wait in the old.
    expected = tensors(2)
    sender(transport, [good]).send(Source(expected), 2, 0)
    assert good.versions[-1] == 2
    assert all(torch.equal(good.model.tensors[name], t) for name, t in expected.items())


@pytest.mark.usefixtures("hanging")
def test_a_sampler_that_never_comes_to_the_meeting_is_named() -> None:
    samplers = [Sampler("good", "nccl"), Sampler("bad", "nccl", hangs_in="init_weight_transfer")]
    source = Source(tensors(1))
    with pytest.raises(WeightTransferError, match="did not finish init_weight_transfer within"):
        sender("nccl", samplers, DEADLINE).send(source, 1, 0)
    assert source.passes == 1


@pytest.mark.parametrize("transport", ["ipc", "nccl"])
def test_a_rank_that_sends_nothing_goes_through_the_same_gathers(transport: str) -> None:
    sends, source = sender(transport, []), Source(tensors(1))
    assert sends.send(source, 1, 1) is None
    assert source.passes == 1
