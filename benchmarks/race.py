"""How many times as fast as TRL's GRPOTrainer is a step of ours, and how soon comes the first?

    python -m benchmarks.race                                    # all sizes, both lengths
    python -m benchmarks.race --sizes 2M --lengths 64 --pairs 3  # some minutes
    python -m benchmarks.race --dtypes mixed                     # products in bfloat16 (TRL: bf16)

Both start from the same weights, draw 8 responses to each of the same 16 problems, score them by
the same function and make one update of them, by the same loss; a fixed batch shows that
(`same work`: the relative difference in loss and in gradient norm). `2M`, `10M` and `30M` are
policies whose responses end where they are cut, so both sample the same number of tokens;
`shipped` is the checkpoint in models/, which ends as it will. TRL samples by HF generate.

Each side lives in a process of its own and waits while the other works; turns alternate, which
goes first as well. A turn's first step is not counted; ratios are of the means of a pair's two
turns. `foreign` is what others took of the cores meanwhile, the waiting side among them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product
from pathlib import Path

from benchmarks import machine, tables
from benchmarks.race_work import PROBLEMS, Fixed, Step, Turn, Work, write
from benchmarks.sides import Racer, side

KEYS = ("size", "dtype", "cap", "ours")
SIZES = ("2M", "10M", "30M")
LENGTHS = (64, 256)
SHIPPED_LENGTH = 128
ENGINES: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "by turns": (("sampler.threads=2",), {"on-policy": ()}),
    "side by side": (
        ("learner.threads=1",),
        {"max_staleness = 1": ("algorithm.max_staleness=1",)},
    ),
}
"""How our actors are started, and the variants that take turns with TRL on them: on-policy one side
waits for the other, so each has both cores; ahead of the learner both work, on one core each."""
KV_CACHE_GIB = {"shipped": 0.25, "2M": 0.25, "10M": 1.0, "30M": 2.0}
"""For all responses of a step at once."""
APART = 4
"""Steps that two turns lie apart at least: what is drawn ahead is never drawn twice."""


def main() -> None:
    """Race, and write the table of docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=(*SIZES, "shipped"))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens a response")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "mixed"])
    parser.add_argument("--engines", nargs="+", default=[*ENGINES], choices=[*ENGINES])
    parser.add_argument("--pairs", type=int, default=5, help="of turns")
    parser.add_argument("--steps", type=int, default=6, help="of a turn that count")
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="groups a step")
    parser.add_argument("--to", type=Path, help="a JSON file; without it docs/ is written")
    parser.add_argument("--busy-ok", action="store_true", help="run beside other work all the same")
    args = parser.parse_args()
    machine.refuse_if_busy(args.busy_ok)
    for size in args.sizes:
        lengths = args.lengths if size != "shipped" else [SHIPPED_LENGTH]
        for dtype, length, engine in product(args.dtypes, lengths, args.engines):
            rows = race(size, dtype, length, engine, args)
            tables.keep("race", KEYS, rows, args.to)


def race(
    size: str, dtype: str, length: int, engine: str, args: argparse.Namespace
) -> list[tables.Row]:
    """TRL against the variants of one way to start ours; a row each."""
    threads, variants = ENGINES[engine]
    settings = (*threads, f"sampler.kv_cache_gib={KV_CACHE_GIB[size]}")
    with tempfile.TemporaryDirectory(prefix="equipoise-race-") as scratch:
        folder = Path(scratch)
        model, parameters = policy(size, folder / "model")
        turns = schedule(len(variants), args.pairs, args.steps + 1)
        mine = Work(model, "", length, (), "", args.problems, settings, dtype == "mixed")
        same = (turns[0][0], *(pair[0] for pair in turns[1:]))
        drawn = draw(mine, same, folder / "problems")
        theirs = replace(mine, turns=same, drawn=drawn)
        with side("trl", "benchmarks.race_trl:trl", theirs, folder) as trl:
            ready = {"trl": started(trl, same[0])}
            with side("ours", "benchmarks.race_ours:ours", mine, folder) as ours:
                ready["ours"] = started(ours, same[0])
                agreed = agreement(ours, trl, str(folder / "fixed"))
                print(f"{size}, {dtype}, {length} tokens: same work: {agreed}", flush=True)
                pairs_of = {name: Pairs() for name in variants}
                for number, pair in enumerate(turns[1:]):
                    take_pair(number, pair, variants, ours, trl, pairs_of)
                memory = {r.name: machine.resident_gib([r.process.pid]) for r in (trl, ours)}
    return [
        {
            "size": size,
            "parameters, M": f"{parameters / 1e6:.1f}",
            "dtype": dtype,
            "cap": length,
            "ours": name,
            **pairs.row(),
            "ready + first step, s: TRL": ready["trl"],
            "ours, s": ready["ours"],
            "memory, GiB: TRL / ours": f"{memory['trl']:.1f} / {memory['ours']:.1f}",
            "same work": agreed,
            "machine": machine.where(),
            "command": machine.command("benchmarks.race"),
        }
        for name, pairs in pairs_of.items()
    ]


