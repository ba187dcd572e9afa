"""An engine that sleeps and wakes: vLLM's own engine, core, executor, worker and allocator.

Only the device calls are stood in for: memory that is mapped is an array here. What a GPU frees,
and how fast, is not shown; that the calls are these, in this order, on vLLM's own classes, is.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rollout.engine_state import EngineState

GIB = 2**30


class Card:
    """Memory by address; unmapped memory cannot be read, and comes back with other contents."""

    def __init__(self) -> None:
        self.arrays: dict[int, np.ndarray] = {}
        self.mapped: set[int] = set()
        self.calls: list[str] = []
        self._tags: dict[int, str] = {}

    def allocate(self, tag: str, content: bytes) -> tuple[int, int, int, int]:
        array = np.frombuffer(content, np.uint8).copy()
        address = array.ctypes.data
        self.arrays[address], self._tags[address] = array, tag
        self.mapped.add(address)
        return (0, len(content), address, 0)

    def map(self, handle: Any) -> None:
        assert handle[2] not in self.mapped, "mapped twice"
        self.mapped.add(handle[2])
        self.calls.append(f"map {self._tags[handle[2]]}")

    def unmap(self, handle: Any) -> None:
        self.mapped.remove(handle[2])
        self.arrays[handle[2]][:] = 0
        self.calls.append(f"unmap {self._tags[handle[2]]}")

    def copy(self, to: int, source: int, size: int) -> None:
        for address in {to, source} & self.arrays.keys():
            assert address in self.mapped, "unmapped memory is copied"
        ctypes.memmove(to, source, size)

    def content(self, tag: str) -> bytes:
        (address,) = (a for a, its in self._tags.items() if its == tag)
        return self.arrays[address].tobytes()


class Model(torch.nn.Module):
    """What the worker keeps buffers of."""


class Thread:
    """Our `EngineThread` without a thread: work is done at once, on vLLM's engine."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.paused = llm, False

    async def do(self, work: Callable[[Any], Any]) -> Any:
        return work(self.llm)

    async def pause(self) -> None:
        self.llm.engine_core.engine_core.pause_scheduler(mode="keep", clear_cache=False)
        self.paused = True

    async def resume(self) -> None:
        self.llm.engine_core.engine_core.resume_scheduler()
        self.paused = False


@pytest.fixture
def card() -> Card:
    return Card()


