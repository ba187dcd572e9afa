"""A run in words and tables: what was trained, what changed, how sure, what went wrong. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from cluster.ablation.statistics import Estimate, asymmetry, crossed_interval
from cluster.record.evaluation import counted
from cluster.record.mismatch import MISMATCH_LIMIT
from cluster.report.charts import Metrics, Series
from rewards.advantages import is_constant

METRIC_NAMES = {
    "a": "a: end to end",
    "a_p": "a_p: seeing",
    "a_p_graded": "a_p_graded: seeing, graded",
    "a_r": "a_r: thinking, given p*",
    "a_r_blank": "a_r_blank: the same, image blank",
    "blind": "blind: no image",
    "leak": "leak: seen wrong, answered right",
    "self_consistency": "self-consistency: answer fits own perception",
}
LEAST_P = 0.05


@dataclass(frozen=True)
class Table:
    """`align`: one of l and r a column. Cells are text, hostile where a name is a user's."""

    title: str
    columns: tuple[str, ...]
    align: str
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    folded: bool = False
    """Shown only when asked for."""


@dataclass(frozen=True)
class Finding:
    """A sentence and the numbers behind it."""

    text: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Words:
    """The head of a report: one paragraph, what followed from it, what to be wary of."""

    lead: str
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]


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
    steps = metrics.get("time/step", Series((), ())).steps
    done, asked = (max(steps) if steps else 0), algorithm.get("steps", "?")
    how_long = f"{done} steps" if done == asked else f"{done} of {asked} steps"
    return (
        f"{model} was trained by RL on {on}: {how_long} of "
        f"{algorithm.get('problems_per_step', '?')} problems × {algorithm.get('group_size', '?')} "
        f"rollouts, seed {recipe.get('seed', 0)}. Reward: {reward_words(recipe)}."
    )


def reward_words(recipe: Mapping[str, Any]) -> str:
    """The reward as a weighted sum, such as `0.5 perception + 0.5 outcome`."""
    reward = recipe.get("reward", {})
    alpha, terms = reward.get("alpha"), reward.get("terms", ())
    if alpha is not None:
        return f"{alpha:g} · perception (a_p) + {1 - alpha:g} · outcome (a)"
    named = [f"{t.get('weight', 1):g} · {t.get('name')}" for t in terms]
    return " + ".join(named) if named else "outcome (a)"


