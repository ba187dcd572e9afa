"""From an ablation's summary to the charts of its report. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cluster.ablation.statistics import PHASES, Estimate
from cluster.ablation.summary import ALL_TASKS, COMPARED, COUPLINGS, Summary, at
from cluster.report.charts import ACCURACIES, PLANE, around, other_looks, smoothed
from cluster.report.plots import Chart, Dash, Line, Role, Value

IN_TRAINING = {
    "acc/a": ("a in training", "Share of a step's rollouts that are right."),
    "acc/a_p": ("a_p in training: seeing", "Share of a step's rollouts whose perception is right."),
    "acc/leak": ("Leak in training", "Share seen wrong and answered right all the same."),
}
BAND = "Mean over seeds with its 95 % band, pointwise; no band where there is one seed."
ALPHA = ("α", "the share α of the reward that perception gets; α 0 is the outcome alone")
LAMBDA = ("λ", "the weight λ of perception in the loss")


def looks(arms: Sequence[str]) -> dict[str, tuple[Role, Dash]]:
    """The colour and dash of each arm, the same in every chart; the reference in ink."""
    reference: dict[str, tuple[Role, Dash]] = {arm: ("ink", "solid") for arm in arms[:1]}
    return reference | other_looks(arms[1:])


def value(estimate: Estimate) -> Value:
    """What a chart draws: where there is no interval its ends are the value."""
    if estimate.low is None or estimate.high is None:
        return (estimate.value,) * 3
    return estimate.value, estimate.low, estimate.high


def forests(summary: Summary) -> list[Chart]:
    """Each arm's paired difference from the reference, a chart an accuracy and headline."""
    return [
        Chart(
            f"difference-{i}-{metric}",
            f"{metric}, {ACCURACIES[metric][0]}: less {summary.reference}",
            f"{at(difficulty, task)}, after training: the arm's accuracy less the reference's at "
            "the same seeds and problems, with 95 % intervals. Right of 0: the arm is better.",
            tuple(
                Line.of(c.arm, [value(c.difference)], (0.0,), ACCURACIES[metric][1])
                for c in summary.comparisons
                if (c.difficulty, c.task, c.metric) == (difficulty, task, metric)
            ),
            "rows",
            "difference",
        )
        for i, (difficulty, task) in enumerate(summary.headlines())
        for metric in COMPARED
    ]


def planes(summary: Summary, arms: Sequence[str]) -> list[Chart]:
    """Seeing against thinking for each task: a path an arm from start to end."""
    charts = []
    cells = dict.fromkeys((v.difficulty, v.task) for v in summary.levels if v.task != ALL_TASKS)
    for i, (difficulty, task) in enumerate(cells):
        lines = []
        for arm, look in looks(arms).items():
            of = summary.of(difficulty, task, arm)
            if "a_p" not in of or "a_r" not in of:
                continue
            along = [
                {
                    step: value(point)
                    for c in summary.curves
                    if (c.difficulty, c.arm, c.metric) == (difficulty, arm, f"eval/{task}/{m}")
                    for step, point in zip(c.steps, c.points, strict=True)
                    if math.isfinite(point.value)
                }
                for m in ("a_p", "a_r")
            ]
            between = sorted(set(along[0]) & set(along[1]))[1:-1]
            x, y = (
                [value(level.before), *(points[step] for step in between), value(level.after)]
                for level, points in zip((of["a_p"], of["a_r"]), along, strict=True)
            )
            lines.append(Line.of(arm, x, y, *look))
        charts.append(
            Chart(
                f"plane-{i}",
                f"Seeing against thinking: {at(difficulty, task)}",
                "Each arm from before (hollow) to after (filled) on held-out problems, with 95 % "
                "intervals. Right is better seeing, up better thinking given the true perception. "
                "Dotted: equal product, which is a where they are independent. The axes show only "
                "the part with arms in it.",
                tuple(lines),
                "plane",
                *PLANE,
                close=True,
            )
        )
    return charts


