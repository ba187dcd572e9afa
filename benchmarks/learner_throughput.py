"""How near does an update come to a bare PyTorch loop's, and to what the same cores multiply?

    python -m benchmarks.learner_throughput [--threads 2] [--repeats 5]
    python -m benchmarks.learner_throughput --model build/pretrained/model --dtypes bfloat16

Rollout-like groups of the demo's tasks, terse and verbose, through a real `DeepSpeedLearner` on
one rank: forward, backward, AdamW. The shipped policy (1.8 M parameters), the same family at about
30 M, or a model of one's own. Operations are counted by torch's own counter while an update runs,
so padding counts as work done; the share of it is printed beside. Each update is timed between two
matrix products of 1024 x 1024 in the policy's type and beside one of a bare loop on ready
micro-batches of the same layout: forward, loss, backward, clipping, AdamW. So all meet the same
noise; ratios are pair by pair. The bare loop keeps no float32 masters of bfloat16 weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine, tables
from benchmarks.policies import SHIPPED, larger_model
from cluster.recipe.recipe import load_recipe
from learner.batch import Layout, TrainBatch, TrainSequence
from learner.collate import Collator
from learner.engine import DeepSpeedLearner
from learner.loss_settings import LossConfig
from learner.micro_batches import count_costs, deal_micro_batches, describe
from learner.policy import load_policy
from learner.policy_loss import PolicyLoss
from learner.settings import CheckpointConfig, LearnerConfig
from learner.sft import Demonstrator
from learner.trainer import LearnerSetup, WorldPlace
from rollout.settings import ModelConfig, TransferConfig
from rollout.tokens import load_processor
from tasks.load import load_task
from tasks.splits import draw_problem

ROOT = Path(__file__).resolve().parents[1]
GROUP = 8
SIZES = {"2M": 8, "30M": 2}
"""Policies that are made here, and the groups in an update of each."""
SIDE = 1024
WAYS: tuple[tuple[Layout, int], ...] = (
    ("padded", 1),
    ("padded", 2048),
    ("packed", 2048),
    ("shared_prefix", 2048),
)
"""Before: every sequence alone. After: micro-batches of like lengths, and what packing adds."""
KEYS = ("size", "dtype", "layout", "micro-batch", "threads")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--model", type=Path, help="a folder, in place of --sizes")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="as model.dtype")
    parser.add_argument("--layouts", nargs="+", default=[layout for layout, _ in WAYS[1:]])
    parser.add_argument("--problems", type=int, help="groups an update, in place of the size's own")
    parser.add_argument("--to", type=Path, help="a JSON file; without it docs/ is written")
    parser.add_argument("--busy-ok", action="store_true", help="run beside other work all the same")
    args = parser.parse_args()
    machine.refuse_if_busy(args.busy_ok)
    ways = [way for way in WAYS if way[0] in args.layouts]
    with tempfile.TemporaryDirectory(prefix="equipoise-bench-") as scratch:
        for size, path in policies(args.sizes, args.model, args.seed, Path(scratch)).items():
            batch = groups(args.problems or SIZES.get(size, 2), args.seed, path)
            for dtype in args.dtypes:
                rows = [
                    {
                        "size": size,
                        "dtype": dtype,
                        "layout": layout,
                        "micro-batch": budget,
                        "threads": args.threads,
                    }
                    | measure(path, batch, dtype, layout, budget, args.threads, args.repeats)
                    for layout, budget in ways
                ]
                tables.keep("learner", KEYS, rows, args.to)


def policies(sizes: Sequence[str], own: Path | None, seed: int, scratch: Path) -> dict[str, Path]:
    """Size -> folder; of one's own model the size is counted."""
    if own:
        shapes = load_policy(str(own))[0].parameters()
        return {f"{sum(p.numel() for p in shapes) / 1e6:.0f}M": own}
    if "30M" in sizes:
        larger_model(str(SHIPPED), seed).save_pretrained(scratch)
        load_processor(str(SHIPPED)).save_pretrained(scratch)
    return {size: SHIPPED if size == "2M" else scratch for size in sizes}


