"""How much memory does a learner rank take, by ZeRO stage?

    python -m benchmarks.learner_memory                  # stages 0, 2 and 3 on two ranks
    python -m benchmarks.learner_memory --lora 16        # the same with adapters only
    python -m benchmarks.learner_memory --activations    # what a layer keeps for its gradient

A random Qwen3-VL of about 30 M parameters learns a few updates, in processes of their own for each
stage. Printed for rank 0: the bytes of parameters, gradients and optimizer state that it holds
after an update, and how far its resident memory rose at most, from the model loaded to the end.
With `--activations`: layers of Qwen3-VL in several shapes, none larger than those of its 2 B, and
what autograd keeps of a token in a layer, beside the dry run's estimate.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import resource
import socket
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.policies import larger_model
from cluster.recipe.memory import PolicySize
from learner.batch import TrainBatch
from learner.losses import TokenMeanLoss
from learner.settings import CheckpointConfig, LearnerConfig, LoraConfig
from learner.sft import Demonstrator
from learner.tiny import make_tiny
from learner.trainer import LearnerSetup, WorldPlace
from rollout.settings import ModelConfig, TransferConfig
from tasks.load import load_task

MIB = 2**20
UPDATES = 3
TOKENS, HEAD = 64, 128
"""Of what a layer is measured with: tokens, and the width of an attention head."""
SEQUENCES = 16


@dataclass(frozen=True)
class Held:
    """Bytes on one rank. resident: the rise of its high-water mark since the model was loaded."""

    parameters: int
    gradients: int
    optimizer: int
    resident: int


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 2, 3])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 trains all")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--activations", action="store_true", help="of a layer, and no learner")
    args = parser.parse_args()
    if args.activations:
        print_activations()
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "policy"
        count = make_policy(folder)
        trained = f"adapters of rank {args.lora}" if args.lora else "all trained"
        again = ", activations recomputed" if args.recompute else ""
        print(
            f"{count:,} parameters in float32, {trained}{again}; {args.ranks} ranks, MiB on rank 0"
        )
        print("| ZeRO | parameters | gradients | optimizer | resident memory, rise |")
        print("|---|---|---|---|---|")
        for stage in args.stages:
            learning = LearnerConfig(
                zero_stage=stage,
                micro_batch_tokens=1024,
                activation_checkpointing=args.recompute,
                lora=LoraConfig(rank=args.lora) if args.lora else None,
                threads=1,
            )
            model = ModelConfig(path=str(folder))
            setup = LearnerSetup(model, learning, TransferConfig(), CheckpointConfig())
            measured = measure(setup, args.ranks)
            row = (measured.parameters, measured.gradients, measured.optimizer, measured.resident)
            print(f"| {stage} | " + " | ".join(f"{size / MIB:,.0f}" for size in row) + " |")


def print_activations() -> None:
    """Print what a layer keeps, in bytes a token and unit of width."""
    print("| width, MLP, queries, keys | weights | kept | estimate | recomputed |")
    print("|---|---|---:|---:|---:|")
    for shape in ((512, 1536, 512, 256), (512, 2048, 1024, 256), (2048, 6144, 2048, 1024)):
        size = PolicySize(0, shape[0], 1, 0, *shape[1:])
        for name in ("bfloat16", "float32"):
            dtype = getattr(torch, name)
            estimated = dtype.itemsize * size.kept_by_a_layer(exact=name == "float32")
            rest = (
                kept_by_a_layer(size, dtype),
                estimated,
                kept_by_a_layer(size, dtype, again=True),
            )
            cells = " | ".join(f"{value / size.hidden:.1f}" for value in rest)
            print(f"| {', '.join(map(str, shape))} | {name} | {cells} |")


def kept_by_a_layer(size: PolicySize, dtype: torch.dtype, again: bool = False) -> float:
    """Bytes a token that autograd keeps for one more layer of Qwen3-VL's text model.

    `again`: with activation checkpointing. Weights do not count, and none are looked at.
    """
    one, two = (_kept_bytes(size, layers, dtype, again) for layers in (1, 2))
    return (two - one) / TOKENS


def _kept_bytes(size: PolicySize, layers: int, dtype: torch.dtype, again: bool) -> int:
    from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

    sections = [HEAD // 2 - 2 * (HEAD // 6), HEAD // 6, HEAD // 6]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = Qwen3VLTextConfig(
        vocab_size=8,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=layers,
        num_attention_heads=size.queries // HEAD,
        num_key_value_heads=size.keys // HEAD,
        head_dim=HEAD,
        rope_parameters=rope | {"mrope_interleaved": True},
    )
    model = Qwen3VLTextModel._from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameter_storage = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameter_storage:
            saved.append(tensor)
        return tensor

    states = torch.randn(1, TOKENS, size.hidden, dtype=dtype, requires_grad=True)
    positions = torch.arange(TOKENS).expand(3, 1, TOKENS)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs_embeds=states, position_ids=positions, use_cache=False)
    return storage(saved)


def make_policy(folder: Path) -> int:
    """Write a random policy, larger than the tiny ones, with their tokenizer; its size."""
    make_tiny("qwen3_vl", folder)
    model = larger_model(str(folder))
    model.save_pretrained(folder)
    return int(sum(p.numel() for p in model.parameters()))


def measure(setup: LearnerSetup, ranks: int) -> Held:
    """What rank 0 of a fresh learner holds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        master = f"127.0.0.1:{probe.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(setup, WorldPlace(rank, ranks, master), results))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a rank failed; its error is above")
    measured: Held = results.get()
    return measured


