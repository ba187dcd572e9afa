"""`equipoise eval CHECKPOINT --data FILE`: a policy on people's own questions, every response kept.

The folder it leaves is that of a run of no steps: evaluation, rollouts, images, report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from cluster.recipe.machine import new_run_folder
from cluster.recipe.problems import ProblemSource, held_out
from cluster.recipe.recipe import Recipe, UserError, resolved_toml
from cluster.recipe.sections import EvalConfig
from cluster.record.evaluation import (
    Change,
    EvalTable,
    before_after,
    change_table,
    columns_table,
    parts_of,
)
from cluster.record.tracker import Tracker
from cluster.run.evaluate import Found, eval_recipe, evaluate_all
from rewards.advantages import CREDIT_COLUMNS
from rewards.diagnosis import diagnose
from rewards.scored import ScoredGroup
from rewards.settings import Place
from rollout.record import Group
from tasks.core import Problem, Task
from tasks.files import put, put_text
from tasks.settings import TaskConfig


def run_data_eval(
    checkpoint: str,
    task: TaskConfig,
    *,
    problems: int | None,
    samples: int,
    seed: int,
    by: Sequence[str] = (),
    against: Path | None = None,
    output: Path | None = None,
    as_json: bool = False,
    address: str | None = None,
    like: Recipe | None = None,
    reader: str = "",
    reader_place: Place = "prompt",
) -> Path:
    """Measure, print and keep; returns the folder.

    Args:
        task: whose held-out rows are the questions.
        problems: how many of them, drawn by `seed`; None for all.
        samples: responses a problem at the sampler's temperature, beside the greedy one.
        by: columns of the data; each value's numbers are given apart.
        against: the folder of another such evaluation, compared problem by problem.
        like: a recipe whose [model], [sampler] and [eval.sampling] say how the checkpoint is run.
        reader, reader_place: as in [eval].

    Raises DataError, UserError or ModelError for input that cannot be used, RunFailed where the
    engine ends the evaluation.
    """
    from cluster.run.engines import sampling_from
    from cluster.run.session import session

    asked = EvalConfig(samples=samples, seed=seed, reader=reader, reader_place=reader_place)
    recipe = eval_recipe(f"eval-{_named(checkpoint)}", checkpoint, task, asked, like)
    earlier = read_evaluation(against) if against else None
    folder = new_run_folder(recipe, output)
    console = Console(stderr=as_json)
    groups_of: Found = {}
    with session(recipe, "eval", address, folder, console.print) as ready:
        (source,) = ready.sources
        count = min(problems or len(source.test), len(source.test))
        chosen = ready.recipe.eval.model_copy(update={"problems": count})
        recipe = ready.recipe.model_copy(update={"eval": chosen})
        _require_columns(by, held_out(source, seed, count))
        console.print(f"{count} problems; starting the sampler (vLLM) ...")
        with sampling_from(recipe, recipe.model.path, "eval") as (pool, frozen, _):
            tables = evaluate_all(pool, ready.sources, recipe, frozen, keep=groups_of.update)
    made = keep(folder, recipe, source, tables[source.label], groups_of, by, earlier)
    if as_json:
        evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        printed = {"checkpoint": checkpoint, "folder": str(folder)} | evaluation[source.label]
        print(json.dumps(printed, indent=2))
        return folder
    console.print(made.table.table(f"{checkpoint} on {task.data_named}").to_rich())
    for column, split in made.parts.items():
        console.print(columns_table(split, column).to_rich())
    if earlier:
        console.print(change_table(made.changes, f"{against} and {folder}").to_rich())
    return folder


@dataclass(frozen=True)
class Made:
    """An evaluation, its parts by column and value, and what is other than in an earlier one."""

    table: EvalTable
    parts: Mapping[str, Mapping[str, EvalTable]]
    changes: Sequence[Change]


def keep(
    folder: Path,
    recipe: Recipe,
    source: ProblemSource,
    table: EvalTable,
    groups_of: Found,
    by: Sequence[str] = (),
    earlier: EvalTable | None = None,
) -> Made:
    """Write evaluation, responses and images, and what was compared, into a folder."""
    problems = {g.problem.id: g.problem for g in groups_of[source.label]["greedy"]}
    values = {column: _values(problems, column) for column in by}
    parts = {column: parts_of(table, of) for column, of in values.items()}
    measured: dict[str, Any] = table.to_dict()
    measured["by"] = {
        column: {value: [asdict(row) for row in part.rows] for value, part in split.items()}
        for column, split in parts.items()
    }
    evaluation: dict[str, Any] = measured
    changes = before_after(earlier, table) if earlier else []
    if earlier:
        evaluation = {"before": earlier.to_dict(), "after": measured}
        evaluation["change"] = {"rows": [asdict(row) for row in changes]}
    with Tracker(folder, resolved_toml(recipe)) as tracker:
        tracker.log_evaluation(0, {source.label: table})
        groups = [g for passes in groups_of[source.label].values() for g in passes]
        tracker.log_rollouts(0, [_unscored(source.task, group) for group in groups])
    if earlier:
        _put_pairs(folder / "compared.parquet", earlier, table, values)
    put_text(folder / "evaluation.json", json.dumps({source.label: evaluation}, indent=1))
    return Made(table, parts, changes)


def read_evaluation(folder: Path) -> EvalTable:
    """The one table that an evaluation of data left in its folder. Raises UserError."""
    file = folder / "evaluation.json" if folder.is_dir() else folder
    try:
        (evaluation,) = json.loads(file.read_text(encoding="utf-8")).values()
        return EvalTable.from_dict(evaluation.get("after", evaluation))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"--against {folder}: no evaluation of data there ({type(error).__name__}: {error}); "
            "give a folder that `equipoise eval --data` left"
        ) from error


def _named(checkpoint: str) -> str:
    """A checkpoint as a folder's name: that of its run, or its own."""
    path = Path(checkpoint)
    own = path.parent.name if path.name.startswith("checkpoint") else path.name
    return re.sub(r"[^\w.-]+", "-", own).strip("-.") or "policy"


