"""An ablation's report: the summary's numbers in words, tables and charts, inert and whole."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cluster.ablation.cells import CELL_SCHEMA
from cluster.ablation.grid import Ablation, Cell, stored_ablation
from cluster.ablation.settings import alpha_of
from cluster.cli import app
from cluster.recipe.recipe import UserError
from cluster.record.tracker import Tracker
from cluster.report.ablation_report import (
    build_ablation,
    is_ablation,
    read_ablation,
    write_results,
)
from cluster.report.ablation_words import learnt_words
from cluster.report.charts import CELLS
from cluster.report.rollouts import MOST_OF_AN_ARM
from cluster.report.run_report import run_report
from cluster.report.words import show
from tasks.graph_coloring import GraphColoring
from tasks.sudoku import Sudoku
from tests.support.recipes import GRAPH, SUDOKU, recipe_text
from tests.support.report_pages import (
    HOSTILE,
    Page,
    assert_described,
    assert_inert,
    data,
    four_cells,
    graph_problem,
    grid_problem,
    rollouts,
)
from tests.support.toy_runs import finish as finish_plain
from tests.support.toy_runs import metric_table, started

STEPS = 30
GAIN = {"outcome": 0.1, "quarter": 0.6, "half": 0.3, "same": 0.1, "agree": 0.2}
FILE = """
question = "Does seeing pay? <b>&amp;</b>"
base = "base.toml"
seeds = [1, 2, 3]
[budget]
kind = "updates"
amount = 30
[[arms]]
name = "outcome"
[[arms]]
name = "quarter"
reward = { alpha = 0.25 }
[[arms]]
name = "half"
set = { "reward.alpha" = 0.5 }
[[arms]]
name = "same"
set = { "learner.learning_rate" = 1e-5 }
note = "<script>alert(1)</script>\\u202e$x"
[[arms]]
name = "agree"
reward = { terms = [{ name = "outcome" }, { name = "group_agreement", weight = 0.5 }] }
"""
BASE = recipe_text(model="/somewhere/secret/tiny", tasks=f"{SUDOKU}, {GRAPH}")


def made(folder: Path, text: str = FILE) -> tuple[Ablation, Path]:
    return started(folder, text, BASE)


def finish(out: Path, cell: Cell, last_step: Path) -> None:
    """Leave what a cell leaves, with rollouts of every kind in its last step."""
    run = finish_plain(out, cell, GAIN[cell.arm]) / "run"
    each = {
        "reliability/outcome/within": 0.3 + 0.01 * cell.seed,
        "reliability/outcome/auc": 0.7,
        "throughput/sampler_tokens_per_second": 1000.0 * cell.seed,
    }
    rows = [(step, n, v, 0.0) for step in range(1, STEPS + 1) for n, v in each.items()]
    rows += [
        (step, f"eval/sudoku/{m}", level + GAIN[cell.arm] * step / STEPS, 0.0)
        for step in (0, 15, 30)
        for m, level in (("a", 0.3), ("a_p", 0.4), ("a_r", 0.5))
    ]
    file = run / "metrics.parquet"
    pq.write_table(pa.concat_tables([pq.read_table(file), metric_table(rows)]), file)
    for name in ("rollouts", "images"):
        shutil.copytree(last_step / name, run / name, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def last_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rollouts and images of a run's last step, for every cell to copy."""
    folder = tmp_path_factory.mktemp("last")
    with Tracker(folder, "") as tracker:
        grid, graph = grid_problem(0), graph_problem(0)
        texts = [GraphColoring().demonstrate(graph, "terse"), "nothing", *HOSTILE[:-1]]
        groups = [
            rollouts(Sudoku(), grid, [t for t in four_cells(grid) for _ in range(6)], STEPS),
            rollouts(GraphColoring(), graph, texts, STEPS),
        ]
        tracker.log_rollouts(STEPS, groups)
    return folder


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory, last_step: Path) -> Path:
    """A finished ablation of five arms and three seeds, its results written."""
    ablation, out = made(tmp_path_factory.mktemp("grid"))
    for cell in ablation.cells:
        finish(out, cell, last_step)
    write_results(out)
    return out


