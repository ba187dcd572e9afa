"""From cells to results to words: every number checked against arrays made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.ablation.grid import Ablation
from cluster.ablation.results import (
    RESULT_SCHEMA,
    Results,
    aligned,
    as_results,
    collect,
    pilot_differences,
    summarise,
)
from cluster.ablation.statistics import crossed_interval, paired_test
from cluster.report.ablation_report import build_ablation, read_ablation, write_results
from tests.support.recipes import recipe_text
from tests.support.toy_runs import finish, started

GAIN = {"outcome": 0.1, "half": 0.45, "same": 0.1}
FILE = """
question = "Does seeing pay?"
base = "base.toml"
seeds = [1, 2, 3, 4]
[budget]
kind = "updates"
amount = 30
[[arms]]
name = "outcome"
[[arms]]
name = "half"
[[arms]]
name = "same"
"""


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ablation, Path]:
    """A finished grid of three arms, two of which learn the same."""
    ablation, folder = started(tmp_path_factory.mktemp("grid"), FILE, recipe_text())
    for cell in ablation.cells:
        finish(folder, cell, GAIN[cell.arm])
    return ablation, folder


def answers(ablation: Ablation, folder: Path, arm: str, metric: str, when: str) -> np.ndarray:
    """[S, P] straight from the cells' files."""
    rows = []
    for cell in ablation.cells:
        if cell.arm == arm:
            text = (folder / "cells" / cell.id / "run" / "evaluation.json").read_text()
            values = json.loads(text)["sudoku"][when]["per_problem"][metric]
            rows.append([values[f"t{i}"] for i in range(40)])
    return np.array(rows)


def test_results_hold_every_number_of_every_cell(grid: tuple[Ablation, Path]) -> None:
    ablation, folder = grid
    table = collect(ablation.cells, folder)
    assert table.schema == RESULT_SCHEMA
    # 30 steps of 6 metrics; 3 accuracies of 40 problems, twice.
    assert table.num_rows == 12 * (30 * 6 + 3 * 40 * 2)
    results = Results(table)
    (kept,), _ = aligned(results.problems("", "half", "sudoku", "a_p", "after"))
    expected = answers(ablation, folder, "half", "a_p", "after")
    assert kept.shape == (4, 40) and kept.sum(axis=1) == pytest.approx(expected.sum(axis=1))


def test_levels_and_differences_are_those_of_the_answers(grid: tuple[Ablation, Path]) -> None:
    ablation, folder = grid
    found = summarise(collect(ablation.cells, folder), "?", ["outcome", "half", "same"], None)
    reference, ours = (answers(ablation, folder, arm, "a", "after") for arm in ("outcome", "half"))
    (level,) = [v for v in found.levels if (v.arm, v.metric) == ("half", "a")]
    assert level.after.value == pytest.approx(ours.mean())
    before = answers(ablation, folder, "half", "a", "before")
    assert level.change.low == pytest.approx(crossed_interval(ours - before).low)
    half, same = [c for c in found.comparisons if c.metric == "a"]
    assert half.difference == crossed_interval(
        (ours - reference)[:, sorted(range(40), key=lambda i: f"t{i}")], (-1, 1)
    )
    assert half.test == paired_test(reference, ours)
    assert (
        half.p_holm is not None
        and half.difference.p is not None
        and half.difference.low is not None
    )
    assert half.p_holm == pytest.approx(2 * half.difference.p) and half.difference.low > 0.1
    assert same.p_holm is not None and same.difference.p is not None
    assert same.p_holm >= same.difference.p > 0.05


def test_asymmetry_curves_couplings_and_costs(grid: tuple[Ablation, Path]) -> None:
    ablation, folder = grid
    found = summarise(collect(ablation.cells, folder), "?", ["outcome", "half", "same"], 0.45)
    (index,) = [v for v in found.asymmetries if v.arm == "half"]
    change = {
        m: answers(ablation, folder, "half", m, "after")
        - answers(ablation, folder, "half", m, "before")
        for m in ("a_r", "a_p")
    }
    assert index.index.value == pytest.approx((change["a_r"] - change["a_p"]).mean())
    assert index.step == 30

    (curve,) = [c for c in found.curves if (c.arm, c.metric) == ("half", "acc/a")]
    assert curve.steps == tuple(range(1, 31)) and curve.points[0].seeds == 4
    # A straight line from 0.3 to 0.75, but for noise of 0.01.
    assert curve.mean_level.value == pytest.approx(0.3 + 0.45 * (1 + 1 / 30) / 2, abs=0.01)

    phases = [c.correlation.value for c in found.couplings if c.arm == "half"]
    expected = [np.tanh(np.mean(np.arctanh(0.6 * np.arange(a, a + 10) / 30))) for a in (1, 11, 21)]
    assert phases == pytest.approx(expected)

    costs = {(c.arm, c.unit): c.reach for c in found.costs}
    assert costs["outcome", "tokens"].reached == 0 and costs["outcome", "tokens"].median is None
    assert costs["outcome", "seconds"].spent_at_least == 60
    got = costs["half", "seconds"]
    # 0.3 + 0.45 k/30 averaged over five steps reaches 0.45 at k = 12.
    assert got.reached == 4 and got.median == pytest.approx(24, abs=4)
    by_default = summarise(collect(ablation.cells, folder), "?", ["outcome", "half"], None)
    (target,) = {c.target for c in by_default.costs}
    assert target == pytest.approx(0.3 + 0.1 * 25.5 / 30, abs=0.005)


