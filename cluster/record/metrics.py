"""From scored rollouts to numbers: accuracies with intervals, tables, metrics of a step.

Pure functions. Shapes: P problems, k responses a problem, G rollouts in a group. Accuracies are
those of arXiv 2605.29496: `a` end to end, `a_p` perception, `a_r` reasoning given `p*`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np
from rich.markup import escape
from rich.table import Table

from rewards.advantages import is_constant
from rewards.coupling import Correlations, coupling, outcome_couplings
from rewards.intervals import mean_interval
from rewards.reliability import roc_auc
from rewards.scored import ScoredGroup
from rewards.terms import diagnose
from rollout.record import Group
from tasks.core import NO_SEGMENT, SEGMENTS, Task

MISMATCH_LIMIT = {"float32": 1e-3, "bfloat16": 0.5}
"""Largest on-policy log-prob gap in nats that arithmetic alone explains, by dtype."""

STALE_KL_LIMIT = 0.1
"""Largest KL(sampler ‖ learner) in nats a token of stale tokens: what learning in between explains.

Our choice, about what clips of 0.2 and 0.28 allow within one step, some steps over.
"""


def mismatch(metrics: Mapping[str, float], dtype: str) -> str | None:
    """What is wrong if sampler and learner disagree on a step's tokens, before its first update.

    `metrics` are those of the step; without a learner's in it nothing is said. Where every token is
    of the learner's own version, no log-prob may differ by more than `MISMATCH_LIMIT` of the dtype:
    checksums on a CPU cannot see packed linear layers, so this is the proof that a transfer
    arrived. Where some are older, the mean KL may not be above `STALE_KL_LIMIT`.
    """
    if metrics.get("policy/lag_max", 0.0) > 0:
        kl = metrics.get("learner/mismatch/k3", 0.0)
        return (
            f"sampler and learner are {kl:.2g} nats a token apart (more than {STALE_KL_LIMIT:g}); "
            "the tokens are too stale, or their weights or inputs are not the same"
            if not kl <= STALE_KL_LIMIT
            else None
        )
    gap, limit = metrics.get("learner/logprob_gap", 0.0), MISMATCH_LIMIT[dtype]
    return (
        f"sampler and learner log-probs differ by up to {gap:.2g} nats (more than {limit:g} for "
        f"{dtype}); their weights or inputs are not the same"
        if not gap <= limit
        else None
    )


EvalPass = Literal["greedy", "sampled", "oracle", "oracle_blank", "blind"]
"""`greedy` and `sampled` are free rollouts; the others are greedy. `oracle_blank`: `p*` forced
and the image blanked; `blind`: prompt text only."""

TRUNCATED = "truncated"
"""Stands among an evaluation's defects for a response that reached the token limit."""

