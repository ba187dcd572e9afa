"""`equipoise report ABLATION`: an ablation's results, as one HTML file that needs nothing else.

`read_ablation` reads the folder and `build_ablation` makes the same view model that a run's report
has. All numbers are those of `summarise`. Of an ablation that goes on, or whose cells failed,
there is a report of what has finished.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from cluster.ablation.cells import (
    as_cells,
    cell_folder,
    is_finished,
    pairing_faults,
    read_cells,
    read_failure,
    read_result,
)
from cluster.ablation.grid import CellName, stored_ablation
from cluster.ablation.results import RESULT_SCHEMA, Results, collect, summarise
from cluster.ablation.settings import (
    AblationConfig,
    alpha_of,
    arm_reward,
    fixed_weights,
    other_settings,
)
from cluster.ablation.statistics import Estimate
from cluster.ablation.summary import Summary, at
from cluster.recipe.recipe import UserError
from cluster.report import ablation_charts as charts
from cluster.report import ablation_tables as tables
from cluster.report import ablation_words as words
from cluster.report.document import Document, Part
from cluster.report.rollouts import Shown, read_arms
from cluster.report.words import settings_table
from tasks.files import put, put_text

ABLATION_SCHEMA = pa.schema(
    {
        # level, difference, asymmetry, coupling, curve, mean level, cost, share
        "kind": pa.string(),
        "difficulty": pa.string(),
        "task": pa.string(),
        "arm": pa.string(),
        "metric": pa.string(),
        "when": pa.string(),  # before, after, change, or a third of training
        "step": pa.int64(),
        "value": pa.float64(),
        "low": pa.float64(),
        "high": pa.float64(),
        "p": pa.float64(),
        "p_holm": pa.float64(),
        "seeds": pa.int64(),
        "problems": pa.int64(),
    }
)


@dataclass(frozen=True)
class AblationRecord:
    """What an ablation's folder holds, read.

    Attributes:
        base: the resolved base recipe.
        finished: cell id -> its `result.json`; `failed`: cell id -> why.
        faults: cells that are not paired, in words.
        table: `RESULT_SCHEMA`; `summary` is made of it.
        problems: what could not be read, in words.
    """

    name: str
    config: AblationConfig
    base: Mapping[str, Any]
    cells: tuple[CellName, ...]
    finished: Mapping[str, Mapping[str, Any]]
    failed: Mapping[str, str]
    faults: tuple[str, ...]
    table: pa.Table
    summary: Summary
    shown: Shown
    problems: tuple[str, ...]


def is_ablation(folder: Path) -> bool:
    """Whether a folder is that of an ablation rather than of a run."""
    return (folder / "ablation.json").is_file()


def write_results(folder: Path) -> tuple[AblationRecord, Document]:
    """Write an ablation's tables (`results.parquet`, `cells.parquet`), `summary.json` and
    `report.html`; what they say."""
    record = read_ablation(folder)
    numbers = json.dumps(record.summary.to_dict() | {"pairing_faults": record.faults}, indent=1)
    cells = as_cells(record.finished.values())
    put(folder / "results.parquet", lambda beside: pq.write_table(record.table, beside))
    put(folder / "cells.parquet", lambda beside: pq.write_table(cells, beside))
    put_text(folder / "summary.json", numbers)
    report = build_ablation(record)
    put_text(folder / "report.html", report.to_html())
    return record, report


def read_ablation(folder: Path) -> AblationRecord:
    """Read an ablation's folder, finished or not.

    Raises UserError for an `ablation.json` that cannot be read; all else that cannot is a warning.
    """
    path = folder / "ablation.json"
    try:
        identity = json.loads(path.read_text("utf-8"))
        config, cells = stored_ablation(identity)
        base = identity["base"]
        if not isinstance(base, dict):
            raise TypeError("base is not a recipe")
    except (OSError, ValueError, TypeError, KeyError, ValidationError) as error:
        raise UserError(
            f"{path}: not an ablation that `equipoise ablate` wrote ({error}); run it again with "
            "this folder as --output"
        ) from error
    problems: list[str] = []
    finished, failed, parts = {}, {}, []
    for cell in cells:
        try:
            if is_finished(folder, cell):
                result = read_result(folder, cell)
                parts.append(collect([cell], folder))
                finished[cell.id] = result
            elif (why := read_failure(folder, cell)) is not None:
                failed[cell.id] = why
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            problems.append(f"{cell.id} cannot be read: {type(error).__name__}: {error}")
    if not parts:
        finished = _stored_cells(folder, problems)
    faults: tuple[str, ...] = ()
    try:
        faults = tuple(pairing_faults(cells, finished))
    except KeyError as error:
        problems.append(f"Results of cells lack {error}: whether arms are paired is not known.")
    table = pa.concat_tables(parts) if parts else _stored_table(folder, problems)
    summary = summarise(table, config.question, [a.name for a in config.arms], config.target)
    runs, seed = _runs_to_show(folder, cells, set(finished) if parts else ())
    # SFT has no rollouts to show.
    shown = read_arms(runs if config.command == "train" else {}, seed)
    return AblationRecord(
        name=folder.resolve().name,
        config=config,
        base=base,
        cells=cells,
        finished=finished,
        failed=failed,
        faults=faults,
        table=table,
        summary=summary,
        shown=shown,
        problems=(*problems, *shown.problems),
    )


def build_ablation(record: AblationRecord) -> Document:
    """The document of an ablation."""
    summary, config, base = record.summary, record.config, record.base
    arms = [arm.name for arm in config.arms]
    results = Results(record.table)
    finished_cells = [c.id for c in record.cells if c.id in record.finished] or sorted(
        set(record.table.column("cell").to_pylist())
    )
    wary = words.warnings(config, record.cells, finished_cells, record.failed, record.faults)
    if finished_cells and not record.finished:
        rollouts = "no rollouts, " if config.command == "train" else ""
        wary.append(
            f"The cells' folders are not here, only their numbers: {rollouts}no times, and no "
            "hashes to show that arms were paired."
        )
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for cell in record.cells:
        if (took := record.finished.get(cell.id, {}).get("seconds")) is not None:
            seconds[cell.difficulty, cell.arm].append(float(took))
    if config.command == "sft":
        frontier = Part.of(
            "frontier",
            "The λ frontier",
            *charts.frontiers(summary, fixed_weights(config, base), charts.LAMBDA),
            missing="No two finished arms differ in a fixed λ, the weight of perception in the "
            "loss.",
        )
        learnt_from = Part.of(
            "shares",
            "What the updates were made of",
            tables.share_table(summary),
            missing="No shares were logged.",
        )
    else:
        metrics = list(dict.fromkeys(record.table.column("metric").to_pylist()))
        alphas = {
            arm.name: alpha
            for arm in config.arms
            if (alpha := alpha_of(arm_reward(arm, base))) is not None
            and other_settings(arm) == other_settings(config.arms[0])
        }
        frontier = Part.of(
            "frontier",
            "The α frontier",
            *charts.frontiers(summary, alphas),
            missing="No two finished arms differ in α, the share of the reward that perception "
            "gets.",
        )
        learnt_from = Part.of(
            "reward",
            "Coupling and reliability",
            *charts.coupling_charts(summary, arms),
            tables.coupling_table(summary),
            tables.reliability_table(results, metrics, arms),
            missing="No coupling and no reliability was logged.",
        )
    parts = (
        Part.of("arms", "Arms", tables.arms_table(config, base, record.cells, finished_cells)),
        Part.of(
            "outcome",
            "Which arm ended best",
            *charts.forests(summary),
            *tables.comparison_tables(summary),
            *tables.level_tables(summary),
            missing="No cell has finished, so nothing is compared.",
        ),
        Part.of(
            "seeing",
            "To see or to think",
            *charts.planes(summary, arms),
            tables.asymmetry_table(summary),
            missing="a_p and a_r were not measured before and after: no pass asked for them, or no "
            "problem has a perception label.",
        ),
        frontier,
        Part.of(
            "learning",
            "Learning curves",
            *charts.curves(summary, arms),
            missing="No cell has finished, so there are no curves.",
        ),
        learnt_from,
        Part.of(
            "cost",
            "Cost",
            tables.cost_table(summary),
            tables.speed_table(results, arms, seconds),
            missing="No cost was logged.",
        ),
        Part.of(
            "pairing",
            "Pairing and cells",
            tables.pairing_table(record.cells, record.finished, config.command),
            tables.made_with_table(record.finished),
            tables.cells_table(record.cells, finished_cells, record.finished, record.failed),
        ),
    )
    return Document(
        kicker="Equipoise ablation report",
        title=record.name,
        question=config.question,
        lead=words.lead(config, base, len(finished_cells), len(record.cells), summary.reference),
        findings=words.findings(summary, arms),
        warnings=(*wary, *record.problems),
        parts=parts,
        shown=record.shown,
        settings=settings_table(base, {}),
    )


def ablation_to_parquet(summary: Summary) -> pa.Table:
    """Every estimate of a summary as one flat table (`ABLATION_SCHEMA`)."""
    names = ABLATION_SCHEMA.names
    rows = [{name: row.get(name) for name in names} for row in _flat_rows(summary)]
    return pa.Table.from_pylist(rows, schema=ABLATION_SCHEMA)


def _flat_rows(summary: Summary) -> Iterator[dict[str, Any]]:
    def row(kind: str, of: Any, estimate: Estimate, **columns: Any) -> dict[str, Any]:
        return {"kind": kind} | vars(of) | vars(estimate) | columns

    for v in summary.levels:
        for when in ("before", "after", "change"):
            yield row("level", v, getattr(v, when), when=when)
    for c in summary.comparisons:
        yield row("difference", c, c.difference, when="after")
    for a in summary.asymmetries:
        yield row("asymmetry", a, a.index)
    for k in summary.couplings:
        yield row("coupling", k, k.correlation, metric=k.of, when=k.phase)
    for curve in summary.curves:
        for step, point in zip(curve.steps, curve.points, strict=True):
            yield row("curve", curve, point, step=step)
        yield row("mean level", curve, curve.mean_level)
    for cost in summary.costs:
        reached = {"value": cost.reach.median, "seeds": cost.reach.seeds}
        yield {"kind": "cost"} | vars(cost) | {"metric": cost.unit} | reached
    for share in summary.shares:
        yield row("share", share, share.share, metric=share.of)


def _stored_table(folder: Path, problems: list[str]) -> pa.Table:
    """The results that a finished ablation left, where its cells are no longer there."""
    path = folder / "results.parquet"
    if path.is_file():
        try:
            return pq.read_table(path, schema=RESULT_SCHEMA)
        except (OSError, ValueError, pa.ArrowException) as error:
            problems.append(f"{path.name} cannot be read: {type(error).__name__}: {error}")
    return RESULT_SCHEMA.empty_table()


def _stored_cells(folder: Path, problems: list[str]) -> dict[str, dict[str, Any]]:
    """The same of what each cell was: cell id -> its result."""
    path = folder / "cells.parquet"
    if path.is_file():
        try:
            return read_cells(path)
        except (OSError, ValueError, pa.ArrowException) as error:
            problems.append(f"{path.name} cannot be read: {type(error).__name__}: {error}")
    return {}


def _runs_to_show(
    folder: Path, cells: Sequence[CellName], finished: Iterable[str]
) -> tuple[dict[str, Path], int]:
    """(arm -> run folder, seed) of the first seed that the most arms have finished."""
    by_seed: dict[int, dict[str, Path]] = {cell.seed: {} for cell in cells}
    ended = set(finished)
    for cell in cells:
        if cell.id in ended:
            name = at(cell.difficulty, cell.arm)
            by_seed[cell.seed][name] = cell_folder(folder, cell) / "run"
    best = max(by_seed, key=lambda seed: len(by_seed[seed]))
    return by_seed[best], best
