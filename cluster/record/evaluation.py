"""Evaluations: accuracies with intervals, in tables, and what changed between two of them.

Pure functions. Shapes: P problems, k responses a problem. Accuracies are those of arXiv
2605.29496: `a` end to end, `a_p` perception, `a_r` reasoning given `p*`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from cluster.recipe.sections import EvalPass
from cluster.record.table import Table
from cluster.record.tool_values import COMPARED, FREE, PerProblem, called, compared, looked
from rewards.diagnosis import diagnose
from rewards.intervals import mean_interval, t_interval
from rewards.reader import Reading, believed
from rewards.tool_use import four
from rollout.record import Group
from tasks.core import ComparesAnswers, Problem, Task

TRUTHS = ("a", "a_p", "a_p_graded", "leak", "self_consistency", "reread_gain", "reread_loss")
"""Of a `Diagnosis`, in the order of a table; a problem without a label has some of them only."""

LOSS = "text_loss"
"""The one metric that is no share (`with_language`)."""

TRUNCATED = "truncated"
"""Stands among an evaluation's defects for a response that reached the token limit."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 − C(n−c, k)/C(n, k): a problem's chance that one of k responses is right.

    The unbiased estimate from n responses of which c are right (arXiv 2107.03374, eq. 1).
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"n = {n}, c = {c}, k = {k}: expected 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p-value: of `gained + lost` coins, as uneven or more so."""
    from scipy.stats import binomtest  # a second of imports that a run's start does without

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


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
    """One metric with its 95 % interval (`mean_interval`; of a loss `t_interval`); `n` counts
    problems.

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
    """An evaluation: a value for each metric and problem, and the rows that sum it up.

    `puzzles`: problem id -> its puzzle, task and symmetry key; one that is not there is its own.
    """

    per_problem: PerProblem
    puzzles: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, metric: str) -> EvalRow:
        return _row(metric, self.per_problem[metric], self.puzzles)

    @property
    def rows(self) -> tuple[EvalRow, ...]:
        """A row a metric."""
        return tuple(self[metric] for metric in self.per_problem)

    def table(self, title: str = "") -> Table:
        """To be read."""
        rows = [
            (r.metric, f"{r.value:.3f}", f"{r.low:.3f} – {r.high:.3f}", counted(r.n, r.puzzles))
            for r in self.rows
        ]
        return Table(title, ("metric", "value", "95% interval", "n"), tuple(rows))

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
        return cls(data["per_problem"], data.get("puzzles", {}))


def eval_table(task: Task, passes: Mapping[EvalPass, Sequence[Group]]) -> EvalTable:
    """The table of one task's evaluation passes; absent passes leave out their rows.

    Every pass holds one group a problem. Passes other than `sampled` have one rollout a group;
    with more, a problem counts by the mean of its rollouts.
    """
    values: dict[str, dict[str, float]] = {}
    for name, groups in passes.items():
        values |= _pass_values(task, name, groups)
    for skill in COMPARED:
        shared, in_common = compared(values, skill)
        for term, true in four(*in_common).items() if shared else ():
            values[f"{skill}_{term}"] = dict(zip(shared, true.astype(float).tolist(), strict=True))
    problems = [group.problem for groups in passes.values() for group in groups]
    return EvalTable(values, {p.id: f"{p.task}/{p.symmetry_key}" for p in problems})


def with_readings(table: EvalTable, readings: Mapping[str, Reading]) -> EvalTable:
    """An evaluation with what a text-only reader makes of the pass `greedy`, by problem.

    `used` is of the problems whose perception suffices. Of a kind of question for which the reader
    is `refused` only floor and ceiling are given, which show why.
    """
    places, trusted = believed([*readings.values()]), list(readings.items())
    trusted = [trusted[place] for place in places]
    by_metric: dict[str, dict[str, float]] = {
        "sufficiency": {i: float(r.sufficient.mean()) for i, r in trusted},
        "used": {i: table.per_problem["a"][i] for i, r in trusted if r.sufficient.all()},
        "reader_blind": {i: float(r.blind) for i, r in readings.items()},
        "reader_ceiling": {
            i: float(r.ceiling) for i, r in readings.items() if r.ceiling is not None
        },
    }
    for kind in sorted({r.kind for r in readings.values()} - {""}):
        of_kind = {i for i, r in readings.items() if r.kind == kind}
        for bound in ("reader_blind", "reader_ceiling"):
            chosen = {i: value for i, value in by_metric[bound].items() if i in of_kind}
            by_metric[f"{bound}/{kind}"] = chosen
    nonempty = {metric: values for metric, values in by_metric.items() if values}
    defects = {m: v for m, v in table.per_problem.items() if m.startswith("defect/")}
    others = {m: v for m, v in table.per_problem.items() if m not in defects}
    return replace(table, per_problem={**others, **nonempty, **defects})


def with_language(
    tables: Mapping[str, EvalTable], values: Mapping[str, Mapping[str, float]]
) -> dict[str, EvalTable]:
    """Every task's table with what the policy keeps of language, which is the same for all."""
    return {
        label: replace(table, per_problem={**table.per_problem, **values})
        for label, table in tables.items()
    }


