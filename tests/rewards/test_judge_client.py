"""How a judge's client waits, tries again and gives up, keeps keys and rates, on a real server."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import pickle
import socket
import threading
import time
import traceback
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.judge import Judge
from rewards.judge_client import MAX_REPLY_BYTES
from rewards.rate import TokenBucket
from tests.support.judge_server import (
    FakeClock,
    Reply,
    Server,
    error_of,
    gives,
    make,
    run,
    says,
    seen,
)
from tests.support.toys import TASK

KEY = "sk-Very+Secret/0123456789=="

pytestmark = pytest.mark.usefixtures("no_waiting")


def test_a_server_that_is_down() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    judge = make(f"http://127.0.0.1:{port}/v1", retries=3)
    error = error_of(judge, seen("a"))
    assert (error.kind, error.status, error.tries) == ("connection", None, 4)
    for part in (f"127.0.0.1:{port}/v1", "'m'", "no reply", "4 tries", "server is up"):
        assert part in str(error)
    assert judge.counts()["failures/connection"] == 4
    # Doubled with each try, less a jitter.
    pauses = judge.client.clock.slept
    assert [0.3 < p / 2**i <= 0.5 for i, p in enumerate(pauses)] == [True] * 3


def test_pauses_have_a_ceiling_and_without_trouble_nobody_waits(server: Server) -> None:
    server.script(*[Reply(500)] * 9, gives(4))
    judge = make(server.url, retries=9)
    assert run(judge, seen("a")) == [[0.4]]
    assert 6 <= max(judge.client.clock.slept) <= 8
    quiet = make(server.url)
    run(quiet, seen(*"abcdefgh"))
    assert quiet.client.clock.slept == []


@pytest.mark.parametrize("drip", [False, True])
def test_a_server_that_is_too_slow(server: Server, drip: bool) -> None:
    server.reply = lambda n, body: Reply(
        then=(lambda: None) if drip else lambda: server.over.wait(60), drip=drip
    )
    error = error_of(make(server.url, retries=1, timeout_seconds=0.2), seen("a"))
    assert (error.kind, error.status, error.tries) == ("timeout", None, 2)
    assert "within 0.2 s" in str(error) and "timeout_seconds" in str(error)


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (Reply(500, b'{"error": {"message": "boom"}}'), "server_error"),
        (Reply(503, b"<html>busy</html>"), "server_error"),
        (Reply(429, b'{"error": {"message": "slow down"}}'), "rate_limit"),
        (Reply(hang_up=True), "connection"),
        (Reply(200, b"[" * 100_000), "no_completion"),
        (Reply(200, b'{"choices": []}'), "no_completion"),
        (Reply(200, b'{"choices": [{"message": null}]}'), "no_completion"),
        (Reply(200, b"<html>hello</html>"), "no_completion"),
        (Reply(200, b""), "no_completion"),
        (Reply(200, b"1" * 5000), "no_completion"),
        (Reply(200, b" " * (MAX_REPLY_BYTES + 1)), "huge_reply"),
    ],
)
def test_trouble_that_passes_is_counted_and_forgotten(
    server: Server, trouble: Reply, kind: str
) -> None:
    server.script(trouble, trouble, gives(9))
    judge = make(server.url, structured=False)
    assert run(judge, seen("a")) == [[0.9]]
    counts = judge.counts()
    assert (counts["requests"], counts["retries"], counts["given_up"]) == (3, 2, 0)
    assert counts[f"failures/{kind}"] == 2


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [("17", 17, 17), ("2.5", 2.5, 2.5), ("soon", 0.3, 0.5), ("", 0.3, 0.5), ("-3", 0.3, 0.5)],
)
def test_retry_after_is_honoured(server: Server, header: str, least: float, most: float) -> None:
    server.script(Reply(429, headers={"Retry-After": header}), gives(1))
    judge = make(server.url)
    assert run(judge, seen("a")) == [[0.1]]
    assert least <= sum(judge.client.clock.slept) <= most + 1e-6


def test_retry_after_may_be_a_date(server: Server) -> None:
    later = formatdate(time.time() + 100, usegmt=True)
    server.script(Reply(503, headers={"Retry-After": later}), gives(1))
    judge = make(server.url)
    assert run(judge, seen("a")) == [[0.1]]
    assert 50 < sum(judge.client.clock.slept) <= 100


def test_retry_after_holds_all_requests(server: Server) -> None:
    arrivals: list[float] = []
    judge = make(server.url, concurrency=1)

    def reply(n: int, body: dict[str, Any]) -> Reply:
        arrivals.append(judge.client.clock.now())
        return Reply(503, headers={"Retry-After": "100"}) if n == 0 else gives(1)

    server.reply = reply
    assert run(judge, seen("a", "b", "c")) == [[0.1] * 3]
    assert arrivals[0] == 0 and min(arrivals[1:]) >= 100
    # Not only the one that was refused waits: the next in line does too.
    assert sum(pause >= 99 for pause in judge.client.clock.slept) >= 2


def test_a_wait_beyond_reason_fails_at_once(server: Server) -> None:
    server.script(Reply(429, headers={"Retry-After": "86400"}))
    judge = make(server.url)
    error = error_of(judge, seen("a"))
    assert (error.kind, error.status, error.tries) == ("rate_limit", 429, 1)
    assert "wait 86400 s" in str(error)
    assert judge.client.clock.slept == []


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422])
def test_a_refusal_fails_at_once_with_the_servers_own_words(server: Server, status: int) -> None:
    words = "no such\x1b[31m model\n" + "z" * 5000
    server.script(Reply(status, json.dumps({"error": {"message": words}}).encode()))
    error = error_of(make(server.url), seen("a"))
    assert (error.kind, error.status, error.tries) == ("refused", status, 1)
    assert "no such [31m model zzz" in str(error)
    assert str(error).isprintable() and len(str(error)) < 700
    assert ("structured = false" in str(error)) == (status in (400, 422))
    assert len(server.bodies) == 1


def test_an_endless_body_is_not_read_to_its_end(server: Server) -> None:
    server.script(Reply(200, b" " * (MAX_REPLY_BYTES + 1), drip=True))
    error = error_of(make(server.url, retries=0), seen("a"))
    assert (error.kind, error.status) == ("huge_reply", 200)


def test_nothing_is_unpacked(server: Server) -> None:
    import gzip

    server.script(Reply(200, gzip.compress(says('{"score": 1}')), {"Content-Encoding": "gzip"}))
    assert error_of(make(server.url, retries=0), seen("a")).kind == "no_completion"
    assert server.headers[0]["Accept-Encoding"] == "identity"


# --- the key ----------------------------------------------------------------------------------


def test_the_key_is_in_the_header_and_nowhere_else(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    echo = json.dumps({"error": {"message": "x" * 270 + f"wrong key {KEY}"}}).encode()
    server.script(gives(5), Reply(500, echo), Reply(200, says(f"{KEY}")), Reply(401, echo))
    judge = make(server.url, api_key_env="JUDGE_KEY", cache=str(tmp_path), retries=5)
    assert run(judge, seen("a")) == [[0.5]]
    error = error_of(judge, seen("b"))
    assert (error.status, error.tries) == (401, 3)
    assert [h["Authorization"] for h in server.headers] == [f"Bearer {KEY}"] * 4

    shown = ["".join(traceback.format_exception(error)), repr(error.__dict__), caplog.text]
    shown += [
        repr(vars(judge)),
        str(judge.settings),
        str(judge.counts()),
        json.dumps(server.bodies),
    ]
    shown += [path.read_text() + path.name for path in tmp_path.iterdir()]
    assert len(shown) == 8 and "DEBUG" in caplog.text
    for part in (KEY, KEY[:8], base64.b64encode(KEY.encode()).decode()):
        assert not [text for text in shown if part in text]
    assert KEY.encode() not in pickle.dumps(error)


@pytest.mark.parametrize("value", ["", f"{KEY}\n", f" {KEY}", f"{KEY}\u2019", "\r\n"])
def test_a_key_that_is_not_set_or_that_no_header_takes_is_refused_unseen(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", value)
    says = "JUDGE_KEY holds white space" if value else "JUDGE_KEY is not set"
    with pytest.raises(ValueError, match=says) as error:
        make("http://localhost/v1", api_key_env="JUDGE_KEY")
    assert KEY not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"api_key": KEY}, "api_key_env"),
        ({"api_key_env": KEY}, "never an argument"),
        ({"api_key_env": "abcdef0123456789"}, "never an argument"),
        ({"base_url": f"http://me:{KEY[:10]}@host/v1"}, "api_key_env"),
        ({"base_url": f"http://host/v1?key={KEY}"}, "api_key_env"),
        ({"base_url": f"http://me:{KEY[:10]}"}, "no http address"),
    ],
)
def test_a_key_in_the_wrong_place_is_refused_unseen(args: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        Judge(**{"base_url": "http://host/v1", "model": "m"} | args)
    text = "".join(traceback.format_exception(error.value))
    # The call above is quoted in the traceback; the values are not in it.
    assert KEY not in text and "sk-Very" not in text and "abcdef0" not in text
    assert error.value.__cause__ is None and error.value.__context__ is None


# --- cache, concurrency, rate -----------------------------------------------------------------


def test_no_more_requests_are_in_flight_than_allowed(server: Server) -> None:
    together = threading.Barrier(3)
    # A reply leaves only when three requests are there, so three must be let through.
    server.reply = lambda n, body: Reply(200, gives(2).body, then=lambda: together.wait(60))
    judge = make(server.url, concurrency=3)
    groups = [seen(*[f"{i}.{j}" for j in range(3)]) for i in range(4)]
    assert run(judge, *groups) == [[0.2] * 3] * 4
    assert server.most_in_flight == 3


def test_the_rate_holds_at_the_server_for_tries_too(server: Server) -> None:
    judge = make(server.url, concurrency=1, requests_per_minute=30.0)
    arrivals: list[float] = []

    def reply(n: int, body: dict[str, Any]) -> Reply:
        arrivals.append(judge.client.clock.now())
        return Reply(500) if n == 3 else gives(2)

    server.reply = reply
    assert run(judge, seen(*"abcd"), seen(*"efgh")) == [[0.2] * 4] * 2
    assert len(arrivals) == 9
    assert np.diff(arrivals) == pytest.approx([2.0] * 8)


@given(st.floats(0.5, 600), st.lists(st.floats(0, 20), min_size=1, max_size=25), st.integers(0, 20))
@settings(max_examples=60)
def test_a_token_bucket_never_exceeds_its_rate(
    per_minute: float, waits: list[float], closed_at: int
) -> None:
    clock = FakeClock()
    bucket = TokenBucket(per_minute, clock)
    gone: list[float] = []
    closed: list[tuple[float, float]] = []

    async def one(i: int, wait: float) -> None:
        if wait:
            await clock.sleep(wait)
        if i == closed_at:
            bucket.close_for(7.0)
            closed.append((clock.now(), clock.now() + 7.0))
        await bucket.take()
        gone.append(clock.now())

    async def everyone() -> None:
        await asyncio.gather(*(one(i, wait) for i, wait in enumerate(waits)))

    asyncio.run(everyone())
    assert len(gone) == len(waits)
    rate = per_minute / 60
    for i, start in enumerate(gone):
        for j in range(i, len(gone)):
            assert j - i + 1 <= max(1, rate) + rate * (gone[j] - start) + 1e-6
    assert not [t for t in gone for start, end in closed if start < t < end - 1e-9]


def test_a_call_that_is_cancelled_gives_its_place_back(server: Server) -> None:
    server.reply = lambda n, body: (
        gives(7) if n else Reply(then=lambda: server.over.wait(60), hang_up=True)
    )
    judge = make(server.url, concurrency=1, timeout_seconds=60.0)

    async def scene() -> list[float]:
        hanging = asyncio.create_task(judge(TASK, seen("a")))
        while not server.bodies:
            await asyncio.sleep(0.01)
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        scores = await judge(TASK, seen("b"))
        await judge.aclose()
        return scores

    assert asyncio.run(scene()) == [0.7]


def test_a_judge_outlives_an_event_loop(server: Server) -> None:
    judge = make(server.url)
    for text in "abc":
        assert asyncio.run(judge(TASK, seen(text))) == [0.7]
    run(judge, seen("d"))


def test_the_counts_are_all_numbers(server: Server) -> None:
    server.script(Reply(500), gives(3))
    judge = make(server.url, name="second-judge")
    run(judge, seen("a", "a", None))
    counts = judge.counts()
    assert judge.name == "second-judge"
    assert all(isinstance(value, int | float) for value in counts.values())
    assert (counts["requests"], counts["retries"], counts["shared"]) == (2, 1, 1)
    assert 0 <= counts["latency_mean"] <= counts["latency_max"]
