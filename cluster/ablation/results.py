"""From the folders of an ablation's cells to one table of results and to what they say.

`collect` reads finished cells into a table (`RESULT_SCHEMA`, kept as `results.parquet`);
`summarise` is a pure function of that table: intervals, paired differences, curves and costs,
JSON-able (`summary.json`). `cluster/report/ablation_words.py` says it in words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.ablation.cells import cell_folder, is_finished
from cluster.ablation.grid import CellName
from cluster.ablation.statistics import (
    PHASES,
    Estimate,
    accuracy_interval,
    asymmetry,
    band,
    correlation_interval,
    cost_to_reach,
    crossed_interval,
    holm,
    mean_correlation,
    mean_level,
    paired_test,
    phase_of,
    reach,
    seed_interval,
)
from cluster.ablation.summary import (
    ALL_TASKS,
    COMPARED,
    COUPLINGS,
    SHARES,
    Asymmetry,
    Comparison,
    Cost,
    Coupling,
    Curve,
    Level,
    SegmentShare,
    Summary,
)
from cluster.record.stored import read_metrics
from rewards.intervals import by_puzzle

RESULT_SCHEMA = pa.schema(
    {
        "cell": pa.string(),
        "arm": pa.string(),
        "difficulty": pa.string(),  # "" where the ablation names none
        "seed": pa.int64(),
        "step": pa.int64(),  # 0: before training
        "task": pa.string(),  # "" for metrics of a training step
        "metric": pa.string(),
        "problem": pa.string(),  # "" for a number of the whole step or evaluation
        "value": pa.float64(),
        "puzzle": pa.string(),  # of that problem, which it may share; "" where that is not known
    }
)
"""Rows with a problem are its value in the evaluation before (step 0) or after training."""

CURVES = ("acc/a", "acc/a_p", "acc/leak", "reward/total/mean")
SPENT = {"tokens": "response/tokens", "seconds": "time/step"}
"""Costs of reaching an accuracy, and the metric of a step that adds to each."""
ACCURACY = (0.0, 1.0)
DIFFERENCE = (-1.0, 1.0)
INDEX = (-2.0, 2.0)

BySeed = Mapping[int, Mapping[int, float]]
"""seed -> step -> value."""


def collect(cells: Iterable[CellName], folder: Path) -> pa.Table:
    """The results (`RESULT_SCHEMA`) of every finished one of `cells`, in their order."""
    tables = [RESULT_SCHEMA.empty_table()]
    for cell in cells:
        if not is_finished(folder, cell):
            continue
        run = cell_folder(folder, cell) / "run"
        rows = [
            (row["step"], *_task_of(row["name"]), "", row["value"], "")
            for row in read_metrics(run).to_pylist()
        ]
        steps = max((row[0] for row in rows), default=0)
        evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
        for task, measured in evaluation.items():
            if task == ALL_TASKS:  # its problems are those of the others
                continue
            for step, when in ((0, "before"), (steps, "after")):
                puzzles = measured[when].get("puzzles", {})
                rows += [
                    (step, task, metric, problem, value, puzzles.get(problem, ""))
                    for metric, values in measured[when]["per_problem"].items()
                    for problem, value in values.items()
                ]
        tables.append(as_results((cell.id, cell.arm, cell.difficulty, cell.seed, *r) for r in rows))
    return pa.concat_tables(tables)


def as_results(rows: Iterable[tuple[object, ...]]) -> pa.Table:
    """Rows in the order of `RESULT_SCHEMA` as a table of it."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, RESULT_SCHEMA, strict=bool(columns))]
    if not arrays:
        return RESULT_SCHEMA.empty_table()
    return pa.Table.from_arrays(arrays, schema=RESULT_SCHEMA)


def _task_of(name: str) -> tuple[str, str]:
    """(task, metric) of a logged name: `eval/sudoku/a` is `a` of sudoku, others of no task."""
    if name.startswith("eval/"):
        _, task, metric = name.split("/", 2)
        return task, metric
    return "", name


