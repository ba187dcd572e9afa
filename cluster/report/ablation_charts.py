"""From an ablation's summary to the charts of its report. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from cluster.ablation.results import ALL_TASKS, COMPARED, COUPLINGS, Curve, Level, Summary
from cluster.ablation.statistics import PHASES, Estimate
from cluster.report.charts import ACCURACIES, SEGMENT_ROLES, smoothed
from cluster.report.plots import DASHES, OTHER_ROLES, Chart, Dash, Line, Role

Pair = tuple[float, float]
IN_TRAINING = {
    "acc/a": ("a in training", "Share of a step's rollouts that are right."),
    "acc/a_p": ("a_p in training: seeing", "Share of a step's rollouts whose perception is right."),
    "acc/leak": ("Leak in training", "Share seen wrong and answered right all the same."),
}
BAND = "Mean over seeds with its 95 % band, pointwise; no band where there is one seed."


def looks(arms: Sequence[str]) -> dict[str, tuple[Role, Dash]]:
    """The colour and dash of each arm, the same in every chart; the reference in ink."""
    found: dict[str, tuple[Role, Dash]] = {arms[0]: ("ink", "solid")} if arms else {}
    for i, arm in enumerate(arms[1:]):
        found[arm] = (OTHER_ROLES[i % 4], DASHES[i // 4 % 4])
    return found


def headlines(summary: Summary) -> list[tuple[str, str]]:
    """(difficulty, task) of the verdict: of each difficulty all tasks together, or its only one."""
    found: dict[str, str] = {}
    for level in summary.levels:
        if level.task == ALL_TASKS or level.difficulty not in found:
            found[level.difficulty] = level.task
    return list(found.items())


def at(difficulty: str, task: str) -> str:
    """Such as `sudoku` or `sudoku (hard)`."""
    return f"{task} ({difficulty})" if difficulty else task


def bounds(estimate: Estimate) -> Pair:
    """The interval, or the value twice where there is none."""
    if estimate.low is None or estimate.high is None:
        return estimate.value, estimate.value
    return estimate.low, estimate.high


def forests(summary: Summary) -> list[Chart]:
    """Each arm's paired difference from the reference, a chart an accuracy and headline."""
    charts = []
    for i, (difficulty, task) in enumerate(headlines(summary)):
        for metric in COMPARED:
            words, role = ACCURACIES[metric]
            found = [
                c
                for c in summary.comparisons
                if (c.difficulty, c.task, c.metric) == (difficulty, task, metric)
            ]
            lines = tuple(
                Line(c.arm, (c.difference.value,), (0.0,), role, x_range=(bounds(c.difference),))
                for c in found
            )
            if lines:
                charts.append(
                    Chart(
                        f"difference-{i}-{metric}",
                        f"{metric}, {words}: less {summary.reference}",
                        f"{at(difficulty, task)}, after training: the arm's accuracy less the "
                        "reference's at the same seeds and problems, with 95 % intervals. Right "
                        "of 0: the arm is better.",
                        "; ".join(_difference(line) for line in lines),
                        lines,
                        "forest",
                        "difference",
                    )
                )
    return charts


def planes(summary: Summary, arms: Sequence[str]) -> list[Chart]:
    """Seeing against thinking for each task: a path an arm from start to end."""
    charts = []
    style = looks(arms)
    places = dict.fromkeys((v.difficulty, v.task) for v in summary.levels if v.task != ALL_TASKS)
    for i, (difficulty, task) in enumerate(places):
        lines = []
        for arm in arms:
            of = levels(summary, difficulty, task, arm)
            if "a_p" not in of or "a_r" not in of:
                continue
            ends = [
                (getattr(of["a_p"], when), getattr(of["a_r"], when)) for when in ("before", "after")
            ]
            path = [ends[0], *_on_the_way(summary, difficulty, task, arm), ends[1]]
            role, dash = style[arm]
            lines.append(
                Line(
                    arm,
                    tuple(p.value for p, _ in path),
                    tuple(r.value for _, r in path),
                    role,
                    dash,
                    (),
                    tuple(bounds(p) for p, _ in path),
                    tuple(bounds(r) for _, r in path),
                )
            )
        if lines:
            charts.append(
                Chart(
                    f"plane-{i}",
                    f"Seeing against thinking: {at(difficulty, task)}",
                    "Each arm from before (hollow) to after (filled) on held-out problems, with "
                    "95 % intervals. Right is better seeing, up better thinking given the true "
                    "perception. Dotted: equal product, which is a where they are independent. "
                    "The axes show only the part with arms in it.",
                    "; ".join(_journey(line) for line in lines),
                    tuple(lines),
                    "path",
                    "a_p, perception accuracy",
                    "a_r, reasoning accuracy given p*",
                    close=True,
                )
            )
    return charts


