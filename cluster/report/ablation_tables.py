"""An ablation in tables: what its arms are, what they reached and at what cost. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.ablation.plan import (
    AblationConfig,
    CellCommand,
    CellName,
    arm_reward,
    other_settings,
)
from cluster.ablation.results import (
    SHARES,
    Results,
    Summary,
)
from cluster.ablation.statistics import PHASES, Estimate, seed_interval
from cluster.report.ablation_charts import at, headlines, levels
from cluster.report.ablation_words import overlaps, show, show_p, spent
from cluster.report.words import METRIC_NAMES, Table, duration, reward_words, short_path

RELIABILITY = {"pooled": "over all", "within": "within groups", "auc": "AUC"}
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
        changed = [f"{key} = {_plain(value)}" for key, value in other_settings(arm)]
        ended = {c.seed for c in cells if c.arm == arm.name and c.id in finished}
        settings = (reward_words({"reward": arm_reward(arm, base)}), "; ".join(changed))
        rows.append(
            (
                arm.name + (" (reference)" if i == 0 else ""),
                *(settings if rewarded else settings[1:]),
                arm.note or "",
                f"{len(ended)} of {len(config.seeds)}",
            )
        )
    named = ("reward", "other settings") if rewarded else ("settings",)
    return Table(
        "What each arm is",
        ("arm", *named, "note", "seeds finished"),
        "ll" + "l" * len(named) + "r",
        tuple(rows),
    )


def level_tables(summary: Summary) -> list[Table]:
    """Before and after, a table a task; the headline's is open, the others folded."""
    open_ = set(headlines(summary))
    tables = []
    for difficulty, task in dict.fromkeys((v.difficulty, v.task) for v in summary.levels):
        rows = tuple(
            (v.arm, METRIC_NAMES.get(v.metric, v.metric), show(v.before), show(v.after),
             show(v.change, "+"), f"{v.after.seeds} × {v.after.problems}")
            for v in summary.levels
            if (v.difficulty, v.task) == (difficulty, task)
        )  # fmt: skip
        tables.append(
            Table(
                f"Accuracies before and after: {at(difficulty, task)}",
                ("arm", "metric", "before", "after", "change", "seeds × problems"),
                "llrrrr",
                rows,
                "Held-out problems, greedy answers; a_r with the true perception forced.",
                folded=(difficulty, task) not in open_,
            )
        )
    return tables


def comparison_tables(summary: Summary) -> list[Table]:
    """Paired differences from the reference after training, a table a task."""
    open_ = set(headlines(summary))
    tables = []
    for difficulty, task in dict.fromkeys((c.difficulty, c.task) for c in summary.comparisons):
        rows = []
        for c in summary.comparisons:
            if (c.difficulty, c.task) != (difficulty, task):
                continue
            ours, theirs = (
                levels(summary, difficulty, task, arm).get(c.metric) for arm in (c.arm, c.reference)
            )
            overlap = ours is not None and theirs is not None and overlaps(ours.after, theirs.after)
            test = ("–", "–", "–")
            if c.test is not None:
                each = ", ".join(f"{p:.2g}" for p in c.test.p_by_seed)
                test = (str(c.test.gained), str(c.test.lost), each)
            rows.append(
                (c.arm, c.metric, show(c.difference, "+"), show_p(c.difference.p), show_p(c.p_holm),
                 "overlap" if overlap else "apart", *test, str(c.difference.seeds))
            )  # fmt: skip
        tables.append(
            Table(
                f"Against {summary.reference} after training: {at(difficulty, task)}",
                (
                    "arm",
                    "metric",
                    "difference",
                    "p",
                    "p (Holm)",
                    "intervals",
                    "gained",
                    "lost",
                    "McNemar p by seed",
                    "seeds",
                ),
                "llrrrrrrrr",
                tuple(rows),
                "Paired by seed and problem. p and the interval are over other seeds and problems; "
                "McNemar's exact p, gained and lost (wrong in the reference and right here, and "
                "the reverse) compare two checkpoints, seed by seed. “Intervals”: whether those of "
                "the two arms' own levels overlap; paired differences are surer than levels.",
                folded=(difficulty, task) not in open_,
            )
        )
    return tables


