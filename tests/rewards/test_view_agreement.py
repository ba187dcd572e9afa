"""View agreement: by hand, against other implementations, on hostile text."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rewards.terms import load_term
from rewards.view_agreement import ViewAgreement, agreement
from rollout.record import Group
from tasks.graph_coloring import GraphColoring, GraphColoringSpec
from tasks.views import another_view
from tests.support.surrogate_groups import HOSTILE, group_of, perception_length, rollout_of, says
from tests.support.toys import TASK, group

GRAPHS = GraphColoring()
SMALL = GraphColoringSpec(vertices=5, canvas=64, prompt="brief")
DRAWING = GRAPHS.generate(np.random.default_rng(0), SMALL)


def readings(*texts: str) -> Group:
    return Group("r", DRAWING, tuple(rollout_of(GRAPHS, t, i) for i, t in enumerate(texts)))


def test_by_hand_and_what_is_asked() -> None:
    one = group_of(DRAWING, says("0-1 1-2"), "nothing", says("3-4"))
    term = ViewAgreement(readings=3, temperature=0.5, max_tokens=99)
    (request,) = term.ask(GRAPHS, one, None)
    assert (request.kind, request.view, request.prefix, request.n) == ("free", "shown", "", 3)
    assert (request.sampling.temperature, request.sampling.max_tokens) == (0.5, 99)
    assert replace(request.problem, images=DRAWING.images) == DRAWING
    (image,) = request.problem.images
    assert image != DRAWING.images[0]
    assert term.ask(GRAPHS, one, None) == [request]  # asked again, it is the same view
    (elsewhere,) = term.ask(GRAPHS, replace(one, group_id="h"), None)
    assert elsewhere.problem.images != request.problem.images
    # F1 with each: 1, 2·1/(2+1), 0 (unreadable); and 0, 0, 0.
    reply = readings(says("1-2 0-1"), says("0-1"), "gibberish")
    assert term.score(GRAPHS, one, [reply]) == pytest.approx([5 / 9, 0, 0])


def test_every_image_of_a_problem_gets_a_view_and_none_gets_none() -> None:
    two = replace(DRAWING, images=DRAWING.images * 2)
    one = group_of(two, says("0-1"))
    (request,) = ViewAgreement(changes=("colour",)).ask(GRAPHS, one, None)
    assert len(set(request.problem.images)) == 2  # each image its own change
    for text_only in (group_of(replace(DRAWING, images=()), says("0-1")), group_of(DRAWING, "")):
        assert ViewAgreement().ask(GRAPHS, text_only, None) == []
        assert ViewAgreement().score(GRAPHS, text_only, []) == [0.0]


def slow_words(one: str, other: str) -> float:
    """2·LCS / (words of both), by the table of longest common subsequences."""
    a, b = one.lower().split(), other.lower().split()
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = (
                table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
            )
    return 2 * table[-1, -1] / (len(a) + len(b)) if a and b else 0.0


def test_texts_agree_by_words_in_order_as_another_implementation_says() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        one, other = (
            " ".join(rng.choice(["A", "a", "bar", "is", "30", "80\n"], rng.integers(0, 9)))
            for _ in range(2)
        )
        found = agreement(TASK, one, other)
        assert found == pytest.approx(slow_words(one, other), abs=1e-12)
        assert found == agreement(TASK, other, one)
    assert agreement(TASK, "The bar is 30", "the  BAR\nis 30") == 1.0
    assert agreement(TASK, "the bar is 30", "the bar is 80") == 0.75
    # To say nothing twice is no agreement.
    assert agreement(TASK, "", "") == agreement(TASK, " ", "a") == 0.0


def test_other_perceptions_agree_where_they_are_equal() -> None:
    one = group(5, "5;10;", "4;8;", ";1;")
    term = ViewAgreement(readings=2)
    assert term.score(TASK, one, [group(5, "5;1;", "5;2;")]) == [1, 0, 0]
    assert term.score(TASK, one, [group(5, "4;1;", "5;2;")]) == [0.5, 0.5, 0]
    assert agreement(GRAPHS, frozenset(), frozenset()) == 1.0  # a graph without edges


def test_the_mean_over_all_readings_is_what_random_pairs_give_on_average() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        own = [says("0-1"), *(says(t) for t in rng.choice(["0-1 1-2", "1-2 3-4", "gone"], 2))]
        others = [says(t) for t in rng.choice(["0-1", "0-1 1-2", "1-2 3-4", "gone"], 3)]
        group, reply = group_of(DRAWING, *own), readings(*others)
        found = ViewAgreement(readings=3).score(GRAPHS, group, [reply])
        p, q = ([r.parsed.perception for r in g.rollouts] for g in (group, reply))
        paired = [
            [agreement(GRAPHS, mine, theirs) for mine, theirs in zip(p, order, strict=True)]
            for order in itertools.permutations(q)
        ]
        np.testing.assert_allclose(found, np.mean(paired, axis=0), atol=1e-12)


def test_length_cap_hostile_text_and_replies_that_do_not_fit() -> None:
    text = says("0-1")
    one = group_of(DRAWING, text)
    n = perception_length(text)
    assert ViewAgreement(max_perception_tokens=n).ask(GRAPHS, one, None)
    assert ViewAgreement(max_perception_tokens=n - 1).ask(GRAPHS, one, None) == []
    term = ViewAgreement(readings=len(HOSTILE))
    found = np.array(term.score(GRAPHS, group_of(DRAWING, text, *HOSTILE), [readings(*HOSTILE)]))
    assert ((found >= 0) & (found <= 1)).all()
    for replies, message in (
        ([], "1 requests and got 0"),
        ([readings("")], "a group of"),
        ([np.zeros(3)], "a group of"),
    ):
        with pytest.raises(ValueError, match=message):
            ViewAgreement().score(GRAPHS, one, replies)


@pytest.mark.parametrize("args", [{"changes": []}, {"changes": ["flip"]}, {"readings": 0}])
def test_arguments(args: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(args))):
        load_term("view_agreement", args)
    made = load_term("view_agreement", {"changes": ["margin"]})
    assert isinstance(made, ViewAgreement) and made.changes == ("margin",)
    assert another_view(DRAWING.images[0], 0, made.changes)
