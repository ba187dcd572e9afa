"""Blind questions: by hand, against another implementation with a scripted reader, hostile banks.

The reader looks facts up ("red=3") in the description it is given, and knows some without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rewards.questions import BlindQuestions
from rewards.terms import load_term
from rollout.record import Group, SampleRequest
from tasks.core import Problem
from tasks.free_text import instructions
from tasks.load import load_task
from tests.support.surrogate_groups import HOSTILE, perception_length, rollout_of, says

VQA = load_task("vqa")
TRUE = {"red": "3", "blue": "12", "pet": "cat", "left": "yes"}
BANK: list[dict[str, Any]] = [
    {"question": "How many are red?", "answer": 3, "checker": "number"},
    {"question": "How many are blue?", "answer": ["12", "a dozen"]},
    {"question": "Which pet?", "answer": "B", "choices": ["dog", "cat", "newt"]},
    {"question": "Is it left?", "answer": "yes"},
]
KEYS = ("red", "blue", "pet", "left")


def problem(bank: Any = BANK, answer: str = "15") -> Problem:
    return Problem(
        id="p7",
        task="vqa",
        prompt=f"<image>How many in all?\n\n{instructions('segments')}",
        perception="",
        truth={"checker": "number", "answers": [answer], "choices": [], "options": {}},
        knobs={},
        symmetry_key="7",
        images=(b"picture",),
        extra={} if bank is None else {"questions": bank, "other": 1},
    )


def group(one: Problem, *perceptions: str | None, name: str = "s1-p7") -> Group:
    texts = ["unreadable" if p is None else says(p, "15") for p in perceptions]
    return Group(name, one, tuple(rollout_of(VQA, t, i) for i, t in enumerate(texts)))


def looked_up(request: SampleRequest, known: Mapping[str, str]) -> str:
    """What the reader answers to one question."""
    text = request.problem.prompt
    seen = text.partition("-----\n")[2].partition("\n-----")[0]
    question = text.rpartition("\n-----\n")[2]
    told = (request.prefix or seen).replace(";", " ").split()
    facts = {word.partition("=")[0]: word.partition("=")[2] for word in told}
    key = next((key for key in KEYS if key in question), "in all")
    if key == "in all" and {"red", "blue"} <= facts.keys():
        return str(int(facts["red"]) + int(facts["blue"]))
    return facts.get(key, known.get(key, "no idea"))


def replies(requests: Sequence[SampleRequest], known: Mapping[str, str] = {}) -> list[Group]:
    made = []
    for request in requests:
        answer = looked_up(request, known)
        task = load_task(request.problem.task)
        text = says("p", answer) if request.prefix == "" and task is VQA else answer
        if request.problem.task == "vqa/boxed":
            text = f"So it is \\boxed{{{answer}}}"
        elif request.prefix:
            text = f"<reasoning>\nso\n</reasoning>\n<answer>\n{answer}\n</answer>"
        rollout = rollout_of(task, text, prefix=request.prefix)
        made.append(Group(request.group_id, request.problem, (rollout,)))
    return made


def asks(**args: Any) -> BlindQuestions:
    """Of a frozen reader that is given perceptions in its prompt."""
    return BlindQuestions(**({"place": "prompt"} | args))


def scored(term: BlindQuestions, one: Group, known: Mapping[str, str] = {}) -> Any:
    requests = term.ask(VQA, one, None)
    return term.score(VQA, one, replies(requests, known))


def test_the_three_floors_by_hand() -> None:
    one = group(problem(), "red=3 blue=12 pet=cat left=yes", "red=3 blue=9", None, "nothing")
    known = {"left": "yes"}
    assert scored(asks(floor="condition"), one, known) == {
        "value": [1.0, 1 / 3, 0.0, 0.0],
        "floor": [0.25] * 4,
    }
    assert scored(asks(floor="subtract"), one, known) == {
        "value": [0.75, 0.25, -0.25, 0.0],  # nothing suffices for what is known anyway
        "floor": [0.25] * 4,
    }
    assert scored(asks(floor="keep"), one, known) == {"value": [1.0, 0.5, 0.0, 0.25]}
    everything = dict(TRUE)
    assert scored(asks(), one, everything)["value"] == [0.0] * 4
    assert scored(asks(), one, everything)["floor"] == [1.0] * 4


def test_what_is_asked() -> None:
    one = group(problem(), "red=3", "blue=1", "red=3", None)
    requests = asks(model="m", max_tokens=9, temperature=0.5).ask(VQA, one, None)
    assert len(requests) == len({r.group_id for r in requests}) == 4 * 3
    for place, request in enumerate(requests):
        assert request.problem.images == () and (request.kind, request.view) == ("blind", "none")
        assert (request.sampling.max_tokens, request.sampling.temperature) == (9, 0.5)
        assert request.problem.task == "vqa/boxed"
        assert request.problem.prompt.rstrip().endswith(instructions("boxed"))
        assert ("red=3" in request.problem.prompt) == (place % 3 == 1)
        assert BANK[place // 3]["question"] in request.problem.prompt
        # The answer is for the checker alone, and the other questions for themselves.
        assert "dozen" not in request.problem.prompt and "in all" not in request.problem.prompt
    assert "\n(A) dog\n(B) cat\n(C) newt\n" in requests[6].problem.prompt
    prefixed = asks(place="prefix", floor="keep").ask(VQA, one, None)
    assert [r.prefix for r in prefixed[:2]] == [
        f"<perception>\n{said}\n</perception>\n" for said in ("red=3", "blue=1")
    ]
    assert {r.problem.task for r in prefixed} == {"vqa"}
    assert scored(asks(place="prefix"), one)["value"] == [0.25, 0.0, 0.25, 0.0]
    assert asks().ask(VQA, group(problem(), None), None) == []
    assert asks().score(VQA, group(problem(), None), []) == [0.0]


def test_without_a_bank_it_is_the_problems_own_question() -> None:
    one = group(problem(None), "red=3 blue=12", "red=3 blue=13", "The answer is 15.")
    requests = asks().ask(VQA, one, None)
    assert len(requests) == 3  # of the one that states the answer nobody is asked
    for request in requests:
        # The form is the reader's, and the image is gone.
        assert request.problem.prompt.endswith(f"How many in all?\n\n{instructions('boxed')}")
    assert scored(asks(), one)["value"] == [1.0, 0.0, 0.0]
    stating = scored(asks(leakage_check=False), one, {"in all": "15"})
    assert stating["value"] == [0.0] * 3 and stating["floor"] == [1.0] * 3
    with pytest.raises(ValueError, match="p7: extra column 'elsewhere': missing"):
        asks(column="elsewhere").ask(VQA, one, None)
    assert len(asks(column="questions").ask(VQA, group(problem(), "red=3"), None)) == 8
    # Without a word about it a frozen model is prompted, and the policy begins with a perception.
    for model, prefix in (("m", ""), ("", "<perception>\nred=3\n</perception>\n")):
        term = load_term("blind_questions", {"model": model, "floor": "keep"})
        assert isinstance(term, BlindQuestions)
        (request,) = term.ask(VQA, group(problem(None), "red=3"), None)
        assert request.prefix == prefix


def test_length_decays_from_n_to_twice_n() -> None:
    short, long = "red=3", "red=3" + " and so on" * 30
    n = perception_length(says(short))
    m = perception_length(says(long))
    one = group(problem(BANK[:1]), short, long)

    def values(length_tokens: int, floor: Any = "condition") -> list[float]:
        term = asks(length_tokens=length_tokens, floor=floor)
        found = scored(term, one)
        return found["value"]

    assert values(0) == values(m) == [1.0, 1.0]
    assert values(n) == [1.0, 0.0]
    assert values(m // 2 + 20) == [1.0, pytest.approx(2 - m / (m // 2 + 20))]
    # A length at which nothing is earned is not asked about.
    assert len(asks(length_tokens=n).ask(VQA, one, None)) == 2
    assert values(n, "subtract") == [1.0, 0.0]
    # What is known anyway is taken off in full, however little is left of the rest.
    decayed = asks(length_tokens=m * 2 // 3, floor="subtract")
    two = group(problem([BANK[0], BANK[3]]), short, long)
    found = scored(decayed, two, {"left": "yes"})["value"]
    assert found == [0.5, pytest.approx(2 - m / (m * 2 // 3) - 0.5)]


def test_random_groups_equal_another_implementation() -> None:
    rng = np.random.default_rng(0)
    for number in range(100):
        told = []
        for _ in range(int(rng.integers(1, 6))):
            facts = {k: v if rng.random() < 0.7 else "99" for k, v in TRUE.items()}
            kept = {k: v for k, v in facts.items() if rng.random() < 0.7}
            told.append(None if rng.random() < 0.2 else kept)
        known = {k: TRUE[k] for k in KEYS if rng.random() < 0.3}
        floor = str(rng.choice(["condition", "subtract", "keep"]))
        texts = [
            None if f is None else "; ".join(f"{k}={v}" for k, v in f.items()) or "-" for f in told
        ]
        one = group(problem(), *texts, name=f"s{number}")
        found = scored(asks(floor=floor), one, known)  # type: ignore[arg-type]
        found = found if isinstance(found, list) else found["value"]
        expected = []
        for facts in told:
            counted = [k for k in KEYS if floor != "condition" or k not in known]
            right = [
                facts is not None and (facts | {}).get(k, known.get(k)) == TRUE[k] for k in counted
            ]
            share = sum(right) / len(counted) if counted else 0.0
            expected.append(share - (len(known) / 4 if floor == "subtract" else 0.0))
        if all(facts is None for facts in told):
            expected = [0.0] * len(told)
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_k_questions_are_drawn_for_a_group_and_anew_in_every_step() -> None:
    bank = [{"question": f"Q{i}?", "answer": str(i)} for i in range(30)]

    def drawn(name: str) -> list[str]:
        one = group(problem(bank), "red=3", "x", name=name)
        requests = asks(k=3, floor="keep").ask(VQA, one, None)
        return [r.problem.prompt.partition("Q")[2].partition("?")[0] for r in requests]

    first = drawn("s1-p7")
    assert drawn("s1-p7") == first and len(first) == 6 and len(set(first)) == 3
    assert first[::2] == first[1::2]  # all of a group get the same
    assert len({tuple(drawn(f"s{step}-p7")) for step in range(20)}) > 15
    ever = {number for step in range(60) for number in drawn(f"s{step}-p7")}
    assert ever == {str(i) for i in range(30)}


@pytest.mark.parametrize(
    ("bank", "words"),
    [
        ([], "expected a list"),
        ("How many?", "expected a list"),
        (["How many?"], "item 0: expected"),
        ([{"answer": "3"}], "item 0: expected"),
        ([{"question": "How many?"}], "item 0: it has no answer"),
        ([{"question": "?", "answer": "x", "checker": "box"}], "item 0: "),
        ([{"question": "?", "answer": "x", "checker": "guess"}], "checker 'guess'"),
        ([BANK[0], {"question": "?", "answer": "E", "choices": ["a", "b"]}], "item 1: "),
    ],
)
def test_a_bank_that_cannot_be_used_names_problem_column_and_item(bank: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r"p7.*'questions'") as caught:
        asks().ask(VQA, group(problem(bank), "red=3"), None)
    assert words in str(caught.value)


def test_arguments_and_hostile_perceptions() -> None:
    with pytest.raises(ValueError, match="checker = 'guess'"):
        load_term("blind_questions", {"checker": "guess"})
    one = replace(
        group(problem(), "red=3"),
        rollouts=tuple(rollout_of(VQA, text, i) for i, text in enumerate(HOSTILE)),
    )
    found = np.array(scored(asks(), one)["value"])
    assert found.shape == (len(HOSTILE),) and not found.any()
