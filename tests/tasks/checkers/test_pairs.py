"""Verdicts worked out by hand (pairs.toml) against those of the checkers."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.checkers import CHECKERS, Gold

SETS = tomllib.loads(Path(__file__).with_name("pairs.toml").read_text())["set"]
MOST_FALSE_WRONGS = 0.03


def pairs() -> Iterator[tuple[dict[str, Any], list[str], bool]]:
    for one in SETS:
        for verdict in (True, False):
            yield from ((one, pair, verdict) for pair in one["right" if verdict else "wrong"])


def gold_of(one: dict[str, Any], answer: str) -> Gold:
    return Gold((answer,), tuple(one.get("choices", ())), one.get("options", {}))


def test_no_wrong_answer_is_right_and_few_right_ones_are_wrong(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = [
        (
            one["checker"],
            pair,
            verdict,
            CHECKERS[one["checker"]].right(pair[0], gold_of(one, pair[1])),
        )
        for one, pair, verdict in pairs()
    ]
    false_rights = [(name, pair) for name, pair, verdict, said in found if said and not verdict]
    false_wrongs = [(name, pair) for name, pair, verdict, said in found if verdict and not said]
    rights = sum(verdict for _, _, verdict, _ in found)
    with capsys.disabled():
        print(f"\n{len(found)} pairs: {len(false_rights)} false rights of {len(found) - rights}, ")
        print(f"{len(false_wrongs)} false wrongs of {rights}: {false_wrongs}")
    assert len(found) >= 150
    assert false_rights == []
    assert len(false_wrongs) <= MOST_FALSE_WRONGS * rights


@pytest.mark.parametrize("name", CHECKERS)
def test_each_checker_has_pairs_of_both_verdicts(name: str) -> None:
    verdicts = [verdict for one, _, verdict in pairs() if one["checker"] == name]
    assert verdicts.count(True) >= 5 and verdicts.count(False) >= 5


def test_golds_of_the_table_have_no_fault_and_are_right_themselves() -> None:
    for one, pair, verdict in pairs():
        checker, gold = CHECKERS[one["checker"]], gold_of(one, pair[1])
        if verdict:
            assert checker.fault(gold) is None, pair
            if checker.name != "point":  # whose gold is a box
                assert checker.right(pair[1], gold), pair
