"""Terms: values against hand-worked and independent ones; failures typed, never swallowed."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.recipe.placement import frozen_models
from cluster.recipe.recipe import Recipe
from cluster.record.metric_table import unlisted
from cluster.run.step_metrics import step_metrics
from rewards.compose import Composition, compose_groups
from rewards.scored import DIAGNOSIS, Reply, TermError
from rewards.settings import BUILT_IN, RewardTermConfig
from rewards.terms import (
    Format,
    Outcome,
    Perception,
    PerceptionGraded,
    TermFacts,
    diagnose,
    facts_of,
    load_term,
    load_terms,
    score_group,
    term_facts,
)
from rollout.record import Group, SampleRequest
from tasks.core import Problem, Task
from tests.support.toys import TASK, Length, Misbehaves, group, score

#            seen, solved        wrong seen, leak   right seen, wrong  unreadable
FOUR = ("5;10;", "4;10;bad_cell", "5;9;", ";;missing_perception,missing_answer")


def test_built_in_terms_on_a_group_worked_out_by_hand() -> None:
    found = score(
        group(5, *FOUR),
        Outcome(),
        Perception(),
        PerceptionGraded(),
        Format({"bad_cell": 0.25}, default=0.75),
    )
    assert not found.failures
    assert found.values["outcome"].tolist() == [1, 1, 0, 0]
    assert found.values["perception"].tolist() == [1, 0, 1, 0]
    assert found.values["perception_graded"].tolist() == [1, 0.5, 1, 0]
    assert found.values["format"].tolist() == [1, 0.75, 1, 0]
    assert all(v.dtype == np.float64 for v in found.values.values())
    assert found.seconds.keys() == found.values.keys()
    assert all(s >= 0 for s in found.seconds.values())


def test_diagnosis_is_there_whatever_is_rewarded() -> None:
    found = score(group(5, *FOUR, "4;8;")).diagnosis
    assert found is not None
    assert found.a.tolist() == [True, True, False, False, False]
    assert found.a_p.tolist() == [True, False, True, False, False]
    assert found.leak.tolist() == [False, True, False, False, False]
    assert found.self_consistency.tolist() == [True, False, False, False, True]
    assert found.defects[3] == ("missing_perception", "missing_answer")


def test_terms_equal_an_independent_reading_of_random_groups() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        n = int(rng.integers(10))
        texts, outcome, perception, graded, form = [], [], [], [], []
        for _ in range(int(rng.integers(1, 9))):
            p = None if rng.random() < 0.2 else int(rng.integers(10))
            a = None if rng.random() < 0.2 else int(rng.integers(20))
            k = int(rng.integers(3))
            texts.append(f"{'' if p is None else p};{'' if a is None else a};{'x,y,z'[: 2 * k]}")
            outcome.append(float(a == 2 * n))
            perception.append(float(p == n))
            graded.append(0.0 if p is None else 1 / (1 + abs(p - n)))
            form.append([1.0, 0.7, 0.4][k])
        terms = [load_term(name) for name in ("outcome", "perception", "perception_graded")]
        found = score(group(n, *texts), *terms, Format(default=0.3))
        assert found.values["outcome"].tolist() == outcome
        assert found.values["perception"].tolist() == perception
        assert found.values["perception_graded"].tolist() == graded
        np.testing.assert_allclose(found.values["format"], form, rtol=0, atol=1e-12)


class Halves:
    """A number and two that it is made of."""

    name = "halves"

    def __call__(self, task: Task, group: Group) -> dict[str, list[float]]:
        lengths = [float(len(r.text)) for r in group.rollouts]
        return {"value": lengths, "first": [n / 2 for n in lengths], "second": [0.0] * len(lengths)}


def test_parts_of_a_term_are_logged_and_stored_beside_it_and_never_rewarded() -> None:
    one = group(1, "1;2;", "1;;")
    found = score_group(TASK, one, {"both": Halves()})
    assert {name: v.tolist() for name, v in found.values.items()} == {
        "both": [4.0, 3.0],
        "both.first": [2.0, 1.5],
        "both.second": [0.0, 0.0],
    }
    for method in ("sum_then_normalize", "normalize_then_sum"):
        (made,) = compose_groups([one], [found], Composition({"both": 2.0}, method=method))
        assert made.totals.tolist() == [8.0, 6.0]
        metrics = step_metrics([made], 0)
        assert metrics["reward/both.first/mean"] == 1.75
        assert metrics["reward/both.second/zero_variance"] == 1.0
        assert not unlisted(metrics)


@given(
    penalties=st.dictionaries(st.sampled_from("abcde"), st.floats(0, 3), max_size=5),
    default=st.floats(0, 3),
    defects=st.lists(st.sampled_from("abcdefg"), unique=True),
)
@settings(max_examples=50)
def test_format_falls_with_every_defect_and_stays_in_range(
    penalties: dict[str, float], default: float, defects: list[str]
) -> None:
    term = Format(penalties, default)
    scores = [
        term(TASK, group(1, f";;{','.join(defects[:k])}"))[0] for k in range(len(defects) + 1)
    ]
    assert scores[0] == 1.0
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] >= 0.0


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("nan", "nan"),
        ("inf", "nan"),
        ("short", "wrong_length"),
        ("empty", "wrong_length"),
        ("matrix", "wrong_length"),
        ("none", "not_numbers"),
        ("nones", "not_numbers"),
        ("words", "not_numbers"),
        ("scalar", "wrong_length"),
        ("ragged", "not_numbers"),
        ("complex", "not_numbers"),
        ("parts", "nan"),
        ("no value", "not_numbers"),
        ("huge", "not_numbers"),
        ("raise", "exception"),
        ("exit", "exception"),
    ],
)
def test_a_failing_term_is_typed_and_the_others_still_score(what: str, kind: str) -> None:
    found = score(group(0, "0;0;", "1;2;"), Misbehaves(what), Outcome())
    (failure,) = found.failures
    assert (failure.term, failure.kind) == (what, kind)
    assert failure.message
    assert what not in found.values
    assert what in found.seconds
    assert found.values["outcome"].tolist() == [1, 0]
    assert found.diagnosis is not None


def test_an_exception_keeps_the_terms_own_traceback() -> None:
    (failure,) = score(group(0, "0;0;"), Misbehaves("raise")).failures
    assert "toys.py" in failure.traceback
    assert 'raise KeyError("no such cell")' in failure.traceback
    assert "_attempt" not in failure.traceback
    assert failure.message == "KeyError: 'no such cell'"


def test_a_failing_checker_is_reported_as_the_tasks_fault_too() -> None:
    found = score(group(1, "1;666;"), Outcome(), Perception())
    assert [f.term for f in found.failures] == ["outcome", DIAGNOSIS]
    assert found.diagnosis is None
    assert found.values["perception"].tolist() == [1]


def test_integers_and_booleans_count_as_numbers() -> None:
    class Flags:
        name = "flags"

        def __call__(self, task: object, group: object) -> list[bool]:
            return [True, False]

    assert score(group(1, "1;2;", "1;3;"), Flags()).values["flags"].tolist() == [1.0, 0.0]


USABLE: dict[str, dict[str, Any]] = {
    "length": {"max_tokens": 64, "buffer": 16},
    "judge": {"base_url": "http://localhost:8000/v1", "model": "m"},
    "reward_model": {"model": "a/classifier"},
    "call_cap": {"most": 3},
}
"""Arguments of the built-in terms that need some."""


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        *(
            ("format", {"penalties": {"bad_cell": penalty}}, f"penalties.bad_cell = {penalty!r}: ")
            for penalty in (-0.1, math.nan, math.inf, "1", True)
        ),
        (
            "group_agreement",
            {"mode": "votes"},
            "mode = 'votes': Input should be 'plurality' or 'soft'",
        ),
        ("group_agreement", {"max_perception_tokens": -1}, "max_perception_tokens = -1"),
        ("self_consistency", {"max_perception_tokens": 1.5}, "max_perception_tokens = 1.5"),
        ("self_consistency", {"leakage_check": True}, "leakage_check"),
        (
            "blind_solver",
            {"leakage_check": 1},
            "leakage_check = 1: Input should be a valid boolean",
        ),
        ("blind_policy", {"model": None}, "model = None"),
        ("blind_policy", {"max_tokens": 0}, "max_tokens = 0"),
        ("blind_policy", {"temperature": float("nan")}, "temperature = nan"),
        ("blind_policy", {"temperature": -1}, "temperature = -1"),
        ("image_dependence", {"view": "none"}, "view = 'none'"),
        ("image_dependence", {"cap": 0}, "cap = 0"),
        ("image_dependence", {"cap": float("inf")}, "cap = inf"),
        (
            "image_dependence",
            {"share": 1.01},
            "share = 1.01: Input should be less than or equal to 1",
        ),
        ("image_dependence", {"share": 0.0}, "share = 0.0: Input should be greater than 0"),
        ("image_dependence", {"patch_size": 0}, "patch_size = 0"),
        ("length", {"max_tokens": 0, "buffer": 1}, "max_tokens = 0"),
        ("length", {"max_tokens": 8.0, "buffer": 1}, "max_tokens = 8.0"),
        ("length", {"max_tokens": 8, "buffer": 9}, "buffer = 9: at most max_tokens"),
        ("length", {"max_tokens": 8, "buffer": True}, "buffer = True"),
        ("repetition", {"n": 0}, "n = 0"),
        ("repetition", {"max_penalty": -2.0}, "max_penalty = -2.0"),
        ("repetition", {"max_penalty": float("inf")}, "max_penalty = inf"),
        ("judge", {"base_url": None}, "base_url: Input should be"),
        ("judge", {"base_url": "localhost:8000"}, "base_url: no http address"),
        ("judge", {"base_url": "http://host:99999/v1"}, "base_url: no http address"),
        ("judge", {"base_url": "http://[::1/v1"}, "base_url: no http address"),
        ("judge", {"base_url": "http://host/v1/chat/completions/"}, "leave out"),
        ("judge", {"model": ""}, "model: "),
        ("judge", {"modle": "m"}, "modle: Extra inputs"),
        ("judge", {"rubric": ""}, "rubric: "),
        ("judge", {"name": "my judge"}, "name: "),
        ("judge", {"send_image": False}, "set `rubric`"),
        ("judge", {"send_image": 1}, "send_image: "),
        ("judge", {"structured": "regex"}, "structured"),
        ("judge", {"concurrency": 0}, "concurrency: "),
        ("judge", {"requests_per_minute": -1.0}, "requests_per_minute: "),
        ("judge", {"timeout_seconds": float("inf")}, "timeout_seconds: "),
        ("judge", {"retries": -1}, "retries: "),
        ("judge", {"max_tokens": 0}, "max_tokens: "),
        ("judge", {"temperature": float("nan")}, "temperature: "),
        ("judge", {"max_perception_tokens": -1}, "max_perception_tokens: "),
        ("judge", {"cache": "/dev/null/x"}, "cache: /dev/null/x: "),
    ],
)
def test_arguments_that_make_no_sense_are_named(name: str, args: dict[str, Any], says: str) -> None:
    with pytest.raises(TermError, match=f"reward term '{name}': args: ") as error:
        load_term(name, USABLE.get(name, {}) | args)
    assert says in str(error.value)


def test_terms_load_by_name_and_by_class() -> None:
    for name in BUILT_IN:
        assert load_term(name, USABLE.get(name)).name == name
    for name in USABLE:
        with pytest.raises(TermError, match="required"):
            load_term(name)
    mine = load_term("tests.support.toys:Length", {"scale": 2.0})
    assert mine(TASK, group(1, "1;2;")).tolist() == [8.0]
    assert isinstance(mine, Length)


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("percption", {}, 'did you mean "perception"'),
        ("zzz", {}, "outcome, perception"),
        ("tests.support.toys:Lenght", {}, 'did you mean "Length"'),
        ("tests.rewards.nowhere:Length", {}, "PYTHONPATH"),
        ("tests.support.toys:NoTerm", {}, "no RewardTerm"),
        ("tests.support.toys:TASK", {}, "not callable"),
        ("outcome", {"wieght": 1}, "args"),
    ],
)
def test_a_term_that_cannot_be_loaded_says_why(name: str, args: dict, says: str) -> None:
    with pytest.raises(TermError, match="reward term") as error:
        load_term(name, args)
    assert says in str(error.value)


def test_two_terms_never_share_a_name() -> None:
    with pytest.raises(TermError, match="'outcome'"):
        load_terms([RewardTermConfig(name="outcome"), RewardTermConfig(name="outcome")])
    second = RewardTermConfig(name="outcome", label="again")
    assert list(load_terms([RewardTermConfig(name="outcome"), second])) == ["outcome", "again"]
    toy = "tests.support.toys:Misbehaves"
    with pytest.raises(TermError, match="diagnosis"):
        load_terms([RewardTermConfig(name=toy, args={"what": "diagnosis"})])


def test_diagnose_leaves_the_group_alone() -> None:
    one = group(5, *FOUR)
    before = [r.parsed for r in one.rollouts]
    diagnose(TASK, one)
    assert [r.parsed for r in one.rollouts] == before


class HoldsAModel:
    """An asking term that takes a while, and memory, to make."""

    name = "holds"
    made: ClassVar[list[weakref.ref[HoldsAModel]]] = []

    def __init__(self, model: str) -> None:
        self.model = model
        self.made.append(weakref.ref(self))

    def ask(self, task: Task, group: Group, other: Problem | None) -> list[SampleRequest]:
        return []

    def score(self, task: Task, group: Group, replies: Sequence[Reply]) -> list[float]:
        return []


def test_where_a_term_does_not_work_it_is_made_once_and_let_go() -> None:
    term = {"name": "tests.rewards.test_terms:HoldsAModel", "args": {"model": "a/solver"}}
    head = {"name": "x", "model": {"path": "m"}, "tasks": [{"name": "sudoku"}]}
    recipe = Recipe.model_validate(head | {"reward": {"terms": [term, {"name": "outcome"}]}})
    specs = recipe.reward.effective_terms()
    # The plan, the check before the start, the engines and the pool of workers each ask.
    assert frozen_models(recipe, "train") == frozen_models(recipe, "sample") == ["a/solver"]
    assert (
        facts_of(specs)
        == facts_of(specs)
        == {
            "holds": TermFacts("holds", "a/solver", remote=False),
            "outcome": TermFacts("outcome", None, remote=False),
        }
    )
    assert [ref() for ref in HoldsAModel.made] == [None]
    # Other arguments make another term.
    assert term_facts(str(term["name"]), {"model": ""}).model == ""
    assert len(HoldsAModel.made) == 2
