"""From a run's metrics to the charts of its report. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.report.plots import DASHES, OTHER_ROLES, Chart, Dash, Line, Role
from rewards.coupling import independent_reference

SEGMENT_ROLES: dict[str, Role] = {
    "perception": "perception",
    "reasoning": "reasoning",
    "answer": "answer",
    "other": "muted",
    "none": "muted",
}
ACCURACIES: dict[str, tuple[str, Role]] = {
    "a": ("end to end", "answer"),
    "a_p": ("seeing", "perception"),
    "a_r": ("thinking, given p*", "reasoning"),
}
CELLS = ("saw right, thought right", "saw right, thought wrong", "saw wrong, thought right",
         "saw wrong, thought wrong", "not judged")  # fmt: skip


@dataclass(frozen=True)
class Series:
    """A metric over steps: `steps` rise, `values` are finite; `bad` steps were not."""

    steps: tuple[int, ...]
    values: tuple[float, ...]
    bad: tuple[int, ...] = ()


Metrics = Mapping[str, Series]


def smoothed(values: Sequence[float]) -> tuple[float, ...]:
    """Centred moving mean over about an eighth of the curve; short curves stay as they are."""
    n = len(values)
    half = n // 16
    if half == 0:
        return tuple(values)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return tuple(
        float(sums[min(n, i + half + 1)] - sums[max(0, i - half)])
        / (min(n, i + half + 1) - max(0, i - half))
        for i in range(n)
    )


def training_charts(metrics: Metrics, cells: Mapping[int, Sequence[int]]) -> list[Chart]:
    """Every learning curve the metrics hold; `cells`: step -> rollouts in each of `CELLS`."""
    found = [
        _lines(metrics, "accuracy", "Accuracy in training", [
            ("acc/a", "a, end to end", "answer", "solid"),
            ("acc/a_p", "a_p, seeing", "perception", "solid"),
            ("acc/self_consistency", "self-consistency", "reasoning", "solid"),
            ("acc/leak", "leak", "muted", "dashed"),
        ], "Share of a step's rollouts. Self-consistency (the answer is valid for what the rollout "
            "itself saw) stands in for thinking, since a_r needs the true perception forced. Leak: "
            "seen wrong, answered right.", (0, 1)),
        _cells(cells),
        _lines(metrics, "rewards", "Reward terms", _term_lines(metrics, "reward", "mean"),
               "Mean of each term over the kept rollouts, before its weight."),
        _lines(metrics, "reliability", "Reliability of the terms",
               _term_lines(metrics, "reliability", "within"),
               "Correlation of each term with true perception within groups: what the update "
               "can learn from.", (-1, 1)),
        _coupling(metrics),
        *_segments(metrics),
        _lines(metrics, "length", "Length of a response", [
            ("response/tokens_mean", "mean", "ink", "solid"),
            ("response/tokens_max", "longest", "muted", "dashed"),
        ], "Tokens.", y_from_zero=True),
        _lines(metrics, "groups", "Groups that teach nothing", [
            ("group/zero_variance", "no variance", "c1", "solid"),
            ("response/truncated", "responses cut off", "c2", "dashed"),
        ], "Share of kept groups whose advantages are all 0, and of responses that reached the "
            "token limit.", (0, 1)),
        _lines(metrics, "mismatch", "Sampler against learner", [
            ("learner/logprob_gap", "largest log-prob gap", "c2", "solid"),
            ("learner/kl", "KL", "c3", "dashed"),
        ], "Nats, on the same tokens before the update. It should be rounding only.", log_y=True),
        _lines(metrics, "gradient", "Gradient norm and clipping", [
            ("learner/grad_norm", "gradient norm", "ink", "solid"),
            ("learner/clip_fraction", "clipped share", "muted", "dashed"),
        ], "Global norm before clipping; share of tokens whose gradient the ratio clip cuts off.",
            y_from_zero=True),
        _time(metrics),
        _lines(metrics, "throughput", "Throughput", [
            ("throughput/sampler_tokens_per_second", "sampled", "c1", "solid"),
            ("throughput/learner_tokens_per_second", "learnt", "c3", "dashed"),
        ], "Response tokens a second.", y_from_zero=True),
        _lines(metrics, "idle", "Idle share of a step", [
            ("idle/sampler", "sampler", "c1", "solid"),
            ("idle/learner", "learner", "c3", "dashed"),
        ], "Share of a step in which that side does nothing.", (0, 1)),
        _lines(metrics, "sft", "Cold start: loss by segment", [
            (f"sft/nll/{name}", name, SEGMENT_ROLES[name], "solid")
            for name in ("perception", "reasoning", "answer")
        ], "Nats a token."),
    ]  # fmt: skip
    return [chart for chart in found if chart is not None]


def evaluation_curves(metrics: Metrics) -> list[Chart]:
    """A chart a task of the evaluations along the way, where there are more than two."""
    charts = []
    names = [name.split("/") for name in metrics if name.startswith("eval/")]
    tasks = dict.fromkeys("/".join(parts[1:-1]) for parts in names if parts[-1] in ACCURACIES)
    for i, task in enumerate(tasks):
        if len(metrics.get(f"eval/{task}/a", Series((), ())).steps) < 3:
            continue
        wanted = [
            (f"eval/{task}/{m}", f"{m}, {words}", role, DASHES[0])
            for m, (words, role) in ACCURACIES.items()
        ]
        chart = _lines(
            metrics, f"evaluation-{i}", f"Held-out problems: {task}", wanted,
            "Greedy answers to the same held-out problems along the run.", (0, 1), smooth=False,
        )  # fmt: skip
        charts += [chart] if chart else []
    return charts


def plane(metrics: Metrics, evaluation: Mapping[str, Any] | None) -> Chart | None:
    """Seeing against thinking: measured a_p and a_r, or else what training shows of them."""
    lines = []
    for i, task in enumerate(t for t in (evaluation or {}) if t != "all tasks"):
        points = _plane_points(metrics, task, (evaluation or {})[task])
        if points:
            x, y, x_range, y_range = zip(*points, strict=True)
            role = (("ink", *OTHER_ROLES))[i % 5]
            lines.append(Line(task, x, y, role, DASHES[i % 4], (), x_range, y_range))
    if lines:
        alt = "; ".join(
            f"{line.label} goes from a_p {line.x[0]:.2f}, a_r {line.y[0]:.2f} "
            f"to a_p {line.x[-1]:.2f}, a_r {line.y[-1]:.2f}"
            for line in lines
        )
        return Chart(
            "plane", "Seeing against thinking",
            "From before (hollow) to after (filled) on held-out problems, with 95 % intervals. "
            "Right is better seeing, up is better thinking given the true perception. Dotted: "
            "equal product of the two, which is a where they are independent.",
            alt, tuple(lines), "path",
            "a_p, perception accuracy", "a_r, reasoning accuracy given p*",
        )  # fmt: skip
    see, think = metrics.get("acc/a_p"), metrics.get("acc/self_consistency")
    if see is None or think is None or see.steps != think.steps:
        return None
    x, y = smoothed(see.values), smoothed(think.values)
    return Chart(
        "plane", "Seeing against thinking (training rollouts)",
        "a_r was not measured before and after, so this is training's own a_p against "
        "self-consistency, as moving means from the first step (hollow) to the last (filled).",
        f"From a_p {x[0]:.2f}, self-consistency {y[0]:.2f} to a_p {x[-1]:.2f}, "
        f"self-consistency {y[-1]:.2f}",
        (Line("training", x, y, "ink"),), "path", "a_p in training",
        "self-consistency in training",
    )  # fmt: skip


def change_chart(evaluation: Mapping[str, Any] | None) -> Chart | None:
    """a, a_p and a_r of each task before and after, with intervals."""
    lines, tasks = [], list(evaluation or {})
    for task in tasks:
        rows = {r["metric"]: r for r in (evaluation or {})[task].get("change", {}).get("rows", ())}
        for metric, (_, role) in ACCURACIES.items():
            if metric not in rows:
                continue
            both = rows[metric]["before"], rows[metric]["after"]
            label = metric if len(tasks) == 1 else f"{task}  {metric}"
            values = tuple(b["value"] for b in both)
            ranges = tuple((b["low"], b["high"]) for b in both)
            lines.append(Line(label, values, (0.0, 0.0), role, x_range=ranges))
    if not lines:
        return None
    return Chart(
        "change", "Before and after",
        "Held-out problems, greedy answers; hollow before, filled after, with 95 % intervals.",
        "; ".join(f"{line.label} {line.x[0]:.2f} to {line.x[1]:.2f}" for line in lines),
        tuple(lines), "change", "accuracy",
    )  # fmt: skip


def _plane_points(metrics: Metrics, task: str, tables: Mapping[str, Any]) -> list[Any]:
    rows = {r["metric"]: r for r in tables.get("change", {}).get("rows", ())}
    if "a_p" not in rows or "a_r" not in rows:
        return []
    ends = [
        (see["value"], think["value"], (see["low"], see["high"]), (think["low"], think["high"]))
        for see, think in ((rows["a_p"][w], rows["a_r"][w]) for w in ("before", "after"))
    ]
    along_p = metrics.get(f"eval/{task}/a_p", Series((), ()))
    along_r = metrics.get(f"eval/{task}/a_r", Series((), ()))
    both = sorted(set(along_p.steps) & set(along_r.steps))[1:-1]
    p, r = (dict(zip(s.steps, s.values, strict=True)) for s in (along_p, along_r))
    between = [(p[s], r[s], (p[s], p[s]), (r[s], r[s])) for s in both]
    return [ends[0], *between, ends[1]]


def _lines(
    metrics: Metrics,
    name: str,
    title: str,
    wanted: Sequence[tuple[str, str, Role, Dash]],
    caption: str,
    limits: tuple[float, float] | None = None,
    *,
    log_y: bool = False,
    smooth: bool = True,
    y_from_zero: bool = False,
) -> Chart | None:
    """A chart of those metrics that are there, or None without any."""
    lines = []
    for metric, label, role, dash in wanted:
        series = metrics.get(metric)
        if series is None or not series.steps:
            continue
        values = [max(v, 1e-12) for v in series.values] if log_y else series.values
        drawn = smoothed(values) if smooth and not log_y else tuple(values)
        raw = series.values if drawn != tuple(values) else ()
        lines.append(Line(label, _floats(series.steps), drawn, role, dash, raw))
    if not lines:
        return None
    if any(line.raw for line in lines):
        caption += " Thin: each step; thick: moving mean."
    if y_from_zero:
        limits = (0, 1.05 * max(max(line.raw or line.y) for line in lines) or 1)
    return Chart(name, title, caption, _in_words(lines), tuple(lines), y_limits=limits, log_y=log_y)


def _in_words(lines: Sequence[Line]) -> str:
    return "; ".join(
        f"{line.label} from {line.y[0]:.3g} to {line.y[-1]:.3g}, between {min(line.y):.3g} and "
        f"{max(line.y):.3g}"
        for line in lines
    )


def _term_lines(metrics: Metrics, prefix: str, stat: str) -> list[tuple[str, str, Role, Dash]]:
    """The lines of every term: outcome and perception in their segments' colours."""
    ends = f"/{stat}"
    terms = [
        name[len(prefix) + 1 : -len(ends)]
        for name in metrics
        if name.startswith(f"{prefix}/") and name.endswith(ends)
    ]
    lines: list[tuple[str, str, Role, Dash]] = []
    fixed: dict[str, tuple[Role, Dash]] = {
        "total": ("ink", "dotted"),
        "outcome": ("answer", "solid"),
        "perception": ("perception", "solid"),
        "perception_graded": ("perception", "dashed"),
    }
    others = sorted(term for term in terms if term not in fixed)
    for term in sorted(terms):
        i = others.index(term) if term in others else 0
        role, dash = fixed.get(term, (OTHER_ROLES[i % 4], DASHES[i // 4 % 4]))
        lines.append((f"{prefix}/{term}{ends}", term, role, dash))
    return lines


def _segments(metrics: Metrics) -> list[Chart | None]:
    source = "learner" if any(n.startswith("learner/entropy/") for n in metrics) else "sft"
    entropy = _lines(
        metrics, "entropy", "Entropy by segment",
        [(f"{source}/entropy/{s}", s, SEGMENT_ROLES[s], "dashed" if s == "other" else "solid")
         for s in ("perception", "reasoning", "answer", "other")],
        "Mean entropy of the policy in nats a token.", y_from_zero=True,
    )  # fmt: skip
    names = [f"response/share/{s}" for s in ("perception", "reasoning", "answer", "none")]
    layers = [(n, metrics[n]) for n in names if n in metrics]
    share = None
    if layers and len({series.steps for _, series in layers}) == 1:
        lines = tuple(
            Line("outside" if n.endswith("none") else n.rsplit("/", 1)[1], _floats(s.steps),
                 s.values, SEGMENT_ROLES[n.rsplit("/", 1)[1]])
            for n, s in layers
        )  # fmt: skip
        share = Chart(
            "share", "Share of the response by segment", "Share of all response tokens.",
            _in_words(lines), lines, "stack",
        )  # fmt: skip
    return [entropy, share]


def _coupling(metrics: Metrics) -> Chart | None:
    chart = _lines(metrics, "coupling", "What the outcome reward follows", [
        (f"coupling/outcome_{s}/{k}", f"{s}, {k}", SEGMENT_ROLES[s], dash)
        for s in ("perception", "reasoning") for k, dash in (("within", DASHES[0]),
                                                             ("pooled", DASHES[2]))
    ], "Correlation of the outcome with seeing (a_p) and thinking (self-consistency), within "
        "groups (what GRPO learns from) and over all rollouts. Dashed: what independent seeing "
        "and thinking of these rates would give.", (-1, 1))  # fmt: skip
    see, think = metrics.get("acc/a_p"), metrics.get("acc/self_consistency")
    if chart is None or see is None or think is None or see.steps != think.steps:
        return chart
    pairs = zip(smoothed(see.values), smoothed(think.values), strict=True)
    # Rounding of the moving mean must not leave [0, 1].
    reference = [independent_reference(*(min(1.0, max(0.0, v)) for v in (p, q))) for p, q in pairs]
    extra = []
    for i, segment in enumerate(("perception", "reasoning")):
        known = [
            (float(s), r[i]) for s, r in zip(see.steps, reference, strict=True) if r[i] is not None
        ]
        if known:
            x, y = zip(*known, strict=True)
            extra.append(Line(f"{segment}, independent", x, y, SEGMENT_ROLES[segment], "dashed"))
    lines = (*chart.lines, *extra)
    low = min(-0.05, *(min(line.y) for line in lines))
    return Chart(
        chart.name, chart.title, chart.caption, _in_words(lines), lines,
        y_limits=(max(-1.0, low), 1.0),
    )  # fmt: skip


def _time(metrics: Metrics) -> Chart | None:
    phases = [
        n for n in metrics if n.startswith("time/") and n.count("/") == 1 and n != "time/step"
    ]
    steps = sorted({s for n in phases for s in metrics[n].steps})
    if not steps:
        return None
    lines = []
    for i, name in enumerate(phases):
        at = dict(zip(metrics[name].steps, metrics[name].values, strict=True))
        role = ("c1", "c2", "c3", "c4", "muted")[i % 5]
        values = tuple(at.get(s, 0.0) for s in steps)
        lines.append(Line(name.removeprefix("time/"), _floats(steps), values, role))  # type: ignore[arg-type]
    return Chart(
        "time", "Where a step's time goes", "Seconds of each phase; evaluation is not in it.",
        _in_words(lines), tuple(lines), "stack", y_label="s",
    )  # fmt: skip


def _cells(cells: Mapping[int, Sequence[int]]) -> Chart | None:
    steps = [s for s in sorted(cells) if sum(cells[s])]
    if not steps:
        return None
    roles: tuple[Role, ...] = ("answer", "perception", "reasoning", "c4", "muted")
    lines = []
    for i, (label, role) in enumerate(zip(CELLS, roles, strict=True)):
        values = smoothed([cells[s][i] / sum(cells[s]) for s in steps])
        if any(values):
            lines.append(Line(label, _floats(steps), values, role))
    return Chart(
        "cells", "Seeing × thinking", "Share of a step's rollouts in each of the four cells "
        "(thinking judged on what the rollout itself saw), moving mean.",
        _in_words(lines), tuple(lines), "stack",
    )  # fmt: skip


def _floats(steps: Sequence[int]) -> tuple[float, ...]:
    return tuple(float(s) for s in steps)