def pooled(tables: Mapping[str, EvalTable]) -> EvalTable:
    """One table over the problems of several entries, by label, each metric of those that have it.

    Every problem counts once in each entry that holds it, as `<label>/<id>`. What is of no entry
    (`with_language`) is left out.
    """
    values: dict[str, dict[str, float]] = {}
    for label, table in tables.items():
        for metric, by_problem in table.per_problem.items():
            if not metric.startswith(("defect/", "text_")):
                problems = {f"{label}/{problem}": value for problem, value in by_problem.items()}
                values.setdefault(metric, {}).update(problems)
    return EvalTable(
        values, {f"{n}/{i}": puzzle for n, t in tables.items() for i, puzzle in t.puzzles.items()}
    )


def parts_of(table: EvalTable, values: Mapping[str, str]) -> dict[str, EvalTable]:
    """The table of each value's problems; `values`: problem id -> what its row has in a column."""
    tables = {}
    for value in sorted(set(values.values())):
        columns = {
            metric: part
            for metric, numbers in table.per_problem.items()
            if (part := {i: n for i, n in numbers.items() if values.get(i) == value})
        }
        tables[value] = EvalTable(columns, table.puzzles)
    return tables


def columns_table(parts: Mapping[str, EvalTable], column: str) -> Table:
    """To be read: each accuracy, with a row a value of the column that has it."""
    metrics = dict.fromkeys(m for t in parts.values() for m in t.per_problem if "defect/" not in m)
    rows = []
    for metric in (m for m in metrics if m.startswith(("a", "blind"))):
        for value, table in parts.items():
            if metric in table.per_problem:
                row = table[metric]
                interval = f"{row.low:.3f} – {row.high:.3f}"
                rows.append((metric, value, f"{row.value:.3f}", interval, str(row.n)))
    return Table(f"by {column}", ("metric", column, "value", "95% interval", "n"), tuple(rows))


def _pass_values(
    task: Task, name: EvalPass, groups: Sequence[Group]
) -> dict[str, dict[str, float]]:
    """metric -> problem id -> value for one pass."""
    by_metric: dict[str, dict[str, float]] = {}
    defects: dict[str, list[tuple[str, ...]]] = {}
    episodes = any(rollout.turns for group in groups for rollout in group.rollouts)
    for group in groups:
        problem = group.problem.id
        d = diagnose(task, group)
        if name == "greedy":
            truths = {name: getattr(d, name) for name in TRUTHS}
            metrics = {name: t.mean() for name, t in truths.items() if t is not None}
            cut = [(TRUNCATED,) if r.finish_reason == "length" else () for r in group.rollouts]
            defects[problem] = [(*ds, *c) for ds, c in zip(d.defects, cut, strict=True)]
            metrics |= {"called": called(group), "looked": looked(group)} if episodes else {}
        elif name == "sampled":
            n, right = len(d.a), {"a": d.a} | ({} if d.a_p is None else {"a_p": d.a_p})
            metrics = {f"{skill} avg@{n}": truth.mean() for skill, truth in right.items()}
            if n > 1:
                metrics[f"a maj@{n}"] = majority(task, group, d.a)
            for k in _powers_of_two(n):
                for skill, truth in right.items():
                    metrics[f"{skill} pass@{k}"] = pass_at_k(n, int(truth.sum()), k)
        elif name in FREE:
            right = {"a": d.a} | ({} if d.a_p is None else {"a_p": d.a_p})
            metrics = {f"{skill}{FREE[name]}": truth.mean() for skill, truth in right.items()}
        elif name == "oracle_tool":
            metrics = {"a_r_tool": d.a.mean(), "a_r_called": called(group)}
        else:
            label = {"oracle": "a_r", "oracle_blank": "a_r_blank", "blind": "blind"}[name]
            metrics = {label: d.a.mean()}
        for metric, value in metrics.items():
            by_metric.setdefault(metric, {})[problem] = float(value)
    for defect in sorted({d for lists in defects.values() for ds in lists for d in ds}):
        by_metric[f"defect/{defect}"] = {
            problem: sum(defect in ds for ds in lists) / len(lists)
            for problem, lists in defects.items()
        }
    return by_metric


