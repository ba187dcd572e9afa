"""From a run's metrics to the charts of its report, and what charts of ablations share. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np

from cluster.report.plots import DASHES, OTHER_ROLES, Chart, Dash, Line, Pair, Role, Value
from rewards.coupling import independent_reference
from tasks.core import SEGMENTS

SEGMENT_ROLES: dict[str, Role] = {
    "perception": "perception",
    "reasoning": "reasoning",
    "answer": "answer",
    "act": "act",
    "other": "muted",
    "none": "muted",
}
ACCURACIES: dict[str, tuple[str, Role]] = {
    "a": ("end to end", "answer"),
    "a_p": ("seeing", "perception"),
    "a_r": ("thinking, given p*", "reasoning"),
    "sufficiency": ("seeing, by a text-only reader", "perception"),
    "used": ("thinking, where enough is seen", "reasoning"),
}
CELLS = ("saw right, thought right", "saw right, thought wrong", "saw wrong, thought right",
         "saw wrong, thought wrong", "not judged")  # fmt: skip
PLANE = ("a_p, perception accuracy", "a_r, reasoning accuracy given p*")
SHARE, CORRELATION, FROM_ZERO = (0.0, 1.0), (-1.0, 1.0), (0.0, None)
"""Limits of y; None: what the curves need."""

MetricStyles = Mapping[str, tuple[str, Role, Dash]]
"""Metric -> the label, colour and dash of its curve."""


@dataclass(frozen=True)
class Series:
    """A metric over steps: `steps` rise, `values` are finite; `bad` steps were not."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    bad: tuple[int, ...] = ()

    def at(self) -> dict[int, float]:
        """Step -> value."""
        return dict(zip(self.steps, self.values, strict=True))


Metrics = Mapping[str, Series]
NOTHING = Series()


def smoothed(values: Sequence[float]) -> tuple[float, ...]:
    """Centred moving mean over about an eighth of the curve; short curves stay as they are."""
    n = len(values)
    half = n // 16
    if half == 0:
        return tuple(values)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.minimum(n, np.arange(n) + half + 1)
    starts = np.maximum(0, np.arange(n) - half)
    return tuple(float(v) for v in (sums[ends] - sums[starts]) / (ends - starts))


def learning_charts(metrics: Metrics, cells: Mapping[int, Sequence[int]]) -> list[Chart]:
    """What the run learnt, step by step; `cells`: step -> rollouts in each of `CELLS`."""
    entropy = "learner" if any(n.startswith("learner/entropy/") for n in metrics) else "sft"
    return [
        curves(metrics, "accuracy", "Accuracy in training",
            "Share of a step's rollouts. Self-consistency (the answer is valid for what the "
            "rollout itself saw) stands in for thinking, since a_r needs the true perception "
            "forced. Leak: seen wrong, answered right.", {
                "acc/a": ("a, end to end", "answer", "solid"),
                "acc/a_p": ("a_p, seeing", "perception", "solid"),
                "acc/self_consistency": ("self-consistency", "reasoning", "solid"),
                "acc/leak": ("leak", "muted", "dashed"),
            }, SHARE),
        _cells(cells),
        curves(metrics, "rewards", "Reward terms",
            "Mean of each term over the kept rollouts, before its weight.",
            _terms(metrics, "reward", "mean")),
        curves(metrics, "entropy", "Entropy by segment",
            "Mean entropy of the policy in nats a token.", {
                f"{entropy}/entropy/{s}": (s, SEGMENT_ROLES[s], "dashed" if s == "other" else
                                           "solid")
                for s in (*SEGMENTS, "other")
            }, FROM_ZERO),
        _shares(metrics),
        curves(metrics, "length", "Length of a response", "Tokens.", {
                "response/tokens_mean": ("mean", "ink", "solid"),
                "response/tokens_max": ("longest", "muted", "dashed"),
            }, FROM_ZERO),
        curves(metrics, "groups", "Groups that teach nothing",
            "Share of kept groups whose advantages are all 0, and of responses that reached the "
            "token limit.", {
                "group/zero_variance": ("no variance", "c1", "solid"),
                "response/truncated": ("responses cut off", "c2", "dashed"),
            }, SHARE),
        curves(metrics, "sft", "Cold start: loss by segment", "Nats a token.", {
            f"sft/nll/{s}": (s, SEGMENT_ROLES[s], "solid")
            for s in SEGMENTS
        }),
    ]  # fmt: skip


