"""How long do new weights take to reach a live engine, and how much memory do they need on the way?

    python -m benchmarks.weight_transfer

A random Qwen3-VL of about 100 million parameters, from a learner's weight source through
`HostSender` into a real vLLM engine on this machine, against a copy of the same bytes in memory,
in turns. Extra memory of sender and engine: the high-water mark of a process's resident memory
during a transfer less what it held before; to it come two files in shared memory. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import threading
import time
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from learner.tiny import make_tiny
from learner.weights import GatheredWeights
from rollout.engine import Engine, EngineSettings
from rollout.settings import TransferConfig
from rollout.transfer import HostSender

HIDDEN, INTERMEDIATE, LAYERS = 768, 3072, 11
DEADLINE = 600.0


def main() -> None:
    """Print the times and the memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the engine and of the learner")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = scaled_model(Path(folder))
        # One rank holds whole parameters, so there is nothing to gather.
        bucket = int(TransferConfig().bucket_mib * 2**20)
        source = GatheredWeights(model, nullcontext, torch.float32, bucket)
        names = [meta.name for meta in source.metadata()]
        client = EngineClient(EngineSettings(folder, max_model_len=256, threads=given.threads))
        sender = HostSender([client], DEADLINE)
        sender.send(source, 1, 0)  # what is done once is not timed: pages, vLLM's first reload
        engine = next(
            p.pid for p in psutil.Process().children(recursive=True) if "VLLM" in p.name()
        )
        seconds, copies = [], []
        extra: dict[int, list[int]] = {os.getpid(): [], engine: []}
        target = {name: torch.empty_like(t).fill_(0) for name, t in source}
        report = None
        client.seconds.clear()
        for version in range(2, given.repeats + 2):
            copies.append(copy_seconds(source, target))
            before = {process: reset_high_water(process) for process in extra}
            report = sender.send(source, version, 0)
            for process, rises in extra.items():
                rises.append(high_water(process) - before[process])
            assert report is not None
            seconds.append(report.seconds)
        assert report is not None
        client.stop()
    million = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{million:.1f} M parameters, {len(names)} tensors, {report.bytes / 2**20:.0f} MiB")
    print(f"groups: {report.groups}, largest {report.largest_group_bytes / 2**20:.1f} MiB")
    print(f"transfer: {spread(seconds)} s; memcpy of the same bytes: {spread(copies)} s")
    ratios = [t / c for t, c in zip(seconds, copies, strict=True)]
    print(f"transfer over memcpy, pair by pair: {spread(ratios)}")
    for method, spent in client.seconds.items():
        print(f"  of a transfer, waiting for {method}: {sum(spent) / given.repeats:.3f} s")
    waiting = sum(map(sum, client.seconds.values())) / given.repeats
    print(f"  the rest, gathering and writing: {statistics.mean(seconds) - waiting:.3f} s")
    for process, rises in extra.items():
        name = "engine" if process == engine else "sender"
        print(f"{name}'s extra resident memory: {spread([x / 2**20 for x in rises])} MiB")


def spread(values: list[float]) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def scaled_model(folder: Path) -> Any:
    """A tiny Qwen3-VL's checkpoint with a text model of about 100 million random weights."""
    make_tiny("qwen3_vl", folder)
    config = Qwen3VLConfig.from_pretrained(folder)
    text = config.text_config
    text.hidden_size, text.intermediate_size = HIDDEN, INTERMEDIATE
    text.num_hidden_layers, text.head_dim = LAYERS, 64
    text.num_attention_heads, text.num_key_value_heads = 12, 4
    text.rope_parameters = text.rope_parameters | {"mrope_section": [12, 10, 10]}
    text.layer_types = ["full_attention"] * LAYERS
    config.vision_config.out_hidden_size = HIDDEN
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config).to(torch.float32)
    model.save_pretrained(folder)
    return model


def copy_seconds(source: GatheredWeights, target: dict[str, torch.Tensor]) -> float:
    """Wall time of a copy of all weights into memory that is there already."""
    start = time.perf_counter()
    for name, tensor in source:
        target[name].copy_(tensor)
    return time.perf_counter() - start


class EngineClient:
    """An engine in this process's own event loop, as `rollout.transfer` sees a sampler."""

    name = "sampler-0"

    def __init__(self, settings: EngineSettings) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._engine = self._run(self._start(settings)).result(DEADLINE)

    def call(self, method: str, *args: Any) -> Future[Any]:
        return self._run(self._timed(method, *args))

    def wait(self, future: Future[Any], seconds: float) -> Any:
        return future.result(seconds)

    def stop(self) -> None:
        """Shut the engine's process down."""
        self._engine.shutdown()

    async def _start(self, settings: EngineSettings) -> Engine:
        return Engine.start(settings)

    async def _timed(self, method: str, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return await getattr(self._engine, method)(*args)
        finally:
            self.seconds.setdefault(method, []).append(time.perf_counter() - start)

    def _run(self, work: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def reset_high_water(process: int) -> int:
    """Forget the high-water mark of a process's resident memory; bytes resident now."""
    Path(f"/proc/{process}/clear_refs").write_text("5", encoding="ascii")
    return status(process, "VmRSS")


def high_water(process: int) -> int:
    """The most bytes that were resident since `reset_high_water`."""
    return status(process, "VmHWM")


def status(process: int, field: str) -> int:
    """A memory field of /proc/<process>/status in bytes."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    found = next(line for line in lines if line.startswith(f"{field}:"))
    return int(found.split()[1]) * 1024


if __name__ == "__main__":
    main()