def asymmetry_table(summary: Summary) -> Table | None:
    """Δa_r − Δa_p over training."""
    rows = tuple(
        (at(v.difficulty, v.task), v.arm, str(v.step), show(v.index, "+"))
        for v in summary.asymmetries
    )
    return (
        Table(
            "Asymmetry index over training", ("task", "arm", "step", "Δa_r − Δa_p"), "llrr", rows,
            "Above 0: thinking gained more than seeing since the start.",
        )
        if rows
        else None
    )  # fmt: skip


def share_table(summary: Summary) -> Table | None:
    """Perception's share of tokens, loss and gradient norm, and λ, arm by arm."""
    by_arm: dict[tuple[str, str], dict[str, str]] = {}
    for s in summary.shares:
        by_arm.setdefault((s.difficulty, s.arm), {})[s.of] = show(s.share)
    rows = tuple(
        (at(difficulty, arm) if difficulty else arm, *(found.get(of, "–") for of in SHARES))
        for (difficulty, arm), found in by_arm.items()
    )
    return (
        Table(
            "Perception's share of an update", ("arm", *SHARES), "l" + "r" * len(SHARES), rows,
            "Means over the updates of a run, those of the gradient norm over the updates it was "
            "measured at; intervals over seeds. Loss and gradient norm are as λ weighs them; under "
            "the token mean λ is perception's share of the tokens.",
        )
        if rows
        else None
    )  # fmt: skip


def coupling_table(summary: Summary) -> Table | None:
    """Within-group correlations of the outcome by third of training."""
    cells = {(c.difficulty, c.arm, c.of, c.phase): show(c.correlation) for c in summary.couplings}
    keys = dict.fromkeys((c.difficulty, c.of, c.arm) for c in summary.couplings)
    rows = tuple(
        (arm, at(difficulty, of.replace("outcome_", "outcome with ")),
         *(cells.get((difficulty, arm, of, p), "–") for p in PHASES))
        for difficulty, of, arm in keys
    )  # fmt: skip
    return (
        Table(
            "Coupling by phase", ("arm", "correlation", *PHASES), "llrrr", rows,
            "Within groups, which is what an update of GRPO learns from.",
        )
        if rows
        else None
    )  # fmt: skip


def reliability_table(
    results: Results, metrics: Sequence[str], arms: Sequence[str]
) -> Table | None:
    """How well each term tells true perception, arm by arm."""
    terms = dict.fromkeys(
        m.removeprefix("reliability/").rsplit("/", 1)[0]
        for m in metrics
        if m.startswith("reliability/") and m.count("/") > 1
    )
    rows = []
    for difficulty in results.difficulties:
        for term in terms:
            for arm in arms:
                found = [
                    _mean_over_steps(results, difficulty, arm, f"reliability/{term}/{stat}", -1, 1)
                    for stat in RELIABILITY
                ]
                if any(f is not None for f in found):
                    rows.append(
                        (arm, at(difficulty, term), *("–" if f is None else show(f) for f in found))
                    )
    return (
        Table(
            "Reliability of reward terms", ("arm", "term", *RELIABILITY.values()), "llrrr",
            tuple(rows),
            "Correlation of the term with true perception over all rollouts and within groups, "
            "and the chance that a right perception gets more than a wrong one; means over steps, "
            "intervals over seeds.",
        )
        if rows
        else None
    )  # fmt: skip


