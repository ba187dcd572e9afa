"""How many rollouts a second do reward workers score, beside what the sampler makes?

    python -m benchmarks.score_rollouts             # made-up rollouts of both tasks, no engine
    python -m benchmarks.score_rollouts RUN         # the rollouts of a run, against its sampler

Every label-based term and the diagnosis, through the `RewardPool` that training uses, transport
to the workers and composition included. Responses are parsed by the sampler in training, so
parsing is timed on its own.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.record.stored import read_groups, read_metrics, stored_steps
from cluster.run.session import connected
from rewards.pool import RewardPool
from rewards.settings import RewardConfig, RewardTermConfig
from rollout.record import Group, Rollout
from rollout.tokens import label_segments
from tasks.core import Problem, Task
from tasks.load import load_task
from tasks.splits import draw_problem

TERMS = ("outcome", "perception", "perception_graded", "format")
TASKS = ("sudoku", "graph_coloring")
"""Those that draw their problems with nothing fetched."""
GROUP = 8
PROBLEMS = 64
"""Different problems a task; groups repeat them with other responses."""
CHARS_PER_TOKEN = 2
REPEATS = 5


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="a run folder; without it, made up")
    parser.add_argument("--rollouts", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    count = max(1, args.rollouts // GROUP)
    groups = stored(args.run, count) if args.run else made_up(count, args.seed)
    rollouts = sum(len(group.rollouts) for group in groups)
    where = f"of {args.run.name}" if args.run else "made up"
    print(f"{rollouts} rollouts in {len(groups)} groups, {where}; terms {', '.join(TERMS)}")
    print(f"parsing, in one process: {rollouts / parse_seconds(groups):,.0f} rollouts/s")

    seconds = score_seconds(groups, args.workers)
    rates = sorted(rollouts / s for s in seconds)
    rate = statistics.median(rates)
    print(
        f"scoring, {args.workers} workers: {rate:,.0f} rollouts/s (median of {len(rates)}; "
        f"{rates[0]:,.0f} to {rates[-1]:,.0f}), "
        f"{1e3 * statistics.median(seconds) / len(groups):.2f} ms a group"
    )
    if args.run:
        sampled = sampler_rate(args.run)
        print(f"the run's sampler: {sampled:,.1f} rollouts/s; scoring is {rate / sampled:,.0f}x")


def stored(run: Path, count: int) -> list[Group]:
    """`count` groups of a run, from its last step back and then over again."""
    stored_groups: list[Group] = []
    for step in reversed(stored_steps(run)):
        stored_groups += [stored.group for stored in read_groups(run, step)]
        if len(stored_groups) >= count:
            break
    return list(itertools.islice(itertools.cycle(stored_groups), count))


def made_up(count: int, seed: int) -> list[Group]:
    """`count` groups over the built-in tasks: demonstrations, most of them damaged."""
    tasks: list[Any] = [load_task(name) for name in TASKS]
    problems = [
        [draw_problem(task, task.spec(), "train", seed, i) for i in range(PROBLEMS)]
        for task in tasks
    ]
    rng = np.random.default_rng(seed)
    groups = []
    for index in range(count):
        which, index_in_task = index % len(tasks), index // len(tasks) % PROBLEMS
        task, problem = tasks[which], problems[which][index_in_task]
        text = task.demonstrate(problem, "terse")
        groups.append(group_of(task, problem, [damaged(text, rng) for _ in range(GROUP)], index))
    return groups


def damaged(text: str, rng: np.random.Generator) -> str:
    """A response as a policy in training may write it: whole, misread, cut short or repeated."""
    damage = rng.choice(["whole", "misread", "cut", "lost line", "repeated line"])
    if damage == "misread":
        characters = list(text)
        for position in rng.integers(len(text), size=rng.integers(1, 6)):
            characters[position] = text[rng.integers(len(text))]
        return "".join(characters)
    if damage == "cut":
        return text[: rng.integers(len(text))]
    lines = text.split("\n")
    position = int(rng.integers(len(lines)))
    if damage == "lost line":
        del lines[position]
    if damage == "repeated line":
        lines.insert(position, lines[position])
    return "\n".join(lines)


def group_of(task: Task, problem: Problem, texts: Sequence[str], index: int) -> Group:
    """A group with these responses; its tokens are stand-ins of a likely number."""
    rollouts = []
    for number, text in enumerate(texts):
        parsed = task.parse(text)
        offsets = np.arange(0, len(text) + CHARS_PER_TOKEN, CHARS_PER_TOKEN, dtype=np.int32)
        tokens = len(offsets) - 1
        rollouts.append(
            Rollout(
                rollout_id=f"{index}/{number}",
                group_id=str(index),
                kind="free",
                view="shown",
                prompt_ids=np.arange(256, dtype=np.int32),
                response_ids=np.arange(tokens, dtype=np.int32),
                images=(),
                logprobs=np.full(tokens, -0.5, np.float32),
                versions=np.zeros(tokens, np.int32),
                segments=label_segments(offsets, parsed.spans),
                prefix="",
                text=text,
                parsed=parsed,
                finish_reason="stop",
                seconds=0.0,
                sampler="made-up",
            )
        )
    return Group(str(index), problem, tuple(rollouts))


def parse_seconds(groups: Sequence[Group]) -> float:
    """Seconds to parse every response once."""
    tasks = {group.problem.task: load_task(group.problem.task) for group in groups}
    start = time.perf_counter()
    for group in groups:
        for rollout in group.rollouts:
            tasks[group.problem.task].parse(rollout.prefix + rollout.text)
    return time.perf_counter() - start


def score_seconds(groups: Sequence[Group], workers: int) -> list[float]:
    """Seconds to score all groups, `REPEATS` times, the workers' first calls left out."""
    with connected(None):
        terms = [RewardTermConfig(name=name, on_failure="drop_group") for name in TERMS]
        pool = RewardPool(RewardConfig(terms=tuple(terms), workers=workers))
        pool.score(groups[: 16 * workers])
        seconds_each = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            pool.score(groups)
            seconds_each.append(time.perf_counter() - start)
        pool.close()
    return seconds_each


def sampler_rate(run: Path) -> float:
    """Rollouts/s of a run's sampler: median over steps of tokens/s over tokens a rollout."""
    by_step: dict[int, dict[str, float]] = {}
    for row in read_metrics(run).to_pylist():
        by_step.setdefault(row["step"], {})[row["name"]] = row["value"]
    speed, length = "throughput/sampler_tokens_per_second", "response/tokens_mean"
    return statistics.median(
        metrics[speed] / metrics[length] for metrics in by_step.values() if speed in metrics
    )


if __name__ == "__main__":
    main()
