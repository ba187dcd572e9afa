"""A run's report: whole, self-contained, small, and inert whatever a model wrote."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from cluster.cli import app
from cluster.record.evaluation import EvalTable, before_after
from cluster.record.tracker import Tracker
from cluster.report.charts import CELLS, Series, evaluation_curves, plane, smoothed
from cluster.report.choice import Entry, choose
from cluster.report.plots import MOST_POINTS, Chart, Line, thinned, to_svg, to_svg_file
from cluster.report.rollouts import _pieces, embedded, read_shown
from cluster.report.run_report import NoRun, build, draw_report, read_run, run_report, write_report
from cluster.report.run_words import asymmetry_of, events_table, verdict, warnings
from rewards.advantages import NO_CALL_COLUMNS
from rewards.compose import Composition, compose_groups
from rewards.terms import Outcome, score_group
from tasks.core import SEGMENTS, Parsed, Problem
from tasks.figures import Words
from tasks.graph_coloring import GraphColoring
from tasks.sudoku import Sudoku
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
from tests.support.toys import TASK, Doubling, group

LIMIT = 10_000_000
RECIPE = """
name = "trial"
question = "Is it seeing?"
seed = 3
[model]
path = "/somewhere/secret/tiny-vlm"
dtype = "float32"
[[tasks]]
name = "sudoku"
[reward]
alpha = 0.25
[algorithm]
steps = 3
problems_per_step = 2
group_size = 4
"""


def log_steps(tracker: Tracker, steps: int = 3) -> None:
    for step in range(1, steps + 1):
        tracker.log(
            step,
            {
                "acc/a": 0.1 * step,
                "acc/a_p": 0.2 * step,
                "acc/self_consistency": 0.5,
                "reward/outcome/mean": 0.1 * step,
                "reward/outcome/failures": float(step == 2),
                "reliability/outcome/within": 0.3,
                "reliability/outcome/auc": 0.6,
                "coupling/outcome_perception/within": 0.2,
                "learner/loss": 0.1,
                "learner/entropy/perception": 0.2,
                "learner/logprob_gap": 1e-5,
                "response/share/perception": 0.4,
                "response/share/reasoning": 0.6,
                "group/dropped": 0.0,
                "time/sample": 2.0,
                "time/learn": 1.0,
                "time/step": 3.0,
                "idle/learner": 0.6,
            },
        )
        problem = grid_problem(step % 2)  # that of step 1 comes again at step 3
        groups = [rollouts(Sudoku(), problem, four_cells(problem), step)]
        graph = graph_problem(step)
        texts = [GraphColoring().demonstrate(graph, "terse"), "nothing", *HOSTILE]
        groups.append(rollouts(GraphColoring(), graph, texts, step))
        tracker.log_rollouts(step, groups)


def table_of(**values: Sequence[float]) -> EvalTable:
    per = {m: {f"p{i}": float(v) for i, v in enumerate(vs)} for m, vs in values.items()}
    return EvalTable(per)


def evaluation(before: EvalTable, after: EvalTable) -> dict[str, Any]:
    change = before_after(before, after)
    return {
        "before": before.to_dict(),
        "after": after.to_dict(),
        "change": {"rows": [asdict(row) for row in change]},
    }


def coins(share: float, n: int = 200) -> list[float]:
    return [float(i < share * n) for i in range(n)]


SEEING = evaluation(
    table_of(a=coins(0.3), a_p=coins(0.3), a_r=coins(0.5)),
    table_of(a=coins(0.5), a_p=coins(0.8), a_r=coins(0.5)),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with Tracker(folder, RECIPE) as tracker:
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
    recipe = RECIPE.replace('"trial"', json.dumps(bad)).replace("Is it seeing?", "<b>&amp;\\u202e")
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
    with Tracker(tmp_path, RECIPE) as tracker:
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


def entry(step: int, cell: int, name: str, defects: tuple[str, ...] = ()) -> Entry:
    return Entry(Path("x"), 0, step, name, f"p{name}", "sudoku", f"i{name}", cell, defects)


@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), limit=st.integers(120, 200))
def test_the_choice_represents_every_kind_and_is_the_same_each_time(seed: int, limit: int) -> None:
    rng = np.random.default_rng(seed)
    entries = [
        entry(
            int(rng.integers(1, 40)),
            int(rng.choice(5, p=[0.9, 0.07, 0.02, 0.005, 0.005])),
            str(i),
            tuple(f"d{d}" for d in range(8) if rng.random() < 0.5**d / 8),
        )
        for i in range(600)
    ]
    again = Entry(**(vars(entries[0]) | {"rollout_id": "again", "step": entries[0].step + 50}))
    entries.append(again)
    chosen = choose(entries, limit)
    assert len(chosen) == len({e.rollout_id for e in chosen}) == limit
    for kind in ("step", "cell"):
        assert {getattr(e, kind) for e in chosen} == {getattr(e, kind) for e in entries}
    assert {d for e in chosen for d in e.defects} == {d for e in entries for d in e.defects}
    assert {"0", "again"} <= {e.rollout_id for e in chosen}
    shuffled = [entries[i] for i in rng.permutation(len(entries))]
    assert {e.rollout_id for e in choose(shuffled, limit)} == {e.rollout_id for e in chosen}
    assert choose(entries[:limit], limit) == entries[:limit]


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
        with Tracker(folder, RECIPE) as tracker:
            log_steps(tracker)
        yield "There is no evaluation.json"
        yield "only training's own rollouts can tell"
        yield "a_r was not measured"
    elif what == "after":
        with Tracker(folder, RECIPE) as tracker:
            tracker.log_evaluation(0, {"sudoku": table_of(a=coins(0.3), a_p=coins(0.5))})
            log_steps(tracker)
        yield "There is no evaluation.json: what is shown is evaluations/step-000000.json"
        yield "sudoku, held-out problems"
        yield "0.300"
    elif what == "end":
        log_steps(Tracker(folder, RECIPE), 2)
        (folder / "error.txt").write_text("RuntimeError: out of cores\ntrace")
        yield "The run failed: RuntimeError: out of cores"
        yield "2 of 3 steps"
    elif what == "close":
        log_steps(Tracker(folder, RECIPE), 1)
        yield "The run is still going, or it was killed"
    elif what == "rollouts":
        with Tracker(folder, RECIPE) as tracker:
            tracker.log(1, {"acc/a": 0.5, "time/step": 1.0})
        yield "This run holds no rollouts."
        yield "1 steps made no update"
    elif what == "everything":
        (folder / "recipe.toml").write_text(RECIPE)
        yield "No metrics were logged"
        yield "The run ended before its first step."
    elif what == "sense":
        with Tracker(folder, RECIPE) as tracker:
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


def test_evaluations_along_the_way_are_on_the_path(tmp_path: Path) -> None:
    metrics = {
        f"eval/sudoku/{m}": Series((0, 10, 20), (0.3, value, 0.5))
        for m, value in (("a", 0.4), ("a_p", 0.9), ("a_r", 0.7))
    }
    (curve,) = evaluation_curves(metrics)
    assert [line.y[1] for line in curve.lines] == [0.4, 0.9, 0.7]
    path = plane(metrics, {"sudoku": SEEING, "all tasks": SEEING})
    assert [(line.x, line.y) for line in path.lines] == [((0.3, 0.9, 0.8), (0.5, 0.7, 0.5))]


@pytest.mark.usefixtures("undrawn")
def test_a_cold_start_has_one_column_and_no_verdict(tmp_path: Path) -> None:
    with Tracker(tmp_path, RECIPE + "[sft]\nsteps = 2\n") as tracker:
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


def test_a_users_own_task_is_compared_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toys = [group(5, "5;10;", "4;8;made_up"), group(2, "2;666;")]
    terms = Composition({"outcome": 1.0}, on_failure={"outcome": "drop_group"})
    scored = compose_groups(
        toys, [score_group(TASK, g, {"outcome": Outcome()}) for g in toys], terms
    )
    with Tracker(tmp_path, RECIPE) as tracker:
        tracker.log_rollouts(1, scored)
    shown = read_shown(tmp_path).rollouts
    assert shown[1]["figure"]["rows"] == [["missing", "5"], ["extra", "4"]]
    assert shown[1]["defects"] == ["made_up"]
    assert shown[2]["cell"] == CELLS.index("not judged")
    assert (shown[2]["total"], shown[2]["note"]) == (None, "dropped")
    assert "the checker cannot take 666" in shown[2]["failures"][0]
    # One that draws is asked for it; where it fails at that, the texts are compared again.
    for name in ("draw_perception", "draw_answer"):
        monkeypatch.setattr(Doubling, name, lambda *_: Words(rows=(), text="drawn"), raising=False)
    drawn = {"kind": "words", "rows": [], "text": "drawn"}
    assert [r["figure"] for r in read_shown(tmp_path).rollouts] == [drawn] * 3
    monkeypatch.setattr(Doubling, "draw_answer", lambda *_: 1 / 0)
    assert read_shown(tmp_path).rollouts[1]["figure"] == shown[1]["figure"]
    # A parser that raises on what it reads, as no stored row of ours would make it.
    file = tmp_path / "rollouts" / "step-000001.parquet"
    table = pq.read_table(file)
    place = table.schema.get_field_index("text")
    pq.write_table(table.set_column(place, "text", pa.array(["<b>"] * 3)), file)
    assert read_shown(tmp_path).rollouts[0]["pieces"] == [["", "<b>"]]
    unknown = table.set_column(
        table.schema.get_field_index("task"), "task", pa.array(["no_such:Task"] * 3)
    )
    pq.write_table(unknown, file)
    found = read_shown(tmp_path)
    assert "no_such" in found.problems[0]
    assert found.rollouts[0]["pieces"] == [["", "5;10;"]]


def test_a_call_is_a_piece_of_its_own_wherever_it_stands() -> None:
    text = "I see. <look>1</look>so<look>2</look>4"
    spans = {"reasoning": (7, 37), "answer": (37, 38)}
    parsed = Parsed(None, "", None, spans, ())  # type: ignore[arg-type]
    assert _pieces(text, parsed, [(7, 21), (23, 37)]) == [
        ["", "I see. "], ["act", "<look>1</look>"], ["reasoning", "so"],
        ["act", "<look>2</look>"], ["answer", "4"],
    ]  # fmt: skip
    assert _pieces(text, None, []) == [["", text]]


def test_advantages_are_shown_by_segment(run: Path) -> None:
    shown = read_shown(run).rollouts
    assert all([name for name, _ in one["advantages"]] == list(NO_CALL_COLUMNS) for one in shown)
    assert any(value for one in shown for _, value in one["advantages"])


@pytest.mark.parametrize(
    ("see", "think", "words"),
    [
        ((0.3, 0.8), (0.5, 0.5), "It learnt to see; seeing gained more"),
        ((0.3, 0.3), (0.5, 0.8), "It learnt to think; thinking gained more"),
        ((0.3, 0.6), (0.3, 0.6), "It learnt to see and to think"),
        ((0.3, 0.31), (0.5, 0.51), "It learnt nothing that is beyond chance."),
        ((0.7, 0.3), (0.5, 0.5), "It got worse at seeing; thinking gained more"),
        ((0.3, 0.7), (0.9, 0.5), "It learnt to see, and got worse at thinking; seeing gained"),
    ],
)
def test_the_verdict(see: tuple[float, float], think: tuple[float, float], words: str) -> None:
    tables = evaluation(
        table_of(a_p=coins(see[0]), a_r=coins(think[0])),
        table_of(a_p=coins(see[1]), a_r=coins(think[1])),
    )
    assert verdict(tables).startswith(words)


def test_without_labels_the_verdict_is_a_readers() -> None:
    was = table_of(a=coins(0.3), sufficiency=coins(0.3), used=coins(0.5), reader_blind=coins(0.2))
    now = table_of(a=coins(0.3), sufficiency=coins(0.8), used=coins(0.5), reader_blind=coins(0.2))
    told = "It learnt to see, by what a text-only reader makes of its perceptions."
    assert verdict(evaluation(was, now)) == told
    # A label is worth more than a reader.
    labelled = [table_of(a_p=coins(0.3), sufficiency=coins(share)) for share in (0.3, 0.8)]
    assert verdict(evaluation(*labelled)).startswith("It learnt nothing")


def test_the_asymmetry_interval_is_the_paired_one_of_ablations() -> None:
    rng = np.random.default_rng(1)
    draws = {name: rng.integers(0, 2, 300).astype(float) for name in "abcd"}
    found = asymmetry_of(
        evaluation(
            table_of(a_p=draws["a"], a_r=draws["b"]), table_of(a_p=draws["c"], a_r=draws["d"])
        )
    )
    d = (draws["d"] - draws["b"]) - (draws["c"] - draws["a"])
    low, high = scipy.stats.ttest_1samp(d, 0).confidence_interval(0.95)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((d.mean(), low, high))


def test_warnings_name_a_mismatch_and_numbers_that_are_none() -> None:
    metrics: Mapping[str, Series] = {
        "learner/logprob_gap": Series((1, 2), (1e-5, 0.2)),
        "learner/loss": Series((1,), (0.1,), bad=(2,)),
        "group/dropped": Series((1, 2), (0.0, 3.0)),
    }
    text = " ".join(warnings({"model": {"dtype": "float32"}}, metrics))
    assert "beyond rounding in 1 of 2 steps (up to 0.2 nats)" in text
    assert "Not finite in some steps: learner/loss." in text
    assert "3 groups were dropped" in text
    assert "beyond rounding" not in " ".join(warnings({"model": {"dtype": "bfloat16"}}, metrics))
    assert ("group/dropped", "3", "1", "2") in events_table(metrics).rows


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


def test_curves_keep_their_mean_when_smoothed_or_thinned() -> None:
    values = np.random.default_rng(0).random(5000)
    x, y = thinned(tuple(range(5000)), tuple(values))
    assert len(x) == len(y) == MOST_POINTS
    assert np.mean(y) == pytest.approx(values.mean(), abs=1e-3)
    assert smoothed([0.5] * 100) == pytest.approx([0.5] * 100)
    assert smoothed(values[:10]) == tuple(values[:10])
    middle = smoothed(values[:160])[80]
    assert middle == pytest.approx(values[70:91].mean())


def test_a_drawing_of_its_own_has_all_its_colours_and_its_legend() -> None:
    evil = "a<script>&\u202e"
    lines = tuple(Line(name, (1.0, 2.0), (0.5, 0.25), "c1", "dashed") for name in ("b", evil))
    colours = {"light": "#111111", "dark": "#eeeeee"}
    roles = (*SEGMENTS, "ink", "muted", "c1", "c2", "c3", "c4", "grid")
    schemes = [dict.fromkeys((*roles, "paper"), value) for value in colours.values()]
    drawn = to_svg_file(Chart("c", "t", "", lines, alt=evil), *schemes)
    root = ElementTree.fromstring(drawn)
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg" and not root.findall(f".//{space}script")
    defined = set(re.findall(r"--([\w-]+):#", drawn))
    assert set(re.findall(r"var\(--([\w-]+)\)", drawn)) <= defined == {*roles, "paper"}
    written = [text.text for text in root.iter(f"{space}text")]
    assert "b" in written and any("<script>" in str(t) for t in written)
    assert "\u202e" not in drawn and "http" not in drawn.replace("http://www.w3.org/2000/svg", "")
    # In the page the legend is the page's own.
    assert ">b<" not in to_svg(Chart("c", "t", "", lines[:1]))


@pytest.mark.parametrize("kind", ["lines", "stack", "plane", "joined", "close", "rows", "change"])
def test_a_drawing_names_roles_and_no_colours(kind: str) -> None:
    x, y = (0.3,), (0.5,)
    if kind in ("lines", "stack", "plane", "close", "change"):
        x, y = (0.3, 0.6), (0.5, 0.25)  # type: ignore[assignment]
    ends = tuple((v - 0.1, v + 0.1) for v in x)
    line = Line("$x <b>", x, y, "perception", x_range=ends, y_range=ends)
    drawn = {"joined": "plane", "close": "plane", "change": "rows"}.get(kind, kind)
    close = kind in ("joined", "close")
    chart = Chart("c", "t", "", (line,), drawn, close=close, joined=kind == "joined")  # type: ignore[arg-type]
    svg = to_svg(chart)
    assert "var(--perception)" in svg
    assert not re.search(r"#0102|http|<script|<!--|<b>", svg)
    assert svg == to_svg(chart)
    assert ("$x <b>" in chart.alt and "0.5" in chart.alt) or kind in ("rows", "change")


def test_a_report_that_cannot_be_drawn_is_told_and_fails_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_report(tmp_path / "gone")
    shown = capsys.readouterr().out
    assert shown.startswith("report: not drawn (NoRun: ")
    assert f"equipoise report {tmp_path / 'gone'}" in shown