class Results:
    """A table of results, by what one asks of it."""

    def __init__(self, table: pa.Table) -> None:
        self._problems: dict[tuple[str, ...], dict[int, dict[str, float]]] = {}
        self._numbers: dict[tuple[str, ...], dict[int, dict[int, float]]] = {}
        self._puzzles: dict[tuple[str, str], str] = {}
        self.last_step: dict[tuple[str, str], int] = {}
        names = ["difficulty", "arm", "seed", "step", "task", "metric", "problem", "value"]
        columns = [table.column(name).to_pylist() for name in names]
        known = "puzzle" in table.column_names  # not in tables of an earlier time
        columns.append(table.column("puzzle").to_pylist() if known else [""] * len(table))
        for row in zip(*columns, strict=True):
            difficulty, arm, seed, step, task, metric, problem, value, puzzle = row
            key = (difficulty, arm, task, metric)
            self.last_step[key[:2]] = max(self.last_step.get(key[:2], 0), step)
            if problem:
                when = "before" if step == 0 else "after"
                self._problems.setdefault((*key, when), {}).setdefault(seed, {})[problem] = value
                self._puzzles[task, problem] = puzzle or f"{task}/{problem}"
            else:
                self._numbers.setdefault(key, {}).setdefault(seed, {})[step] = value
        self.difficulties, self.arms, tasks = (list(dict.fromkeys(columns[i])) for i in (0, 1, 4))
        self.tasks = [task for task in tasks if task]

    def problems(
        self, difficulty: str, arm: str, task: str, metric: str, when: str
    ) -> dict[int, dict[str, float]]:
        """seed -> problem -> value; `ALL_TASKS` has every task's problems."""
        if task != ALL_TASKS:
            return self._problems.get((difficulty, arm, task, metric, when), {})
        merged: dict[int, dict[str, float]] = {}
        for name in self.tasks:
            for seed, values in self.problems(difficulty, arm, name, metric, when).items():
                merged.setdefault(seed, {}).update({f"{name}/{k}": v for k, v in values.items()})
        return merged

    def puzzles(self, task: str, problems: Sequence[str]) -> list[str]:
        """The puzzle of each problem that `problems` names so."""
        if task != ALL_TASKS:
            return [self._puzzles[task, problem] for problem in problems]
        merged = {f"{name}/{problem}": puzzle for (name, problem), puzzle in self._puzzles.items()}
        return [merged[problem] for problem in problems]

    def numbers(self, difficulty: str, arm: str, task: str, metric: str) -> BySeed:
        """seed -> step -> value of a whole step or evaluation, seeds rising."""
        by_seed = self._numbers.get((difficulty, arm, task, metric), {})
        return dict(sorted(by_seed.items()))

    def mean(
        self, difficulty: str, arm: str, metric: str, bounds: tuple[float, float]
    ) -> Estimate | None:
        """Of a training metric's mean over its steps, those not finite left out, over seeds."""
        good = [
            [v for step, v in values.items() if step > 0 and v is not None and math.isfinite(v)]
            for values in self.numbers(difficulty, arm, "", metric).values()
        ]
        means = [sum(values) / len(values) for values in good if values]
        return seed_interval(means, bounds) if means else None


def pilot_differences(
    table: pa.Table, arms: Sequence[str]
) -> tuple[dict[str, list[np.ndarray]], float]:
    """arm -> its `a` after training less that of `arms[0]`, [S, K puzzles] a difficulty; and K / P.

    The second is how many puzzles a problem stands for: 1 where no two are of one puzzle.
    """
    results = Results(table)
    task = ALL_TASKS if len(results.tasks) > 1 else "".join(results.tasks)
    differences: dict[str, list[np.ndarray]] = {}
    of_problems = of_puzzles = 0
    for arm in arms[1:]:
        for difficulty in results.difficulties:
            (ours, reference), problems = aligned(
                *(results.problems(difficulty, a, task, "a", "after") for a in (arm, arms[0]))
            )
            if ours.size:
                puzzles = results.puzzles(task, problems)
                differences.setdefault(arm, []).append(by_puzzle(ours - reference, puzzles))
                of_problems += len(problems)
                of_puzzles += differences[arm][-1].shape[1]
    return differences, of_puzzles / max(1, of_problems)