def reward_charts(metrics: Metrics) -> list[Chart]:
    """What the outcome follows, and how reliable the terms are."""
    return [
        _coupling(metrics),
        curves(metrics, "reliability", "Reliability of the terms",
            "Correlation of each term with true perception within groups: what the update can "
            "learn from.", _terms(metrics, "reliability", "within"), CORRELATION),
    ]  # fmt: skip


def machine_charts(metrics: Metrics) -> list[Chart]:
    """Time, throughput, and whether sampler and learner agree."""
    return [
        _time(metrics),
        curves(metrics, "throughput", "Throughput", "Response tokens a second.", {
            "throughput/sampler_tokens_per_second": ("sampled", "c1", "solid"),
            "throughput/learner_tokens_per_second": ("learnt", "c3", "dashed"),
        }, FROM_ZERO),
        curves(metrics, "idle", "Idle share of a step",
            "Share of a step in which that side does nothing.", {
                "idle/sampler": ("sampler", "c1", "solid"),
                "idle/learner": ("learner", "c3", "dashed"),
            }, SHARE),
        curves(metrics, "mismatch", "Sampler against learner",
            "Nats, on the same tokens before the update. It should be rounding only.", {
                "learner/logprob_gap": ("largest log-prob gap", "c2", "solid"),
                "learner/kl": ("KL", "c3", "dashed"),
            }, log_y=True),
        curves(metrics, "gradient", "Gradient norm and clipping",
            "Global norm before clipping; share of tokens whose gradient the ratio clip cuts off.",
            {
                "learner/grad_norm": ("gradient norm", "ink", "solid"),
                "learner/clip_fraction": ("clipped share", "muted", "dashed"),
            }, FROM_ZERO),
    ]  # fmt: skip


def evaluation_curves(metrics: Metrics) -> list[Chart]:
    """A chart a task of the evaluations along the way, where there are more than two."""
    names = [name.split("/") for name in metrics if name.startswith("eval/")]
    tasks = dict.fromkeys("/".join(parts[1:-1]) for parts in names if parts[-1] in ACCURACIES)
    return [
        curves(
            metrics, f"evaluation-{i}", f"Held-out problems: {task}",
            "Greedy answers to the same held-out problems along the run.",
            {
                f"eval/{task}/{m}": (f"{m}, {words}", role, "solid")
                for m, (words, role) in ACCURACIES.items()
            },
            SHARE, smooth=False,
        )
        for i, task in enumerate(tasks)
        if len(metrics.get(f"eval/{task}/a", NOTHING).steps) > 2
    ]  # fmt: skip


def plane(metrics: Metrics, evaluation: Mapping[str, Any]) -> Chart:
    """Seeing against thinking: measured a_p and a_r, or else what training shows of them."""
    looks = zip(cycle(("ink", *OTHER_ROLES)), cycle(DASHES), strict=False)
    lines = []
    for task in (t for t in evaluation if t != "all tasks"):
        role, dash = next(looks)
        rows = _changes(evaluation[task])
        if "a_p" not in rows or "a_r" not in rows:
            continue
        along = [metrics.get(f"eval/{task}/{m}", NOTHING).at() for m in ("a_p", "a_r")]
        between = sorted(set(along[0]) & set(along[1]))[1:-1]
        x, y = (
            [value(row["before"]), *((at[s],) * 3 for s in between), value(row["after"])]
            for row, at in zip((rows["a_p"], rows["a_r"]), along, strict=True)
        )
        lines.append(Line.of(task, x, y, role, dash))
    if lines:
        return Chart(
            "plane", "Seeing against thinking",
            "From before (hollow) to after (filled) on held-out problems, with 95 % intervals. "
            "Right is better seeing, up is better thinking given the true perception. Dotted: "
            "equal product of the two, which is a where they are independent.",
            tuple(lines), "plane", *PLANE,
        )  # fmt: skip
    see, think = (metrics.get(f"acc/{m}", NOTHING) for m in ("a_p", "self_consistency"))
    paired = see.steps and see.steps == think.steps
    return Chart(
        "plane", "Seeing against thinking (training rollouts)",
        "a_r was not measured before and after, so this is training's own a_p against "
        "self-consistency, as moving means from the first step (hollow) to the last (filled).",
        (Line("training", smoothed(see.values), smoothed(think.values), "ink"),) if paired else (),
        "plane", "a_p in training", "self-consistency in training",
    )  # fmt: skip