@dataclass
class Pairs:
    """What a variant and TRL took, pair by pair."""

    trl: list[list[Step]] = field(default_factory=list)
    ours: list[list[Step]] = field(default_factory=list)
    foreign: dict[str, list[float]] = field(default_factory=lambda: {"trl": [], "ours": []})

    def row(self) -> tables.Row:
        """The columns that compare."""
        medians = [[_mean(turn, "seconds") for turn in side] for side in (self.trl, self.ours)]
        tokens = [[per_thousand(turn) for turn in side] for side in (self.trl, self.ours)]
        all_trl, all_ours = (list(chain.from_iterable(side)) for side in (self.trl, self.ours))
        return {
            "times as fast": tables.spread(tables.ratios(*medians)),
            "by tokens": tables.spread(tables.ratios(*tokens)),
            "step, s: TRL": tables.spread(medians[0]),
            "step, s: ours": tables.spread(medians[1]),
            "sampling / learning, s: TRL": _parts(all_trl),
            "waiting for samples / learning, s: ours": _parts(all_ours),
            "tokens a step: TRL / ours": (
                f"{_mean(all_trl, 'tokens'):,.0f} / {_mean(all_ours, 'tokens'):,.0f}"
            ),
            "s a 1,000 tokens: TRL / ours": (
                f"{statistics.median(tokens[0]):.3f} / {statistics.median(tokens[1]):.3f}"
            ),
            "pairs x steps": f"{len(self.trl)} x {len(self.trl[0])}",
            "foreign: TRL / ours": " / ".join(
                f"{statistics.median(shares):.0%} (at most {max(shares):.0%})"
                for shares in self.foreign.values()
            ),
        }


def take_pair(
    number: int,
    pair: Sequence[Turn],
    variants: dict[str, tuple[str, ...]],
    ours: Racer,
    trl: Racer,
    pairs_of: dict[str, Pairs],
) -> None:
    """A turn of TRL and one of each variant; in every other pair the other way round."""
    turns: list[tuple[Racer, str, Turn]] = [(trl, "", pair[0])]
    for index, (name, settings) in enumerate(variants.items()):
        turns.append((ours, name, Turn(pair[index].first, pair[index].steps, settings)))
    for racer, name, turn in reversed(turns) if number % 2 else turns:
        shared = machine.Shared([racer.process.pid])
        steps = racer.ask(turn)[1:]
        share = shared.foreign()
        for pairs in [pairs_of[name]] if name else pairs_of.values():
            (pairs.ours if name else pairs.trl).append(steps)
            pairs.foreign["ours" if name else "trl"].append(share)
        print(
            f"  pair {number + 1}, {name or 'TRL'}: {_mean(steps, 'seconds'):.2f} s a step, "
            f"{_mean(steps, 'tokens'):,.0f} tokens; others took {share:.0%}",
            flush=True,
        )


def schedule(variants: int, pairs: int, steps: int) -> list[list[Turn]]:
    """The steps of all turns: a first step alone, then for each pair one turn a variant.

    TRL's turn of a pair has the problems of the first variant's.
    """
    turns, first = [[Turn(1, 1)]], 1 + APART
    for _ in range(pairs):
        turns.append([Turn(first + i * (steps + APART), steps) for i in range(variants)])
        first += variants * (steps + APART)
    return turns


def policy(size: str, folder: Path) -> tuple[str, int]:
    """A folder with the policy of a size, and its parameters."""
    from benchmarks.policies import SHIPPED, write_unending

    if size != "shipped":
        return str(folder), write_unending(size, folder)
    from safetensors.numpy import load_file

    return str(SHIPPED), sum(t.size for t in load_file(SHIPPED / "model.safetensors").values())


def draw(work: Work, turns: Sequence[Turn], file: Path) -> str:
    """Write the problems of TRL's turns, the same that our run draws in those steps."""
    from benchmarks.race_ours import race_recipe
    from cluster.recipe.problems import open_sources, step_problems

    recipe = race_recipe(work)
    sources = open_sources(recipe.tasks)
    numbers = [turn.first + i for turn in turns for i in range(turn.steps)]
    steps = (step_problems(sources, recipe.seed, n - 1, work.problems) for n in numbers)
    return write(file, [problem for step in steps for problem in step])


def started(racer: Racer, first: Turn) -> str:
    """Wait until a side is ready, and for its first step: "12.3 + 4.5"."""
    racer.answer()
    up = time.perf_counter()
    racer.ask(first)
    return f"{up - racer.started:.1f} + {time.perf_counter() - up:.1f}"


def agreement(ours: Racer, trl: Racer, file: str) -> str:
    """How far both are apart on one batch, as shares of what ours finds."""
    mine: Fixed = ours.ask(file)
    theirs: Fixed = trl.ask(file)
    loss, norm = theirs.loss / mine.loss - 1, theirs.grad_norm / mine.grad_norm - 1
    return f"{abs(loss):.0e} / {abs(norm):.0e}"


def per_thousand(turn: Sequence[Step]) -> float:
    """Seconds for 1,000 sampled and learnt tokens."""
    return 1000 * sum(s.seconds for s in turn) / sum(s.tokens for s in turn)


def _mean(steps: Sequence[Step], name: str) -> float:
    return statistics.fmean(getattr(step, name) for step in steps)


def _parts(steps: Sequence[Step]) -> str:
    return f"{_mean(steps, 'sampling'):.2f} / {_mean(steps, 'learning'):.2f}"


if __name__ == "__main__":
    main()
