"""Which layout of a micro-batch learns fastest on this machine?

    python -m benchmarks.layouts

Deals, collates and takes the gradient of one update's batch in each layout, one after the other in
turns, on one thread. Printed is the processor time against that of `padded` in the same turn, the
median of the turns with the lowest and the highest, and the shares of padding and of shared tokens.
Batches are of both tasks, with the shipped tokenizer and pictures: `rl`, groups of 8 rollouts of
the shipped policy's length; `rl long`, groups whose responses are terse and verbose; `sft`,
demonstrations of both styles, each of a problem of its own. Models are the shipped one and one of
its kind with about 30 M parameters.

Measured on a busy machine at 1.9 M parameters, `rl` of 128 sequences (33.5 % of its tokens shared),
three turns: packed 1.01 (0.92 to 1.10); shared_prefix 0.76 at micro-batches of 1,024 tokens, 0.83
at 2,048 and 0.84 at 8,192 (0.74 to 0.90). The other batches and the larger model have not been
measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.policies import larger_model
from learner.batch import Layout, TrainSequence
from learner.collate import Collator
from learner.micro_batches import count_costs, deal_micro_batches, describe
from learner.policy import Policy, load_policy
from learner.sft import Demonstrator
from tasks.core import Problem, Style, Task
from tasks.load import load_task

MODEL = "models/tiny-qwen3-vl"
GROUP = 8
KNOBS: dict[str, dict[str, Any]] = {
    "sudoku": {"size": 4, "blanks": 8, "cell_size": 16, "font_size": 12, "margin": 0},
    "graph_coloring": {"vertices": 6, "canvas": 64, "layout": "circle", "label_size": 0},
}
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--budgets", type=int, nargs="+", default=[8192])
    parser.add_argument("--models", nargs="+", default=["shipped", "larger"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    shipped, processor = load_policy(MODEL)
    for model, problems in (("shipped", 16), ("larger", 4)):
        if model not in args.models:
            continue
        policy = shipped if model == "shipped" else Policy(larger_model(MODEL))
        size = sum(p.numel() for p in policy.parameters()) / 1e6
        for name, batch in batches(processor, problems).items():
            for budget in args.budgets:
                print(f"{size:.1f} M parameters, {name}, {len(batch)} sequences, budget {budget}")
                compare(policy, processor, batch, budget, args.turns)


def compare(
    policy: Policy, processor: Any, batch: list[TrainSequence], budget: int, turns: int
) -> None:
    """Print one line a layout."""
    seconds: dict[Layout, list[float]] = {layout: [] for layout in LAYOUTS}
    shares: dict[Layout, str] = {}
    for turn in range(turns + 1):
        for layout in LAYOUTS:
            spent, shares[layout] = learn(policy, processor, batch, budget, layout)
            if turn:  # the first warms up
                seconds[layout].append(spent)
    for layout in LAYOUTS:
        ratios = [a / b for a, b in zip(seconds[layout], seconds["padded"], strict=True)]
        print(
            f"  {layout:14} {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}), "
            f"{statistics.median(seconds[layout]):.2f} s; {shares[layout]}",
            flush=True,
        )


def learn(
    policy: Policy, processor: Any, batch: list[TrainSequence], budget: int, layout: Layout
) -> tuple[float, str]:
    """Processor seconds of the gradient of a batch, and what its micro-batches held."""
    collate = Collator(policy, processor, layout)
    costs = count_costs(policy, collate.blank)
    policy.zero_grad()
    start = time.process_time()
    items = [describe(s, collate.image_token_id) for s in batch]
    (dealt,) = deal_micro_batches(items, 1, budget, layout, costs)
    slots = real = shared = 0
    for indices in dealt:
        micro = collate([batch[i] for i in indices])
        logprobs, _ = policy.run(micro)
        logprobs.mean().backward()
        slots += micro.inputs["input_ids"].numel()
        real += micro.real_tokens
        shared += micro.shared_tokens
    spent = time.process_time() - start
    return spent, (
        f"{len(dealt)} micro-batches, {1 - real / slots:.1%} padding, "
        f"{shared / (real + shared):.1%} shared"
    )


def batches(processor: Any, problems: int) -> dict[str, list[TrainSequence]]:
    """The batches by name: `problems` groups of terse responses, a quarter of as many others."""
    of_kind: dict[str, list[TrainSequence]] = {"rl": [], "rl long": [], "sft": []}
    demonstrate = Demonstrator(processor)
    rng = np.random.default_rng(0)
    for index in range(problems * GROUP):
        name = ("sudoku", "sudoku", "graph_coloring")[index // GROUP % 3]
        task = load_task(name)
        spec = task.spec(**KNOBS[name], prompt="brief")
        problem = _problem(task, spec, index // GROUP)
        answered = _problem(task, spec, 1000 + index)

        def sequence(of: Problem, style: Style, task: Task = task) -> TrainSequence:
            return demonstrate.sequence(task, of, task.demonstrate(of, style))

        def rollout(style: Style, problem: Problem = problem, answered: Problem = answered) -> Any:
            """A response of the length that another problem of the task takes."""
            prompt = sequence(problem, "terse")
            response = sequence(answered, style)
            return replace(response, prompt_ids=prompt.prompt_ids, images=prompt.images)

        of_kind["rl"].append(rollout("terse"))
        if index < problems // 4 * GROUP:
            either: Style = get_args(Style)[int(rng.integers(2))]
            of_kind["rl long"].append(rollout(either))
            of_kind["sft"].append(sequence(answered, either))
    return of_kind


def _problem(task: Task, spec: Any, seed: int) -> Problem:
    return task.generate(np.random.default_rng([seed, 7]), spec)


if __name__ == "__main__":
    main()
