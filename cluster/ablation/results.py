"""From the folders of an ablation's cells to one table of results and to what they say.

`collect` reads finished cells into a table (`RESULT_SCHEMA`, kept as `results.parquet`);
`summarise` is a pure function of that table: intervals, paired differences, curves and costs,
JSON-able (`summary.json`). `cluster/report/ablation_words.py` says it in words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.ablation.launch import cell_folder, is_finished
from cluster.ablation.plan import CellName
from cluster.ablation.statistics import (
    PHASES,
    Estimate,
    PairedTest,
    Reach,
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

ALL_TASKS = "all tasks"
COMPARED = ("a", "a_p", "a_r")
"""Accuracies that arms are compared by; others are in the table to compare by hand."""
CURVES = ("acc/a", "acc/a_p", "acc/leak", "reward/total/mean")
COUPLINGS = ("outcome_perception", "outcome_reasoning")
SPENT = {"tokens": "response/tokens", "seconds": "time/step"}
"""Costs of reaching an accuracy, and the metric of a step that adds to each."""
SHARES = {
    "tokens": "sft/share/tokens/perception",
    "loss": "sft/share/loss/perception",
    "gradient norm": "sft/share/grad_norm/perception",
    "λ": "sft/lambda",
}
"""Of SFT: what perception has a share of, and the metric of an update that tells it."""
ACCURACY = (0.0, 1.0)
DIFFERENCE = (-1.0, 1.0)


@dataclass(frozen=True)
class Level:
    """One arm's accuracy on one task before and after training, and its change."""

    difficulty: str
    task: str
    arm: str
    metric: str
    before: Estimate
    after: Estimate
    change: Estimate


@dataclass(frozen=True)
class Comparison:
    """An arm less the reference after training, at the same seeds and problems.

    Attributes:
        p_holm: `difference.p` adjusted over the arms compared on this difficulty, task and
            metric; None where there is no p.
        test: McNemar's tests seed by seed; None for values that are not right or wrong.
    """

    difficulty: str
    task: str
    arm: str
    reference: str
    metric: str
    difference: Estimate
    p_holm: float | None
    test: PairedTest | None


@dataclass(frozen=True)
class Asymmetry:
    """Δa_r − Δa_p of an arm since step 0; above 0 where thinking gained more than seeing.

    At the last step over seeds and problems, at earlier evaluations over seeds.
    """

    difficulty: str
    task: str
    arm: str
    step: int
    index: Estimate


@dataclass(frozen=True)
class Coupling:
    """Within-group correlation of the outcome with seeing or thinking in a third of training."""

    difficulty: str
    arm: str
    of: str
    phase: str
    correlation: Estimate


@dataclass(frozen=True)
class Curve:
    """A metric of training step by step with its band, and its mean level over training."""

    difficulty: str
    arm: str
    metric: str
    steps: tuple[int, ...]
    points: tuple[Estimate, ...]
    mean_level: Estimate


@dataclass(frozen=True)
class Cost:
    """What an arm spent until training accuracy `acc/a` reached `target`."""

    difficulty: str
    arm: str
    unit: str
    target: float
    reach: Reach


@dataclass(frozen=True)
class SegmentShare:
    """Perception's mean share, over SFT's updates, of what `SHARES` names; interval over seeds."""

    difficulty: str
    arm: str
    of: str
    share: Estimate