def majority(task: Task, group: Group, right: np.ndarray) -> float:
    """The chance that the answer which most of G responses give is right (bool [G]).

    Answers are the same by the task's own word, or as they are parsed; ties are broken by chance.
    A response without an answer has no vote.
    """
    votes: list[list[int]] = []
    answers = [rollout.parsed.answer for rollout in group.rollouts]
    for i, answer in enumerate(answers):
        if answer is None:
            continue
        like = (v for v in votes if _same(task, group.problem, answers[v[0]], answer))
        votes_alike = next(like, None)
        if votes_alike is None:
            votes.append([i])
        else:
            votes_alike.append(i)
    most = max(map(len, votes), default=0)
    first = [right[same[0]] for same in votes if len(same) == most]
    return float(np.mean(first)) if first else 0.0


def _same(task: Task, problem: Problem, one: Any, other: Any) -> bool:
    if isinstance(task, ComparesAnswers):
        return task.same_answer(problem, one, other)
    return bool(one == other)


def _powers_of_two(n: int) -> list[int]:
    """2, 4, 8, ... up to n, and n itself; empty for one response."""
    powers = [2**i for i in range(1, n.bit_length()) if 2**i < n]
    return [*powers, n] if n > 1 else []


def _row(metric: str, per_problem: Mapping[str, float], puzzles: Mapping[str, str]) -> EvalRow:
    values = np.array(list(per_problem.values()))
    names = [puzzles.get(problem, problem) for problem in per_problem]
    n, different = len(values), len(set(names))
    low, high = mean_interval(values, names) if metric != LOSS else t_interval(values)
    return EvalRow(metric, float(values.mean()), n, low, high, different if different < n else None)


@dataclass(frozen=True)
class Change:
    """A metric before and after training.

    Attributes:
        difference: after − before.
        overlap: whether the two 95 % intervals share a point.
        paired: problems measured both times (0 where the two sets differ).
        gained, lost: paired problems that went from wrong to right, and back; of a loss the
            passages on which it rose, and fell.
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


def change_table(changes: Sequence[Change], title: str = "") -> Table:
    """To be read: the accuracies, without the defects by name."""
    columns = ("metric", "before", "after", "change", "intervals", "p (paired)", "n")
    rows = [
        (
            row.metric,
            *(f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in (row.before, row.after)),
            f"{row.difference:+.3f}",
            "overlap" if row.overlap else "apart",
            "" if row.p is None else f"{row.p:.2g}",
            counted(row.after.n, row.after.puzzles),
        )
        for row in changes
        if not row.metric.startswith("defect/")
    ]
    return Table(title, columns, tuple(rows))


def before_after(before: EvalTable, after: EvalTable) -> list[Change]:
    """Compare the metrics both tables have; paired where they hold the same problems."""
    puzzles = {**before.puzzles, **after.puzzles}
    metrics = dict.fromkeys([*before.per_problem, *after.per_problem])
    pairs = ((m, _values_of(before, m), _values_of(after, m)) for m in metrics)
    return [_change(m, was, now, puzzles) for m, was, now in pairs if was and now]


def _change(
    metric: str, was: Mapping[str, float], now: Mapping[str, float], puzzles: Mapping[str, str]
) -> Change:
    old, new = _row(metric, was, puzzles), _row(metric, now, puzzles)
    changes = np.array([now[i] - was[i] for i in was] if was.keys() == now.keys() else [])
    if metric == LOSS:  # of the same passages: what counts is on how many it rose
        changes = np.sign(changes)
    paired = metric == LOSS or {*was.values(), *now.values()} <= {0.0, 1.0}
    names = [puzzles.get(problem, problem) for problem in was]
    return Change(
        metric=metric,
        before=old,
        after=new,
        difference=new.value - old.value,
        overlap=old.low <= new.high and new.low <= old.high,
        paired=len(changes),
        gained=int((changes == 1).sum()),
        lost=int((changes == -1).sum()),
        p=paired_p(changes, names) if len(changes) and paired else None,
    )


def _values_of(table: EvalTable, metric: str) -> Mapping[str, float]:
    """Values by problem; a defect that a table does not know occurred in none of its problems."""
    if metric.startswith("defect/") and metric not in table.per_problem:
        return dict.fromkeys(table.per_problem.get("a", {}), 0.0)
    return table.per_problem.get(metric, {})
