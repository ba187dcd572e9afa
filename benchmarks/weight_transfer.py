"""How long do new weights take to reach a live engine, and how much memory do they need on the way?

    python -m benchmarks.weight_transfer

A random Qwen3-VL of about 100 million parameters, from a learner's weight source in one process
through Ray's object store into a sampler with a real vLLM engine on this machine, against a copy
of the same bytes in memory, in turns. Extra memory of a process: the high-water mark of its
resident memory during a transfer less what it held before; the engine is a thread of the sampler's.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from benchmarks import machine, tables
from learner.tiny import make_tiny
from learner.weights import GatheredWeights, stored
from rollout.record import Weights
from rollout.sampler import ray_samplers
from rollout.settings import ModelConfig, SamplerConfig, TransferConfig
from rollout.transfer import TransferReport

HIDDEN, INTERMEDIATE, LAYERS = 768, 3072, 11
DEADLINE = 600.0


@ray.remote(num_cpus=0)
class Source:
    """Rank 0 of a learner, as far as weights go: one rank holds whole parameters."""

    def __init__(self, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        model = Qwen3VLForConditionalGeneration.from_pretrained(folder)
        bucket = int(TransferConfig().bucket_mib * 2**20)
        self._source = GatheredWeights(model, nullcontext, torch.float32, bucket)
        self._target = {name: torch.empty_like(t).fill_(0) for name, t in self._source}

    def publish(self) -> Iterator[Any]:
        """See `learner.actor.LearnerRank`."""
        yield from stored(self._source.iter_groups())

    def copy_seconds(self) -> float:
        """Wall time of a copy of all weights into memory that is there already."""
        start = time.perf_counter()
        for name, tensor in self._source:
            self._target[name].copy_(tensor)
        return time.perf_counter() - start

    def pid(self) -> int:
        """Of this process."""
        return os.getpid()


def main() -> None:
    """Print the times and the memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the engine and of the learner")
    parser.add_argument("--to", type=Path, help="a JSON file; without it docs/ is written")
    parser.add_argument("--busy-ok", action="store_true", help="run beside other work all the same")
    args = parser.parse_args()
    machine.refuse_if_busy(args.busy_ok)
    variables = {"PYTHONPATH": os.getcwd()}
    with tempfile.TemporaryDirectory() as folder:
        million = scaled_model(Path(folder)) / 1e6
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": variables},
        )
        source = Source.remote(folder, args.threads)  # type: ignore[attr-defined]
        settings = SamplerConfig(threads=args.threads)
        sampler = ray_samplers(ModelConfig(path=folder, max_model_len=256), settings)("sampler-0")
        ray.get(sampler.call("ready", None), timeout=DEADLINE)
        seconds_of: dict[str, list[float]] = {"publish": [], "fetch and load": [], "memcpy": []}
        below = [(p.pid, "".join(p.cmdline())) for p in psutil.Process().children(recursive=True)]
        watched = {"learner": ray.get(source.pid.remote())}
        watched["sampler"] = next(pid for pid, line in below if line.startswith("ray::Sampler"))
        extra: dict[str, list[float]] = {name: [] for name in watched}
        # What is done once is not timed: pages, vLLM's first reload.
        weights = transfer(source, sampler, 1, seconds_of)
        shared = machine.Shared()
        for spent in seconds_of.values():
            spent.clear()
        for version in range(2, args.repeats + 2):
            seconds_of["memcpy"].append(ray.get(source.copy_seconds.remote()))
            before = {name: reset_high_water(pid) for name, pid in watched.items()}
            weights = transfer(source, sampler, version, seconds_of)
            for name, pid in watched.items():
                extra[name].append((high_water(pid) - before[name]) / 2**20)
        foreign = shared.foreign()
        sampler.kill()
        ray.shutdown()
    report = TransferReport.of(weights, 0.0)
    whole = [
        p + f for p, f in zip(seconds_of["publish"], seconds_of["fetch and load"], strict=True)
    ]
    row = {
        "parameters, M": f"{million:.1f}",
        "threads": args.threads,
        "times a memcpy": tables.spread(tables.ratios(whole, seconds_of["memcpy"]), 1),
        "transfer, s": tables.spread(whole, 3),
        **{f"{name}, s": tables.spread(spent, 3) for name, spent in seconds_of.items()},
        "MiB": f"{report.bytes / 2**20:.0f}",
        "tensors": sum(map(len, weights.manifest)),
        "buckets": report.groups,
        **{f"{name}'s extra MiB": tables.spread(rises, 0) for name, rises in extra.items()},
        "foreign": f"{foreign:.0%}",
        "machine": machine.where(),
        "command": machine.command("benchmarks.weight_transfer"),
    }
    tables.keep("transfer", ("parameters, M", "threads"), [row], args.to)


def transfer(
    source: Any, sampler: Any, version: int, seconds_of: dict[str, list[float]]
) -> Weights:
    """Publish a version and have the sampler load it; the seconds of both go into `seconds_of`."""
    start = time.perf_counter()
    *buckets, manifest = source.publish.remote()
    weights = Weights(version, ray.get(manifest, timeout=DEADLINE), tuple(buckets))
    published = time.perf_counter()
    ray.get(sampler.call("renew", weights), timeout=DEADLINE)
    seconds_of["publish"].append(published - start)
    seconds_of["fetch and load"].append(time.perf_counter() - published)
    return weights


def scaled_model(folder: Path) -> int:
    """A tiny Qwen3-VL's checkpoint, its text model of about 100 million weights; how many."""
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
    return sum(p.numel() for p in model.parameters())


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
    matching = next(line for line in lines if line.startswith(f"{field}:"))
    return int(matching.split()[1]) * 1024


if __name__ == "__main__":
    main()
