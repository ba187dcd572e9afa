"""A run in words and tables: what was trained, what changed, how sure, what went wrong. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.ablation.statistics import Estimate, asymmetry, crossed_interval
from cluster.record.evaluation import counted
from cluster.record.folder import REREAD
from cluster.record.mismatch import MISMATCH_LIMIT
from cluster.record.table import Table
from cluster.report.charts import NOTHING, Metrics
from cluster.report.document import Finding
from cluster.report.words import (
    DASH,
    LEAST_P,
    METRIC_NAMES,
    RELIABILITY,
    duration,
    interval,
    learnt,
    reliability_table,
    reliability_terms,
    reward_words,
    short_path,
    signed,
)
from rewards.advantages import is_constant
from tasks.core import SEGMENTS

TOLD = ("a", "a_p", "a_r", "text_loss", "text_right")
"""What is told of a task in words: what was learnt, and what was forgotten."""


def lead(recipe: Mapping[str, Any], metrics: Metrics) -> str:
    """What was trained, on what, by which reward, for how long."""
    if not recipe:
        return "This run folder holds no readable recipe, so what was trained is not known."
    tasks = recipe.get("tasks", ())
    algorithm = recipe.get("algorithm", {})
    model = short_path(recipe.get("model", {}).get("path", "?"))
    on = " and ".join(
        f"{t.get('name')} (weight {t.get('weight', 1):g})" if len(tasks) > 1 else str(t.get("name"))
        for t in tasks
    )
    if "sft" in recipe and not any(name.startswith("reward/") for name in metrics):
        return f"Cold start of {model} on demonstrations of {on}, seed {recipe.get('seed', 0)}."
    steps_done = max(metrics.get("time/step", NOTHING).steps, default=0)
    steps_planned = algorithm.get("steps", "?")
    how_long = (
        f"{steps_done} steps"
        if steps_done == steps_planned
        else f"{steps_done} of {steps_planned} steps"
    )
    return (
        f"{model} was trained by RL on {on}: {how_long} of "
        f"{algorithm.get('problems_per_step', '?')} problems × {algorithm.get('group_size', '?')} "
        f"rollouts, seed {recipe.get('seed', 0)}. Reward: {reward_words(recipe)}."
    )


def findings(evaluation: Mapping[str, Any], metrics: Metrics) -> tuple[Finding, ...]:
    """Before and after in sentences, and whether it learnt to see or to think."""
    compared = {task: t for task, t in evaluation.items() if t.get("change", {}).get("rows")}
    results = []
    # With several tasks the verdict is on all of them first.
    for task in sorted(compared, key=lambda t: (t != "all tasks", list(compared).index(t))):
        rows = {row["metric"]: row for row in compared[task]["change"]["rows"]}
        changes = tuple(_change_words(m, rows[m]) for m in TOLD if m in rows)
        text = verdict(compared[task])
        where = f"{task}: {text[0].lower()}{text[1:]}" if len(compared) > 1 else text
        results.append(Finding(where, changes))
    parts = {m: metrics.get(f"acc/{m}", NOTHING) for m in ("a_p", "self_consistency")}
    if results or any(len(series.values) < 2 for series in parts.values()):
        return tuple(results)
    moved = [
        f"{name.replace('_c', '-c')} {first:.3f} → {last:.3f}"
        for name, (first, last) in ((n, _fifths(s.values)) for n, s in parts.items())
    ]
    return (
        Finding(
            "Nothing was measured before and after, so only training's own rollouts can tell, "
            "first fifth against last fifth of the steps, on other problems each step and "
            "without intervals.",
            tuple(moved),
        ),
    )


def _fifths(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and of the last fifth."""
    n = max(1, len(values) // 5)
    return float(np.mean(values[:n])), float(np.mean(values[-n:]))


def verdict(tables: Mapping[str, Any]) -> str:
    """Whether seeing, thinking, both or neither was learnt, and which of them more.

    A change counts where the exact test of paired problems gives p < 0.05, or, without pairs, where
    the two 95 % intervals are apart. Without labels it is what a text-only reader tells, if asked.
    """
    rows = {row["metric"]: row for row in tables["change"]["rows"]}
    names = {"see": ("a_p", "seeing"), "think": ("a_r", "thinking")}
    by_reader = "sufficiency" in rows and not {"a_p", "a_r"} & set(rows)
    if by_reader:
        names = {"see": ("sufficiency", "seeing"), "think": ("used", "thinking")}
    moves = {
        word: math.copysign(1, rows[metric]["difference"]) if _counts(rows[metric]) else 0
        for word, (metric, _) in names.items()
        if metric in rows
    }
    if not moves:
        return "Neither seeing nor thinking was measured."
    lacking = [
        f" ({doing}, {m}, was not measured)" for w, (m, doing) in names.items() if w not in moves
    ]
    aside = ", by what a text-only reader makes of its perceptions" if by_reader else ""
    return learnt("It", moves, aside + "".join(lacking), asymmetry_of(tables))


def _counts(row: Mapping[str, Any]) -> bool:
    """Whether a change is beyond chance: by the paired test, where there is none by intervals."""
    return not row["overlap"] if row["p"] is None else bool(row["p"] < LEAST_P)


def asymmetry_of(tables: Mapping[str, Any]) -> Estimate | None:
    """Δa_r − Δa_p over the problems measured all four times, as ablations have it of one seed."""
    parts = [
        tables[when].get("per_problem", {}).get(m, {})
        for m in ("a_r", "a_p")
        for when in ("before", "after")
    ]
    shared = sorted(set.intersection(*map(set, parts)))
    if len(shared) < 2:
        return None
    r0, r1, p0, p1 = (np.array([[part[i] for i in shared]]) for part in parts)
    index = asymmetry((r0, r1), (p0, p1))
    puzzles = tables["after"].get("puzzles", {})
    names = [puzzles.get(i, i) for i in shared]
    return None if is_constant(index) else crossed_interval(index, (-2, 2), names)


def _change_words(metric: str, row: Mapping[str, Any]) -> str:
    p = f", p (paired) {row['p']:.2g}" if row["p"] is not None else ""
    return (
        f"{metric} {interval(row['before'])} → {interval(row['after'])}, "
        f"{signed(row['difference'])}: intervals {_overlap(row)}{p}, n {_count(row['after'])}"
    )


def _overlap(row: Mapping[str, Any]) -> str:
    return "overlap" if row["overlap"] else "apart"


def _count(row: Mapping[str, Any]) -> str:
    return counted(row["n"], row.get("puzzles"))


def evaluation_tables(evaluation: Mapping[str, Any]) -> list[Table]:
    """A table a task, and one of the defects; an evaluation without a before has one column."""
    tables = []
    for task, evaluated in evaluation.items():
        columns: tuple[str, ...]
        rows: list[tuple[str, ...]]
        if "change" in evaluated:
            columns = ("before", "after", "change", "95 % intervals", "p (paired)", "n")
            rows = [
                (
                    row["metric"],
                    interval(row["before"]),
                    interval(row["after"]),
                    signed(row["difference"]),
                    _overlap(row),
                    "" if row["p"] is None else f"{row['p']:.2g}",
                    _count(row["after"]),
                )
                for row in evaluated["change"]["rows"]
            ]
        else:
            columns = ("value and 95 % interval", "n")
            rows = [(r["metric"], interval(r), _count(r)) for r in evaluated.get("rows", ())]
        accuracies = [(METRIC_NAMES.get(n, n), *r) for n, *r in rows if not n.startswith("defect/")]
        defects = [(n.removeprefix("defect/"), *r) for n, *r in rows if n.startswith("defect/")]
        title = f"{task}, held-out problems"
        tables.append(Table(title, ("metric", *columns), tuple(accuracies)))
        title = f"{task}: share of responses with a defect"
        tables.append(Table(title, ("defect", *columns), tuple(defects), folded=True))
    return tables


def training_table(metrics: Metrics) -> Table:
    """The first against the last fifth of the steps, metric by metric."""
    names = [
        *(f"acc/{m}" for m in ("a", "a_p", "a_p_graded", "self_consistency", "leak", *REREAD)),
        *sorted(n for n in metrics if n.startswith("reward/") and n.endswith("/mean")),
        *sorted(n for n in metrics if n.startswith("reliability/")),
        *(f"coupling/outcome_{s}/within" for s in ("perception", "reasoning")),
        "group/zero_variance",
        *(f"learner/entropy/{s}" for s in SEGMENTS),
        "response/tokens_mean",
        "response/truncated",
    ]
    rows = []
    for name in names:
        if values := metrics.get(name, NOTHING).values:
            first, last = _fifths(values)
            rows.append((name, _short(first), _short(last), signed(last - first)))
    return Table(
        "Training, first against last fifth of the steps",
        ("metric", "first", "last", "change"),
        tuple(rows),
        "Means over steps. Each step draws other problems, so small changes are chance.",
        folded=True,
    )


def terms_table(metrics: Metrics) -> Table:
    """How well each term tells true perception, where the run measured it."""
    rows = []
    for term in sorted(reliability_terms(metrics)):
        logged = [metrics.get(f"reliability/{term}/{stat}", NOTHING).values for stat in RELIABILITY]
        if any(logged):
            rows.append((term, *(_short(float(np.mean(v))) if v else DASH for v in logged)))
    return reliability_table(rows, ("term",), "")


def time_table(metrics: Metrics) -> Table:
    """Seconds a step, share and sum of each phase, and throughput."""
    total = sum(metrics.get("time/step", NOTHING).values)
    rows = [
        (
            name.removeprefix("time/"),
            f"{np.mean(series.values):.2f} s",
            f"{sum(series.values) / total:.0%}",
            duration(sum(series.values)),
        )
        for name, series in metrics.items()
        if total and name.startswith("time/") and name.count("/") == 1 and series.values
    ]
    speeds = [
        form.format(side, np.mean(values))
        for name, form in (
            ("throughput/{}_tokens_per_second", "{} {:,.0f} tokens/s"),
            ("idle/{}", "{} idle {:.0%}"),
        )
        for side in ("sampler", "learner")
        if (values := metrics.get(name.format(side), NOTHING).values)
    ]
    return Table(
        "Where the time went",
        ("phase", "mean a step", "share", "in all"),
        tuple(rows),
        "; ".join(speeds) + ". Evaluation and logging are in none of them.",
    )


def events_table(metrics: Metrics) -> Table:
    """Failures, dropped groups, numbers that are none, steps without an update, defects."""
    rows = []
    for name, series in sorted(metrics.items()):
        failed = name.startswith("reward/") and "/failures" in name
        total = sum(series.values)
        if (failed or name == "group/dropped" or name.startswith("defects/")) and total > 0:
            at = [s for s, v in series.at().items() if v > 0]
            rows.append((name, f"{total:,.0f}", str(len(at)), _span(at)))
        if series.bad:
            rows.append((f"{name} is not finite", "", str(len(series.bad)), _span(series.bad)))
    if idle := without_update(metrics):
        rows.append(("steps without an update", "", str(len(idle)), _span(idle)))
    columns = ("event", "count", "steps", "first – last step")
    return Table("Failures, defects, dropped groups", columns, tuple(rows))


def warnings(recipe: Mapping[str, Any], metrics: Metrics) -> list[str]:
    """What a reader must know before believing the rest."""
    sentences = []
    for name, series in sorted(metrics.items()):
        if name.startswith("reward/") and name.endswith("/failures") and sum(series.values) > 0:
            term = name.split("/")[1]
            source = "The task's own code" if term == "diagnosis" else f"Reward term {term}"
            sentences.append(f"{source} failed on {sum(series.values):.0f} groups.")
    if dropped := sum(metrics.get("group/dropped", NOTHING).values):
        sentences.append(f"{dropped:.0f} groups were dropped because a term failed.")
    if "acc/a" in metrics and "acc/a_p" not in metrics:
        sentences.append(
            "No problem has a perception label: what was seen right (a_p), leaks, and whether a "
            "reward follows perception are not known, and nothing here says they are."
        )
    elif labelled := metrics.get("acc/labelled", NOTHING).values:
        sentences.append(
            f"{np.mean(labelled):.0%} of the rollouts are of problems with a perception label: "
            "a_p, leaks and the reliability of rewards are of these alone."
        )
    on_gpu = recipe.get("sampler", {}).get("gpus", 0) > 0
    limit = MISMATCH_LIMIT.get((recipe.get("model", {}).get("dtype", ""), on_gpu), math.inf)
    gaps = metrics.get("learner/logprob_gap", NOTHING).values
    if over := sum(gap > limit for gap in gaps):
        sentences.append(
            f"Sampler and learner disagreed beyond rounding in {over} of {len(gaps)} steps (up to "
            f"{max(gaps):.2g} nats): their weights or inputs were not the same."
        )
    if not_finite := sorted(name for name, series in metrics.items() if series.bad):
        sentences.append(f"Not finite in some steps: {', '.join(not_finite)}.")
    cut = metrics.get("response/truncated", NOTHING).values
    if cut and np.mean(cut) > 0.1:
        sentences.append(f"{np.mean(cut):.0%} of the responses were cut off at the token limit.")
    flat = metrics.get("group/zero_variance", NOTHING).values
    if flat and _fifths(flat)[1] > 0.8:
        sentences.append("In the last fifth of the steps over 80 % of the groups taught nothing.")
    if idle := without_update(metrics):
        sentences.append(f"{len(idle)} steps made no update: no group had a gradient.")
    return sentences


def without_update(metrics: Metrics) -> list[int]:
    """Steps of RL in which the learner logged no loss."""
    learnt = set(metrics.get("learner/loss", NOTHING).steps)
    return [s for s in metrics.get("time/step", NOTHING).steps if s not in learnt]


def _span(steps: Sequence[int]) -> str:
    return f"{min(steps)} – {max(steps)}" if len(steps) > 1 else str(steps[0])


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
