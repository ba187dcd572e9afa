"""A worker's process that Ray has started again, which nobody told to load anything."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rewards import worker
from rewards.scored import DIAGNOSIS
from rewards.settings import RewardTermConfig
from rewards.worker import RemoteWorker, RewardWorker
from tests.support.toys import group

TOYS = "tests.support.toys"


@pytest.fixture(autouse=True)
def _no_limit(monkeypatch: Any) -> None:
    monkeypatch.setattr(worker, "limit_memory", lambda gib: None)


def test_it_scores_with_its_terms_from_the_first_call_on() -> None:
    entries = [RewardTermConfig(name="outcome"), RewardTermConfig(name="perception")]
    told, untold = RewardWorker(entries, 1.0), RewardWorker(entries, 1.0)
    told.ready()
    parts, chunk = ("outcome", "perception", DIAGNOSIS), [(group(3, "3;6;", "3;1;"), None)]
    (one,), (other,) = told.score(chunk, parts), untold.score(chunk, parts)
    assert one.values.keys() == other.values.keys() == {"outcome", "perception"}
    for name, values in one.values.items():
        assert values.tolist() == other.values[name].tolist()


def test_so_does_one_that_waits_for_others() -> None:
    untold = RemoteWorker([RewardTermConfig(name=f"{TOYS}:Waits")], 0.0)
    (found,) = asyncio.run(untold.score([group(3, "3;6;", "3;1;1")], ("waits",)))
    assert not found.failures
    assert {name: values.tolist() for name, values in found.values.items()} == {"waits": [4, 5]}
    assert asyncio.run(untold.counts()) == {"sent": 1.0, "most": 1.0}