def curves(summary: Summary, arms: Sequence[str]) -> list[Chart]:
    """Learning curves with bands: of training, and of evaluations where there are over two."""
    charts = []
    for i, difficulty in enumerate(dict.fromkeys(c.difficulty for c in summary.curves)):
        here = [c for c in summary.curves if c.difficulty == difficulty]
        for j, metric in enumerate(dict.fromkeys(c.metric for c in here)):
            of_metric = [c for c in here if c.metric == metric]
            if metric in IN_TRAINING:
                title, caption = IN_TRAINING[metric]
            elif metric.startswith("eval/") and max(len(c.steps) for c in of_metric) > 2:
                task, of = metric.removeprefix("eval/").rsplit("/", 1)
                title = f"{of}, {ACCURACIES[of][0]}: {task}"
                caption = "Greedy answers to the same held-out problems along the run."
            else:
                continue
            lines = []
            for curve in of_metric:
                steps = zip(curve.steps, curve.points, strict=True)
                points = {s: value(p) for s, p in steps if math.isfinite(p.value)}
                if points:
                    y = zip(*map(smoothed, zip(*points.values(), strict=True)), strict=True)
                    lines.append(Line.of(curve.arm, [*points], [*y], *looks(arms)[curve.arm]))
            charts.append(
                Chart(
                    f"curve-{i}-{j}",
                    at(difficulty, title),
                    f"{caption} {BAND}",
                    tuple(lines),
                    y_limits=around(lines),
                )
            )
    return charts


def frontiers(
    summary: Summary, weights: Mapping[str, float], weight_words: tuple[str, str] = ALPHA
) -> list[Chart]:
    """a_p against a_r over a weight, and the three accuracies over it; none with fewer than two.

    `weights` has the arms that differ in nothing else: α of rewards α·a_p + (1 − α)·a, or λ of
    losses λ·L_p + (1 − λ)·L_r. `weight_words`: the weight's sign and what it is.
    """
    sign, meaning = weight_words
    charts = []
    for i, (difficulty, task) in enumerate(summary.headlines()):
        after_by_weight = [
            (weight, {m: value(v.after) for m, v in summary.of(difficulty, task, arm).items()})
            for weight, arm in sorted((weight, arm) for arm, weight in weights.items())
            if summary.of(difficulty, task, arm)
        ]
        if len({weight for weight, _ in after_by_weight}) < 2:
            continue
        points = tuple(
            Line.of(f"{sign} {weight:g}", [after["a_p"]], [after["a_r"]], "c1")
            for weight, after in after_by_weight
            if {"a_p", "a_r"} <= set(after)
        )
        charts.append(
            Chart(
                f"frontier-{i}",
                f"The {sign} frontier: {at(difficulty, task)}",
                f"After training, by {meaning}. With 95 % intervals; dotted: equal product.",
                points,
                "plane",
                *PLANE,
                close=True,
                joined=True,
            )
        )
        lines = []
        for m, (words, role) in ACCURACIES.items():
            curve = [(weight, after[m]) for weight, after in after_by_weight if m in after]
            if curve:
                x, y = zip(*curve, strict=True)
                lines.append(Line.of(f"{m}, {words}", x, y, role))
        charts.append(
            Chart(
                f"alpha-{i}",
                f"Accuracy over {sign}: {at(difficulty, task)}",
                "Held-out problems after training, with 95 % intervals.",
                tuple(lines),
                x_label=sign,
                y_limits=around(lines),
                whole_x=False,
            )
        )
    return charts


def coupling_charts(summary: Summary, arms: Sequence[str]) -> list[Chart]:
    """What the outcome follows within groups, third by third of training."""
    charts = []
    for i, difficulty in enumerate(dict.fromkeys(c.difficulty for c in summary.couplings)):
        for name in COUPLINGS:
            segment = name.removeprefix("outcome_")
            lines = []
            for arm, look in looks(arms).items():
                by_phase = {
                    PHASES.index(c.phase) + 1: value(c.correlation)
                    for c in summary.couplings
                    if (c.difficulty, c.arm, c.of) == (difficulty, arm, name)
                }
                if by_phase:
                    lines.append(Line.of(arm, [*by_phase], [*by_phase.values()], *look))
            low = min((v for line in lines for pair in line.y_range for v in pair), default=0)
            charts.append(
                Chart(
                    f"coupling-{i}-{segment}",
                    at(difficulty, f"The outcome follows {segment}"),
                    "Correlation within groups of the outcome reward with "
                    + ("a_p." if segment == "perception" else "self-consistency.")
                    + f" By third of training. {BAND}",
                    tuple(lines),
                    x_label="third of training",
                    y_limits=(max(-1.0, min(-0.05, low)), 1.0),
                )
            )
    return charts