def curves(summary: Summary, arms: Sequence[str]) -> list[Chart]:
    """Learning curves with bands: of training, and of evaluations where there are over two."""
    charts = []
    for i, difficulty in enumerate(dict.fromkeys(c.difficulty for c in summary.curves)):
        here = [c for c in summary.curves if c.difficulty == difficulty]
        where = f" ({difficulty})" if difficulty else ""
        for j, metric in enumerate(dict.fromkeys(c.metric for c in here)):
            found = [c for c in here if c.metric == metric]
            if metric in IN_TRAINING:
                title, caption = IN_TRAINING[metric]
            elif metric.startswith("eval/") and max(len(c.steps) for c in found) > 2:
                _, rest = metric.split("/", 1)
                task, of = rest.rsplit("/", 1)
                title = f"{of}, {ACCURACIES[of][0]}: {task}"
                caption = "Greedy answers to the same held-out problems along the run."
            else:
                continue
            lines = _bands(found, arms)
            if lines:
                charts.append(
                    Chart(
                        f"curve-{i}-{j}",
                        title + where,
                        f"{caption} {BAND}",
                        "; ".join(f"{v.label} from {v.y[0]:.3g} to {v.y[-1]:.3g}" for v in lines),
                        lines,
                        y_limits=_limits(lines),
                    )
                )
    return charts


ALPHA = ("α", "the share α of the reward that perception gets; α 0 is the outcome alone")
LAMBDA = ("λ", "the weight λ of perception in the loss")


def frontiers(
    summary: Summary, weights: Mapping[str, float], told: tuple[str, str] = ALPHA
) -> list[Chart]:
    """a_p against a_r over a weight, and the three accuracies over it; none with fewer than two.

    `weights` has the arms that differ in nothing else: α of rewards α·a_p + (1 − α)·a, or λ of
    losses λ·L_p + (1 − λ)·L_r. `told`: the weight's sign and what it is.
    """
    sign, meaning = told
    charts = []
    for i, (difficulty, task) in enumerate(headlines(summary)):
        found = sorted(
            (alpha, arm) for arm, alpha in weights.items() if levels(summary, difficulty, task, arm)
        )
        if len({alpha for alpha, _ in found}) < 2:
            continue
        after = {
            arm: {m: v.after for m, v in levels(summary, difficulty, task, arm).items()}
            for _, arm in found
        }
        points = tuple(
            Line(
                f"{sign} {alpha:g}",
                (after[arm]["a_p"].value,),
                (after[arm]["a_r"].value,),
                "c1",
                x_range=(bounds(after[arm]["a_p"]),),
                y_range=(bounds(after[arm]["a_r"]),),
            )
            for alpha, arm in found
            if {"a_p", "a_r"} <= set(after[arm])
        )
        if points:
            charts.append(
                Chart(
                    f"frontier-{i}",
                    f"The {sign} frontier: {at(difficulty, task)}",
                    f"After training, by {meaning}. With 95 % intervals; dotted: equal product.",
                    "; ".join(f"{p.label}: a_p {p.x[0]:.3f}, a_r {p.y[0]:.3f}" for p in points),
                    points,
                    "frontier",
                    "a_p, perception accuracy",
                    "a_r, reasoning accuracy given p*",
                    close=True,
                )
            )
        lines = tuple(
            Line(
                f"{m}, {words}",
                tuple(alpha for alpha, _ in there),
                tuple(after[arm][m].value for _, arm in there),
                role,
                y_range=tuple(bounds(after[arm][m]) for _, arm in there),
            )
            for m, (words, role) in ACCURACIES.items()
            if (there := [(alpha, arm) for alpha, arm in found if m in after[arm]])
        )
        if lines:
            charts.append(
                Chart(
                    f"alpha-{i}",
                    f"Accuracy over {sign}: {at(difficulty, task)}",
                    "Held-out problems after training, with 95 % intervals.",
                    "; ".join(
                        f"{v.label}: "
                        + ", ".join(
                            f"{y:.3f} at {sign} {x:g}" for x, y in zip(v.x, v.y, strict=True)
                        )
                        for v in lines
                    ),
                    lines,
                    x_label=sign,
                    y_limits=_limits(lines),
                    whole_x=False,
                )
            )
    return charts