def _require_columns(by: Sequence[str], problems: Sequence[Problem]) -> None:
    known = dict.fromkeys(name for problem in problems for name in problem.extra)
    for column in by:
        if column.partition(".")[0] not in known:
            raise UserError(
                f"--by {column}: the data has no such column beside question, images and answer; "
                f"there are {', '.join(known) or 'none'}"
            )


def _values(problems: Mapping[str, Problem], column: str) -> dict[str, str]:
    """Problem id -> what its row has in a column (`a.b`: in a struct's field), as text."""
    texts = {}
    for name, problem in problems.items():
        value: Any = problem.extra
        for part in [column] if column in problem.extra else column.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        texts[name] = value if isinstance(value, str) else json.dumps(value)
    return texts


def _put_pairs(
    file: Path, before: EvalTable, after: EvalTable, values: Mapping[str, Mapping[str, str]]
) -> None:
    """A row a problem that both evaluations have: each metric before and after."""
    shared = [m for m in after.per_problem if m in before.per_problem and "defect/" not in m]
    rows = [
        {"problem_id": name, **{column: of[name] for column, of in values.items()}}
        | {
            f"{metric} {when}": table.per_problem[metric].get(name)
            for metric in shared
            for when, table in (("before", before), ("after", after))
        }
        for name in after.per_problem["a"]
        if name in before.per_problem["a"]
    ]
    put(file, lambda path: pq.write_table(pa.Table.from_pylist(rows), path))


def _unscored(task: Task, group: Group) -> ScoredGroup:
    """A group as it is stored where nothing is rewarded: its total is whether it was right."""
    diagnosis = diagnose(task, group)
    advantages = np.zeros((len(group.rollouts), len(CREDIT_COLUMNS)))
    right = diagnosis.a.astype(float)
    return ScoredGroup(group, {}, right, advantages, False, False, (), {}, diagnosis)
