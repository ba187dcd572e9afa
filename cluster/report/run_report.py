"""`equipoise report`: what a run did, as one HTML file that needs nothing else.

`read_run` reads the folder and `build` makes the document of it. A report is made of whatever
there is: of a run that crashed, is still going or left no rollouts, it says so.
"""

from __future__ import annotations

import json
import math
import tomllib
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.recipe.machine import require_free
from cluster.recipe.recipe import UserError
from cluster.record.evaluation import EvalTable
from cluster.record.folder import TOOL_FILE
from cluster.record.stored import not_kept, read_metrics
from cluster.report import charts, run_words
from cluster.report.ablation_report import (
    ablation_to_parquet,
    build_ablation,
    is_ablation,
    read_ablation,
)
from cluster.report.charts import Metrics, Series
from cluster.report.document import Document, Format, Part
from cluster.report.rollouts import Shown, read_shown
from cluster.report.tool_use import read_tables, tool_curves, tool_reports, tool_sheets
from cluster.report.words import settings_table
from tasks.files import put, put_text

FLAT_SCHEMA = pa.schema(
    {
        "source": pa.string(),  # metric, evaluation, or tool
        "task": pa.string(),
        "when": pa.string(),  # before, after; null for metrics
        "step": pa.int64(),
        "name": pa.string(),
        "value": pa.float64(),
        "low": pa.float64(),
        "high": pa.float64(),
        "n": pa.int64(),
        "wall_seconds": pa.float64(),  # since the epoch
    }
)


