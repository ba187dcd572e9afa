"""The pool on a real local Ray: whatever a term does, the others score and nothing hangs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rewards.compose import Composition, compose_groups
from rewards.records import RewardError
from rewards.terms import Outcome, Perception
from rewards.worker import CHUNK, RewardPool
from tests.rewards.toys import Length, Misbehaves, group, score

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield
    ray.shutdown()


def spec(name: str, on_failure: str = "abort", weight: float = 1.0, **args: Any) -> Any:
    if ":" not in name and name not in ("outcome", "perception"):
        name, args = "tests.rewards.toys:Misbehaves", {"what": name}
    return SimpleNamespace(name=name, weight=weight, args=args, on_failure=on_failure)


def test_the_pool_equals_scoring_in_this_process_and_a_hang_ends_it_under_abort() -> None:
    rest = [group(i, f"{i};{2 * i};", f"{i};1;", "4;8;") for i in range(1, 2 * CHUNK + 3)]
    length = spec("tests.rewards.toys:Length", weight=0.1, scale=2.0)
    pool = RewardPool([spec("outcome"), spec("perception"), length, spec("hang")], workers=2)
    found = pool.score(rest)
    weights = {"outcome": 1.0, "perception": 1.0, "length": 0.1, "hang": 1.0}
    terms = [Outcome(), Perception(), Length(2.0), Misbehaves("hang")]
    expected = compose_groups(rest, [score(g, *terms) for g in rest], Composition(weights))
    assert [g.group.group_id for g in found] == [g.group_id for g in rest]
    assert [g.advantages.tolist() for g in found] == [g.advantages.tolist() for g in expected]
    assert all(g.diagnosis is not None and len(g.seconds) == 4 for g in found)
    assert pool.composition.weights == weights
    assert pool.restarts == 0

    pool.deadline_seconds = 1.0
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

    pool.composition = Composition({"outcome": 1.0, "raise": 1.0})
    with pytest.raises(RewardError) as error:
        pool.score([group(1, "1;2;"), group(0, "0;0;")])
    assert str(error.value).startswith("Traceback")
    assert 'raise KeyError("no such cell")' in str(error.value)
    assert "'raise' failed on group 'g-0'" in str(error.value)


def test_a_hang_and_a_crash_are_blamed_on_their_term_and_group_alone() -> None:
    groups = [group(i, f"{i};{2 * i};", f"{i};1;") for i in range(3)]
    # Ray takes a second or two to tell that a process died; the deadline must not come first.
    pool = RewardPool(
        [spec("outcome"), spec("crash", "drop_group"), spec("hang", "zero")], deadline_seconds=5.0
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
        RewardPool([spec("tests.rewards.toys:Lenght")])
