"""A run's report: whole, self-contained, small, and inert whatever a model wrote."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from cluster.cli import app
from cluster.record.tracker import Tracker
from cluster.report.rollouts import embedded, read_shown
from cluster.report.run_report import NoRun, build, draw_report, read_run, run_report, write_report
from rewards.advantages import NO_CALL_COLUMNS
from tasks.core import Problem
from tasks.sudoku import Sudoku
from tests.support.report_pages import (
    HOSTILE,
    RUN_RECIPE,
    SEEING,
    Page,
    assert_described,
    assert_inert,
    coins,
    data,
    grid_problem,
    log_steps,
    rollouts,
    table_of,
)

LIMIT = 10_000_000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with Tracker(folder, RUN_RECIPE) as tracker:
        log_steps(tracker)
    (folder / "evaluation.json").write_text(json.dumps({"sudoku": SEEING}))
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return write_report(run).read_text("utf-8")


def test_what_a_model_wrote_is_inert_and_whole(html: str) -> None:
    found = Page(html)
    assert_inert(found, html)
    shown = data(found)["rollouts"]
    texts = {"".join(text for _, text in r["pieces"]) for r in shown}
    for hostile in HOSTILE[:-1]:
        assert hostile in texts
    assert any(t.startswith("line line") and t.endswith("characters cut]") for t in texts)
    assert json.loads(embedded(list(HOSTILE))) == list(HOSTILE)
    assert_described(found, more_than=8)


def test_hostile_names_and_errors_are_inert(tmp_path: Path) -> None:
    bad = '"><script>alert(1)</script>\u202e$\\frac{'
    recipe = RUN_RECIPE.replace('"trial"', json.dumps(bad)).replace(
        "Is it seeing?", "<b>&amp;\\u202e"
    )
    with Tracker(tmp_path, recipe) as tracker:
        tracker.log(1, {f"reward/{bad}/mean": 1.0, f"defects/{bad}": 2.0, f"reward/{bad}/std": 1.0})
        tracker.log(2, {f"reward/{bad}/failures": 1.0, f"defects/{bad}": float("nan")})
    (tmp_path / "error.txt").write_text(f"Boom {bad}\nmore")
    (tmp_path / "evaluation.json").write_text(json.dumps({bad: SEEING, f"{bad}2": SEEING}))
    html = write_report(tmp_path).read_text("utf-8")
    assert_inert(Page(html), html)
    assert '"><script>alert(1)</script>\\u202e' in Page(html).text
    markdown = run_report(tmp_path, "md").read_text("utf-8")
    assert "<script>" not in markdown
    assert "\u202e" not in markdown


def test_the_summary_says_what_was_learnt_and_how_sure(html: str) -> None:
    text = Page(html).text
    assert "tiny-vlm was trained by RL on sudoku: 3 steps of 2 problems × 4 rollouts" in text
    assert "0.25 · perception (a_p) + 0.75 · outcome (a)" in text
    assert "It learnt to see; seeing gained more (Δa_r − Δa_p = −0.500" in text
    assert "intervals apart" in text
    assert "intervals overlap" in text
    assert "Reward term outcome failed on 1 groups." in text
    assert "secret" not in text
    for words in ("Reliability of reward terms", "Accuracy in training", "Where the time went"):
        assert words in text


def test_the_browser_has_all_four_cells_and_their_figures(html: str) -> None:
    found = data(Page(html))
    sudoku = [r for r in found["rollouts"] if r["task"] == "sudoku" and r["step"] == 1]
    assert [r["cell"] for r in sudoku] == [0, 1, 2, 3]
    assert [r["a"] for r in sudoku] == [True, False, True, False]
    assert sudoku[2]["leak"] is True
    assert [p[0] for p in sudoku[0]["pieces"]] == ["perception", "reasoning", "answer"]
    assert sudoku[0]["terms"] == [["outcome", 1.0], ["perception", 1.0]]
    assert sudoku[3]["version"] == "0"
    assert sum("bad" in cell for row in sudoku[2]["figure"]["cells"] for cell in row) == 1
    assert {sha for r in found["rollouts"] for sha in r["images"]} == set(found["images"])
    steps = {r["step"] for r in found["rollouts"] if r["problem"] == sudoku[0]["problem"]}
    assert steps == {1, 3}


@pytest.mark.usefixtures("undrawn")
def test_five_hundred_rollouts_with_large_noisy_images_fit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    text = "\u202e<\x00" * 4000  # six characters each as JSON
    with Tracker(tmp_path, RUN_RECIPE) as tracker:
        for step in range(1, 6):
            groups = []
            for i in range(20):
                out = io.BytesIO()
                pixels = rng.integers(0, 256, (369, 369, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(out, "PNG", compress_level=0)
                one = grid_problem(0)
                problem = Problem(
                    **(vars(one) | {"id": f"s{step}-{i}", "images": (out.getvalue(),)})
                )
                groups.append(rollouts(Sudoku(), problem, [text] * 5, step))
            tracker.log_rollouts(step, groups)
    path = write_report(tmp_path)
    assert path.stat().st_size < LIMIT
    found = Page(path.read_text("utf-8"))
    assert len(data(found)["rollouts"]) == 500
    assert len(data(found)["images"]) == 100
    assert "to keep this file small" in found.text


def test_the_same_run_gives_the_same_page_and_building_reads_only_the_record(
    run: Path, html: str, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "copy")
    record = read_run(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy")
    assert build(record).to_html() == html


def missing(folder: Path, what: str) -> Iterator[str]:
    """Make a run that lacks something; the words its report must say."""
    if what == "evaluation":
        with Tracker(folder, RUN_RECIPE) as tracker:
            log_steps(tracker)
        yield "There is no evaluation.json"
        yield "only training's own rollouts can tell"
        yield "a_r was not measured"
    elif what == "after":
        with Tracker(folder, RUN_RECIPE) as tracker:
            tracker.log_evaluation(0, {"sudoku": table_of(a=coins(0.3), a_p=coins(0.5))})
            log_steps(tracker)
        yield "There is no evaluation.json: what is shown is evaluations/step-000000.json"
        yield "sudoku, held-out problems"
        yield "0.300"
    elif what == "end":
        log_steps(Tracker(folder, RUN_RECIPE), 2)
        (folder / "error.txt").write_text("RuntimeError: out of cores\ntrace")
        yield "The run failed: RuntimeError: out of cores"
        yield "2 of 3 steps"
    elif what == "close":
        log_steps(Tracker(folder, RUN_RECIPE), 1)
        yield "The run is still going, or it was killed"
    elif what == "rollouts":
        with Tracker(folder, RUN_RECIPE) as tracker:
            tracker.log(1, {"acc/a": 0.5, "time/step": 1.0})
        yield "This run holds no rollouts."
        yield "1 steps made no update"
    elif what == "everything":
        (folder / "recipe.toml").write_text(RUN_RECIPE)
        yield "No metrics were logged"
        yield "The run ended before its first step."
    elif what == "sense":
        with Tracker(folder, RUN_RECIPE) as tracker:
            log_steps(tracker)
        (folder / "evaluation.json").write_text("{half")
        (folder / "recipe.toml").write_text("= =")
        (folder / "rollouts" / "step-000002.parquet").write_bytes(b"PAR1 half")
        for image in (folder / "images").iterdir():
            image.unlink()
        yield "evaluation.json cannot be read"
        yield "recipe.toml cannot be read"
        yield "rollouts/step-000002.parquet cannot be read"
        yield "no readable recipe"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "what", ["evaluation", "after", "end", "close", "rollouts", "everything", "sense"]
)
def test_a_report_says_what_is_missing(what: str, tmp_path: Path) -> None:
    expected = list(missing(tmp_path, what))
    html = write_report(tmp_path).read_text("utf-8")
    found = Page(html)
    assert_inert(found, html)
    for words in expected:
        assert words in found.text


@pytest.mark.usefixtures("undrawn")
def test_a_cold_start_has_one_column_and_no_verdict(tmp_path: Path) -> None:
    with Tracker(tmp_path, RUN_RECIPE + "[sft]\nsteps = 2\n") as tracker:
        for step in (1, 2):
            tracker.log(step, {"sft/nll/perception": 0.5, "sft/entropy/perception": 0.5})
    tables = {"sudoku": table_of(a=coins(0.5), a_p=coins(0.25)).to_dict()}
    (tmp_path / "evaluation.json").write_text(json.dumps(tables))
    text = Page(write_report(tmp_path).read_text("utf-8")).text
    assert "Cold start of tiny-vlm on demonstrations of sudoku" in text
    assert "0.250 [0.195, 0.314]" in text
    assert "learnt" not in text.split("Learning curves")[0]
    assert "Before and after" not in text
    rows = pq.read_table(run_report(tmp_path, "parquet")).to_pylist()
    assert [r["value"] for r in rows if r["source"] == "evaluation"] == [0.5, 0.25]


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(NoRun, match=re.escape(str(tmp_path))):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert isinstance(result.exception, NoRun)


def test_advantages_are_shown_by_segment(run: Path) -> None:
    shown = read_shown(run).rollouts
    assert all([name for name, _ in one["advantages"]] == list(NO_CALL_COLUMNS) for one in shown)
    assert any(value for one in shown for _, value in one["advantages"])


def test_other_formats_hold_the_same_numbers(run: Path, tmp_path: Path) -> None:
    markdown = run_report(run, "md", tmp_path / "a" / "report.md").read_text("utf-8")
    assert "| a_p: seeing | 0.300 \\[" in markdown
    linked = re.findall(r"\]\(([\w-]+/[\w-]+\.svg)\)", markdown)
    folder = tmp_path / "a" / "report-figures"
    assert sorted(linked) == sorted(f"report-figures/{p.name}" for p in folder.iterdir())
    assert "report-figures/plane.svg" in linked
    assert "It learnt to see" in markdown
    found = json.loads(run_report(run, "json").read_text("utf-8"))
    assert found["warnings"]
    assert len(found["shown"]["rollouts"]) == 36
    assert "base64" not in json.dumps(found)
    table = pq.read_table(run_report(run, "parquet")).to_pylist()
    rows = {(r["when"], r["name"]): r for r in table if r["source"] == "evaluation"}
    assert rows["after", "a_p"]["value"] == pytest.approx(0.8)
    assert sum(r["name"] == "acc/a" for r in table) == 3
    result = CliRunner().invoke(app, ["report", str(run), "--output", str(tmp_path / "r.html")])
    assert (result.exit_code, (tmp_path / "r.html").is_file()) == (0, True)


def test_a_report_that_cannot_be_drawn_is_told_and_fails_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_report(tmp_path / "gone")
    shown = capsys.readouterr().out
    assert shown.startswith("report: not drawn (NoRun: ")
    assert f"equipoise report {tmp_path / 'gone'}" in shown