class NoRun(UserError):
    """A folder that holds no run; the message says what was looked for."""


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds, read; `problems` says in words what could not be read."""

    name: str
    recipe: Mapping[str, Any]
    versions: Mapping[str, Any]
    metrics: Metrics
    metric_rows: pa.Table | None
    evaluation: Mapping[str, Any]
    error: str
    ended: bool
    shown: Shown
    problems: tuple[str, ...]
    tool: Mapping[str, EvalTable] = field(default_factory=dict)
    """Of `equipoise diagnose --tool`, by task."""


def write_report(run_dir: Path) -> Path:
    """Write `RUN/report.html` and return where it is.

    Raises NoRun for a folder that holds no run; a file of the run that cannot be read is a
    warning in the report.
    """
    path = run_dir / "report.html"
    put_text(path, build(read_run(run_dir)).to_html())
    return path


def draw_report(run_dir: Path, say: Callable[[str], object] = print) -> None:
    """Write the report of a run that is over; its data are kept, so a failure ends nothing."""
    try:
        say(f"report: {write_report(run_dir)}")
    except Exception as error:
        traceback.print_exc()
        say(
            f"report: not drawn ({type(error).__name__}: {error}); all else is in {run_dir}: "
            f"equipoise report {run_dir}"
        )


def run_report(folder: Path, form: Format = "html", output: Path | None = None) -> Path:
    """`equipoise report`: write the report of a run or an ablation and return where it is.

    Raises NoRun for a folder that holds no run, and UserError for an `output` that is there
    already or cannot be written.
    """
    path = output or folder / f"report.{form}"
    if output is not None:
        require_free(output, "--output")
    write = _writer(folder, form, path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path, write)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); choose another --output") from error
    return path


def _writer(folder: Path, form: Format, name: str) -> Callable[[Path], object]:
    """What writes a folder's report in a format to a path; the folder is read at once.

    `name`: what the file will be called in the end.
    """
    extra: dict[str, Any] = {}
    if is_ablation(folder):
        ablation = read_ablation(folder)
        if form == "parquet":
            return lambda path: pq.write_table(ablation_to_parquet(ablation.summary), path)
        report, extra = build_ablation(ablation), {"summary": ablation.summary.to_dict()}
    else:
        record = read_run(folder)
        if form == "parquet":
            return lambda path: pq.write_table(to_parquet(record), path)
        report = build(record)
    if form == "md":
        return lambda path: report.write_markdown(path, name)
    text = report.to_html() if form == "html" else report.to_json(extra)
    return lambda path: path.write_text(text, encoding="utf-8")


def read_run(run_dir: Path) -> RunRecord:
    """Read a run folder, running, ended or crashed.

    Raises NoRun where there is neither a recipe nor a metric nor a rollout.
    """
    parts = ("recipe.toml", "metrics.parquet", "metrics", "rollouts")
    if not any((run_dir / part).exists() for part in parts):
        raise NoRun(
            f"{run_dir}: no run is here (none of {', '.join(parts)}) and no ablation; give the "
            "folder that `equipoise train` or `equipoise ablate` printed"
        )
    problems: list[str] = []

    def read(name: str, parse: Callable[[Path], Any], empty: Any) -> Any:
        path = run_dir / name
        if not path.exists():
            return empty
        try:
            return parse(path)
        except (OSError, ValueError, pa.ArrowException) as error:
            problems.append(f"{name} cannot be read: {type(error).__name__}: {error}")
            return empty

    def of_json(path: Path) -> Any:
        return json.loads(path.read_text("utf-8"))

    recipe = read("recipe.toml", lambda path: tomllib.loads(path.read_text("utf-8")), {})
    evaluation = read("evaluation.json", of_json, {})
    tool = read(TOOL_FILE, read_tables, {})
    measured = sorted((run_dir / "evaluations").glob("step-*.json"))
    if not evaluation and measured:
        name = f"evaluations/{measured[-1].name}"
        evaluation = read(name, of_json, {})
        problems.append(f"There is no evaluation.json: what is shown is {name}, the last measured.")
    rows: pa.Table | None = None
    try:
        rows = read_metrics(run_dir)
    except FileNotFoundError:
        problems.append("No metrics were logged: the run ended before its first evaluation.")
    except (OSError, pa.ArrowException) as failure:
        problems.append(f"The metrics cannot be read: {failure}")
    shown = read_shown(run_dir)
    if shown.total and (lacking := not_kept(run_dir)):
        problems.append(f"{lacking[0].upper()}{lacking[1:]}.")
    return RunRecord(
        name=str(recipe.get("name") or run_dir.resolve().name),
        recipe=recipe,
        versions=read("versions.json", of_json, {}),
        metrics=_series(rows),
        metric_rows=rows,
        evaluation=evaluation,
        error=read("error.txt", lambda path: path.read_text("utf-8", "replace"), ""),
        ended=not any((run_dir / "metrics").glob("part-*.parquet")),
        shown=shown,
        problems=(*problems, *shown.problems),
        tool=tool,
    )


def build(record: RunRecord) -> Document:
    """The document of a run."""
    metrics, evaluation = record.metrics, record.evaluation
    wary = list(record.problems)
    if record.error:
        first = record.error.strip().splitlines() or [""]
        wary.insert(0, f"The run failed: {first[0][:300]}")
    elif not record.ended:
        wary.insert(0, "The run is still going, or it was killed: its metrics are not yet joined.")
    if not evaluation:
        wary.append("There is no evaluation.json: nothing was measured before and after training.")
    wary += run_words.warnings(record.recipe, metrics)
    compared = any("change" in tables for tables in evaluation.values())
    parts = (
        Part.of(
            "outcome",
            "Before and after" if compared or not evaluation else "Held-out problems",
            charts.change_chart(evaluation),
            charts.plane(metrics, evaluation),
            *charts.evaluation_curves(metrics),
            *run_words.evaluation_tables(evaluation),
            missing="Nothing was measured before and after, and training logged no accuracies.",
        ),
        *_tool_parts(record),
        Part.of(
            "learning",
            "Learning curves",
            *charts.learning_charts(metrics, record.shown.cells),
            run_words.training_table(metrics),
            missing="The run ended before its first step.",
        ),
        Part.of(
            "reward",
            "Reward and credit",
            *charts.reward_charts(metrics),
            run_words.terms_table(metrics),
            missing="No coupling was logged.",
        ),
        Part.of(
            "machine",
            "Time and machinery",
            *charts.machine_charts(metrics),
            run_words.time_table(metrics),
            missing="No step was timed.",
        ),
        Part.of(
            "events",
            "Events and failures",
            run_words.events_table(metrics),
            missing="Nothing failed, nothing was dropped and no response had a defect.",
        ),
    )
    return Document(
        kicker="Equipoise report",
        title=record.name,
        question=str(record.recipe.get("question", "")),
        lead=run_words.lead(record.recipe, metrics),
        findings=run_words.findings(evaluation, metrics),
        warnings=tuple(wary),
        parts=parts,
        shown=record.shown,
        settings=settings_table(record.recipe, record.versions),
        error=record.error,
    )


def _tool_parts(record: RunRecord) -> list[Part]:
    """What its environment gives and takes; of a run that has none, nothing."""
    sheets = [sheet for report in tool_reports(record.tool) for sheet in tool_sheets(report)]
    part = Part.of("tool", "With the tool and without", *tool_curves(record.metrics), *sheets)
    return [part] if part.charts or part.tables else []


def to_parquet(record: RunRecord) -> pa.Table:
    """Metrics and evaluation as one flat table (`FLAT_SCHEMA`)."""
    logged = record.metric_rows.to_pylist() if record.metric_rows is not None else ()
    rows = [{"source": "metric"} | row for row in logged]
    for task, tables in record.evaluation.items():
        # Without a comparison the one table is of what was measured last.
        measured = tables if "before" in tables or "after" in tables else {"after": tables}
        rows += [
            {"source": "evaluation", "task": task, "when": when, "name": row["metric"]}
            | {name: row[name] for name in ("value", "low", "high", "n")}
            for when in ("before", "after")
            for row in measured.get(when, {}).get("rows", ())
        ]
    rows += [
        {"source": "tool", "task": task, "name": row.metric}
        | {name: getattr(row, name) for name in ("value", "low", "high", "n")}
        for task, table in record.tool.items()
        for row in table.rows
    ]
    return pa.Table.from_pylist(rows, schema=FLAT_SCHEMA)


def _series(rows: pa.Table | None) -> dict[str, Series]:
    """Metric rows by name, in the order of their first appearance, steps rising."""
    points: dict[str, dict[int, float]] = defaultdict(dict)
    if rows is not None:
        columns = (rows[name].to_pylist() for name in ("step", "name", "value"))
        for step, name, value in zip(*columns, strict=True):
            points[name][step] = math.nan if value is None else value
    series = {}
    for name, at in points.items():
        good = [(s, v) for s, v in sorted(at.items()) if math.isfinite(v)]
        bad = tuple(s for s, v in sorted(at.items()) if not math.isfinite(v))
        series[name] = Series(tuple(s for s, _ in good), tuple(v for _, v in good), bad)
    return series
