"""The pool on a real local Ray: whatever a term does, the others score and nothing hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from rewards.compose import Composition, compose_groups
from rewards.pool import RewardPool
from rewards.processes import CHUNK
from rewards.reward_model import RewardModel
from rewards.scored import RewardError
from rewards.settings import RewardConfig, RewardTermConfig
from rewards.terms import Outcome, Perception
from rollout.record import ReplyError, SampleRequest
from tests.rewards.test_reward_model import classifier
from tests.support.ray_heads import local_ray
from tests.support.toys import Length, Misbehaves, group, score

TOYS = "tests.support.toys"


@pytest.fixture(scope="module", autouse=True)
def ray_is_up() -> Iterator[None]:
    with local_ray(cpus=1):
        yield


@pytest.fixture
def pool() -> Iterator[Callable[..., RewardPool]]:
    """Makes pools, and closes them after the test."""
    made: list[RewardPool] = []

    def make(*terms: RewardTermConfig, answerers: Any = None, **fields: Any) -> RewardPool:
        made.append(RewardPool(RewardConfig(terms=terms, **fields), answerers=answerers))
        return made[-1]

    yield make
    for one in made:
        one.close()


def term(name: str, on_failure: Any = "abort", **fields: Any) -> RewardTermConfig:
    """A built-in term, one of the toys, or one that misbehaves as its name says."""
    args = {key: fields.pop(key) for key in [*fields] if key in ("scale", "what", "misbehaves")}
    if name[0].isupper():
        name = f"{TOYS}:{name}"
    elif name not in ("outcome", "perception"):
        fields["label"], args = name, {"what": name}
        name = f"{TOYS}:Misbehaves"
    fields.setdefault("args", args)
    return RewardTermConfig(name=name, on_failure=on_failure, **fields)


def failures(scored: Any) -> list[tuple[str, str]]:
    return [(failure.term, failure.kind) for failure in scored.failures]


def test_the_pool_equals_scoring_in_this_process_and_a_hang_ends_it_under_abort(pool: Any) -> None:
    rest = [group(i, f"{i};{2 * i};", f"{i};1;", "4;8;") for i in range(1, 2 * CHUNK + 3)]
    terms = [term("outcome"), term("perception"), term("Length", weight=0.1, scale=2.0)]
    made = pool(*terms, term("hang"), workers=2)
    found = made.score(rest)
    weights = {"outcome": 1.0, "perception": 1.0, "length": 0.1, "hang": 1.0}
    alone = [Outcome(), Perception(), Length(2.0), Misbehaves("hang")]
    expected = compose_groups(rest, [score(g, *alone) for g in rest], Composition(weights))
    assert [g.group.group_id for g in found] == [g.group_id for g in rest]
    assert [g.advantages.tolist() for g in found] == [g.advantages.tolist() for g in expected]
    assert all(g.diagnosis is not None and len(g.seconds) == 4 for g in found)
    assert made.composition_at(0.0).weights == weights
    assert made.restarts == 0

    made = pool(term("outcome"), term("hang"), deadline_seconds=3.0)
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"'\w+' failed on group 'g-0'.*deadline"):
        made.score([*rest[:3], group(0, "0;0;")])
    assert time.monotonic() - start < 60


def test_failing_terms_come_back_typed_and_abort_ends_with_their_own_words(pool: Any) -> None:
    kinds = {"raise": "exception", "nan": "nan", "short": "wrong_length", "words": "not_numbers"}
    hog = term("Hog", "zero")
    made = pool(term("outcome"), *(term(name, "zero") for name in kinds), hog, memory_gib=0.5)
    found, other = made.score([group(0, "0;0;", "0;1;"), group(1, "1;2;")])
    assert failures(found) == [*kinds.items(), ("hog", "exception")]
    assert "MemoryError" in found.failures[-1].traceback
    assert found.totals.tolist() == [1.0, 0.0]
    # A term that eats memory fails alone, and its worker lives on.
    assert not other.failures and made.restarts == 0

    made = pool(term("outcome"), term("raise"))
    with pytest.raises(RewardError) as error:
        made.score([group(1, "1;2;"), group(0, "0;0;")])
    assert str(error.value).startswith("Traceback")
    assert 'raise KeyError("no such cell")' in str(error.value)
    assert "'raise' failed on group 'g-0'" in str(error.value)


def test_a_hang_and_a_crash_are_blamed_on_their_term_and_group_alone(pool: Any) -> None:
    groups = [group(i, f"{i};{2 * i};", f"{i};1;") for i in range(3)]
    # Ray takes a second or two to tell that a process died, more on a busy machine; the deadline
    # must not come first.
    terms = [term("outcome"), term("crash", "drop_group"), term("hang", "zero")]
    made = pool(*terms, deadline_seconds=15.0)
    found = made.score(groups)
    assert [g.dropped for g in found] == [True, False, False]
    assert [set(failures(g)) for g in found] == [
        {("crash", "worker_died"), ("hang", "deadline")},
        set(),
        set(),
    ]
    assert all(g.diagnosis is not None for g in found)
    assert found[0].terms["outcome"].tolist() == [1.0, 0.0]
    assert found[1].terms["hang"].tolist() == [1.0, 1.0]
    assert made.restarts == 3  # the chunk, then the two guilty pieces

    # The pool still works, on a worker that was started again.
    assert not made.score(groups[1:])[0].failures


def test_a_worker_that_stands_still_is_replaced_and_its_groups_are_scored_again(pool: Any) -> None:
    made = pool(term("outcome"), deadline_seconds=4.0)
    groups = [group(i, f"{i};{2 * i};", f"{i};1;") for i in range(3)]
    before = [g.totals.tolist() for g in made.score(groups)]
    below = psutil.Process().children(recursive=True)
    workers = [p for p in below if "ray::RewardWorker" in " ".join(p.cmdline())]
    assert workers
    for worker in workers:  # those of other tests have ended, or will not be asked
        worker.suspend()
    after = made.score(groups)
    assert [g.totals.tolist() for g in after] == before
    assert not any(g.failures for g in after) and made.restarts == 1
    psutil.wait_procs(workers, timeout=60)
    assert not any(worker.is_running() for worker in workers)


def test_a_function_scores_a_group_or_the_whole_step_and_fails_for_all_of_it(pool: Any) -> None:
    groups = [group(i, *["1" * i + ";;"] * i, ";9;") for i in range(1, CHUNK + 3)]
    name = f"{TOYS}:above_the_mean"
    own = [
        RewardTermConfig(name=name),
        RewardTermConfig(name=name, label="of_step", scope="step"),
        RewardTermConfig(name=f"{TOYS}:later"),
        *(
            RewardTermConfig(
                name=name, label=what, args={"what": what}, scope="step", on_failure="zero"
            )
            for what in ("hang", "short")
        ),
    ]
    # What does not hang must be done by then on a busy machine too.
    made = pool(*own, deadline_seconds=10.0, workers=2)
    for more in ([], [group(0, "0;0;")]):
        found = made.score([*groups, *more])
        lengths = [[len(r.text) for r in g.group.rollouts] for g in found]
        together = np.mean(np.concatenate(lengths))
        for scored, own_lengths in zip(found, lengths, strict=True):
            mine = np.array(own_lengths, dtype=float)
            np.testing.assert_allclose(scored.terms["above_the_mean"], mine - mine.mean())
            np.testing.assert_allclose(scored.terms["of_step"], mine - together, atol=1e-12)
            assert scored.terms["later"].tolist() == mine.tolist()
            failed = [("hang", "deadline"), ("short", "wrong_length")] if more else []
            assert sorted(failures(scored)) == failed


def test_a_reward_model_has_a_process_of_its_own_beside_the_other_terms(
    pool: Any, tmp_path: Path
) -> None:
    args = {"model": str(classifier(tmp_path / "m"))}
    groups = [group(i, f"{i};{2 * i};", "9;9;") for i in range(3)]
    made = pool(term("outcome"), RewardTermConfig(name="reward_model", args=args))
    alone = RewardModel(**args)
    for scored in made.score(groups):
        texts = [rollout.text for rollout in scored.group.rollouts]
        expected = alone.scores(scored.group.problem.prompt, texts)
        np.testing.assert_allclose(scored.terms["reward_model"], expected, atol=1e-5)
        assert not scored.failures and scored.terms["outcome"][1] == 0


def test_a_pool_that_cannot_start_says_why(pool: Any) -> None:
    with pytest.raises(RewardError, match=r"cannot start: .*did you mean .Length."):
        pool(term("Lenght"))
    with pytest.raises(RewardError, match="no sampler runs such a model"):
        pool(term("Asks"), answerers={"f": Echo()})


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


def test_answers_come_back_to_the_rollouts_that_asked(pool: Any) -> None:
    both = threading.Barrier(2)  # each answers once the other is asked
    policy, frozen = Echo(beside=both), Echo(beside=both)
    groups = [group(i, f"{i};2;", ";;", "777;1;", f"{i};1;") for i in range(2 * CHUNK + 3)]
    terms = [term("Asks"), term("Asks", label="frozen", args={"model": "f"})]
    found = pool(*terms, workers=2, answerers={"": policy, "f": frozen}).score(groups)
    for name in ("asks", "frozen"):
        assert [g.terms[name].tolist() for g in found] == [[1.0, 0.0, 0.0, 1.0]] * len(groups)
    assert len(policy.seen) == len(frozen.seen) == 3 * len(groups)
    # A swap needs another problem of the step.
    assert all(r.problem.id != r.group_id.split("-")[1] for r in policy.seen)
    assert all(g.seconds["asks"] > 0 and g.diagnosis is not None for g in found)


@pytest.mark.parametrize(
    ("misbehaves", "answers", "kind"),
    [
        ("", Echo("g-0", "refused"), "model"),
        ("", Echo("g-0", "deadline"), "deadline"),
        ("ask", Echo(), "exception"),
        ("words", Echo(), "exception"),
        ("score", Echo(), "worker_died"),
    ],
)
def test_an_asking_term_fails_typed_whichever_half_or_answer_fails(
    pool: Any, misbehaves: str, answers: Echo, kind: str
) -> None:
    asks = term("Asks", "zero", misbehaves=misbehaves)
    found = pool(term("outcome"), asks, answerers={"": answers}).score(
        [group(0, "0;0;", "0;1;"), group(1, "1;2;")]
    )
    assert failures(found[0]) == [("asks", kind)]
    assert not answers.broken or "too long" in found[0].failures[0].message
    assert found[0].totals.tolist() == [1.0, 0.0]
    assert bool(found[1].failures) == (misbehaves == "words")


def test_remote_terms_wait_side_by_side_and_never_too_many(pool: Any) -> None:
    groups = [group(i, f"{i};{2 * i};", "9;9;") for i in range(12)]
    made = pool(term("outcome"), term("Waits", what="three"), remote_in_flight=3)
    found = made.score(groups)
    assert [g.terms["waits"].tolist() for g in found] == [
        [float(len(r.text)) for r in g.rollouts] for g in groups
    ]
    assert made.counts() == {"waits/calls/sent": 12.0, "waits/calls/most": 3.0}


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
def test_a_remote_term_that_misbehaves_fails_alone(pool: Any, what: str, kind: str) -> None:
    groups = [group(i, f"{i};{2 * i};", "9;9;") for i in range(5)]
    waits = term("Waits", "drop_group", what=what)
    # Only what hangs waits for it; Ray may take long to tell that a process died.
    seconds = 8.0 if kind == "deadline" else 60.0
    made = pool(term("outcome"), waits, remote_seconds=seconds, remote_in_flight=2)
    found = made.score(groups)
    assert [g.dropped for g in found] == [True, False, False, False, False]
    assert failures(found[0]) == [("waits", kind)]
    assert all(g.terms["waits"].tolist()[1] == 4.0 for g in found[1:])


def test_abort_ends_remote_calls_that_are_in_flight(pool: Any) -> None:
    start = time.monotonic()
    with pytest.raises(RewardError, match="no such cell"):
        pool(term("raise"), term("Waits", what="hang")).score([group(0, "0;0;"), group(1, "1;2;")])
    assert time.monotonic() - start < 60