def aligned(
    *parts: Mapping[int, Mapping[str, float]],
) -> tuple[list[np.ndarray], list[str]]:
    """Arrays [S, P] of the seeds and problems that all parts have, in one order, and these [P].

    Problems are those that every one of those seeds has. Empty arrays where nothing is shared.
    """
    seeds = sorted(set.intersection(*(set(part) for part in parts)))
    if not seeds:
        return [np.zeros((0, 0)) for _ in parts], []
    problems = sorted(set.intersection(*(set(part[seed]) for part in parts for seed in seeds)))
    return [np.array([[part[s][p] for p in problems] for s in seeds]) for part in parts], problems


def summarise(table: pa.Table, question: str, arms: Sequence[str], target: float | None) -> Summary:
    """All statistics of a table of results; `arms[0]` is the reference.

    `target` is the accuracy that costs are counted to; None: for each difficulty the mean of the
    reference's `acc/a` over the last third of training. Comparisons use the seeds that both arms
    have finished.
    """
    results = Results(table)
    arms = [arm for arm in arms if arm in results.arms]
    tasks = [*results.tasks, *([ALL_TASKS] if len(results.tasks) > 1 else [])]
    of_arms = [(difficulty, arm) for difficulty in results.difficulties for arm in arms]
    of_tasks = [(d, task, arm) for d in results.difficulties for task in tasks for arm in arms]
    return Summary(
        question=question,
        reference=arms[0] if arms else "",
        levels=tuple(row for cell in of_tasks for row in _levels(results, *cell)),
        comparisons=tuple(
            comparison
            for difficulty in results.difficulties
            for task in tasks
            for metric in COMPARED
            for comparison in _comparisons(results, difficulty, task, metric, arms)
        ),
        asymmetries=tuple(row for cell in of_tasks for row in _asymmetries(results, *cell)),
        couplings=tuple(row for cell in of_arms for row in _couplings(results, *cell)),
        curves=tuple(row for cell in of_arms for row in _curves(results, *cell)),
        costs=tuple(
            cost for d in results.difficulties for cost in _costs(results, d, arms, target)
        ),
        shares=tuple(
            SegmentShare(*cell, of, share)
            for cell in of_arms
            for of, metric in SHARES.items()
            if (share := results.mean(*cell, metric, ACCURACY))
        ),
    )


def _levels(results: Results, difficulty: str, task: str, arm: str) -> Iterator[Level]:
    for metric in COMPARED:
        (before, after), problems = aligned(
            *(results.problems(difficulty, arm, task, metric, w) for w in ("before", "after"))
        )
        puzzles = results.puzzles(task, problems)
        if after.size:
            yield Level(
                difficulty,
                task,
                arm,
                metric,
                # Before training all seeds are one checkpoint: greedy, they give the same answers.
                before=accuracy_interval(before[:1], puzzles),
                after=accuracy_interval(after, puzzles),
                change=crossed_interval(after - before, DIFFERENCE, puzzles),
            )


def _comparisons(
    results: Results, difficulty: str, task: str, metric: str, arms: Sequence[str]
) -> list[Comparison]:
    tests = []
    for arm in arms[1:]:
        (ours, reference), problems = aligned(
            *(results.problems(difficulty, a, task, metric, "after") for a in (arm, arms[0]))
        )
        if ours.size:
            binary = bool(np.isin(ours, (0, 1)).all() and np.isin(reference, (0, 1)).all())
            puzzles = results.puzzles(task, problems)
            difference = crossed_interval(ours - reference, DIFFERENCE, puzzles)
            test = paired_test(reference, ours, puzzles) if binary else None
            tests.append((arm, difference, test))
    adjusted = iter(holm([d.p for _, d, _ in tests if d.p is not None]))
    return [
        Comparison(
            difficulty, task, arm, arms[0], metric, d, None if d.p is None else next(adjusted), test
        )
        for arm, d, test in tests
    ]