def measure(
    path: Path,
    batch: TrainBatch,
    dtype: str,
    layout: Layout,
    budget: int,
    threads: int,
    repeats: int,
) -> tables.Row:
    """The columns of an update with micro-batches of at most `budget` tokens."""
    learning = LearnerConfig(
        zero_stage=0,
        learning_rate=1e-6,
        layout=layout,
        micro_batch_tokens=budget,
        threads=threads,
    )
    model = ModelConfig.model_validate({"path": str(path), "dtype": dtype})
    setup = LearnerSetup(model, learning, TransferConfig(), CheckpointConfig())
    learner = DeepSpeedLearner(setup, WorldPlace(master="127.0.0.1:29610"))
    logprobs = learner.logprobs(batch)
    batch = TrainBatch(
        tuple(
            replace(s, sampler_logprobs=measured)
            for s, measured in zip(batch.sequences, logprobs, strict=True)
        )
    )
    with FlopCounterMode(display=False) as counter:
        metrics = learner.update(batch, PolicyLoss(LossConfig()))
    work = float(counter.get_total_flops())
    tokens = sum(len(s) for s in batch.sequences)
    loop = BareLoop(path, batch, dtype, layout, budget)
    loop.update()
    shared, of_peak = machine.Shared(), []
    ours: list[float] = []
    bare: list[float] = []
    for repeat in range(repeats):
        before = matmul_rate(dtype)
        for measured, update in ((ours, partial(learner.update, batch, PolicyLoss(LossConfig()))),
                              (bare, loop.update))[:: 1 if repeat % 2 else -1]:  # fmt: skip
            start = time.perf_counter()
            update()
            measured.append(time.perf_counter() - start)
        of_peak.append(work / ours[-1] / ((before + matmul_rate(dtype)) / 2))
    learner.close()
    return {
        "ours over bare": tables.spread(tables.ratios(bare, ours)),
        "of the matmul peak": tables.spread(of_peak),
        "tokens/s: ours": f"{tokens / statistics.median(ours):,.0f}",
        "bare": f"{tokens / statistics.median(bare):,.0f}",
        "GFLOP": f"{work / 1e9:,.1f}",
        "padding": f"{metrics['padding_share']:.1%}",
        "pairs": repeats,
        "foreign": f"{shared.foreign():.0%}",
        "machine": machine.where(),
        "command": machine.command("benchmarks.learner_throughput"),
    }


class BareLoop:
    """What PyTorch takes for the same micro-batches, ready beforehand: no engine, no metrics."""

    def __init__(
        self, path: Path, batch: TrainBatch, dtype: str, layout: Layout, budget: int
    ) -> None:
        self._policy, processor = load_policy(str(path), dtype)
        self._policy.train()
        collate = Collator(self._policy, processor, layout)
        items = [describe(s, collate.image_token_id) for s in batch.sequences]
        costs = count_costs(self._policy, collate.blank)
        (dealt,) = deal_micro_batches(items, 1, budget, layout, costs)
        self._micros = [collate([batch.sequences[i] for i in indices]) for indices in dealt]
        self._tokens = batch.response_tokens()
        self._optimizer = torch.optim.AdamW(self._policy.parameters(), lr=1e-6, weight_decay=0.0)

    def update(self) -> None:
        """Forward and backward of all micro-batches, one optimizer step."""
        for micro in self._micros:
            logprobs, _ = self._policy.run(micro)
            ratio = torch.exp(logprobs - micro.tokens.sampler_logprobs)
            gain = torch.minimum(
                ratio * micro.tokens.advantages, ratio.clamp(0.8, 1.28) * micro.tokens.advantages
            )
            (-gain.sum() / self._tokens).backward()
        torch.nn.utils.clip_grad_norm_(self._policy.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


def matmul_rate(dtype: str, seconds: float = 0.5) -> float:
    """Floating-point operations a second of a product of two square matrices."""
    multiplied = torch.float32 if dtype == "float32" else torch.bfloat16  # `mixed` too
    a, b = torch.randn(2, SIDE, SIDE, dtype=multiplied)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        torch.mm(a, b)
        count += 1
    return count * 2 * SIDE**3 / (time.perf_counter() - start)


def groups(problems: int, seed: int, model: Path) -> TrainBatch:
    """Groups of 8 responses to problems of the demo's tasks, half terse, half verbose."""
    recipe = load_recipe(ROOT / "recipes" / "tiny" / "demo.toml")
    rng = np.random.default_rng(seed)
    demonstrator = Demonstrator(load_processor(str(model)))
    sequences: list[TrainSequence] = []
    for index in range(problems):
        config = recipe.tasks[index % len(recipe.tasks)]
        task: Any = load_task(config.name)
        problem = draw_problem(task, task.spec(**config.knobs), "train", seed, index)
        for rollout_index in range(GROUP):
            style = "verbose" if rollout_index % 2 else "terse"
            sequence = demonstrator.sequence(task, problem, task.demonstrate(problem, style))
            advantages = np.full(len(sequence.response_ids), rng.normal(), np.float32)
            sequences.append(replace(sequence, advantages=advantages))
    return TrainBatch(tuple(sequences))


if __name__ == "__main__":
    main()
