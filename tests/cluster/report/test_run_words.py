"""What a report says in words of a run: its verdict, how sure it is, its warnings."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import scipy.stats

from cluster.report.charts import Series
from cluster.report.run_words import asymmetry_of, events_table, verdict, warnings
from tests.support.report_pages import (
    coins,
    evaluation,
    table_of,
)


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
