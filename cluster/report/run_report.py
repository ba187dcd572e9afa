"""`equipoise report`: what a run did, as one HTML file that needs nothing else.

`read_run` reads the folder, `build` makes the view model (`Report`), and `to_html`,
`write_markdown`, `to_json` and `to_parquet` write it down. A report is made of whatever there is:
of a run that crashed, is still going or left no rollouts, it says so.
"""

from __future__ import annotations

import json
import math
import tomllib
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.recipe.machine import require_free
from cluster.recipe.recipe import UserError
from cluster.record.stored import not_kept, read_metrics
from cluster.report.ablation_report import (
    ablation_to_parquet,
    build_ablation,
    is_ablation,
    read_ablation,
)
from cluster.report.charts import (
    Metrics,
    Series,
    change_chart,
    evaluation_curves,
    plane,
    training_charts,
)
from cluster.report.page import Format, Report, Section, to_html, to_json, write_markdown
from cluster.report.plots import Chart
from cluster.report.rollouts import Shown, read_shown
from cluster.report.words import (
    Words,
    evaluation_tables,
    events_table,
    findings,
    lead,
    reliability_table,
    settings_table,
    time_table,
    training_table,
    warnings,
)
from tasks.files import put, put_text

FLAT_SCHEMA = pa.schema(
    {
        "source": pa.string(),  # metric, or evaluation
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


def write_report(run_dir: Path) -> Path:
    """Write `RUN/report.html` and return where it is.

    Raises NoRun for a folder that holds no run; a file of the run that cannot be read is a
    warning in the report.
    """
    path = run_dir / "report.html"
    put_text(path, to_html(build(read_run(run_dir))))
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
    more: dict[str, Any] = {}
    if is_ablation(folder):
        found = read_ablation(folder)
        if form == "parquet":
            return lambda path: pq.write_table(ablation_to_parquet(found.summary), path)
        report, more = build_ablation(found), {"summary": found.summary.to_dict()}
    else:
        record = read_run(folder)
        if form == "parquet":
            return lambda path: pq.write_table(to_parquet(record), path)
        report = build(record)
    if form == "md":
        return lambda path: write_markdown(report, path, name)
    text = to_html(report) if form == "html" else to_json(report, more)
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

    def read(name: str, how: Callable[[Path], Any], empty: Any) -> Any:
        path = run_dir / name
        if not path.exists():
            return empty
        try:
            return how(path)
        except (OSError, ValueError, pa.ArrowException) as error:
            problems.append(f"{name} cannot be read: {type(error).__name__}: {error}")
            return empty

    recipe = read("recipe.toml", lambda p: tomllib.loads(p.read_text("utf-8")), {})
    versions = read("versions.json", lambda p: json.loads(p.read_text("utf-8")), {})
    evaluation = read("evaluation.json", lambda p: json.loads(p.read_text("utf-8")), {})
    measured = sorted((run_dir / "evaluations").glob("step-*.json"))
    if not evaluation and measured:
        name = f"evaluations/{measured[-1].name}"
        evaluation = read(name, lambda p: json.loads(p.read_text("utf-8")), {})
        problems.append(f"There is no evaluation.json: what is shown is {name}, the last measured.")
    error = read("error.txt", lambda p: p.read_text("utf-8", "replace"), "")
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
        versions=versions,
        metrics=_series(rows),
        metric_rows=rows,
        evaluation=evaluation,
        error=error,
        ended=not any((run_dir / "metrics").glob("part-*.parquet")),
        shown=shown,
        problems=(*problems, *shown.problems),
    )


def build(record: RunRecord) -> Report:
    """The view model of a run."""
    metrics, evaluation = record.metrics, record.evaluation
    wary = list(record.problems)
    if record.error:
        first = record.error.strip().splitlines() or [""]
        wary.insert(0, f"The run failed: {first[0][:300]}")
    elif not record.ended:
        wary.insert(0, "The run is still going, or it was killed: its metrics are not yet joined.")
    if not evaluation:
        wary.append("There is no evaluation.json: nothing was measured before and after training.")
    wary += warnings(record.recipe, metrics)
    compared = any("change" in tables for tables in evaluation.values())
    curves = training_charts(metrics, record.shown.cells)
    named = {chart.name: chart for chart in curves}

    def charts(*names: str) -> tuple[Chart, ...]:
        return tuple(named[n] for n in names if n in named)

    def present(*things: Any) -> tuple[Any, ...]:
        return tuple(thing for thing in things if thing is not None)

    sections = (
        Section(
            "outcome", "Before and after" if compared or not evaluation else "Held-out problems",
            (*present(change_chart(evaluation), plane(metrics, evaluation)),
             *evaluation_curves(metrics)),
            tuple(evaluation_tables(evaluation)),
            "Nothing was measured before and after, and training logged no accuracies.",
        ),
        Section(
            "learning", "Learning curves",
            charts("accuracy", "cells", "rewards", "entropy", "share", "length", "groups", "sft"),
            present(training_table(metrics)),
            "The run ended before its first step.",
        ),
        Section(
            "reward", "Reward and credit", charts("coupling", "reliability"),
            present(reliability_table(metrics)),
            "No coupling was logged.",
        ),
        Section(
            "machine", "Time and machinery",
            charts("time", "throughput", "idle", "mismatch", "gradient"),
            present(time_table(metrics)),
            "No step was timed.",
        ),
        Section(
            "events", "Events and failures", (), present(events_table(metrics)),
            "Nothing failed, nothing was dropped and no response had a defect.",
        ),
    )  # fmt: skip
    return Report(
        title=record.name,
        question=str(record.recipe.get("question", "")),
        words=Words(lead(record.recipe, metrics), findings(evaluation, metrics), tuple(wary)),
        sections=sections,
        shown=record.shown,
        error=record.error,
        settings=settings_table(record.recipe, record.versions),
    )


def to_parquet(record: RunRecord) -> pa.Table:
    """Metrics and evaluation as one flat table (`FLAT_SCHEMA`)."""
    rows = [
        {"source": "metric"} | row
        for row in (record.metric_rows.to_pylist() if record.metric_rows is not None else ())
    ]
    for task, tables in record.evaluation.items():
        for when in ("before", "after"):
            found = tables.get(when) if when in tables else tables if when == "after" else None
            for row in (found or {}).get("rows", ()):
                kept = {name: row[name] for name in ("value", "low", "high", "n")}
                rows.append(
                    {"source": "evaluation", "task": task, "when": when, "name": row["metric"]}
                    | kept
                )
    return pa.Table.from_pylist(rows, schema=FLAT_SCHEMA)


def _series(rows: pa.Table | None) -> dict[str, Series]:
    """Metric rows by name, in the order of their first appearance, steps rising."""
    points: dict[str, dict[int, float]] = defaultdict(dict)
    if rows is not None:
        columns = (rows[name].to_pylist() for name in ("step", "name", "value"))
        for step, name, value in zip(*columns, strict=True):
            points[name][step] = math.nan if value is None else value
    found = {}
    for name, at in points.items():
        good = [(s, v) for s, v in sorted(at.items()) if math.isfinite(v)]
        bad = tuple(s for s, v in sorted(at.items()) if not math.isfinite(v))
        found[name] = Series(tuple(s for s, _ in good), tuple(v for _, v in good), bad)
    return found