def _rank(setup: LearnerSetup, world: WorldPlace, results: Any) -> None:
    from learner.engine import DeepSpeedLearner

    learner = DeepSpeedLearner(setup, world)
    batch = make_batch(learner.processor)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gradients = 0
    step = learner._step

    def watched() -> float:
        nonlocal gradients
        gradients = gradient_bytes(learner._engine, setup.learner.zero_stage)
        return step()

    learner._step = watched  # type: ignore[method-assign]
    for _ in range(UPDATES):
        learner.update(batch, TokenMeanLoss(), 1e-4)
    rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if world.rank == 0:
        engine = learner._engine
        results.put(Held(parameter_bytes(engine), gradients, optimizer_bytes(engine), rise))
    learner.close()
    os._exit(0)


def make_batch(processor: Any) -> TrainBatch:
    """Demonstrations of the Sudoku task."""
    task, demonstrator = load_task("sudoku"), Demonstrator(processor)
    spec = task.spec(size=4, blanks=8, cell_size=16, font_size=12, margin=0, prompt="brief")
    problems = [task.generate(np.random.default_rng(i), spec) for i in range(SEQUENCES)]
    return TrainBatch(
        tuple(demonstrator.sequence(task, p, task.demonstrate(p, "terse")) for p in problems)
    )


def parameter_bytes(engine: Any) -> int:
    """Of the weights: under ZeRO-3 this rank's parts of them."""
    return storage(weights_of(engine))


def weights_of(engine: Any) -> list[torch.Tensor]:
    """The weights that this rank holds between updates."""
    return [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]


def gradient_bytes(engine: Any, stage: int) -> int:
    """Of the gradients that wait for the step."""
    if stage == 0:
        return storage(p.grad for p in engine.module.parameters() if p.grad is not None)
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return storage([*gradients, *tensors_in(vars(engine.optimizer).get("averaged_gradients", {}))])


def optimizer_bytes(engine: Any) -> int:
    """Of AdamW's moments, and of the float32 weights it steps on where the model has others."""
    parameter_storage = {t.untyped_storage().data_ptr() for t in weights_of(engine)}
    state = engine.optimizer.state
    tensors = [*state, *tensors_in(list(state.values()))]
    return storage(t for t in tensors if t.untyped_storage().data_ptr() not in parameter_storage)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested tables and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for below in value.values():
            yield from tensors_in(below)
    elif isinstance(value, list | tuple):
        for below in value:
            yield from tensors_in(below)


def storage(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory behind tensors, each piece of it once."""
    bytes_of = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(bytes_of.values())


if __name__ == "__main__":
    main()
