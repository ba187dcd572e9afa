"""The split of a difference in four, by counting problem after problem; intervals by puzzles."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.intervals import Interval, wilson
from rewards.tool_use import TERMS, paired, returned, tool_use

Cases = list[tuple[bool, bool, bool]]
"""Right alone, right with the tool, called; one a problem."""
CASES = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=40)
FLIPS = {
    "call_gain": (False, True, True),
    "prompt_gain": (False, True, False),
    "call_harm": (True, False, True),
    "prompt_harm": (True, False, False),
}


def columns(cases: Cases) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    alone, tool, called = np.array(cases, dtype=bool).T
    return alone, tool, called


@settings(deadline=None)
@given(CASES)
def test_the_four_add_up_to_the_difference_and_each_is_its_product(cases: Cases) -> None:
    found, n = tool_use(*columns(cases)), len(cases)
    terms = {term.name: term for term in found.terms}
    assert tuple(terms) == TERMS
    for name, flip in FLIPS.items():
        term, side, did = terms[name], flip[0], flip[2]
        assert term.count == cases.count(flip)
        of_side = [case for case in cases if case[0] == side]
        acted = [case for case in of_side if case[2] == did]
        parts = [Fraction(len(of_side), n)]
        parts += [Fraction(len(acted), len(of_side))] if of_side else []
        parts += [Fraction(term.count, len(acted))] if acted else []
        told = (term.of_problems.value, term.rate.value, term.success.value)
        for part, value in zip(parts, told, strict=False):
            assert value == pytest.approx(float(part), abs=1e-12)
        assert told[len(parts) :] == (None,) * (3 - len(parts))
        product = Fraction(term.count, n) if len(parts) < 3 else parts[0] * parts[1] * parts[2]
        assert product == Fraction(term.count, n)
        assert term.share.value == pytest.approx(float(product), abs=1e-12)
    gains = terms["call_gain"].count + terms["prompt_gain"].count
    harms = terms["call_harm"].count + terms["prompt_harm"].count
    difference = sum(tool - alone for alone, tool, _ in cases)
    assert gains - harms == difference
    assert found.difference.value == pytest.approx(difference / n, abs=1e-12)
    assert found.tool.value == pytest.approx(sum(case[1] for case in cases) / n)
    assert found.alone.value == pytest.approx(sum(case[0] for case in cases) / n)
    assert found.called.value == pytest.approx(sum(case[2] for case in cases) / n)
    for each in (found.tool, found.alone, found.called, *(t.share for t in found.terms)):
        assert each.low is not None and each.high is not None and each.value is not None
        assert 0 <= each.low <= each.value <= each.high <= 1


def test_an_interval_is_of_the_problems_it_is_about_and_of_their_puzzles() -> None:
    cases = [*[FLIPS["call_gain"]] * 6, *[(False, False, True)] * 4, *[(True, True, False)] * 10]
    term = tool_use(*columns(cases)).terms[0]
    assert term.share == Interval(0.3, *wilson(6, 20))
    assert term.rate == Interval(1.0, *wilson(10, 10))
    assert term.success == Interval(0.6, *wilson(6, 10))
    # Each problem twice is no more than each once, where both are of one puzzle.
    names = [str(i) for i in range(20)] * 2
    doubled = tool_use(*columns(cases * 2), names)
    for once, twice in zip(tool_use(*columns(cases)).terms, doubled.terms, strict=True):
        assert (twice.share.value, twice.count) == (once.share.value, 2 * once.count)
        one, two = once.success, twice.success
        if one.low is not None and one.high is not None and two.low is not None:
            assert two.high is not None and two.high - two.low >= 0.9 * (one.high - one.low)


def test_a_paired_difference_knows_pairs() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(400) < 0.5
    after = before ^ (rng.random(400) < 0.02)
    found = paired(before, after, [str(i) for i in range(400)])
    assert found.value == pytest.approx(after.mean() - before.mean())
    # Of two unpaired shares it would be about 0.14 wide.
    assert found.low is not None and found.high is not None and found.high - found.low < 0.05
    assert paired(before[:0], after[:0], []) == Interval()


def test_what_shown_pictures_were_worth_is_of_those_who_looked() -> None:
    shown = np.array([1, 1, 1, 1, 0, 0, 1, 0], dtype=bool)
    blank = np.array([0, 0, 0, 1, 0, 1, 1, 0], dtype=bool)
    looked = np.array([1, 1, 1, 1, 1, 1, 0, 0], dtype=bool)
    found = returned(shown, blank, looked)
    assert (found.n, found.looked, found.value.value) == (8, 6, pytest.approx(3 / 8))
    assert found.lost.value == pytest.approx((3 - 1) / 8)
    assert found.lost_where_looked.value == pytest.approx((3 - 1) / 6)
    nobody = returned(shown, shown, np.zeros(8, dtype=bool))
    assert (nobody.lost.value, nobody.lost_where_looked) == (0.0, Interval())