def coupling_charts(summary: Summary, arms: Sequence[str]) -> list[Chart]:
    """What the outcome follows within groups, third by third of training."""
    charts = []
    style = looks(arms)
    for i, difficulty in enumerate(dict.fromkeys(c.difficulty for c in summary.couplings)):
        for name in COUPLINGS:
            segment = name.removeprefix("outcome_")
            assert segment in SEGMENT_ROLES
            lines = []
            for arm in arms:
                by_phase = {
                    c.phase: c.correlation
                    for c in summary.couplings
                    if (c.difficulty, c.arm, c.of) == (difficulty, arm, name)
                }
                there = [(k + 1, by_phase[p]) for k, p in enumerate(PHASES) if p in by_phase]
                if there:
                    role, dash = style[arm]
                    lines.append(
                        Line(
                            arm,
                            tuple(float(k) for k, _ in there),
                            tuple(e.value for _, e in there),
                            role,
                            dash,
                            y_range=tuple(bounds(e) for _, e in there),
                        )
                    )
            if lines:
                where = f" ({difficulty})" if difficulty else ""
                low = min(-0.05, *(v for line in lines for pair in line.y_range for v in pair))
                charts.append(
                    Chart(
                        f"coupling-{i}-{segment}",
                        f"The outcome follows {segment}{where}",
                        "Correlation within groups of the outcome reward with "
                        + ("a_p." if segment == "perception" else "self-consistency.")
                        + f" By third of training. {BAND}",
                        "; ".join(f"{v.label} from {v.y[0]:.3g} to {v.y[-1]:.3g}" for v in lines),
                        tuple(lines),
                        x_label="third of training",
                        y_limits=(max(-1.0, low), 1.0),
                    )
                )
    return charts


def levels(summary: Summary, difficulty: str, task: str, arm: str) -> dict[str, Level]:
    """An arm's accuracies on a task, by metric."""
    return {
        v.metric: v
        for v in summary.levels
        if (v.difficulty, v.task, v.arm) == (difficulty, task, arm)
    }


def _on_the_way(
    summary: Summary, difficulty: str, task: str, arm: str
) -> list[tuple[Estimate, Estimate]]:
    """(a_p, a_r) at the evaluations between the first and the last."""
    by_metric: dict[str, dict[int, Estimate]] = {}
    for c in summary.curves:
        if (c.difficulty, c.arm) == (difficulty, arm):
            by_metric[c.metric] = {
                s: p for s, p in zip(c.steps, c.points, strict=True) if math.isfinite(p.value)
            }
    p, r = (by_metric.get(f"eval/{task}/{m}", {}) for m in ("a_p", "a_r"))
    return [(p[step], r[step]) for step in sorted(set(p) & set(r))[1:-1]]


def _bands(found: Iterable[Curve], arms: Sequence[str]) -> tuple[Line, ...]:
    style = looks(arms)
    lines = []
    for curve in found:
        there = [
            (float(s), p)
            for s, p in zip(curve.steps, curve.points, strict=True)
            if math.isfinite(p.value)
        ]
        if not there:
            continue
        role, dash = style[curve.arm]
        low, high = (smoothed([bounds(p)[k] for _, p in there]) for k in (0, 1))
        lines.append(
            Line(
                curve.arm,
                tuple(s for s, _ in there),
                smoothed([p.value for _, p in there]),
                role,
                dash,
                y_range=tuple(zip(low, high, strict=True)),
            )
        )
    return tuple(lines)


def _limits(lines: Iterable[Line]) -> Pair:
    """Around means and bands, within [0, 1]; a band of few seeds may fill it."""
    values = [v for line in lines for pair in line.y_range for v in pair]
    margin = max(0.02, 0.05 * (max(values) - min(values)))
    return max(0.0, min(values) - margin), min(1.0, max(values) + margin)


def _difference(line: Line) -> str:
    low, high = line.x_range[0]
    return f"{line.label} {line.x[0]:+.3f}, from {low:+.3f} to {high:+.3f}"


def _journey(line: Line) -> str:
    return (
        f"{line.label} goes from a_p {line.x[0]:.3f}, a_r {line.y[0]:.3f} to a_p "
        f"{line.x[-1]:.3f}, a_r {line.y[-1]:.3f}"
    )