@dataclass(frozen=True)
class Summary:
    """Everything an ablation says, in numbers. `reference` is the first arm."""

    question: str
    reference: str
    levels: tuple[Level, ...]
    comparisons: tuple[Comparison, ...]
    asymmetries: tuple[Asymmetry, ...]
    couplings: tuple[Coupling, ...]
    curves: tuple[Curve, ...]
    costs: tuple[Cost, ...]
    shares: tuple[SegmentShare, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; NaN (a step that no seed has) becomes null."""
        found: dict[str, Any] = _without_nan(asdict(self))
        return found

    def headlines(self) -> list[tuple[str, str]]:
        """(difficulty, task) of the verdict: of each difficulty all tasks, or its only one."""
        found: dict[str, str] = {}
        for level in self.levels:
            if level.task == ALL_TASKS or level.difficulty not in found:
                found[level.difficulty] = level.task
        return list(found.items())

    def of(self, difficulty: str, task: str, arm: str) -> dict[str, Level]:
        """An arm's accuracies on a task, by metric."""
        place = (difficulty, task, arm)
        return {v.metric: v for v in self.levels if (v.difficulty, v.task, v.arm) == place}


def at(difficulty: str, what: str) -> str:
    """Such as `sudoku` or `sudoku (hard)`."""
    return f"{what} ({difficulty})" if difficulty else what


def collect(cells: Iterable[CellName], folder: Path) -> pa.Table:
    """The results (`RESULT_SCHEMA`) of every finished one of `cells`, in their order."""
    tables = []
    for cell in cells:
        if not is_finished(folder, cell):
            continue
        run = cell_folder(folder, cell) / "run"
        rows: list[tuple[int, str, str, str, float, str]] = []
        for row in read_metrics(run).to_pylist():
            rows.append((row["step"], *_task_of(row["name"]), "", row["value"], ""))
        steps = max((row[0] for row in rows), default=0)
        evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
        for task, tables_of in evaluation.items():
            if task == ALL_TASKS:  # its problems are those of the others
                continue
            for step, when in ((0, "before"), (steps, "after")):
                puzzles = tables_of[when].get("puzzles", {})
                for metric, values in tables_of[when]["per_problem"].items():
                    rows += [
                        (step, task, metric, problem, value, puzzles.get(problem, ""))
                        for problem, value in values.items()
                    ]
        constant = [cell.id, cell.arm, cell.difficulty, cell.seed]
        columns = [[value] * len(rows) for value in constant] + [
            list(c) for c in zip(*rows, strict=True)
        ]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, RESULT_SCHEMA, strict=True)]
        tables.append(pa.Table.from_arrays(arrays, schema=RESULT_SCHEMA))
    return pa.concat_tables(tables) if tables else RESULT_SCHEMA.empty_table()


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
        arms: dict[str, None] = {}
        difficulties: dict[str, None] = {}
        tasks: dict[str, None] = {}
        names = ["difficulty", "arm", "seed", "step", "task", "metric", "problem", "value"]
        columns = [table.column(name).to_pylist() for name in names]
        known = "puzzle" in table.column_names  # not in tables of an earlier time
        columns.append(table.column("puzzle").to_pylist() if known else [""] * len(table))
        for *key_parts, problem, value, puzzle in zip(*columns, strict=True):
            difficulty, arm, seed, step, task, metric = key_parts
            arms[arm] = difficulties[difficulty] = None
            if task:
                tasks[task] = None
            key = (difficulty, arm, task, metric)
            last = self.last_step.get((difficulty, arm), 0)
            self.last_step[difficulty, arm] = max(last, step)
            if problem:
                when = "before" if step == 0 else "after"
                self._problems.setdefault((*key, when), {}).setdefault(seed, {})[problem] = value
                self._puzzles[task, problem] = puzzle or f"{task}/{problem}"
            else:
                self._numbers.setdefault(key, {}).setdefault(seed, {})[step] = value
        self.arms, self.difficulties, self.tasks = list(arms), list(difficulties), list(tasks)

    def problems(
        self, difficulty: str, arm: str, task: str, metric: str, when: str
    ) -> dict[int, dict[str, float]]:
        """seed -> problem -> value; `ALL_TASKS` has every task's problems."""
        if task != ALL_TASKS:
            return self._problems.get((difficulty, arm, task, metric, when), {})
        merged: dict[int, dict[str, float]] = {}
        for name in self.tasks:
            by_seed = self._problems.get((difficulty, arm, name, metric, when), {})
            for seed, values in by_seed.items():
                merged.setdefault(seed, {}).update({f"{name}/{k}": v for k, v in values.items()})
        return merged

    def puzzles(self, task: str, problems: Sequence[str]) -> list[str]:
        """The puzzle of each problem that `problems` names so."""
        if task != ALL_TASKS:
            return [self._puzzles[task, problem] for problem in problems]
        merged = {f"{name}/{problem}": puzzle for (name, problem), puzzle in self._puzzles.items()}
        return [merged[problem] for problem in problems]

    def numbers(
        self, difficulty: str, arm: str, task: str, metric: str
    ) -> dict[int, dict[int, float]]:
        """seed -> step -> value of a whole step or evaluation."""
        return self._numbers.get((difficulty, arm, task, metric), {})


