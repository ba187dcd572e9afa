"""`make results`: the pages of docs/results/ again, from the raw tables that lie beside them.

    python -m benchmarks.results

Of each folder of an ablation (`ablation.json`, `results.parquet`) its report and figures are drawn
anew, and in the page of its name the places that are marked for a table. All numbers are those of
`cluster.ablation.results.summarise`; of `looking` those of one run's evaluations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.tables import between_marks
from cluster.ablation.results import Results
from cluster.ablation.statistics import PHASES, Estimate
from cluster.ablation.summary import COMPARED, COUPLINGS, SHARES, Summary
from cluster.report.ablation_report import AblationRecord, build_ablation, read_ablation
from tasks.files import put_text

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "results"
LAST_UPDATES = 20


def main() -> None:
    """Write the reports and the pages."""
    for folder in sorted(path.parent for path in FOLDER.glob("*/ablation.json")):
        record = read_ablation(folder)
        build_ablation(record).write_markdown(folder / "report.md", "report.md")
        page = folder.with_suffix(".md")
        put_text(page, with_tables(page.read_text(encoding="utf-8"), record))
        print(page)
    page = FOLDER / "looking.md"
    put_text(page, with_looks(page.read_text(encoding="utf-8"), FOLDER / "looking"))
    print(page)


LOOKS = (
    "called", "a", "a_alone", "a_call_gain", "a_prompt_gain", "a_call_harm", "a_prompt_harm",
    "a_p", "a_r",
)  # fmt: skip
"""Metrics of an evaluation of a run with [environment], in the order of the page's columns."""


def with_looks(page: str, folder: Path) -> str:
    """The page on looking with its table: a row an evaluation of the run's `metrics.parquet`."""
    values: dict[int, dict[str, float]] = {}
    for row in pq.read_table(folder / "metrics.parquet").to_pylist():
        if row["name"].startswith("eval/sudoku/"):
            values.setdefault(row["step"], {})[row["name"].rpartition("/")[2]] = row["value"]
    rows = [
        [str(step), *(number(measured[name]) for name in LOOKS)]
        for step, measured in sorted(values.items())
    ]
    return between_marks(page, "looking", markdown([["after step", *LOOKS], *rows]))


def with_tables(page: str, record: AblationRecord) -> str:
    """The page with each table in the place that is marked for it; those without a place are left.

    Raises ValueError where the ablation has several difficulties or tasks: a page shows one.
    """
    (headline,) = record.summary.headlines()
    for name, rows in TABLES.items():
        if f"<!-- {name}:" in page:
            page = between_marks(page, name, markdown(rows(record, headline)))
    return page


Headline = tuple[str, str]
"""(difficulty, task)."""
Rows = list[Sequence[str]]


def levels(record: AblationRecord, headline: Headline) -> Rows:
    """Each arm after training, and its paired difference from the reference."""
    summary = record.summary
    metrics = [m for m in COMPARED if any(v.metric == m for v in summary.levels)]
    less = [f"{m} less {summary.reference}" for m in metrics]
    rows: Rows = [["arm", *metrics, *(column for name in less for column in (name, "p (Holm)"))]]
    before = summary.of(*headline, summary.reference)
    blank = [""] * (2 * len(metrics))
    rows.append(["before training", *(short(before[m].before) for m in metrics), *blank])
    for arm in arms(record):
        cells = [short(summary.of(*headline, arm)[m].after) for m in metrics]
        for metric in metrics:
            cells += _difference(summary, headline, arm, metric)
        rows.append([arm, *cells])
    return rows


def _difference(summary: Summary, headline: Headline, arm: str, metric: str) -> list[str]:
    for c in summary.comparisons:
        if (c.difficulty, c.task, c.arm, c.metric) == (*headline, arm, metric):
            return [short(c.difference, "+"), "–" if c.p_holm is None else number(c.p_holm, ".2g")]
    return ["", ""]


def seeds(record: AblationRecord, headline: Headline) -> Rows:
    """Each arm's accuracies after training, seed by seed."""
    results, (difficulty, task) = Results(record.table), headline
    metrics = [m for m in COMPARED if any(v.metric == m for v in record.summary.levels)]
    rows: Rows = [["arm", *(f"{m} by seed" for m in metrics)]]
    for arm in arms(record):
        cells = []
        for metric in metrics:
            values = results.problems(difficulty, arm, task, metric, "after")
            means = [sum(v.values()) / len(v) for _, v in sorted(values.items())]
            cells.append(", ".join(map(number, means)))
        rows.append([arm, *cells])
    return rows


def asymmetry(record: AblationRecord, headline: Headline) -> Rows:
    """Δa_r − Δa_p at each evaluation."""
    rows = [v for v in record.summary.asymmetries if (v.difficulty, v.task) == headline]
    steps = sorted({v.step for v in rows})
    by = {(v.arm, v.step): v.index for v in rows}
    head = ["arm", *(f"Δa_r − Δa_p after {step} updates" for step in steps)]
    return [
        head,
        *([arm, *(short(by.get((arm, step)), "+") for step in steps)] for arm in arms(record)),
    ]


def coupling(record: AblationRecord, headline: Headline) -> Rows:
    """Within-group correlations of the outcome with seeing and thinking, by third of training."""
    by = {
        (v.arm, v.of, v.phase): v.correlation
        for v in record.summary.couplings
        if v.difficulty == headline[0]
    }
    columns = [(of, phase) for of in COUPLINGS for phase in PHASES]
    head = ["arm", *(f"{of.replace('outcome_', '')}, {phase}" for of, phase in columns)]
    return [head, *([arm, *(short(by.get((arm, *at))) for at in columns)] for arm in arms(record))]


def shares(record: AblationRecord, headline: Headline) -> Rows:
    """What SFT's updates were made of, and by seed what a token cost at their end."""
    results, (difficulty, _) = Results(record.table), headline
    parts = ("perception", "reasoning")
    tail = [f"loss a {part} token, last {LAST_UPDATES} updates" for part in parts]
    rows: Rows = [["arm", *(f"perception's {of}" if of != "λ" else of for of in SHARES), *tail]]
    for arm in arms(record):
        of = {v.of: v.share for v in record.summary.shares if v.arm == arm}
        cells = [short(of.get(name)) for name in SHARES]
        for part in parts:
            runs = results.numbers(difficulty, arm, "", f"sft/nll/{part}").values()
            last = [[run[step] for step in sorted(run)[-LAST_UPDATES:]] for run in runs]
            cells.append(", ".join(number(sum(values) / len(values)) for values in last))
        rows.append([arm, *cells])
    return rows


TABLES: dict[str, Callable[[AblationRecord, Headline], Rows]] = {
    "levels": levels, "seeds": seeds, "asymmetry": asymmetry, "coupling": coupling,
    "shares": shares,
}  # fmt: skip


def arms(record: AblationRecord) -> list[str]:
    """In the order of the recipe."""
    return [arm.name for arm in record.config.arms]


def markdown(rows: Rows) -> str:
    """A table, its first row the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def short(estimate: Estimate | None, sign: str = "") -> str:
    """Such as `.659 [.595, .718]`."""
    if estimate is None:
        return "–"
    value = number(estimate.value, f"{sign}.3f")
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{number(estimate.low)}, {number(estimate.high)}]"


def number(value: float, form: str = ".3f") -> str:
    """Without the 0 before the point."""
    return re.sub(r"^([+−]?)0\.", r"\1.", f"{value:{form}}".replace("-", "−"))


if __name__ == "__main__":
    main()