def cost_table(summary: Summary) -> Table | None:
    """Tokens and seconds to a training accuracy."""
    rows = []
    for c in summary.costs:
        reached = f"{c.reach.reached} of {c.reach.seeds}"
        rows.append(
            (c.arm, at(c.difficulty, c.unit) if c.difficulty else c.unit, f"{c.target:.3f}",
             reached, spent(c))
        )  # fmt: skip
    return (
        Table(
            "Cost of an accuracy",
            ("arm", "unit", "training a", "seeds that reached it", "median cost"), "llrrr",
            tuple(rows),
            "Counted as reached when the mean of five steps is. The median counts seeds that never "
            "reached it as later than all that did.",
        )
        if rows
        else None
    )  # fmt: skip


def speed_table(
    results: Results, arms: Sequence[str], seconds: Mapping[tuple[str, str], Sequence[float]]
) -> Table | None:
    """Throughput and wall time; `seconds`: (difficulty, arm) -> of each finished cell."""
    rows = []
    known = {
        name: words
        for name, words in SPEEDS.items()
        if any(results.numbers(d, arm, "", name) for d in results.difficulties for arm in arms)
    }
    for difficulty in results.difficulties:
        for arm in arms:
            speeds = [
                _mean_over_steps(results, difficulty, arm, name, 0, math.inf) for name in known
            ]
            walls = seconds.get((difficulty, arm), ())
            wall = duration(sum(walls) / len(walls)) if walls else "–"
            if walls or any(speeds):
                shown = ("–" if s is None else show(s, form=",.0f") for s in speeds)
                rows.append((at(difficulty, arm) if difficulty else arm, *shown, wall))
    return (
        Table(
            "Throughput and wall time", ("arm", *known.values(), "mean time of a cell"),
            "l" + "r" * (len(known) + 1), tuple(rows),
            "A cell's time is all of it: start, evaluations and report included.",
        )
        if rows
        else None
    )  # fmt: skip


def pairing_table(
    cells: Sequence[CellName],
    finished: Mapping[str, Mapping[str, Any]],
    command: CellCommand = "train",
) -> Table | None:
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
        rows.append(
            (cell.arm, at(cell.difficulty, str(cell.seed)) if cell.difficulty else str(cell.seed),
             hashes[0][:16], hashes[1][:16], equal)
        )  # fmt: skip
    return (
        Table(
            "Are the arms paired?",
            ("arm", "seed", "initial weights", "first batch", "against the first arm"), "lrlll",
            tuple(rows),
            "SHA-256 (its start) of the files of the checkpoint that a cell began from, and of the "
            + (
                "problems of its first step in order: ids, prompts, images."
                if command == "train"
                else "demonstrations of its first update in order: token ids, segments, images."
            ),
        )
        if rows
        else None
    )  # fmt: skip


def cells_table(
    cells: Sequence[CellName],
    ended: Sequence[str],
    finished: Mapping[str, Mapping[str, Any]],
    failed: Mapping[str, str],
) -> Table:
    """Every cell and what became of it; `ended` also has cells that left only numbers."""
    rows = []
    for cell in cells:
        state, told = "not finished", ""
        if cell.id in ended:
            took = finished.get(cell.id, {}).get("seconds")
            state, told = "finished", "" if took is None else duration(float(took))
        elif cell.id in failed:
            state, told = "FAILED", failed[cell.id][:1000]
        rows.append((cell.id, state, told))
    title = "Every cell and what became of it"
    return Table(title, ("cell", "state", "time or error"), "lll", tuple(rows), folded=not failed)


def _mean_over_steps(
    results: Results, difficulty: str, arm: str, metric: str, low: float, high: float
) -> Estimate | None:
    by_seed = results.numbers(difficulty, arm, "", metric)
    means = []
    for _, values in sorted(by_seed.items()):
        good = [v for step, v in values.items() if step > 0 and v is not None and v == v]
        if good:
            means.append(sum(good) / len(good))
    return seed_interval(means, (low, high)) if means else None


def _plain(value: Any) -> str:
    return short_path(value) if isinstance(value, str) else str(value)