def change_chart(evaluation: Mapping[str, Any]) -> Chart:
    """The accuracies of each task before and after, with intervals."""
    lines = [
        Line.of(
            metric if len(evaluation) == 1 else f"{task}  {metric}",
            [value(rows[metric]["before"]), value(rows[metric]["after"])], (0.0, 0.0), role,
        )
        for task, rows in ((task, _changes(tables)) for task, tables in evaluation.items())
        for metric, (_, role) in ACCURACIES.items()
        if metric in rows
    ]  # fmt: skip
    return Chart(
        "change", "Before and after",
        "Held-out problems, greedy answers; hollow before, filled after, with 95 % intervals.",
        tuple(lines), "rows", "accuracy", x_limits=SHARE,
    )  # fmt: skip


def value(row: Mapping[str, Any]) -> Value:
    """A measured row as what a chart draws."""
    return row["value"], row["low"], row["high"]


def _changes(tables: Mapping[str, Any]) -> dict[str, Any]:
    return {row["metric"]: row for row in tables.get("change", {}).get("rows", ())}


def curves(
    metrics: Metrics,
    name: str,
    title: str,
    caption: str,
    metric_styles: MetricStyles,
    limits: tuple[float, float | None] | None = None,
    *,
    log_y: bool = False,
    smooth: bool = True,
) -> Chart:
    """A chart of those metrics that are there."""
    lines = []
    for metric, (label, role, dash) in metric_styles.items():
        series = metrics.get(metric, NOTHING)
        if series.steps:
            values = tuple(max(v, 1e-12) for v in series.values) if log_y else series.values
            drawn = smoothed(values) if smooth and not log_y else values
            raw = series.values if drawn != values else ()
            lines.append(Line(label, _floats(series.steps), drawn, role, dash, raw))
    if any(line.raw for line in lines):
        caption += " Thin: each step; thick: moving mean."
    y_limits = None
    if limits and lines:
        highest = max(max(line.raw or line.y) for line in lines)
        y_limits = (limits[0], (1.05 * highest or 1) if limits[1] is None else limits[1])
    return Chart(name, title, caption, tuple(lines), y_limits=y_limits, log_y=log_y)


def _terms(metrics: Metrics, prefix: str, stat: str) -> MetricStyles:
    """The curves of every term: outcome and perception in their segments' colours."""
    fixed: dict[str, tuple[Role, Dash]] = {
        "total": ("ink", "dotted"),
        "outcome": ("answer", "solid"),
        "perception": ("perception", "solid"),
        "perception_graded": ("perception", "dashed"),
    }
    ends = f"/{stat}"
    names = sorted(n for n in metrics if n.startswith(f"{prefix}/") and n.endswith(ends))
    terms = {name: name.removeprefix(f"{prefix}/").removesuffix(ends) for name in names}
    looks = other_looks([term for term in terms.values() if term not in fixed]) | fixed
    return {name: (term, *looks[term]) for name, term in terms.items()}