def pilot_differences(
    table: pa.Table, arms: Sequence[str]
) -> tuple[dict[str, list[np.ndarray]], float]:
    """arm -> its `a` after training less that of `arms[0]`, [S, K puzzles] a difficulty; and K / P.

    The second is how many puzzles a problem stands for: 1 where no two are of one puzzle.
    """
    results = Results(table)
    task = ALL_TASKS if len(results.tasks) > 1 else "".join(results.tasks)
    found: dict[str, list[np.ndarray]] = {}
    of_problems = of_puzzles = 0
    for arm in arms[1:]:
        for difficulty in results.difficulties:
            (ours, reference), problems = aligned(
                *(results.problems(difficulty, a, task, "a", "after") for a in (arm, arms[0]))
            )
            if ours.size:
                puzzles = results.puzzles(task, problems)
                found.setdefault(arm, []).append(by_puzzle(ours - reference, puzzles))
                of_problems += len(problems)
                of_puzzles += found[arm][-1].shape[1]
    return found, of_puzzles / max(1, of_problems)


def aligned(
    *parts: Mapping[int, Mapping[str, float]],
) -> tuple[list[np.ndarray], list[str]]:
    """Arrays [S, P] of the seeds and problems that all parts have, in one order, and these [P].

    Problems are those that every one of those seeds has. Empty arrays where nothing is shared.
    """
    seeds = sorted(set.intersection(*(set(part) for part in parts)))
    if not seeds:
        return [np.zeros((0, 0)) for _ in parts], []
    shared = set.intersection(*(set(part[seed]) for part in parts for seed in seeds))
    problems = sorted(shared)
    arrays = [np.array([[part[s][p] for p in problems] for s in seeds]) for part in parts]
    return arrays, problems