def findings(evaluation: Mapping[str, Any], metrics: Metrics) -> tuple[Finding, ...]:
    """Before and after in sentences, and whether it learnt to see or to think."""
    said: list[Finding] = []
    both = {task: t for task, t in evaluation.items() if t.get("change", {}).get("rows")}
    # With several tasks the verdict is on all of them first.
    for task in sorted(both, key=lambda t: (t != "all tasks", list(both).index(t))):
        rows = {row["metric"]: row for row in both[task]["change"]["rows"]}
        changes = tuple(_change_words(m, rows[m]) for m in ("a", "a_p", "a_r") if m in rows)
        where = f"{task}: " if len(both) > 1 else ""
        text = verdict(both[task])
        said.append(Finding(where + (text[0].lower() + text[1:] if where else text), changes))
    if said:
        return tuple(said)
    see, think = metrics.get("acc/a_p"), metrics.get("acc/self_consistency")
    if see is not None and think is not None and len(see.values) > 1:
        n = max(1, len(see.values) // 5)
        moved = [
            f"{name} {np.mean(s.values[:n]):.3f} → {np.mean(s.values[-n:]):.3f}"
            for name, s in (("a_p", see), ("self-consistency", think))
        ]
        said.append(
            Finding(
                "Nothing was measured before and after, so only training's own rollouts can tell, "
                "first fifth against last fifth of the steps, on other problems each step and "
                "without intervals.",
                tuple(moved),
            )
        )
    return tuple(said)


def verdict(tables: Mapping[str, Any]) -> str:
    """Whether seeing, thinking, both or neither was learnt, and which of them more.

    A change counts where the exact McNemar test of paired problems gives p < 0.05, or, without
    pairs, where the two 95 % intervals are apart.
    """
    rows = {row["metric"]: row for row in tables["change"]["rows"]}
    moves = {}
    for metric, word in (("a_p", "see"), ("a_r", "think")):
        if metric in rows:
            row = rows[metric]
            moves[word] = math.copysign(1, row["difference"]) if counts(row) else 0
    up = [word for word, move in moves.items() if move > 0]
    down = [word for word, move in moves.items() if move < 0]
    if not moves:
        return "Neither seeing nor thinking was measured."
    worse = f"got worse at {' and at '.join(f'{word}ing' for word in down)}"
    if up:
        text = f"It learnt to {' and to '.join(up)}" + (f", and {worse}" if down else "")
    else:
        text = f"It {worse}" if down else "It learnt nothing that is beyond chance"
    text += "" if "think" in moves else " (thinking, a_r, was not measured)"
    text += "" if "see" in moves else " (seeing, a_p, was not measured)"
    index = asymmetry_of(tables)
    if index is None or index.low is None or index.high is None or not (up or down):
        return f"{text}."
    which = "thinking" if index.low > 0 else "seeing" if index.high < 0 else None
    compared = f"{which} gained more" if which else "neither clearly gained more than the other"
    interval = f"95 % [{_signed(index.low)}, {_signed(index.high)}]"
    return f"{text}; {compared} (Δa_r − Δa_p = {_signed(index.value)}, {interval})."


def counts(row: Mapping[str, Any]) -> bool:
    """Whether a change is beyond chance: by McNemar where there is a p, else by intervals."""
    if row["p"] is not None:
        return bool(row["p"] < LEAST_P)
    return not row["overlap"]


def asymmetry_of(tables: Mapping[str, Any]) -> Estimate | None:
    """The asymmetry index of a run, over the problems measured all four times."""
    before, after = (tables[when].get("per_problem", {}) for when in ("before", "after"))
    parts = [t.get(m) for m in ("a_r", "a_p") for t in (before, after)]
    if not all(parts):
        return None
    shared = sorted(set.intersection(*(set(p) for p in parts if p)))
    if len(shared) < 2:
        return None
    r0, r1, p0, p1 = (np.array([[p[i] for i in shared]]) for p in parts if p)
    index = asymmetry((r0, r1), (p0, p1))
    if is_constant(index):
        return None
    puzzles = tables["after"].get("puzzles", {})
    return crossed_interval(index, (-2, 2), [puzzles.get(i, i) for i in shared])


def _count(row: Mapping[str, Any]) -> str:
    return counted(row["n"], row.get("puzzles"))


def _change_words(metric: str, row: Mapping[str, Any]) -> str:
    before, after = row["before"], row["after"]
    p = f", McNemar p {row['p']:.2g}" if row["p"] is not None else ""
    return (
        f"{metric} {_interval(before)} → {_interval(after)}, {_signed(row['difference'])}: "
        f"intervals {'overlap' if row['overlap'] else 'apart'}{p}, n {_count(after)}"
    )


def evaluation_tables(evaluation: Mapping[str, Any]) -> list[Table]:
    """A table a task, and one of the defects; an evaluation without a before has one column."""
    tables = []
    for task, found in evaluation.items():
        columns: tuple[str, ...]
        rows: list[tuple[str, ...]]
        if "change" in found:
            changes = found["change"]["rows"]
            columns = ("metric", "before", "after", "change", "95 % intervals", "McNemar p", "n")
            rows = [
                (
                    METRIC_NAMES.get(row["metric"], row["metric"]),
                    _interval(row["before"]),
                    _interval(row["after"]),
                    _signed(row["difference"]),
                    "overlap" if row["overlap"] else "apart",
                    "" if row["p"] is None else f"{row['p']:.2g}",
                    _count(row["after"]),
                )
                for row in changes
            ]
            names = [row["metric"] for row in changes]
        else:
            columns = ("metric", "value and 95 % interval", "n")
            names = [row["metric"] for row in found.get("rows", ())]
            rows = [
                (METRIC_NAMES.get(r["metric"], r["metric"]), _interval(r), _count(r))
                for r in found.get("rows", ())
            ]
        align = "l" + "r" * (len(columns) - 1)
        kept = [r for r, n in zip(rows, names, strict=True) if not n.startswith("defect/")]
        defects = [r for r, n in zip(rows, names, strict=True) if n.startswith("defect/")]
        tables.append(Table(f"{task}, held-out problems", columns, align, tuple(kept)))
        if defects:
            short = tuple((r[0].removeprefix("defect/"), *r[1:]) for r in defects)
            named = ("defect", *columns[1:])
            tables.append(
                Table(f"{task}: share of responses with a defect", named, align, short, folded=True)
            )
    return tables


def training_table(metrics: Metrics) -> Table | None:
    """The first against the last fifth of the steps, metric by metric."""
    wanted = [
        *(f"acc/{m}" for m in ("a", "a_p", "a_p_graded", "self_consistency", "leak")),
        *sorted(n for n in metrics if n.startswith("reward/") and n.endswith("/mean")),
        *sorted(n for n in metrics if n.startswith("reliability/")),
        *(f"coupling/outcome_{s}/within" for s in ("perception", "reasoning")),
        "group/zero_variance",
        *(f"learner/entropy/{s}" for s in ("perception", "reasoning", "answer")),
        "response/tokens_mean",
        "response/truncated",
    ]
    rows = []
    for name in wanted:
        series = metrics.get(name)
        if series is None or not series.values:
            continue
        n = max(1, len(series.values) // 5)
        first, last = float(np.mean(series.values[:n])), float(np.mean(series.values[-n:]))
        rows.append((name, _short(first), _short(last), _signed(last - first)))
    if not rows:
        return None
    return Table(
        "Training, first against last fifth of the steps",
        ("metric", "first", "last", "change"), "lrrr", tuple(rows),
        "Means over steps. Each step draws other problems, so small changes are chance.",
        folded=True,
    )  # fmt: skip


def reliability_table(metrics: Metrics) -> Table | None:
    """How well each term tells true perception, where the run measured it."""
    found: dict[str, dict[str, float]] = {}
    for name, series in metrics.items():
        parts = name.split("/")
        if parts[0] == "reliability" and len(parts) >= 3 and series.values:
            found.setdefault("/".join(parts[1:-1]), {})[parts[-1]] = float(np.mean(series.values))
    if not found:
        return None
    stats = ("pooled", "within", "auc")
    rows = tuple(
        (term, *(_short(values[s]) if s in values else "–" for s in stats))
        for term, values in sorted(found.items())
    )
    return Table(
        "Reliability of each term", ("term", *stats), "lrrr", rows,
        "Correlation with true perception over all rollouts and within groups, and the chance "
        "that a right perception gets more than a wrong one; means over steps.",
    )  # fmt: skip


def time_table(metrics: Metrics) -> Table | None:
    """Seconds a step, share and sum of each phase, and throughput."""
    total = metrics.get("time/step")
    if total is None or not total.values:
        return None
    whole = sum(total.values)
    rows = [
        (
            name.removeprefix("time/"),
            f"{np.mean(series.values):.2f} s",
            f"{sum(series.values) / whole:.0%}" if whole else "–",
            duration(sum(series.values)),
        )
        for name, series in metrics.items()
        if name.startswith("time/") and name.count("/") == 1 and series.values
    ]
    tokens = [
        f"{side} {np.mean(metrics[name].values):,.0f} tokens/s"
        for side, name in (
            ("sampler", "throughput/sampler_tokens_per_second"),
            ("learner", "throughput/learner_tokens_per_second"),
        )
        if name in metrics and metrics[name].values
    ]
    idle = [
        f"{side} idle {np.mean(metrics[f'idle/{side}'].values):.0%}"
        for side in ("sampler", "learner")
        if f"idle/{side}" in metrics and metrics[f"idle/{side}"].values
    ]
    return Table(
        "Where the time went", ("phase", "mean a step", "share", "in all"), "lrrr", tuple(rows),
        "; ".join([*tokens, *idle]) + ". Evaluation and logging are in none of them.",
    )  # fmt: skip


def events_table(metrics: Metrics) -> Table | None:
    """Failures, dropped groups, numbers that are none, steps without an update, defects."""
    rows = []
    for name, series in sorted(metrics.items()):
        total = sum(series.values)
        counted = (name.startswith("reward/") and "/failures" in name) or name == "group/dropped"
        if (counted or name.startswith("defects/")) and total > 0:
            at = [s for s, v in zip(series.steps, series.values, strict=True) if v > 0]
            rows.append((name, f"{total:,.0f}", str(len(at)), _span(at)))
        if series.bad:
            rows.append((f"{name} is not finite", "", str(len(series.bad)), _span(series.bad)))
    idle = without_update(metrics)
    if idle:
        rows.append(("steps without an update", "", str(len(idle)), _span(idle)))
    if not rows:
        return None
    title = "Failures, defects, dropped groups"
    return Table(title, ("event", "count", "steps", "first – last step"), "lrrr", tuple(rows))


def warnings(recipe: Mapping[str, Any], metrics: Metrics) -> list[str]:
    """What a reader must know before believing the rest."""
    found = []
    failures = {
        name.split("/")[1]: int(sum(series.values))
        for name, series in metrics.items()
        if name.startswith("reward/") and name.endswith("/failures") and sum(series.values) > 0
    }
    for term, count in sorted(failures.items()):
        what = "The task's own code" if term == "diagnosis" else f"Reward term {term}"
        found.append(f"{what} failed on {count} groups.")
    dropped = sum(metrics.get("group/dropped", Series((), ())).values)
    if dropped:
        found.append(f"{dropped:.0f} groups were dropped because a term failed.")
    limit = MISMATCH_LIMIT.get(recipe.get("model", {}).get("dtype", ""), math.inf)
    gaps = metrics.get("learner/logprob_gap", Series((), ())).values
    over = sum(gap > limit for gap in gaps)
    if over:
        found.append(
            f"Sampler and learner disagreed beyond rounding in {over} of {len(gaps)} steps (up to "
            f"{max(gaps):.2g} nats): their weights or inputs were not the same."
        )
    not_finite = sorted(name for name, series in metrics.items() if series.bad)
    if not_finite:
        found.append(f"Not finite in some steps: {', '.join(not_finite)}.")
    cut = metrics.get("response/truncated", Series((), ())).values
    if cut and np.mean(cut) > 0.1:
        found.append(f"{np.mean(cut):.0%} of the responses were cut off at the token limit.")
    flat = metrics.get("group/zero_variance", Series((), ())).values
    if flat and np.mean(flat[-max(1, len(flat) // 5) :]) > 0.8:
        found.append("In the last fifth of the steps over 80 % of the groups taught nothing.")
    idle = without_update(metrics)
    if idle:
        found.append(f"{len(idle)} steps made no update: no group had a gradient.")
    return found


def without_update(metrics: Metrics) -> list[int]:
    """Steps of RL in which the learner logged no loss."""
    learnt = set(metrics.get("learner/loss", Series((), ())).steps)
    return [s for s in metrics.get("time/step", Series((), ())).steps if s not in learnt]


def settings_table(recipe: Mapping[str, Any], versions: Mapping[str, Any]) -> Table | None:
    """The recipe's values by dotted name (paths cut to their last part) and the versions."""
    rows = [(name, short_path(value)) for name, value in _flat(recipe, "")]
    packages = versions.get("packages", {})
    rows += [(f"version of {name}", str(version)) for name, version in packages.items()]
    git = versions.get("git") or {}
    if git:
        changed = ", modified" if git.get("modified") else ""
        rows.append(("commit", f"{git.get('commit')}{changed}"))
    machine = versions.get("machine", {})
    rows += [(f"machine {name}", str(value)) for name, value in machine.items()]
    return (
        Table("Recipe, versions, machine", ("setting", "value"), "ll", tuple(rows))
        if rows
        else None
    )


def short_path(value: Any) -> str:
    """The value as text; of an absolute path the last part, since reports are handed on."""
    text = str(value)
    return PurePath(text).name if text.startswith(("/", "~")) else text


def duration(seconds: float) -> str:
    """Such as `42 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _flat(value: Any, at: str) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [p for k, v in value.items() for p in _flat(v, f"{at}.{k}" if at else str(k))]
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return [p for i, v in enumerate(value) for p in _flat(v, f"{at}[{i}]")]
    return [(at, value)]


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _span(steps: Sequence[int]) -> str:
    return f"{min(steps)} – {max(steps)}" if len(steps) > 1 else str(steps[0])


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
