"""docs/results/: its pages and reports say what the raw tables beside them say."""

from __future__ import annotations

from dataclasses import replace

import pyarrow.compute as pc
import pytest

from benchmarks.results import FOLDER, number, with_looks, with_tables
from cluster.report.ablation_report import AblationRecord, build_ablation, read_ablation

NAME = "sft_balance"


@pytest.fixture(scope="module")
def record() -> AblationRecord:
    return read_ablation(FOLDER / NAME)


@pytest.mark.parametrize("name", [NAME, "frontier"])
def test_a_page_and_its_report_are_what_the_raw_table_gives(name: str) -> None:
    record = read_ablation(FOLDER / name)
    page = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert with_tables(page, record) == page
    report = (FOLDER / name / "report.md").read_text(encoding="utf-8")
    assert build_ablation(record).to_markdown("report-figures") == report


def test_another_raw_table_gives_another_page(record: AblationRecord) -> None:
    page = (FOLDER / f"{NAME}.md").read_text(encoding="utf-8")
    two = record.table.filter(pc.not_equal(record.table.column("seed"), 3))
    assert "| ngdiff | .062, .062 |" in with_tables(page, replace(record, table=two))


@pytest.mark.parametrize(
    ("value", "form", "said"),
    [(0.6594, ".3f", ".659"), (-0.0041, "+.3f", "−.004"), (1.0, ".3f", "1.000"),
     (10.05, ".2f", "10.05"), (0.16, ".2g", ".16"), (1.0, ".2g", "1")],
)  # fmt: skip
def test_a_number_has_no_zero_before_its_point(value: float, form: str, said: str) -> None:
    assert number(value, form) == said


def test_the_page_on_looking_is_what_its_raw_table_gives() -> None:
    page = (FOLDER / "looking.md").read_text(encoding="utf-8")
    assert with_looks(page, FOLDER / "looking") == page
    rows = [line.split(" | ") for line in page.splitlines() if line[:3] in ("| 0", "| 1", "| 4")]
    assert len(rows) == 3
    for row in rows:  # what the tool gives and takes is the difference that it makes
        a, alone, *terms = (float(cell) for cell in row[2:8])
        assert a - alone == pytest.approx(terms[0] + terms[1] - terms[2] - terms[3], abs=2e-3)
