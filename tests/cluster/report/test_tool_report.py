"""`equipoise diagnose --tool`: what is printed and drawn are the numbers of the evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.record.evaluation import EvalTable
from cluster.record.folder import TOOL_FILE
from cluster.record.tracker import Tracker
from cluster.report.run_report import run_report
from cluster.report.tool_use import print_tool, read_tables, tool_reports
from cluster.run.tool_use import recipe_with_tool
from rewards.tool_use import four, tool_use
from tests.support.recipes import TINY_POLICY, recipe_text
from tests.support.report_pages import log_steps
from tests.support.terminal import Equipoise

SEEN = "graph [red]<script>"
ZOOM = '[environment]\nname = "zoom"\n'


def table_of(seed: int, n: int = 60) -> EvalTable:
    """An evaluation with every pass of a tool, two problems a puzzle; every third has no label."""
    rng = np.random.default_rng(seed)
    names = [f"p{i}" for i in range(n)]
    metrics = ("a", "a_alone", "called", "looked", "a_p", "a_p_alone", "a_r", "a_r_tool")
    metrics += ("a_r_called", "a_returns_blank", "a_p_returns_blank", "a_returns_elsewhere")
    values = {
        metric: {
            name: float(rng.random() < 0.5)
            for i, name in enumerate(names)
            if i % 3 or not metric.startswith(("a_p", "a_r"))
        }
        for metric in metrics
    }
    values["a_returns_blank"] = {
        name: float(rng.random() < 0.5) for name in names
    }  # of all, though its name begins as a_r does
    values["a_returns_elsewhere"] = {name: 1.0 for name in names}
    return EvalTable(values, {name: f"puzzle {i // 2}" for i, name in enumerate(names)})


def test_a_report_is_of_the_problems_that_have_both_and_of_their_puzzles() -> None:
    table = table_of(0)
    whole, one, _ = tool_reports({SEEN: table, "sudoku": table_of(1)})
    assert (whole.task, one.task) == ("all tasks", SEEN)
    assert {skill: found.n for skill, found in one.skills.items()} == {
        "a": 60,
        "a_p": 40,
        "a_r": 40,
    }
    assert whole.skills["a_p"].n == 80
    names = [f"p{i}" for i in range(60)]
    columns = [
        np.array([table.per_problem[m][name] > 0 for name in names])
        for m in ("a_alone", "a", "called")
    ]
    alone, tool, called = columns
    puzzles = [f"puzzle {i // 2}" for i in range(60)]
    assert one.skills["a"] == tool_use(alone, tool, called, puzzles)
    counts = [term.count for term in one.skills["a"].terms]
    assert counts == [int(of.sum()) for of in four(alone, tool, called).values()]
    # What was not asked is not there: no pass with another problem's picture.
    assert {name: set(of) for name, of in one.returns.items()} == {
        "returns_blank": {"a", "a_p"},
        "returns_elsewhere": {"a"},
    }
    worth = one.returns["returns_elsewhere"]["a"]
    assert worth.value.value == 1.0 and worth.lost.value == pytest.approx(tool.mean() - 1)


def test_it_is_told_as_data_as_markdown_and_in_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tables = {SEEN: table_of(0)}
    print_tool("run", tables, as_json=True)
    (told,) = json.loads(capsys.readouterr().out)["tasks"]
    (report,) = tool_reports(tables)
    assert told["skills"]["a"]["difference"]["value"] == report.skills["a"].difference.value
    assert [term["count"] for term in told["skills"]["a_r"]["terms"]] == [
        term.count for term in report.skills["a_r"].terms
    ]
    print_tool("run", tables, as_markdown=True)
    written = capsys.readouterr().out
    assert "<script>" not in written and "| call harm |" in written
    print_tool("run", tables)
    assert "a wrong place of it" in capsys.readouterr().out


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with Tracker(tmp_path / "run", recipe_text(ZOOM)) as tracker:
        log_steps(tracker, 2)
        for step, gain in ((0, 0.1), (2, 0.3)):
            terms = ("call_gain", "prompt_gain", "call_harm", "prompt_harm")
            tracker.log(step, {f"eval/sudoku/a_p_{term}": gain for term in terms})
    return tmp_path / "run"


def test_the_page_has_the_curves_and_the_tables(run: Path) -> None:
    page = run_report(run, "json", run / "one.json")
    named: dict[str, Any] = {p["name"]: p for p in json.loads(page.read_text("utf-8"))["parts"]}
    (chart,) = named["tool"]["charts"]
    assert [line["label"] for line in chart["lines"]] == [
        *("call gain", "prompt gain", "call harm", "prompt harm")
    ]
    assert chart["lines"][0]["y"] == [0.1, 0.3] and not named["tool"]["tables"]
    kept = {SEEN: table_of(0).to_dict()}
    (run / TOOL_FILE).write_text(json.dumps(kept), "utf-8")
    assert read_tables(run / TOOL_FILE) == {SEEN: table_of(0)}
    html = run_report(run, "html", run / "one.html").read_text("utf-8")
    assert "what the tool gives and takes" in html and SEEN not in html
    (run / TOOL_FILE).write_text("[1, 2]", "utf-8")
    broken = run_report(run, "json", run / "two.json").read_text("utf-8")
    assert f"{TOOL_FILE} cannot be read" in broken


def test_a_run_is_measured_by_its_last_policy_and_what_concerns_the_tool(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_text(f"{ZOOM}[eval]\nreader = 'r'\n"), "utf-8")
    (tmp_path / "checkpoint").symlink_to(TINY_POLICY)
    wanted = recipe_with_tool(tmp_path, 7)
    assert (wanted.model.path, wanted.eval.problems) == (str(tmp_path / "checkpoint"), 7)
    assert wanted.eval.passes == (
        *("greedy", "oracle", "greedy_alone", "oracle_tool"),
        *("returns_blank", "returns_other", "returns_elsewhere"),
    )
    assert not wanted.eval.reader and recipe_with_tool(tmp_path).eval.problems == 512


@pytest.mark.parametrize(
    ("more", "words", "said"),
    [
        ("", [], "--tool compares with [environment], and its recipe has none; give "),
        (ZOOM, [], "--tool: "),
        (ZOOM, ["--reader", "r"], "--tool: goes with neither --reader nor --rescore"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_line(
    more: str, words: list[str], said: str, tmp_path: Path, equipoise: Equipoise
) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_text(more), "utf-8")
    told = equipoise("diagnose", tmp_path, "--tool", *words)
    assert told.code == 2 and said in told.err and told.err.count("\n") == 1