PerProblem = Mapping[str, Mapping[str, float]]
"""metric -> problem id -> value in [0, 1]."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 − C(n−c, k)/C(n, k): a problem's chance that one of k responses is right.

    The unbiased estimate from n responses of which c are right (arXiv 2107.03374, eq. 1).
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"n = {n}, c = {c}, k = {k}: expected 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p-value: of `gained + lost` coins, as uneven or more so."""
    n, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(n, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_p(changes: np.ndarray, puzzles: Sequence[str] = ()) -> float:
    """Exact two-sided p-value that changes [P] of −1, 0 or 1, one a problem, are chance.

    McNemar's where no two problems that changed share a puzzle. Else each puzzle's sum of changes
    may as well have had the other sign: the share of all such signs that end as far from 0.
    """
    sums = changes
    if puzzles:
        sums = np.bincount(np.unique(puzzles, return_inverse=True)[1], changes)
    sums = sums.astype(int)
    if np.abs(sums).max(initial=0) <= 1:
        return mcnemar(int((sums > 0).sum()), int((sums < 0).sum()))
    chances = np.ones(1)  # of each total, from −Σ|sums| to Σ|sums|
    for size in np.abs(sums[sums != 0]):
        tails = np.zeros(size * 2)
        chances = (np.concatenate([chances, tails]) + np.concatenate([tails, chances])) / 2
    totals = np.abs(np.arange(len(chances)) - len(chances) // 2)
    return float(min(1.0, chances[totals >= abs(sums.sum())].sum()))


@dataclass(frozen=True)
class EvalRow:
    """One metric with its 95 % interval (`mean_interval`); `n` counts problems.

    `puzzles`: how many different ones these are, if fewer; None where each is its own.
    """

    metric: str
    value: float
    n: int
    low: float
    high: float
    puzzles: int | None = None


def counted(n: int, puzzles: int | None) -> str:
    """`512`, or `512 (12 puzzles)` where some share one."""
    return str(n) if puzzles is None else f"{n} ({puzzles} puzzles)"


@dataclass(frozen=True)
class EvalTable:
    """An evaluation: rows to read, and per-problem values for paired comparison.

    `puzzles`: problem id -> its puzzle, task and symmetry key; one that is not there is its own.
    """

    rows: tuple[EvalRow, ...]
    per_problem: PerProblem
    puzzles: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> EvalRow:
        for row in self.rows:
            if row.metric == metric:
                return row
        raise KeyError(metric)

    def to_rich(self, title: str = "") -> Table:
        """A table for the terminal."""
        table = Table(title=escape(title) or None)
        table.add_column("metric")
        for heading in ("value", "95% interval", "n"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            interval, count = f"{row.low:.3f} – {row.high:.3f}", counted(row.n, row.puzzles)
            table.add_row(escape(row.metric), f"{row.value:.3f}", interval, count)
        return table

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it back."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "per_problem": {name: dict(values) for name, values in self.per_problem.items()},
            "puzzles": dict(self.puzzles),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvalTable:
        """Read what `to_dict` wrote."""
        names = [column.name for column in fields(EvalRow)]
        rows = ({name: row[name] for name in names if name in row} for row in data["rows"])
        puzzles = data.get("puzzles", {})
        return cls(tuple(EvalRow(**row) for row in rows), data["per_problem"], puzzles)


def eval_table(task: Task, passes: Mapping[EvalPass, Sequence[Group]]) -> EvalTable:
    """The table of one task's evaluation passes; absent passes leave out their rows.

    Every pass holds one group a problem. Passes other than `sampled` have one rollout a group;
    with more, a problem counts by the mean of its rollouts.
    """
    values: dict[str, dict[str, float]] = {}
    for name, groups in passes.items():
        values |= _pass_values(task, name, groups)
    puzzles = {
        group.problem.id: f"{group.problem.task}/{group.problem.symmetry_key}"
        for groups in passes.values()
        for group in groups
    }
    return _table(values, puzzles)


def _table(values: PerProblem, puzzles: Mapping[str, str]) -> EvalTable:
    rows = tuple(_row(metric, per, puzzles) for metric, per in values.items())
    return EvalTable(rows, values, puzzles)


def pooled(tables: Mapping[str, EvalTable]) -> EvalTable:
    """One table over the problems of several entries, by label: the metrics that all of them have.

    Every problem counts once in each entry that holds it, as `<label>/<id>`.
    """
    first, *others = tables.values()
    values: dict[str, dict[str, float]] = {}
    for metric in first.per_problem:
        if metric.startswith("defect/") or any(metric not in t.per_problem for t in others):
            continue
        values[metric] = {
            f"{label}/{problem}": value
            for label, table in tables.items()
            for problem, value in table.per_problem[metric].items()
        }
    puzzles = {
        f"{label}/{problem}": puzzle
        for label, table in tables.items()
        for problem, puzzle in table.puzzles.items()
    }
    return _table(values, puzzles)


def _pass_values(
    task: Task, name: EvalPass, groups: Sequence[Group]
) -> dict[str, dict[str, float]]:
    """metric -> problem id -> value for one pass."""
    found: dict[str, dict[str, float]] = {}
    defects: dict[str, list[tuple[str, ...]]] = {}
    for group in groups:
        problem = group.problem.id
        d = diagnose(task, group)
        if name == "greedy":
            metrics = {
                "a": d.a.mean(),
                "a_p": d.a_p.mean(),
                "a_p_graded": d.a_p_graded.mean(),
                "leak": d.leak.mean(),
                "self_consistency": d.self_consistency.mean(),
            }
            cut = [(TRUNCATED,) if r.finish_reason == "length" else () for r in group.rollouts]
            defects[problem] = [(*ds, *c) for ds, c in zip(d.defects, cut, strict=True)]
        elif name == "sampled":
            n, c, seen = len(d.a), int(d.a.sum()), int(d.a_p.sum())
            metrics = {f"a avg@{n}": d.a.mean(), f"a_p avg@{n}": d.a_p.mean()}
            for k in _powers_of_two(n):
                metrics[f"a pass@{k}"] = pass_at_k(n, c, k)
                metrics[f"a_p pass@{k}"] = pass_at_k(n, seen, k)
        else:
            label = {"oracle": "a_r", "oracle_blank": "a_r_blank", "blind": "blind"}[name]
            metrics = {label: d.a.mean()}
        for metric, value in metrics.items():
            found.setdefault(metric, {})[problem] = float(value)
    for defect in sorted({d for lists in defects.values() for ds in lists for d in ds}):
        found[f"defect/{defect}"] = {
            problem: sum(defect in ds for ds in lists) / len(lists)
            for problem, lists in defects.items()
        }
    return found


def _powers_of_two(n: int) -> list[int]:
    """2, 4, 8, ... up to n, and n itself; empty for one response."""
    powers = [2**i for i in range(1, n.bit_length()) if 2**i < n]
    return [*powers, n] if n > 1 else []


def _row(metric: str, per_problem: Mapping[str, float], puzzles: Mapping[str, str]) -> EvalRow:
    values = np.array(list(per_problem.values()))
    names = [puzzles.get(problem, problem) for problem in per_problem]
    n, different = len(values), len(set(names))
    low, high = mean_interval(values, names)
    return EvalRow(metric, float(values.mean()), n, low, high, different if different < n else None)


@dataclass(frozen=True)
class Change:
    """A metric before and after training.

    Attributes:
        difference: after − before.
        overlap: whether the two 95 % intervals share a point.
        paired: problems measured both times (0 where the two sets differ).
        gained, lost: paired problems that went from wrong to right, and back.
        p: exact p-value of gained against lost (`paired_p`); None where not paired or graded.
    """

    metric: str
    before: EvalRow
    after: EvalRow
    difference: float
    overlap: bool
    paired: int
    gained: int
    lost: int
    p: float | None


@dataclass(frozen=True)
class ChangeTable:
    """Before and after, metric by metric."""

    rows: tuple[Change, ...]

    def to_rich(self, title: str = "") -> Table:
        """A table for the terminal: the accuracies; defects by name are in `to_dict`."""
        table = Table(title=escape(title) or None)
        table.add_column("metric", no_wrap=True)
        for heading in ("before", "after", "change", "intervals", "McNemar p", "n"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            if row.metric.startswith("defect/"):
                continue
            table.add_row(
                escape(row.metric),
                f"{row.before.value:.3f} [{row.before.low:.3f}, {row.before.high:.3f}]",
                f"{row.after.value:.3f} [{row.after.low:.3f}, {row.after.high:.3f}]",
                f"{row.difference:+.3f}",
                "overlap" if row.overlap else "apart",
                "" if row.p is None else f"{row.p:.2g}",
                counted(row.after.n, row.after.puzzles),
            )
        return table

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"rows": [asdict(row) for row in self.rows]}


def before_after(before: EvalTable, after: EvalTable) -> ChangeTable:
    """Compare the metrics both tables have; paired where they hold the same problems."""
    rows = []
    metrics = [row.metric for row in before.rows]
    metrics += [row.metric for row in after.rows if row.metric not in metrics]
    for metric in metrics:
        was, now = _values_of(before, metric), _values_of(after, metric)
        if not was or not now:
            continue
        puzzles = {**before.puzzles, **after.puzzles}
        old, new = _row(metric, was, puzzles), _row(metric, now, puzzles)
        paired = len(was) if was.keys() == now.keys() else 0
        gained = sum(was[i] == 0.0 and now[i] == 1.0 for i in was) if paired else 0
        lost = sum(was[i] == 1.0 and now[i] == 0.0 for i in was) if paired else 0
        binary = {*was.values(), *now.values()} <= {0.0, 1.0}
        rows.append(
            Change(
                metric=metric,
                before=old,
                after=new,
                difference=new.value - old.value,
                overlap=old.low <= new.high and new.low <= old.high,
                paired=paired,
                gained=gained,
                lost=lost,
                p=_paired_p(was, now, puzzles) if paired and binary else None,
            )
        )
    return ChangeTable(tuple(rows))


def _paired_p(
    was: Mapping[str, float], now: Mapping[str, float], puzzles: Mapping[str, str]
) -> float:
    changes = np.array([now[problem] - was[problem] for problem in was])
    return paired_p(changes, [puzzles.get(problem, problem) for problem in was])


def _values_of(table: EvalTable, metric: str) -> Mapping[str, float]:
    """Values by problem; a defect that a table does not know occurred in none of its problems."""
    if metric.startswith("defect/") and metric not in table.per_problem:
        return dict.fromkeys(table.per_problem.get("a", {}), 0.0)
    return table.per_problem.get(metric, {})


def step_metrics(groups: Sequence[ScoredGroup], policy_version: int) -> dict[str, float]:
    """Every always-logged number that the scored groups of one step can tell, by name.

    A number that is undefined in this step (a correlation with a constant side, rewards when
    every group was dropped) is left out. `policy_version` is the learner's now, for the lag.
    """
    metrics: dict[str, float] = {}
    metrics |= _reward_metrics(groups)
    metrics |= _truth_metrics(groups)
    metrics |= _reliability_metrics(groups)
    metrics |= _response_metrics(groups, policy_version)
    return metrics


def _reward_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    kept = [g for g in groups if not g.dropped]
    failures = Counter(f.term for g in groups for f in g.failures)
    kinds = Counter((f.term, f.kind) for g in groups for f in g.failures)
    for term in sorted({name for g in groups for name in g.terms} | set(failures)):
        values = [g.terms[term] for g in kept if term in g.terms]
        if values:
            everything = np.concatenate(values)
            metrics[f"reward/{term}/mean"] = float(everything.mean())
            metrics[f"reward/{term}/std"] = float(everything.std())
            constant = sum(is_constant(v) for v in values)
            metrics[f"reward/{term}/zero_variance"] = constant / len(values)
        seconds = [g.seconds[term] for g in groups if term in g.seconds]
        if seconds:
            metrics[f"reward/{term}/seconds_mean"] = float(np.mean(seconds))
            metrics[f"reward/{term}/seconds_max"] = max(seconds)
        metrics[f"reward/{term}/failures"] = float(failures[term])
    for (term, kind), count in sorted(kinds.items()):
        metrics[f"reward/{term}/failures/{kind}"] = float(count)
    if kept:
        totals = np.concatenate([g.totals for g in kept])
        metrics["reward/total/mean"] = float(totals.mean())
        metrics["reward/total/std"] = float(totals.std())
        metrics["group/zero_variance"] = sum(g.zero_variance for g in kept) / len(kept)
        for column, segment in enumerate(SEGMENTS):
            silent = sum(not g.advantages[:, column].any() for g in kept)
            metrics[f"group/zero_variance/{segment}"] = silent / len(kept)
    metrics["group/count"] = float(len(groups))
    metrics["group/dropped"] = float(len(groups) - len(kept))
    return metrics


def _truth_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    diagnoses = [g.diagnosis for g in groups if g.diagnosis is not None]
    if not diagnoses:
        return {}
    metrics = {
        "acc/a": float(np.concatenate([d.a for d in diagnoses]).mean()),
        "acc/a_p": float(np.concatenate([d.a_p for d in diagnoses]).mean()),
        "acc/a_p_graded": float(np.concatenate([d.a_p_graded for d in diagnoses]).mean()),
        "acc/self_consistency": float(
            np.concatenate([d.self_consistency for d in diagnoses]).mean()
        ),
        "acc/leak": float(np.concatenate([d.leak for d in diagnoses]).mean()),
    }
    perception, reasoning = outcome_couplings(diagnoses)
    metrics |= _coupling_metrics("outcome_perception", perception)
    metrics |= _coupling_metrics("outcome_reasoning", reasoning)
    for defect, count in sorted(
        Counter(n for d in diagnoses for r in d.defects for n in r).items()
    ):
        metrics[f"defects/{defect}"] = float(count)
    return metrics


def _coupling_metrics(name: str, found: Correlations) -> dict[str, float]:
    values = {"pooled": found.pooled.value, "within": found.within.value, "n": found.n}
    values |= {"n_within": found.n_within, "zero_variance": found.zero_variance}
    return {f"coupling/{name}/{k}": float(v) for k, v in values.items() if v is not None}


def _reliability_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Every term against true `a_p`; zeros that stand for a failed term are left out."""
    metrics: dict[str, float] = {}
    for term in sorted({name for g in groups for name in g.terms}):
        judged = [
            (g.terms[term], g.diagnosis.a_p)
            for g in groups
            if g.diagnosis is not None
            and term in g.terms
            and all(f.term != term for f in g.failures)
        ]
        if not judged:
            continue
        values, truth = [v for v, _ in judged], [t for _, t in judged]
        found = coupling(values, truth)
        auc = roc_auc(np.concatenate(values), np.concatenate(truth))
        pairs = (("pooled", found.pooled.value), ("within", found.within.value), ("auc", auc))
        for name, value in pairs:
            if value is not None:
                metrics[f"reliability/{term}/{name}"] = value
    return metrics


def _response_metrics(groups: Sequence[ScoredGroup], policy_version: int) -> dict[str, float]:
    rollouts = [rollout for g in groups for rollout in g.group.rollouts]
    if not rollouts:
        return {}
    lengths = np.array([len(r.response_ids) for r in rollouts])
    segments = np.concatenate([r.segments for r in rollouts])
    versions = np.concatenate([r.versions for r in rollouts])
    metrics = {
        "response/tokens_mean": float(lengths.mean()),
        "response/tokens_max": float(lengths.max()),
        "response/tokens": float(lengths.sum()),
        "response/truncated": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
    }
    if len(segments):
        for i, name in [*enumerate(SEGMENTS), (NO_SEGMENT, "none")]:
            metrics[f"response/share/{name}"] = float((segments == i).mean())
        metrics["policy/lag_mean"] = float(policy_version - versions.mean())
        metrics["policy/lag_max"] = float(policy_version - versions.min())
        mixed = [len(r.versions) > 0 and r.versions.min() < r.versions.max() for r in rollouts]
        metrics["policy/mixed"] = sum(mixed) / len(mixed)
    return metrics
