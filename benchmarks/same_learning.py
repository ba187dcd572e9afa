"""After as many updates on the same problems, is our policy as good as TRL's?

    python -m benchmarks.same_learning [--updates 40] [--repeats 2]

Both start from the shipped policy and take the updates of `benchmarks.race`, on-policy, at the
learning rate of recipes/tiny/sudoku.toml; each draws its own responses. What they end with answers
the same held-out problems by `equipoise eval`. Differences are paired by problem, each repeat by
itself: other problems to learn from, other seeds of sampling.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import machine, tables
from benchmarks.policies import SHIPPED
from benchmarks.race import SHIPPED_LENGTH, draw
from benchmarks.race_work import KNOBS, TASK, Save, Turn, Work
from benchmarks.sides import side
from cluster.record.evaluation import EvalTable, before_after
from cluster.run.evaluate import run_eval
from tasks.settings import TaskConfig

KEYS = ("repeat", "metric")
METRICS = ("a", "a_p", "a_r")
RATE = 5e-5
SETTINGS = ("sampler.threads=2", "sampler.kv_cache_gib=0.25")


def main() -> None:
    """Train both, measure, and write the table of docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--problems", type=int, default=512, help="held-out ones, answered greedily"
    )
    parser.add_argument("--to", type=Path, help="a JSON file; without it docs/ is written")
    args = parser.parse_args()
    start = measured(str(SHIPPED), args.problems)
    for seed in range(1, args.repeats + 1):
        ends = {}
        with tempfile.TemporaryDirectory(prefix="equipoise-learning-") as scratch:
            for name, folder in trained(seed, args.updates, Path(scratch)).items():
                ends[name] = measured(folder, args.problems)
        changes = {c.metric: c for c in before_after(ends["trl"], ends["ours"])}
        rows = [
            {
                "repeat": seed,
                "metric": metric,
                "before": f"{start[metric].value:.3f}",
                "TRL": interval(ends["trl"], metric),
                "ours": interval(ends["ours"], metric),
                "ours less TRL": f"{changes[metric].difference:+.3f}",
                "right only of ours / of TRL": (
                    f"{changes[metric].gained} / {changes[metric].lost}"
                ),
                "p": f"{changes[metric].p:.2f}",
                "updates": args.updates,
                "problems": args.problems,
                "machine": machine.where(),
                "command": machine.command("benchmarks.same_learning"),
            }
            for metric in METRICS
        ]
        tables.keep("same_learning", KEYS, rows, args.to)


def trained(seed: int, updates: int, folder: Path) -> dict[str, str]:
    """Side -> the folder of its policy after the updates, one side after the other."""
    turn = Turn(1, updates)
    mine = Work(str(SHIPPED), "", SHIPPED_LENGTH, (turn,), settings=SETTINGS, rate=RATE, seed=seed)
    theirs = replace(mine, drawn=draw(mine, [turn], folder / "problems"))
    ends = {}
    for name, function, work in (
        ("trl", "benchmarks.race_trl:trl", theirs),
        ("ours", "benchmarks.race_ours:ours", mine),
    ):
        ends[name] = str(folder / f"{name}-policy")
        with side(name, function, work, folder) as racer:
            racer.answer()
            steps = racer.ask(turn)
            racer.ask(Save(ends[name]))
        print(f"{name}: {sum(s.seconds for s in steps):.0f} s for {len(steps)} updates", flush=True)
    return ends


def measured(policy: str, problems: int) -> EvalTable:
    """What a policy gets right of held-out problems, greedily."""
    task = TaskConfig(name=TASK, knobs=KNOBS)
    return run_eval(policy, task, problems, 1, 0, as_json=False, output=None, address=None)


def interval(table: EvalTable, metric: str) -> str:
    """A value and its 95 % interval over problems."""
    row = table[metric]
    return f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"


if __name__ == "__main__":
    main()