def _asymmetries(results: Results, difficulty: str, task: str, arm: str) -> Iterator[Asymmetry]:
    last = results.last_step.get((difficulty, arm), 0)
    reasoning, perception = (results.numbers(difficulty, arm, task, m) for m in ("a_r", "a_p"))
    seeds = sorted(set(reasoning) & set(perception))
    every = [set(by[seed]) for by in (reasoning, perception) for seed in seeds]
    steps = set.intersection(*every) if every else set()
    for step in sorted(steps - {0, last}) if 0 in steps else ():
        r, p = (
            [np.array([by[seed][at] for seed in seeds]) for at in (0, step)]
            for by in (reasoning, perception)
        )
        index = seed_interval(asymmetry((r[0], r[1]), (p[0], p[1])), INDEX)
        yield Asymmetry(difficulty, task, arm, step, index)
    (r0, r1, p0, p1), problems = aligned(
        *(
            results.problems(difficulty, arm, task, metric, when)
            for metric in ("a_r", "a_p")
            for when in ("before", "after")
        )
    )
    if r0.size:
        by_problem = asymmetry((r0, r1), (p0, p1))
        index = crossed_interval(by_problem, INDEX, results.puzzles(task, problems))
        yield Asymmetry(difficulty, task, arm, last, index)


def _couplings(results: Results, difficulty: str, arm: str) -> Iterator[Coupling]:
    for name in COUPLINGS:
        values, counts = (
            results.numbers(difficulty, arm, "", f"coupling/{name}/{of}")
            for of in ("within", "n_within")
        )
        steps = max((step for by in counts.values() for step in by), default=0)
        for phase in PHASES:
            by_seed = []
            for seed in (seed for seed in values if seed in counts):
                chosen = [s for s in values[seed] if s > 0 and phase_of(s, steps) == phase]
                mean = mean_correlation(
                    *(np.array([of[seed][s] for s in chosen]) for of in (values, counts))
                )
                by_seed += [] if mean is None else [mean]
            if by_seed:
                yield Coupling(difficulty, arm, name, phase, correlation_interval(by_seed))


def _curves(results: Results, difficulty: str, arm: str) -> Iterator[Curve]:
    evaluated = [(t, m) for t in results.tasks for m in COMPARED]
    for task, metric in [("", m) for m in CURVES] + evaluated:
        by_seed = results.numbers(difficulty, arm, task, metric)
        steps = sorted({step for values in by_seed.values() for step in values})
        if not steps:
            continue
        curves = np.array([[v.get(step, math.nan) for step in steps] for v in by_seed.values()])
        bounds = (-math.inf, math.inf) if metric.startswith("reward/") else ACCURACY
        areas = [mean_level(*_rising(values)) for values in by_seed.values()]
        yield Curve(
            difficulty,
            arm,
            f"eval/{task}/{metric}" if task else metric,
            tuple(steps),
            tuple(band(curves, bounds)),
            seed_interval(areas, bounds),
        )


def _rising(values: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps [K], rising, and their values [K]."""
    steps = sorted(values)
    return np.array(steps), np.array([values[step] for step in steps])


def _costs(
    results: Results, difficulty: str, arms: Sequence[str], target: float | None
) -> Iterator[Cost]:
    if target is None:
        reference = results.numbers(difficulty, arms[0], "", "acc/a") if arms else {}
        if not reference:
            return
        ends = [_rising(values)[1][-max(1, len(values) // 3) :] for values in reference.values()]
        target = float(np.mean([end.mean() for end in ends]))
    for arm in arms:
        accuracy = results.numbers(difficulty, arm, "", "acc/a")
        for unit, metric in SPENT.items():
            amounts = results.numbers(difficulty, arm, "", metric)
            costs, spent = [], []
            for seed in (seed for seed in accuracy if seed in amounts):
                steps = sorted(set(accuracy[seed]) & set(amounts[seed]))
                values, cost = (
                    np.array([of[seed][s] for s in steps]) for of in (accuracy, amounts)
                )
                costs.append(cost_to_reach(cost, values, target))
                spent.append(float(cost.sum()))
            if costs:
                yield Cost(difficulty, arm, unit, target, reach(costs, spent))