@pytest.fixture(scope="module")
def html(grid: Path) -> str:
    return (grid / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def summary(grid: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((grid / "summary.json").read_text())
    return found


def of(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one row with these values."""
    (row,) = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
    return row


def shown(estimate: dict[str, Any], sign: str = "") -> str:
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]".replace("-", "−")


def test_the_page_is_inert_small_and_whole(html: str) -> None:
    found = Page(html)
    assert_inert(found, html)
    assert len(html) < 10_000_000
    assert "<script>alert(1)</script>\\u202e$x" in found.text
    assert "secret" not in found.text
    texts = {"".join(text for _, text in r["pieces"]) for r in data(found)["rollouts"]}
    assert set(HOSTILE[:-1]) <= texts
    assert_described(found, more_than=10)


def test_the_summary_says_who_won_and_how_sure_in_the_summarys_numbers(
    html: str, summary: dict[str, Any]
) -> None:
    text = Page(html).text
    best = of(summary["levels"], task="sudoku", arm="quarter", metric="a")
    against = of(summary["comparisons"], task="sudoku", arm="quarter", metric="a")
    assert f"quarter ended best on a: {shown(best['after'])}" in text
    assert (
        f"{shown(against['difference'], '+')} against outcome (Holm-adjusted p "
        f"{against['p_holm']:.2g}, 3 seeds): more than other seeds and problems explain" in text
    )
    same = of(summary["comparisons"], task="sudoku", arm="same", metric="a")
    assert same["p_holm"] > 0.05
    assert f"same against outcome: {shown(same['difference'], '+')}" in text
    assert "no difference shown" in text
    index = of(summary["asymmetries"], task="sudoku", arm="quarter", step=STEPS)
    seeing = of(summary["levels"], task="sudoku", arm="quarter", metric="a_p")
    assert f"Δa_p {shown(seeing['change'], '+')}" in text
    assert f"Δa_r − Δa_p = {shown(index['index'], '+')}" in text
    assert "quarter learnt to see" in text
    for row in (*summary["levels"], *summary["comparisons"]):
        estimate = row["difference"] if "difference" in row else row["after"]
        assert shown(estimate, "+" if "difference" in row else "") in text


def test_overlap_of_intervals_is_said_as_the_numbers_have_it(
    html: str, summary: dict[str, Any]
) -> None:
    after = {r["arm"]: r["after"] for r in summary["levels"] if r["metric"] == "a"}
    best = after.pop("quarter")
    ranked = sorted(after, key=lambda a: -after[a]["value"])
    over = [a for a in ranked if after[a]["high"] >= best["low"]]
    apart = [a for a in ranked if a not in over]
    assert over and apart, "the made-up arms should show both"
    text = Page(html).text
    assert f"quarter's a overlaps that of {', '.join(over)}; it is apart from" in text
    assert f"apart from that of {', '.join(apart)}." in text


def test_charts_hold_the_summarys_numbers(grid: Path, summary: dict[str, Any]) -> None:
    report = build_ablation(read_ablation(grid))
    charts = {c.name: c for s in report.parts for c in s.charts}
    forest = {line.label: line for line in charts["difference-0-a"].lines}
    for arm, line in forest.items():
        row = of(summary["comparisons"], arm=arm, metric="a")["difference"]
        assert (line.x, line.x_range) == ((row["value"],), ((row["low"], row["high"]),))
    assert set(forest) == set(GAIN) - {"outcome"}
    path = {line.label: line for line in charts["plane-0"].lines}
    for arm, line in path.items():
        see, think = (of(summary["levels"], arm=arm, metric=m) for m in ("a_p", "a_r"))
        assert (line.x[0], line.x[-1]) == (see["before"]["value"], see["after"]["value"])
        assert (line.y[0], line.y[-1]) == (think["before"]["value"], think["after"]["value"])
        assert len(line.x) == 3  # the evaluation on the way lies between
    # `same` has the outcome alone too, but another learning rate, so it is not on the frontier.
    frontier = charts["frontier-0"].lines
    assert [line.label for line in frontier] == ["α 0", "α 0.25", "α 0.5"]
    alphas = charts["alpha-0"].lines[0]
    assert alphas.x == (0, 0.25, 0.5)
    assert alphas.y[1] == of(summary["levels"], arm="quarter", metric="a")["after"]["value"]
    curve = next(c for c in charts.values() if c.title == "a in training")
    (points,) = [
        c["points"] for c in summary["curves"] if (c["arm"], c["metric"]) == ("half", "acc/a")
    ]
    line = next(line for line in curve.lines if line.label == "half")
    assert len(line.y) == len(line.y_range) == STEPS
    assert sum(line.y) == pytest.approx(sum(p["value"] for p in points), rel=1e-2)
    assert all(low < y < high for y, (low, high) in zip(line.y, line.y_range, strict=True))


def test_tables_of_reliability_cost_and_pairing(html: str, grid: Path) -> None:
    report = build_ablation(read_ablation(grid))
    tables = {t.title: t for s in report.parts for t in s.tables}
    rows = tables["Reliability of reward terms"].rows
    assert len(rows) == 5 and rows[0][1] == "outcome" and rows[0][3].startswith("0.320 [")
    assert tables["Throughput and wall time"].rows[0][1].startswith("2,000 [")
    assert tables["Throughput and wall time"].rows[0][-1] == "1 min 30 s"
    pairs = tables["Are the arms paired?"].rows
    assert len(pairs) == 15
    assert [row[4] for row in pairs[:5]] == ["the first of its pairs"] + ["equal"] * 4
    assert {row[4] for row in tables["Cost of an accuracy"].rows if row[0] == "outcome"}
    assert "Coupling by phase" in tables
    assert "sampled tokens/s" in Page(html).text


def test_every_arm_shows_every_cell_and_the_same_problems(html: str) -> None:
    found = data(Page(html))
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for r in found["rollouts"]:
        by_arm.setdefault(r["arm"], []).append(r)
    assert set(by_arm) == set(GAIN)
    for rows in by_arm.values():
        assert {r["cell"] for r in rows} >= {0, 1, 2, 3}
        assert {r["problem"] for r in rows} == {r["problem"] for r in by_arm["outcome"]}
        assert len(rows) <= 2 * MOST_OF_AN_ARM
    assert {sha for r in found["rollouts"] for sha in r["images"]} == set(found["images"])
    assert len(found["images"]) == 2  # each once, however many arms saw it
    assert found["cells"] == list(CELLS)


@pytest.mark.usefixtures("undrawn")
def test_one_seed_failed_cells_and_broken_pairs_are_said(tmp_path: Path, last_step: Path) -> None:
    ablation, out = made(tmp_path)
    first, second, third, fourth, fifth = ablation.cells[:5]
    for cell in (first, second, fourth, fifth):
        finish(out, cell, last_step)
    failed = out / "cells" / third.id
    failed.mkdir()
    (failed / "failure.json").write_text(json.dumps({"error": "boom </script><b>\u202e\nmore"}))
    result = out / "cells" / second.id / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"first_batch": "another"}))
    (out / "cells" / fourth.id / "run" / "evaluation.json").write_text("{half")
    (out / "cells" / fifth.id / "run" / "rollouts" / f"step-{STEPS:06d}.parquet").write_bytes(b"P")
    write_results(out)
    html = (out / "report.html").read_text("utf-8")
    found = Page(html)
    assert_inert(found, html)
    for words in (
        f"{third.id} failed: boom </script><b>\\u202e more",
        f"Not paired: {second.id} and {first.id}: first batch differ",
        "NOT equal",
        f"{fourth.id} cannot be read",
        "agree: rollouts/step-000030.parquet cannot be read",
        "one seed only, so this says nothing about other seeds",
        "Few seeds (finished: outcome 1, quarter 1, half 0, same 0, agree 1)",
        "3 of 15 cells finished",
        "11 of 15 cells have neither ended nor failed",
    ):
        assert words in found.text, words
    assert {r["arm"] for r in data(found)["rollouts"]} == {"outcome", "quarter"}


@pytest.mark.usefixtures("undrawn")
def test_nothing_finished_is_no_error(tmp_path: Path) -> None:
    _, out = made(tmp_path)
    write_results(out)
    text = Page((out / "report.html").read_text("utf-8")).text
    for words in (
        "0 of 15 cells finished",
        "No cell has finished, so nothing is compared.",
        "No arm left rollouts that could be read.",
        "15 of 15 cells have neither ended nor failed",
    ):
        assert words in text


@pytest.mark.usefixtures("undrawn")
def test_a_published_table_without_its_cells_gives_the_same_numbers(
    grid: Path, tmp_path: Path, summary: dict[str, Any]
) -> None:
    for name in ("ablation.json", "results.parquet"):
        shutil.copy(grid / name, tmp_path)
    found = read_ablation(tmp_path)
    assert found.summary.to_dict() == {k: v for k, v in summary.items() if k != "pairing_faults"}
    text = Page(build_ablation(found).to_html()).text
    assert "15 of 15 cells finished" in text
    assert "no hashes to show that arms were paired" in text
    shutil.copy(grid / "cells.parquet", tmp_path)
    whole, alone = read_ablation(grid), read_ablation(tmp_path)
    assert alone.finished == whole.finished and len(alone.finished) == 15
    text = Page(build_ablation(alone).to_html()).text
    assert "no hashes" not in text and "An EPYC, 2 cores" in text
    facts = pq.read_table(tmp_path / "cells.parquet").to_pylist()
    facts[1]["first_batch"] = "another"
    pq.write_table(pa.Table.from_pylist(facts, schema=CELL_SCHEMA), tmp_path / "cells.parquet")
    (fault,) = read_ablation(tmp_path).faults
    assert "first batch differ, so they are not paired" in fault
    for name in ("results.parquet", "cells.parquet"):
        (tmp_path / name).write_bytes(b"PAR1")
        assert f"{name} cannot be read" in " ".join(read_ablation(tmp_path).problems)


def test_the_same_command_writes_every_format(
    grid: Path, tmp_path: Path, summary: dict[str, Any]
) -> None:
    assert is_ablation(grid)
    result = CliRunner().invoke(app, ["report", str(grid), "--output", str(tmp_path / "r.html")])
    assert result.exit_code == 0 and f"report: {tmp_path / 'r.html'}" in result.output
    assert (tmp_path / "r.html").read_text() == (grid / "report.html").read_text()
    markdown = run_report(grid, "md").read_text("utf-8")
    assert "quarter ended best on a" in markdown and "<script>" not in markdown
    found = json.loads(run_report(grid, "json").read_text("utf-8"))
    assert found["summary"] | {"pairing_faults": []} == summary
    table = pq.read_table(run_report(grid, "parquet")).to_pylist()
    row = of(table, kind="difference", arm="half", metric="a_r")
    expected = of(summary["comparisons"], arm="half", metric="a_r")
    assert (row["value"], row["p_holm"]) == (expected["difference"]["value"], expected["p_holm"])
    assert sum(r["kind"] == "level" for r in table) == 3 * len(summary["levels"])


def test_a_file_that_is_no_ablation_is_named(tmp_path: Path) -> None:
    for text in ("{", "[]", "{}", json.dumps({"question": 1})):
        (tmp_path / "ablation.json").write_text(text)
        with pytest.raises(UserError, match=re.escape(str(tmp_path / "ablation.json"))):
            run_report(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["ablation.json"]


def test_cells_are_those_that_the_launcher_ran(tmp_path: Path) -> None:
    harder = '[[difficulties]]\nname = "d1"\n[[difficulties]]\nname = "d2"\n'
    ablation, out = made(tmp_path, FILE + harder)
    _, cells = stored_ablation(json.loads((out / "ablation.json").read_text()))
    assert [vars(c) for c in cells] == [
        {k: v for k, v in vars(c).items() if k in vars(cells[0])} for c in ablation.cells
    ]


def test_alpha_is_known_only_where_the_reward_is_of_that_form() -> None:
    assert alpha_of({"alpha": 0.3}) == 0.3
    assert alpha_of({"alpha": None, "terms": []}) == alpha_of({"terms": [{"name": "outcome"}]}) == 0
    assert alpha_of({"terms": [{"name": "outcome"}, {"name": "judge"}]}) is None
    assert alpha_of({"terms": [{"name": "outcome", "segments": ["answer"]}]}) is None


def test_words_follow_the_intervals(grid: Path) -> None:
    found = read_ablation(grid).summary
    same = {v.metric: v for v in found.levels if v.arm == "same"}
    change = same["a_r"].change
    assert change.low is not None and change.high is not None and change.low < 0 < change.high
    said = learnt_words("same", {"a_r": same["a_r"]}, None)
    assert said == f"same learnt nothing that is beyond chance (Δa_r {show(change, '+')})."
    assert learnt_words("same", {}, None) == ""
