"""How near does an update of the learner come to what the same cores multiply?

    python -m benchmarks.learner_throughput [--threads 2] [--repeats 5]

Rollout-like groups of the demo's tasks, terse and verbose, through a real `DeepSpeedLearner` on
one rank: forward, backward, AdamW. The shipped policy (1.8 M parameters) and the same family at
about 30 M. Operations are counted by torch's own counter while an update runs, so padding counts
as work done; the share of it is printed beside. Each update is timed between two float32 matrix
products of 1024 x 1024, so that both meet the same noise; the ratio is the median over repeats.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.larger import larger_model
from cluster.recipe.recipe import load_recipe
from learner.batch import Layout, TrainBatch, TrainSequence
from learner.engine import DeepSpeedLearner
from learner.loss_settings import LossConfig
from learner.policy_loss import PolicyLoss
from learner.settings import CheckpointConfig, LearnerConfig
from learner.sft import Demonstrator
from learner.trainer import LearnerSetup, WorldPlace
from rollout.settings import ModelConfig, TransferConfig
from rollout.tokens import load_processor
from tasks.load import load_task
from tasks.splits import draw_problem

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "models" / "tiny-qwen3-vl"
GROUP = 8
PROBLEMS = (8, 2)
"""Groups in an update of the small and of the larger policy."""
SIDE = 1024
WAYS: tuple[tuple[Layout, int], ...] = (
    ("padded", 1),
    ("padded", 2048),
    ("packed", 2048),
    ("shared_prefix", 2048),
)
"""Before: every sequence alone. After: micro-batches of like lengths, and what packing adds."""


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="equipoise-bench-") as scratch:
        larger = Path(scratch) / "30m"
        model = larger_model(str(SHIPPED), given.seed)
        print(f"larger: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
        model.save_pretrained(larger)
        load_processor(str(SHIPPED)).save_pretrained(larger)
        for place, path in enumerate((SHIPPED, larger)):
            batch = groups(PROBLEMS[place], given.seed)
            for layout, budget in WAYS:
                measure(path, batch, layout, budget, given.threads, given.repeats, place)


def measure(
    path: Path,
    batch: TrainBatch,
    layout: Layout,
    budget: int,
    threads: int,
    repeats: int,
    place: int,
) -> None:
    """One line: an update with micro-batches of at most `budget` tokens."""
    learning = LearnerConfig(
        zero_stage=0,
        learning_rate=1e-6,
        layout=layout,
        micro_batch_tokens=budget,
        threads=threads,
    )
    setup = LearnerSetup(
        ModelConfig(path=str(path)), learning, TransferConfig(), CheckpointConfig()
    )
    learner = DeepSpeedLearner(setup, WorldPlace(master=f"127.0.0.1:{29610 + place}"))
    logprobs = learner.logprobs(batch)
    batch = TrainBatch(
        tuple(
            replace(s, sampler_logprobs=found)
            for s, found in zip(batch.sequences, logprobs, strict=True)
        )
    )
    with FlopCounterMode(display=False) as counter:
        metrics = learner.update(batch, PolicyLoss(LossConfig()))
    work = float(counter.get_total_flops())
    tokens = sum(len(s) for s in batch.sequences)
    ratios, rates = [], []
    for _ in range(repeats):
        before = matmul_rate()
        start = time.perf_counter()
        learner.update(batch, PolicyLoss(LossConfig()))
        seconds = time.perf_counter() - start
        peak = (before + matmul_rate()) / 2
        ratios.append(work / seconds / peak)
        rates.append(tokens / seconds)
    print(
        f"{path.name:16} {layout:13} {budget:5}  {work / 1e9:8.1f} GFLOP  "
        f"padding {metrics['padding_share']:.1%}  {statistics.median(rates):8,.0f} tokens/s  "
        f"{statistics.median(ratios):.1%} of the matmul peak",
        flush=True,
    )


def matmul_rate(seconds: float = 0.5) -> float:
    """Floating-point operations a second of a float32 product of two square matrices."""
    left, right = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        torch.mm(left, right)
        count += 1
    return count * 2 * SIDE**3 / (time.perf_counter() - start)


def groups(problems: int, seed: int) -> TrainBatch:
    """Groups of 8 responses to problems of the demo's tasks, half terse, half verbose."""
    recipe = load_recipe(ROOT / "recipes" / "tiny" / "demo.toml")
    rng = np.random.default_rng(seed)
    demonstrator = Demonstrator(load_processor(str(SHIPPED)))
    sequences: list[TrainSequence] = []
    for index in range(problems):
        config = recipe.tasks[index % len(recipe.tasks)]
        task: Any = load_task(config.name)
        problem = draw_problem(task, task.spec(**config.knobs), "train", seed, index)
        for place in range(GROUP):
            style = "verbose" if place % 2 else "terse"
            found = demonstrator.sequence(task, problem, task.demonstrate(problem, style))
            advantages = np.full(len(found.response_ids), rng.normal(), np.float32)
            sequences.append(replace(found, advantages=advantages))
    return TrainBatch(tuple(sequences))


if __name__ == "__main__":
    main()
