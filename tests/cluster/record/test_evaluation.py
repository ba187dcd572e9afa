"""Figures against SciPy, brute force and hand-worked groups."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from cluster.record.evaluation import (
    EvalTable,
    before_after,
    change_table,
    eval_table,
    mcnemar,
    paired_p,
    pass_at_k,
    pooled,
    with_language,
    with_readings,
)
from cluster.run.standstill import unread_tables
from rewards.intervals import mean_interval, t_interval, wilson
from rewards.reader import Reading
from tests.support.toys import TASK, group


def test_wilson_equals_scipy() -> None:
    for n in (1, 2, 7, 50, 512):
        for successes in {0, 1, n // 3, n // 2, n - 1, n}:
            expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
            assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 9)[0] == 0.0
    assert wilson(9, 9)[1] == 1.0
    for successes, n in ((-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="successes"):
            wilson(successes, n)


def test_mean_interval_covers_and_never_claims_certainty() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(500):
        low, high = mean_interval(rng.beta(2, 1, size=60))
        hits += low <= 2 / 3 <= high
    assert 0.92 <= hits / 500 <= 0.98
    low, high = mean_interval(np.ones(20))
    assert low < 1.0 == high
    assert mean_interval(np.full(6, 0.9))[0] < 0.9
    for value in (1 / 3, 5 / 6, 0.1):  # whose sums are rounded
        low, high = mean_interval(np.full(60, value))
        assert low < value - 0.01 and high > value + 0.01


def test_a_loss_has_students_interval_and_stays_out_of_what_is_pooled() -> None:
    values = np.array([3.1, 2.7, 4.0, 3.3])
    expected = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert t_interval(values) == pytest.approx(expected)
    assert t_interval(values[:1]) == (values[0], values[0])
    one = EvalTable({"a": {"p": 1.0, "q": 0.0}})
    text = {"text_loss": dict(zip("wxyz", values, strict=True)), "text_right": {"Who?": 1.0}}
    both = with_language({"one": one, "two": one}, text)
    assert both["two"]["text_loss"].value == pytest.approx(values.mean())
    assert (both["one"]["text_loss"].low, both["one"]["text_loss"].high) == t_interval(values)
    assert [row.metric for row in both["one"].rows] == ["a", "text_loss", "text_right"]
    assert [row.metric for row in pooled(both).rows] == ["a"]
    worse = {name: value + 0.01 for name, value in text["text_loss"].items()}
    later = {"text_loss": worse, "text_right": {"Who?": 0.0}}
    changes = {
        c.metric: c for c in before_after(both["one"], with_language({"one": one}, later)["one"])
    }
    right, loss = changes["text_right"], changes["text_loss"]
    assert (right.lost, right.difference, right.p) == (1, -1.0, 1.0)
    # It rose on all four passages, however much they differ among themselves.
    assert (loss.gained, loss.lost, loss.p) == (4, 0, 2 / 2**4) and loss.overlap


def test_pass_at_k_equals_drawing_every_subset() -> None:
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c > n or k > n:
            continue
        right = [True] * c + [False] * (n - c)
        draws = list(itertools.combinations(right, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_at_k(8, 3, 1) == pytest.approx(3 / 8)
    for n, c, k in ((3, 4, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError, match="expected"):
            pass_at_k(n, c, k)


def test_mcnemar_equals_scipys_binomial_test() -> None:
    assert mcnemar(0, 0) == 1.0
    for gained, lost in ((1, 0), (5, 5), (12, 3), (3, 12), (120, 60)):
        expected = stats.binomtest(gained, gained + lost, 0.5).pvalue
        assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)


def passes() -> dict:
    return {
        "greedy": [group(1, "1;2;"), group(2, "3;4;x"), group(3, "3;5;"), group(4, ";;x,y")],
        "sampled": [group(1, "1;2;", "1;3;", "1;2;"), group(2, "2;1;", "3;1;", "2;3;")],
        "oracle": [group(1, "1;2;"), group(2, "2;4;")],
        "oracle_blank": [group(1, "1;2;"), group(2, "2;5;")],
        "blind": [group(1, ";3;"), group(2, ";4;")],
    }


def test_the_evaluation_table_on_groups_worked_out_by_hand() -> None:
    table = eval_table(TASK, passes())
    assert {row.metric: (row.value, row.n) for row in table.rows} == {
        "a": (0.5, 4),
        "a_p": (0.5, 4),
        "a_p_graded": (pytest.approx((1 + 0.5 + 1 + 0) / 4), 4),
        "leak": (0.25, 4),
        "self_consistency": (0.25, 4),
        "defect/x": (0.5, 4),
        "defect/y": (0.25, 4),
        "a avg@3": (pytest.approx(1 / 3), 2),
        "a maj@3": (0.5, 2),  # 2 of 2, 3, 2 is right; 1 of 1, 1, 3 is wrong
        "a_p avg@3": (pytest.approx((1 + 2 / 3) / 2), 2),
        "a pass@2": (0.5, 2),
        "a_p pass@2": (1.0, 2),
        "a pass@3": (0.5, 2),
        "a_p pass@3": (1.0, 2),
        "a_r": (1.0, 2),
        "a_r_blank": (0.5, 2),
        "blind": (0.5, 2),
    }
    assert all(row.low <= row.value <= row.high for row in table.rows)
    assert (table["a"].low, table["a"].high) == wilson(2, 4)
    again = EvalTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again == table


def read(suffices: bool, blind: bool = False, ceiling: bool | None = None) -> Reading:
    return Reading(np.array([suffices]), blind, ceiling, np.array([False]))


def test_what_a_reader_makes_of_the_greedy_pass_by_hand() -> None:
    table = eval_table(TASK, passes())  # right on n1 and n2, wrong on n3 and n4
    found = with_readings(
        table, {"n1": read(True, ceiling=True), "n2": read(False), "n3": read(True, blind=True)}
    )
    rows = {row.metric: (row.value, row.n) for row in found.rows}
    assert rows["sufficiency"] == (pytest.approx(2 / 3), 3)
    assert rows["used"] == (0.5, 2)
    assert rows["reader_blind"] == (pytest.approx(1 / 3), 3)
    assert rows["reader_ceiling"] == (1.0, 1)
    assert {m: v for m, v in rows.items() if m in table.per_problem} == {
        row.metric: (row.value, row.n) for row in table.rows
    }
    assert (found["used"].low, found["used"].high) == wilson(1, 2)
    # What there is none of has no row, and before and after each of its own problems.
    insufficient = with_readings(table, {"n1": read(False), "n2": read(False)})
    assert "used" not in insufficient.per_problem
    assert "reader_ceiling" not in insufficient.per_problem
    (change,) = [c for c in before_after(found, found) if c.metric == "used"]
    assert (change.difference, change.paired) == (0.0, 2)
    assert "used" not in {c.metric for c in before_after(found, insufficient)}


def test_of_a_refused_reader_only_its_bounds_are_told() -> None:
    groups = [group(i, f"{i};{2 * i};", name=f"p{i}") for i in range(20)]
    table = eval_table(TASK, {"greedy": groups})
    for better, refused in ((1, True), (2, False)):
        readings = {f"p{i}": read(True, i < 5, i < 5 + better) for i in range(20)}
        found = with_readings(table, readings).per_problem
        assert ("sufficiency" in found, "used" in found) == (not refused, not refused)
        assert sum(found["reader_ceiling"].values()) == 5 + better
        assert sum(found["reader_blind"].values()) == 5


def test_a_reader_that_is_refused_for_a_kind_of_question_is_believed_on_the_others() -> None:
    groups = [group(i, f"{i};{2 * i};", name=f"p{i}") for i in range(20)]
    table = eval_table(TASK, {"greedy": groups})
    kinds = {f"p{i}": "count" if i < 10 else "sum" for i in range(20)}
    readings = {
        name: replace(read(True, kind == "sum", True), kind=kind) for name, kind in kinds.items()
    }
    found = with_readings(table, readings)
    assert set(found.per_problem["sufficiency"]) == {n for n, k in kinds.items() if k == "count"}
    assert len(found.per_problem["used"]) == 10 and found["reader_ceiling"].n == 20
    assert [found[f"reader_blind/{kind}"].value for kind in ("count", "sum")] == [0.0, 1.0]
    (line,) = unread_tables({"toy": found})
    assert "toy: eval.reader: no sufficiency and no used on questions of kind sum: from p*" in line


def test_intervals_of_sampled_passes_count_problems_not_responses() -> None:
    # Eight copies of each answer tell no more about the problems than one does.
    one = [group(i, f"{i};{2 * i if i % 2 else 1};", name=f"p{i}") for i in range(40)]
    eight = [group(i, *[f"{i};{2 * i if i % 2 else 1};"] * 8, name=f"p{i}") for i in range(40)]
    narrow = eval_table(TASK, {"sampled": eight})["a avg@8"]
    plain = eval_table(TASK, {"greedy": one})["a"]
    assert (narrow.low, narrow.high, narrow.n) == (plain.low, plain.high, 40)


def test_intervals_of_several_pictures_of_a_puzzle_count_puzzles() -> None:
    """A policy that answers every picture of a puzzle alike has shown no more than one of each."""
    alone = [group(i, f"{i};{2 * i if i % 3 else 1};", name=f"p{i}") for i in range(12)]
    copies = [
        group(i, f"{i};{2 * i if i % 3 else 1};", name=f"p{i}/{n}")
        for i in range(12)
        for n in range(40)
    ]
    one, many = (eval_table(TASK, {"greedy": groups}) for groups in (alone, copies))
    assert (many["a"].value, many["a"].n, many["a"].puzzles) == (one["a"].value, 480, 12)
    assert many["a"].low < one["a"].low < one["a"].high < many["a"].high  # and t, not z
    assert many["a_p"].high == 1.0 and many["a_p"].low == one["a_p"].low
    wrong = [group(i, f"{i};1;", name=f"p{i}/{n}") for i in range(12) for n in range(40)]
    other = eval_table(TASK, {"greedy": wrong})
    change = {row.metric: row for row in before_after(many, other)}["a"]
    assert (change.lost, change.gained) == (320, 0)
    assert change.p == pytest.approx(2 / 2**8)  # eight puzzles changed
    assert pooled({"x": many, "y": many})["a"].puzzles == 12
    assert EvalTable.from_dict(json.loads(json.dumps(many.to_dict()))) == many
    out = io.StringIO()
    Console(file=out, width=120).print(
        many.table().to_rich(), change_table(before_after(many, other)).to_rich()
    )
    assert out.getvalue().count("480 (12 puzzles)") > 8


@pytest.mark.parametrize(("puzzles", "alike"), [(12, 1.0), (40, 0.3), (150, 0.0)])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_intervals_hold_the_truth_however_alike_answers_to_a_puzzle_are(
    puzzles: int, alike: float, share: float
) -> None:
    rng = np.random.default_rng([puzzles, int(10 * share)])
    held = 0
    for _ in range(400):
        names = rng.choice(puzzles, size=512, p=rng.dirichlet(np.full(puzzles, 3.0)))
        if alike == 1.0:
            chances = (rng.random(puzzles) < share).astype(float)
        else:
            spread = (1 - alike) / max(alike, 1e-9)
            chances = rng.beta(share * spread, (1 - share) * spread, size=puzzles)
        values = (rng.random(512) < chances[names]).astype(float)
        low, high = mean_interval(values, [str(name) for name in names])
        held += low <= share <= high
    # 400 intervals: a standard error of 1.1 points. Wilson's of 512 answers hold it from 20 % on.
    assert 0.90 <= held / 400 <= 0.99


def test_flipping_signs_of_puzzles_equals_trying_all_of_them() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        changes = rng.integers(-1, 2, size=30)
        puzzles = [str(p) for p in rng.integers(8, size=30)]
        sums = [sum(c for c, p in zip(changes, puzzles, strict=True) if p == q) for q in "01234567"]
        all_signs = np.array(list(itertools.product((-1, 1), repeat=8))) @ sums
        expected = (np.abs(all_signs) >= abs(sum(sums))).mean()
        assert paired_p(changes, puzzles) == pytest.approx(expected)
        alone = [str(i) for i in range(30)]
        gained, lost = (changes == 1).sum(), (changes == -1).sum()
        assert paired_p(changes, alone) == paired_p(changes) == mcnemar(gained, lost)


def test_before_after_pairs_problems_and_tests_what_changed() -> None:
    def table(right: set[int], count: int = 20, defect: str = "") -> EvalTable:
        groups = [
            group(i, f"{i};{2 * i if i in right else 1};{defect}", name=f"p{i}")
            for i in range(count)
        ]
        return eval_table(TASK, {"greedy": groups})

    before, after = table({0, 1, 2}, defect="x"), table({1, *range(3, 20)})
    rows = {row.metric: row for row in before_after(before, after)}
    assert (rows["a"].gained, rows["a"].lost, rows["a"].paired) == (17, 2, 20)
    assert rows["a"].p == pytest.approx(stats.binomtest(2, 19, 0.5).pvalue)
    assert rows["a"].difference == pytest.approx(0.75)
    assert not rows["a"].overlap
    assert (rows["a_p"].p, rows["a_p"].overlap, rows["a_p"].difference) == (1.0, True, 0.0)
    # A defect that is gone is a change too.
    assert (rows["defect/x"].before.value, rows["defect/x"].after.value) == (1.0, 0.0)
    # Other problems: no pairing, and no p-value.
    other = {row.metric: row for row in before_after(before, table({0}, count=19))}
    assert other["a"].p is None
    assert other["a"].paired == 0


def test_changes_of_problems_that_share_a_puzzle_can_be_kept() -> None:
    puzzles = {"p": "one", "q": "one", "r": "two"}
    before = EvalTable({"a": {"p": 0.0, "q": 1.0, "r": 0.0}}, puzzles)
    after = EvalTable({"a": {"p": 1.0, "q": 1.0, "r": 0.0}}, puzzles)
    (row,) = json.loads(json.dumps([asdict(change) for change in before_after(before, after)]))
    assert (row["overlap"], row["paired"], row["gained"]) == (True, 3, 1)


def test_tables_show_hostile_names_as_they_are() -> None:
    table = eval_table(TASK, {"greedy": [group(1, "1;2;[red]x[/red]")]})
    out = io.StringIO()
    console = Console(file=out, width=120)
    console.print(table.table("a [bold]title").to_rich())
    assert out.getvalue().count("[red]x[/red]") == 1
    assert "a [bold]title" in out.getvalue()
    # The table of changes shows accuracies; the defects by name are in its record.
    change = before_after(table, table)
    console.print(change_table(change, "a [bold]change").to_rich())
    assert out.getvalue().count("[red]x[/red]") == 1
    assert "a [bold]change" in out.getvalue()
    assert "defect/[red]x[/red]" in {row.metric for row in change}


def test_pooling_counts_every_problem_once() -> None:
    one = EvalTable({"a": {"p": 1.0, "q": 0.0}, "a_p": {"p": 1.0, "q": 1.0}, "defect/x": {}})
    two = EvalTable({"a": {"r": 1.0}, "leak": {"r": 0.0}})
    table = pooled({"one": one, "two": two})
    assert {row.metric: row.n for row in table.rows} == {"a": 3, "a_p": 2, "leak": 1}
    assert table["a"].value == pytest.approx(2 / 3)
    assert (table["a"].low, table["a"].high) == wilson(2, 3)
    # Two entries of one task may hold one problem: it was answered twice.
    assert pooled({"one": one, "one-2": one})["a"].n == 4