def summarise(table: pa.Table, question: str, arms: Sequence[str], target: float | None) -> Summary:
    """All statistics of a table of results; `arms[0]` is the reference.

    `target` is the accuracy that costs are counted to; None: for each difficulty the mean of the
    reference's `acc/a` over the last third of training. Comparisons use the seeds that both arms
    have finished.
    """
    results = Results(table)
    arms = [arm for arm in arms if arm in results.arms]
    tasks = [*results.tasks, *([ALL_TASKS] if len(results.tasks) > 1 else [])]
    places = [(d, task) for d in results.difficulties for task in tasks]
    return Summary(
        question=question,
        reference=arms[0] if arms else "",
        levels=tuple(
            level
            for difficulty, task in places
            for arm in arms
            for level in _levels(results, difficulty, task, arm)
        ),
        comparisons=tuple(
            comparison
            for difficulty, task in places
            for metric in COMPARED
            for comparison in _comparisons(results, difficulty, task, metric, arms)
        ),
        asymmetries=tuple(
            found
            for difficulty, task in places
            for arm in arms
            for found in _asymmetries(results, difficulty, task, arm)
        ),
        couplings=tuple(
            found
            for difficulty in results.difficulties
            for arm in arms
            for found in _couplings(results, difficulty, arm)
        ),
        curves=tuple(
            found
            for difficulty in results.difficulties
            for arm in arms
            for found in _curves(results, difficulty, arm)
        ),
        costs=tuple(
            found
            for difficulty in results.difficulties
            for found in _costs(results, difficulty, arms, target)
        ),
        shares=tuple(
            found
            for difficulty in results.difficulties
            for arm in arms
            for found in _shares(results, difficulty, arm)
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
    found = []
    for arm in arms[1:]:
        (ours, reference), problems = aligned(
            results.problems(difficulty, arm, task, metric, "after"),
            results.problems(difficulty, arms[0], task, metric, "after"),
        )
        if ours.size:
            binary = bool(np.isin(ours, (0, 1)).all() and np.isin(reference, (0, 1)).all())
            puzzles = results.puzzles(task, problems)
            difference = crossed_interval(ours - reference, DIFFERENCE, puzzles)
            test = paired_test(reference, ours, puzzles) if binary else None
            found.append((arm, difference, test))
    adjusted = iter(holm([d.p for _, d, _ in found if d.p is not None]))
    return [
        Comparison(
            difficulty, task, arm, arms[0], metric, d, None if d.p is None else next(adjusted), test
        )
        for arm, d, test in found
    ]


def _asymmetries(results: Results, difficulty: str, task: str, arm: str) -> Iterator[Asymmetry]:
    last = results.last_step.get((difficulty, arm), 0)
    reasoning, perception = (results.numbers(difficulty, arm, task, m) for m in ("a_r", "a_p"))
    seeds = sorted(set(reasoning) & set(perception))
    every = [set(by[seed]) for by in (reasoning, perception) for seed in seeds]
    steps = set.intersection(*every) if every else set()
    for step in sorted(steps - {0, last}) if 0 in steps else ():
        r, p = (
            np.array([[by[seed][0], by[seed][step]] for seed in seeds]).T
            for by in (reasoning, perception)
        )
        index = seed_interval(asymmetry((r[0], r[1]), (p[0], p[1])), (-2, 2))
        yield Asymmetry(difficulty, task, arm, step, index)
    arrays, problems = aligned(
        *(
            results.problems(difficulty, arm, task, metric, when)
            for metric in ("a_r", "a_p")
            for when in ("before", "after")
        )
    )
    if arrays[0].size:
        by_problem = asymmetry((arrays[0], arrays[1]), (arrays[2], arrays[3]))
        index = crossed_interval(by_problem, (-2, 2), results.puzzles(task, problems))
        yield Asymmetry(difficulty, task, arm, last, index)


def _couplings(results: Results, difficulty: str, arm: str) -> Iterator[Coupling]:
    for name in COUPLINGS:
        values = results.numbers(difficulty, arm, "", f"coupling/{name}/within")
        counts = results.numbers(difficulty, arm, "", f"coupling/{name}/n_within")
        steps = max((step for by in counts.values() for step in by), default=0)
        for phase in PHASES:
            by_seed = []
            for seed in sorted(set(values) & set(counts)):
                chosen = [s for s in values[seed] if s > 0 and phase_of(s, steps) == phase]
                mean = mean_correlation(
                    np.array([values[seed][s] for s in chosen]),
                    np.array([counts[seed][s] for s in chosen]),
                )
                if mean is not None:
                    by_seed.append(mean)
            if by_seed:
                yield Coupling(difficulty, arm, name, phase, correlation_interval(by_seed))


def _curves(results: Results, difficulty: str, arm: str) -> Iterator[Curve]:
    evaluated = [(t, m) for t in results.tasks for m in COMPARED]
    for task, metric in [("", m) for m in CURVES] + evaluated:
        by_seed = results.numbers(difficulty, arm, task, metric)
        steps = sorted({step for values in by_seed.values() for step in values})
        if not steps:
            continue
        curves = np.array(
            [[by_seed[seed].get(step, math.nan) for step in steps] for seed in sorted(by_seed)]
        )
        bounds = (-math.inf, math.inf) if metric.startswith("reward/") else ACCURACY
        areas = [
            mean_level(np.array(sorted(values)), np.array([values[s] for s in sorted(values)]))
            for _, values in sorted(by_seed.items())
        ]
        yield Curve(
            difficulty,
            arm,
            f"eval/{task}/{metric}" if task else metric,
            tuple(steps),
            tuple(band(curves, bounds)),
            seed_interval(areas, bounds),
        )


def _costs(
    results: Results, difficulty: str, arms: Sequence[str], target: float | None
) -> Iterator[Cost]:
    if target is None:
        reference = results.numbers(difficulty, arms[0], "", "acc/a") if arms else {}
        last = [
            [values[s] for s in sorted(values)][-max(1, len(values) // 3) :]
            for values in reference.values()
        ]
        if not last:
            return
        target = float(np.mean([np.mean(values) for values in last]))
    for arm in arms:
        accuracy = results.numbers(difficulty, arm, "", "acc/a")
        for unit, metric in SPENT.items():
            amounts = results.numbers(difficulty, arm, "", metric)
            costs, spent = [], []
            for seed in sorted(set(accuracy) & set(amounts)):
                steps = sorted(set(accuracy[seed]) & set(amounts[seed]))
                cost = np.array([amounts[seed][s] for s in steps])
                values = np.array([accuracy[seed][s] for s in steps])
                costs.append(cost_to_reach(cost, values, target))
                spent.append(float(cost.sum()))
            if costs:
                yield Cost(difficulty, arm, unit, target, reach(costs, spent))


def _shares(results: Results, difficulty: str, arm: str) -> Iterator[SegmentShare]:
    for of, metric in SHARES.items():
        by_seed = results.numbers(difficulty, arm, "", metric)
        means = [float(np.mean(list(values.values()))) for _, values in sorted(by_seed.items())]
        if means:
            yield SegmentShare(difficulty, arm, of, seed_interval(means, ACCURACY))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(below) for below in value]
    return None if isinstance(value, float) and math.isnan(value) else value