@pytest.fixture
def state(card: Card, monkeypatch: pytest.MonkeyPatch) -> EngineState:
    """Our engine's weights and sleep, on vLLM's classes, with weights and a KV cache on a card."""
    from vllm.device_allocator import AllocationData, cumem, sleep_mode_backend
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.core_client import InprocClient
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.uniproc_executor import UniProcExecutor
    from vllm.v1.worker import gpu_worker

    allocator = cumem.CuMemAllocator()
    for tag, content in (("weights", b"version 0"), ("kv_cache", b"keys and values")):
        handle = card.allocate(tag, content)
        allocator.pointer_to_data[handle[2]] = AllocationData(handle, tag)
    monkeypatch.setattr("vllm.device_allocator.get_mem_allocator_instance", lambda: allocator)
    monkeypatch.setattr(cumem, "create_and_map", card.map)
    monkeypatch.setattr(cumem, "unmap_and_release", card.unmap)
    monkeypatch.setattr(cumem, "libcudart", SimpleNamespace(cudaMemcpy=card.copy))
    monkeypatch.setattr(cumem, "PIN_MEMORY", False)
    accelerator = SimpleNamespace(
        synchronize=lambda *_: None,
        is_available=lambda: True,
        empty_cache=lambda: None,
        get_memory_info=lambda: ((10 - len(card.mapped)) * GIB, 10 * GIB),
    )
    monkeypatch.setattr("torch.accelerator", accelerator)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)

    worker: Any = object.__new__(gpu_worker.Worker)
    worker.vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(enable_nccl_comm_suspend=False)
    )
    worker._sleep_mode_backend = sleep_mode_backend.CuMemBackend()
    worker._sleep_saved_parameters = worker._sleep_saved_buffers = {}
    worker._sleep_saved_draft_buffers = {}
    worker.model_runner = SimpleNamespace(model=Model())

    def rpc(method: str, *, kwargs: Any = None, args: Any = ()) -> list[Any]:
        if method in ("sleep", "wake_up"):
            return [getattr(worker, method)(*args, **(kwargs or {}))]
        if method == "update_weights":
            (address,) = (a for a, d in allocator.pointer_to_data.items() if d.tag == "weights")
            assert address in card.mapped, "weights come before there is memory for them"
            card.arrays[address][:] = np.frombuffer(kwargs["update_info"]["bytes"], np.uint8)
        card.calls.append(method)
        return [None]

    executor: Any = object.__new__(UniProcExecutor)
    executor.sleeping_tags = set()
    executor.collective_rpc = rpc
    core: Any = object.__new__(EngineCore)
    core.model_executor, core.batch_queue = executor, None
    core.scheduler = SimpleNamespace(
        pause_state=PauseState.UNPAUSED,
        set_pause_state=lambda state: setattr(core.scheduler, "pause_state", state),
        reset_prefix_cache=lambda *_: True,
        reset_encoder_cache=lambda: None,
        has_unfinished_requests=lambda: False,
    )
    core.mm_receiver_cache = None
    core.reset_mm_cache = lambda: None
    client: Any = object.__new__(InprocClient)
    client.engine_core = core
    llm: Any = object.__new__(LLMEngine)
    llm.engine_core, llm.logger_manager = client, None
    llm.renderer = SimpleNamespace(clear_mm_cache=lambda: None)
    llm.set_weight_version = lambda version: None
    llm.collective_rpc = rpc
    return EngineState(Thread(llm), "sampler-0", frozen=False)  # type: ignore[arg-type]


def play(*steps: Any) -> None:
    async def all_of_them() -> None:
        for step in steps:
            await step

    asyncio.run(all_of_them())


def device(card: Card) -> list[str]:
    """What was asked of the device and the workers since the last call, but for waiting."""
    idle = ("synchronize_device", "reset_encoder_cache", "reset_mm_cache")
    calls, card.calls = [call for call in card.calls if call not in idle], []
    return calls


def is_paused(state: EngineState) -> bool:
    thread: Any = state._llm
    assert thread.paused == thread.llm.engine_core.engine_core.is_scheduler_paused()
    return bool(thread.paused)


def test_weights_wait_in_main_memory_and_come_back_before_the_cache(
    card: Card, state: EngineState
) -> None:
    play(state.sleep())
    assert device(card) == ["unmap weights", "unmap kv_cache"] and not card.mapped
    assert is_paused(state) and state._llm.llm.is_sleeping()  # type: ignore[attr-defined]
    play(state.wake())
    assert device(card) == ["map weights", "map kv_cache"]
    assert card.content("weights") == b"version 0", "a step may bring none"
    assert not is_paused(state)
    play(state.wake())
    assert device(card) == []


def test_new_weights_arrive_between_the_two_and_requests_come_last(
    card: Card, state: EngineState
) -> None:
    play(state.sleep())
    device(card)
    play(state.begin_weight_update())
    assert device(card) == ["map weights", "start_weight_update"]
    play(state.load_weights({"bytes": b"version 1"}), state.finish_weight_update(1))
    assert device(card) == ["update_weights", "finish_weight_update"]
    assert is_paused(state), "no request before the cache is there"
    play(state.wake())
    assert device(card) == ["map kv_cache"] and not is_paused(state)
    assert card.content("weights") == b"version 1"
    # And so it goes on, turn after turn.
    play(state.sleep(), state.wake())
    assert card.content("weights") == b"version 1" and not is_paused(state)


def test_an_engine_that_is_awake_takes_weights_as_ever(card: Card, state: EngineState) -> None:
    play(state.begin_weight_update(), state.load_weights({"bytes": b"version 1"}))
    play(state.finish_weight_update(1))
    assert device(card) == ["start_weight_update", "update_weights", "finish_weight_update"]
    assert not is_paused(state)
