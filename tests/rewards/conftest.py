"""A judge's server, and its client's pauses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.judge_server import FakeClock, Server


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.stop()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's pauses between tries pass on the judge's clock."""
    monkeypatch.setattr("anyio.sleep", lambda seconds: FakeClock.latest.sleep(seconds))
