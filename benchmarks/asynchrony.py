"""What does sampling while learning pay on this machine, and where does the time go?

    python -m benchmarks.asynchrony                    # two samplers, one learner, tiny Sudoku
    python -m benchmarks.asynchrony RECIPE --set sampler.count=1

Blocks of steps with `max_staleness` 0 and 1 take turns (0 1 1 0 ...) on the same live engines and
learner, so both meet the same load and, nearly, the same policy. The first step of a block, in
which its pipeline fills, is left out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from benchmarks.turns import take_turn
from cluster.recipe.recipe import load_recipe
from cluster.record.terminal import Progress
from cluster.run.run_log import run_log
from cluster.run.runtime import running

DEFAULT = Path(__file__).parents[1] / "recipes" / "tiny" / "sudoku.toml"
SETTINGS = (
    "sampler.count=2", "sampler.cpus=0.5", "sampler.threads=1", "learner.cpus=1",
    "learner.threads=1", "learner.learning_rate=1e-6", "algorithm.problems_per_step=16",
    "reward.workers=1", "eval.problems=2",
)  # fmt: skip
SHOWN = (
    "time/step", "time/sample", "time/score", "time/learn", "time/transfer",
    "idle/sampler", "idle/learner", "throughput/sampler_tokens_per_second",
    "policy/lag_mean", "policy/lag_max", "policy/mixed", "buffer/in_flight",
    "learner/logprob_gap",
)  # fmt: skip


def main() -> None:
    """Print a table: the mean over steps with each bound, and the speed-up by pair of blocks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default=DEFAULT, type=Path)
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--blocks", type=int, default=4, help="of each bound; an even number")
    parser.add_argument("--steps", type=int, default=5, help="in a block, the first included")
    args = parser.parse_args()
    base = [*(SETTINGS if args.recipe == DEFAULT else ()), *args.settings]
    base.append("algorithm.steps=100000")
    recipes = {k: load_recipe(args.recipe, [*base, f"algorithm.max_staleness={k}"]) for k in (0, 1)}
    order = [k for pair in range(args.blocks) for k in ((0, 1) if pair % 2 == 0 else (1, 0))]

    timings: dict[int, dict[str, list[float]]] = {0: defaultdict(list), 1: defaultdict(list)}
    by_block: dict[int, list[float]] = {0: [], 1: []}
    with (
        tempfile.TemporaryDirectory() as folder,
        running(recipes[0], None, Path(folder) / "run", Progress(0)) as run,
        run_log(run.recipe, Path(folder) / "run", Progress(0)) as log,
    ):
        run.send_weights(0)
        for turn, k in enumerate(order):
            steps, _ = take_turn(run, log, recipes[k], 1 + 2 * turn * args.steps, args.steps)
            for metrics in steps[1:]:
                for name, value in metrics.items():
                    timings[k][name].append(value)
            by_block[k].append(statistics.mean(m["time/step"] for m in steps[1:]))
            print(f"max_staleness {k}: {by_block[k][-1]:.2f} s a step", flush=True)
    show(timings, by_block)


def show(timings: dict[int, dict[str, list[float]]], by_block: dict[int, list[float]]) -> None:
    """The table."""
    print(f"\n{'mean of a step':40} max_staleness 0  max_staleness 1")
    for name in SHOWN:
        values = [statistics.mean(timings[k][name]) for k in (0, 1) if timings[k][name]]
        print(f"{name:40} " + "  ".join(f"{value:15.3f}" for value in values))
    pairs = sorted(old / new for old, new in zip(by_block[0], by_block[1], strict=True))
    print(
        f"\nspeed-up: {statistics.mean(by_block[0]) / statistics.mean(by_block[1]):.2f} "
        f"(pairs of blocks: {', '.join(f'{ratio:.2f}' for ratio in pairs)})"
    )


if __name__ == "__main__":
    main()