def other_looks(names: Sequence[str]) -> dict[str, tuple[Role, Dash]]:
    """A colour and dash for each name, none of a segment's colours."""
    return {n: (OTHER_ROLES[i % 4], DASHES[i // 4 % 4]) for i, n in enumerate(names)}


def _shares(metrics: Metrics) -> Chart:
    names = [f"response/share/{s}" for s in (*SEGMENTS, "none")]
    layers = [(n.rsplit("/", 1)[1], metrics[n]) for n in names if n in metrics]
    lines = [
        Line("outside" if s == "none" else s, _floats(at.steps), at.values, SEGMENT_ROLES[s])
        for s, at in layers
    ]
    if len({series.steps for _, series in layers}) > 1:
        lines = []  # layers of other steps do not add up
    return Chart(
        "share", "Share of the response by segment", "Share of all response tokens.",
        tuple(lines), "stack",
    )  # fmt: skip


def _coupling(metrics: Metrics) -> Chart:
    segments = ("perception", "reasoning")
    chart = curves(
        metrics, "coupling", "What the outcome reward follows",
        "Correlation of the outcome with seeing (a_p) and thinking (self-consistency), within "
        "groups (what GRPO learns from) and over all rollouts. Dashed: what independent seeing "
        "and thinking of these rates would give.",
        {
            f"coupling/outcome_{s}/{k}": (f"{s}, {k}", SEGMENT_ROLES[s], dash)
            for s in segments
            for k, dash in (("within", DASHES[0]), ("pooled", DASHES[2]))
        },
        CORRELATION,
    )  # fmt: skip
    see, think = (metrics.get(f"acc/{m}", NOTHING) for m in ("a_p", "self_consistency"))
    if not chart.lines or not see.steps or see.steps != think.steps:
        return chart
    # Rounding of the moving mean must not leave [0, 1].
    rates = [np.clip(smoothed(series.values), 0.0, 1.0).tolist() for series in (see, think)]
    reference = [independent_reference(p, q) for p, q in zip(*rates, strict=True)]
    lines = list(chart.lines)
    for i, segment in enumerate(segments):
        known = [(s, r[i]) for s, r in zip(see.steps, reference, strict=True) if r[i] is not None]
        if known:
            x, y = zip(*known, strict=True)
            label = f"{segment}, independent"
            lines.append(Line(label, _floats(x), _floats(y), SEGMENT_ROLES[segment], "dashed"))
    low = min(-0.05, *(min(line.y) for line in lines))
    return replace(chart, lines=tuple(lines), y_limits=(max(-1.0, low), 1.0), alt="")


def _time(metrics: Metrics) -> Chart:
    phases = [
        n for n in metrics if n.startswith("time/") and n.count("/") == 1 and n != "time/step"
    ]
    steps = sorted({s for n in phases for s in metrics[n].steps})
    roles: Iterable[Role] = cycle((*OTHER_ROLES, "muted"))
    lines = [
        Line(name.removeprefix("time/"), _floats(steps),
             tuple(metrics[name].at().get(s, 0.0) for s in steps), role)
        for name, role in zip(phases, roles, strict=False)
        if steps
    ]  # fmt: skip
    return Chart(
        "time", "Where a step's time goes", "Seconds of each phase; evaluation is not in it.",
        tuple(lines), "stack", y_label="s",
    )  # fmt: skip


def _cells(cells: Mapping[int, Sequence[int]]) -> Chart:
    steps = [s for s in sorted(cells) if sum(cells[s])]
    roles: tuple[Role, ...] = ("answer", "perception", "reasoning", "c4", "muted")
    lines = [
        Line(label, _floats(steps), values, role)
        for i, (label, role) in enumerate(zip(CELLS, roles, strict=True))
        if any(values := smoothed([cells[s][i] / sum(cells[s]) for s in steps]))
    ]
    return Chart(
        "cells", "Seeing × thinking", "Share of a step's rollouts in each of the four cells "
        "(thinking judged on what the rollout itself saw), moving mean.", tuple(lines), "stack",
    )  # fmt: skip


def around(lines: Iterable[Line]) -> Pair:
    """Limits of y around values and intervals, within [0, 1]; a band of few seeds may fill it."""
    values = [v for line in lines for pair in line.y_range for v in pair] or [0.0, 1.0]
    margin = max(0.02, 0.05 * (max(values) - min(values)))
    return max(0.0, min(values) - margin), min(1.0, max(values) + margin)


def _floats(steps: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(s) for s in steps)
