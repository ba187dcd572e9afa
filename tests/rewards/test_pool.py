"""The pool on a real local Ray: whatever a term does, the others score and nothing hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from rewards.compose import Composition, compose_groups
from rewards.pool import CHUNK, Limits, RewardPool
from rewards.scored import RewardError
from rewards.settings import RewardTermConfig
from rewards.terms import Outcome, Perception
from rollout.record import ReplyError, SampleRequest
from tests.support.toys import Length, Misbehaves, group, score

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()


def spec(name: str, on_failure: Any = "abort", weight: float = 1.0, **args: Any) -> Any:
    if ":" not in name and name not in ("outcome", "perception"):
        name, args = "tests.support.toys:Misbehaves", {"what": name}
    return RewardTermConfig(name=name, weight=weight, args=args, on_failure=on_failure)


def test_the_pool_equals_scoring_in_this_process_and_a_hang_ends_it_under_abort() -> None:
    rest = [group(i, f"{i};{2 * i};", f"{i};1;", "4;8;") for i in range(1, 2 * CHUNK + 3)]
    length = spec("tests.support.toys:Length", weight=0.1, scale=2.0)
    pool = RewardPool([spec("outcome"), spec("perception"), length, spec("hang")], workers=2)
    found = pool.score(rest)
    weights = {"outcome": 1.0, "perception": 1.0, "length": 0.1, "hang": 1.0}
    terms = [Outcome(), Perception(), Length(2.0), Misbehaves("hang")]
    expected = compose_groups(rest, [score(g, *terms) for g in rest], Composition(weights))
    assert [g.group.group_id for g in found] == [g.group_id for g in rest]
    assert [g.advantages.tolist() for g in found] == [g.advantages.tolist() for g in expected]
    assert all(g.diagnosis is not None and len(g.seconds) == 4 for g in found)
    assert pool.composition_at(0.0).weights == weights
    assert pool.restarts == 0

    pool = RewardPool([spec("outcome"), spec("hang")], limits=Limits(deadline_seconds=1.0))
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"'\w+' failed on group 'g-0'.*deadline"):
        pool.score([*rest[:3], group(0, "0;0;")])
    assert time.monotonic() - start < 60


def test_failing_terms_come_back_typed_and_abort_ends_with_their_own_words() -> None:
    names = ("raise", "nan", "short", "words")
    pool = RewardPool([spec("outcome"), *(spec(name, "zero") for name in names)])
    (found,) = pool.score([group(0, "0;0;", "0;1;")])
    kinds = [(f.term, f.kind) for f in found.failures]
    assert kinds == list(
        zip(names, ("exception", "nan", "wrong_length", "not_numbers"), strict=True)
    )
    assert found.totals.tolist() == [1.0, 0.0]

    pool = RewardPool([spec("outcome"), spec("raise")])
    with pytest.raises(RewardError) as error:
        pool.score([group(1, "1;2;"), group(0, "0;0;")])
    assert str(error.value).startswith("Traceback")
    assert 'raise KeyError("no such cell")' in str(error.value)
    assert "'raise' failed on group 'g-0'" in str(error.value)


def test_a_hang_and_a_crash_are_blamed_on_their_term_and_group_alone() -> None:
    groups = [group(i, f"{i};{2 * i};", f"{i};1;") for i in range(3)]
    # Ray takes a second or two to tell that a process died; the deadline must not come first.
    pool = RewardPool(
        [spec("outcome"), spec("crash", "drop_group"), spec("hang", "zero")],
        limits=Limits(deadline_seconds=5.0),
    )
    found = pool.score(groups)
    assert [g.dropped for g in found] == [True, False, False]
    assert [{(f.term, f.kind) for f in g.failures} for g in found] == [
        {("crash", "worker_died"), ("hang", "deadline")},
        set(),
        set(),
    ]
    assert all(g.diagnosis is not None for g in found)
    assert found[0].terms["outcome"].tolist() == [1.0, 0.0]
    assert found[1].terms["hang"].tolist() == [1.0, 1.0]
    assert pool.restarts == 3  # the chunk, then the two guilty pieces

    # The pool still works, on a worker that was started again.
    assert not pool.score(groups[1:])[0].failures
    pool.close()


def test_a_pool_that_cannot_start_says_why() -> None:
    with pytest.raises(RewardError, match="did you mean 'Length'"):
        RewardPool([spec("tests.support.toys:Lenght")])


def test_a_term_that_eats_memory_fails_alone_and_its_worker_lives_on() -> None:
    pool = RewardPool(
        [spec("outcome"), spec("tests.support.toys:Hog", "zero")], limits=Limits(memory_gib=0.5)
    )
    found = pool.score([group(0, "0;0;", "0;1;"), group(1, "1;2;")])
    assert [(f.term, f.kind) for f in found[0].failures] == [("hog", "exception")]
    assert "MemoryError" in found[0].failures[0].traceback
    assert found[0].totals.tolist() == [1.0, 0.0]
    assert not found[1].failures
    assert pool.restarts == 0
    pool.close()


class Echo:
    """A model that says what it was forced to say, or cannot answer for one problem."""

    def __init__(
        self, broken: str = "", kind: Any = "refused", beside: threading.Barrier | None = None
    ) -> None:
        self.broken, self.kind, self.beside = broken, kind, beside
        self.seen: list[SampleRequest] = []

    def answer(self, requests: Any, seconds: float) -> list[Any]:
        self.seen += requests
        if self.beside is not None:
            self.beside.wait(60)
        return [
            ReplyError(r.group_id, self.kind, "too long")
            if r.group_id.startswith(self.broken or "never")
            else group(1, r.prefix if "777" not in r.prefix else "0;0;")
            for r in requests
        ]


def asks(on_failure: Any = "zero", **args: Any) -> RewardTermConfig:
    return spec("tests.support.toys:Asks", on_failure, **args)


def test_answers_come_back_to_the_rollouts_that_asked() -> None:
    both = threading.Barrier(2)  # each answers once the other is asked
    policy, frozen = Echo(beside=both), Echo(beside=both)
    other = RewardTermConfig(name="tests.support.toys:Asks", label="frozen", args={"model": "f"})
    groups = [group(i, f"{i};2;", ";;", "777;1;", f"{i};1;") for i in range(2 * CHUNK + 3)]
    pool = RewardPool([asks(), other], workers=2, answerers={"": policy, "f": frozen})
    found = pool.score(groups)
    assert [g.terms["asks"].tolist() for g in found] == [[1.0, 0.0, 0.0, 1.0]] * len(groups)
    assert [g.terms["frozen"].tolist() for g in found] == [[1.0, 0.0, 0.0, 1.0]] * len(groups)
    assert len(policy.seen) == len(frozen.seen) == 3 * len(groups)
    # A swap needs another problem of the step.
    assert all(r.problem.id != r.group_id.split("-")[1] for r in policy.seen)
    assert all(g.seconds["asks"] > 0 and g.diagnosis is not None for g in found)
    pool.close()
    with pytest.raises(RewardError, match="no sampler runs such a model"):
        RewardPool([asks()], answerers={"f": frozen})


@pytest.mark.parametrize(("kind", "says"), [("refused", "model"), ("deadline", "deadline")])
def test_a_model_that_cannot_answer_fails_that_term_on_that_group(kind: str, says: str) -> None:
    pool = RewardPool([spec("outcome"), asks()], answerers={"": Echo("g-0", kind)})
    found = pool.score([group(0, "0;0;", "0;1;"), group(1, "1;2;")])
    assert [(f.term, f.kind) for f in found[0].failures] == [("asks", says)]
    assert "too long" in found[0].failures[0].message
    assert found[0].totals.tolist() == [1.0, 0.0]
    assert not found[1].failures and found[1].totals.tolist() == [2.0]
    pool.close()


def test_both_halves_of_an_asking_term_may_fail_typed() -> None:
    groups = [group(0, "0;0;"), group(1, "1;2;")]
    for misbehaves, kind in (
        ("ask", "exception"),
        ("words", "exception"),
        ("score", "worker_died"),
    ):
        pool = RewardPool([spec("outcome"), asks(misbehaves=misbehaves)], answerers={"": Echo()})
        found = pool.score(groups)
        assert [(f.term, f.kind) for f in found[0].failures] == [("asks", kind)]
        assert found[0].terms["outcome"].tolist() == [1.0]
        assert bool(found[1].failures) == (misbehaves == "words")
        pool.close()


def test_remote_terms_wait_side_by_side_and_never_too_many() -> None:
    groups = [group(i, f"{i};{2 * i};", "9;9;") for i in range(12)]
    pool = RewardPool(
        [spec("outcome"), spec("tests.support.toys:Waits")], limits=Limits(remote_in_flight=3)
    )
    found = pool.score(groups)
    assert [g.terms["waits"].tolist() for g in found] == [
        [float(len(r.text)) for r in g.rollouts] for g in groups
    ]
    assert pool.counts() == {"waits/calls/sent": 12.0, "waits/calls/most": 3.0}
    pool.close()


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("hang", "deadline"),
        ("block", "deadline"),
        ("crash", "worker_died"),
        ("raise", "exception"),
        ("short", "wrong_length"),
    ],
)
def test_a_remote_term_that_misbehaves_fails_alone(what: str, kind: str) -> None:
    groups = [group(i, f"{i};{2 * i};", "9;9;") for i in range(5)]
    pool = RewardPool(
        [spec("outcome"), spec("tests.support.toys:Waits", "drop_group", what=what)],
        limits=Limits(remote_seconds=5.0, remote_in_flight=2),
    )
    found = pool.score(groups)
    assert [g.dropped for g in found] == [True, False, False, False, False]
    assert [(f.term, f.kind) for f in found[0].failures] == [("waits", kind)]
    assert all(g.terms["waits"].tolist()[1] == 4.0 for g in found[1:])
    pool.close()


def test_abort_ends_remote_calls_that_are_in_flight() -> None:
    pool = RewardPool([spec("raise"), spec("tests.support.toys:Waits", what="hang")])
    start = time.monotonic()
    with pytest.raises(RewardError, match="no such cell"):
        pool.score([group(0, "0;0;"), group(1, "1;2;")])
    assert time.monotonic() - start < 60