def test_evaluations_on_the_way_give_the_index_over_training() -> None:
    rows = []
    for seed, shift in ((1, 0.0), (2, 0.02)):
        for step, a_r, a_p in ((0, 0.5, 0.4), (10, 0.7, 0.45), (20, 0.7, 0.6)):
            for metric, value in (("a_r", a_r + shift * step / 10), ("a_p", a_p)):
                rows.append(("c", "x", "", seed, step, "sudoku", metric, "", value, ""))
                if step != 10:
                    rows += [
                        ("c", "x", "", seed, step, "sudoku", metric, p, value, p) for p in "pq"
                    ]
    found = summarise(as_results(rows), "?", ["x"], None)
    assert [(v.step, round(v.index.value, 6)) for v in found.asymmetries] == [
        (10, 0.16),
        (20, 0.02),
    ]
    assert found.comparisons == ()


def test_several_tasks_are_also_taken_together() -> None:
    rows = [
        ("c", "x", "hard", 1, step, task, "a", p, value, "")
        for step in (0, 5)
        for task, value in (("sudoku", 1.0), ("graph_coloring", 0.0))
        for p in ("same-id", "other")
    ]
    levels = {v.task: v.after for v in summarise(as_results(rows), "?", ["x"], None).levels}
    assert (levels["all tasks"].value, levels["all tasks"].problems) == (0.5, 4)
    assert (levels["sudoku"].value, levels["sudoku"].problems) == (1.0, 2)


def test_only_shared_seeds_and_problems_are_compared() -> None:
    ours = {1: {"p": 1.0, "q": 0.0}, 2: {"p": 0.0, "q": 1.0}}
    theirs = {2: {"q": 0.5, "r": 1.0}, 3: {"q": 0.0}}
    arrays, _ = aligned(ours, theirs)
    assert [a.tolist() for a in arrays] == [[[1.0]], [[0.5]]]
    assert all(a.size == 0 for a in aligned(ours, {})[0])


def test_a_pilots_differences_are_by_puzzle_and_from_its_first_arm() -> None:
    values = {"first": (0.0, 0.0, 1.0), "second": (1.0, 0.0, 1.0)}
    rows = [
        ("c", arm, "", seed, 5, "sudoku", "a", problem, value, puzzle)
        for arm, right in values.items()
        for seed in (1, 2)
        for problem, puzzle, value in zip("pqr", "kkl", right, strict=True)
    ]
    table = as_results(rows)
    found, share = pilot_differences(table, ["first", "second"])
    assert set(found) == {"second"} and share == 2 / 3
    (differences,) = found["second"]
    assert differences.shape == (2, 2) and differences.mean() == pytest.approx(1 / 3)
    turned, _ = pilot_differences(table, ["second", "first"])
    assert turned["first"][0] == pytest.approx(-differences)
    # Where the reference has not finished, no other arm takes its place.
    assert pilot_differences(table, ["gone", "first", "second"]) == ({}, 0)
    alone = [(*row[:-1], row[7]) for row in rows]
    assert pilot_differences(as_results(alone), ["first", "second"])[1] == 1


@pytest.mark.usefixtures("undrawn")
def test_the_words_say_who_is_better_and_who_is_not_shown_to_be(
    grid: tuple[Ablation, Path],
) -> None:
    _, folder = grid
    text = build_ablation(read_ablation(folder)).to_text("outcome")
    lines = text.splitlines()
    (best,) = [line for line in lines if line.startswith("- On sudoku, half ended best on a: ")]
    assert "more than other seeds and problems explain" in best
    (same,) = [line for line in lines if line.startswith("  - same against outcome: ")]
    assert "no difference shown" in same
    assert "3 arms × 4 seeds" in text and "30 updates each; 12 of 12 cells finished" in text
    table = lines[lines.index("Against outcome after training: sudoku") + 1 :][:7]
    assert table[0].split()[:3] == ["arm", "metric", "difference"]
    # Numbers end below the ends of their heads.
    end = table[0].index("difference") + len("difference")
    assert all(row[end - 1] == "]" and row[end : end + 2] == "  " for row in table[1:])

    write_results(folder)
    numbers = json.loads((folder / "summary.json").read_text())
    assert numbers["reference"] == "outcome" and numbers["pairing_faults"] == []
    # Recomputing from the table alone gives the same summary.
    again = summarise(
        pq.read_table(folder / "results.parquet"), "Does seeing pay?", list(GAIN), None
    ).to_dict()
    assert again == {k: v for k, v in numbers.items() if k != "pairing_faults"}
    assert not any(isinstance(v, float) and math.isnan(v) for v in _leaves(numbers))


def _leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for below in value.values() for leaf in _leaves(below)]
    if isinstance(value, list):
        return [leaf for below in value for leaf in _leaves(below)]
    return [value]


def test_arms_are_compared_by_sufficiency_where_nobody_has_labels() -> None:
    rng = np.random.default_rng(0)
    rows, after = [], {}
    for arm, share in (("outcome", 0.4), ("seeing", 0.7)):
        after[arm] = (rng.random((3, 50)) < share).astype(float)
        for seed, values in enumerate(after[arm]):
            for step, answers in ((0, np.zeros(50)), (10, values)):
                rows += [
                    (f"{arm}-{seed}", arm, "", seed, step, "vqa", metric, f"q{i:02}", value, "")
                    for metric in ("a", "sufficiency", "used")
                    for i, value in enumerate(answers)
                ]
    found = summarise(as_results(rows), "?", ["outcome", "seeing"], None)
    (compared,) = [c for c in found.comparisons if c.metric == "sufficiency"]
    assert compared.difference == crossed_interval(after["seeing"] - after["outcome"], (-1, 1))
    # Of `used` every arm has other problems.
    assert {c.metric for c in found.comparisons} == {"a", "sufficiency"}
    assert found.asymmetries == ()
