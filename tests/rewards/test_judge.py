"""The judge against a real HTTP server that misbehaves on demand."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import pickle
import re
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rewards.judge import Judge
from rewards.judge_client import MAX_REPLY_BYTES, JudgeError
from rewards.judge_forms import RUBRIC
from rewards.rate import TokenBucket
from rewards.terms import RemoteTerm
from rollout.record import Group
from tests.support.judge_server import (
    HOSTILE,
    FakeClock,
    Reply,
    Server,
    gives,
    make,
    run,
    says,
    seen,
)
from tests.support.toys import TASK, group

KEY = "sk-Very+Secret/0123456789=="


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.stop()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's pauses between tries pass on the judge's clock."""
    monkeypatch.setattr("anyio.sleep", lambda seconds: FakeClock.latest.sleep(seconds))


def error_of(judge: Judge, *groups: Group) -> JudgeError:
    with pytest.raises(JudgeError) as caught:
        run(judge, *groups)
    return caught.value


def data_message(body: dict[str, Any]) -> tuple[str, str]:
    """(delimiter, the line between the delimiters) of what was sent."""
    first, line, last = body["messages"][-1]["content"].split("\n")
    assert first == last
    return first, line


def test_a_score_is_a_tenth_each_and_only_what_can_be_judged_is_sent(server: Server) -> None:
    grades = {"one cell": 3, "two cells": 10, "none": 0}
    server.reply = lambda n, body: gives(grades[json.loads(data_message(body)[1])])
    one = seen("one cell", None, "two cells", "none", "one cell")
    judge = make(server.url)
    assert isinstance(judge, RemoteTerm)
    assert run(judge, one) == [[0.3, 0.0, 1.0, 0.0, 0.3]]
    assert len(server.bodies) == 3
    assert set(server.paths) == {"/v1/chat/completions"}
    assert (judge.counts()["shared"], judge.counts()["unreadable"]) == (1, 1)


def test_a_perception_longer_than_allowed_earns_nothing(server: Server) -> None:
    judge = make(server.url, max_perception_tokens=5)
    assert run(judge, seen("a", tokens=5), seen("a", tokens=6)) == [[0.7], [0.0]]
    assert judge.counts()["too_long"] == 1
    assert run(make(server.url, max_perception_tokens=0), seen("a", tokens=9999)) == [[0.7]]


def test_a_task_that_does_not_say_where_perception_stands_is_told(server: Server) -> None:
    with pytest.raises(ValueError, match=r"tests.support.toys:Doubling: .* spans"):
        run(make(server.url), group(1, "1;2;"))
    assert server.bodies == []


def check_sent(body: dict[str, Any], text: str, image: bytes) -> None:
    """What must hold of a request, whatever the perception says."""
    delimiter, line = data_message(body)
    assert re.fullmatch(r"data-[0-9a-f]{32}", delimiter)
    assert json.loads(line) == text
    assert line.isascii() and line.isprintable()
    assert delimiter not in line
    assert not re.search(r"[<>]|\[/?[A-Z]+\]", line)
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
    rules = body["messages"][0]["content"]
    assert rules.startswith(RUBRIC) and delimiter in rules
    picture, question = body["messages"][1]["content"]
    assert "Double the number" in question["text"]
    head, _, data = picture["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64" and base64.b64decode(data) == image
    # Nothing else of the rollout, and the perception nowhere else.
    assert "MY-" not in json.dumps(body)


def test_every_image_is_sent_in_order_and_none_where_there_is_none(server: Server) -> None:
    one = seen("a")
    several = replace(one.problem, images=(b"\x89PNG 1", b"\xff\xd8 2", b"\x89PNG 1"))
    for count in (3, 2, 0):
        problem = replace(several, images=several.images[:count])
        run(make(server.url), replace(one, problem=problem))
        *pictures, question = server.bodies[-1]["messages"][1]["content"]
        assert question["type"] == "text"
        urls = [picture["image_url"]["url"].partition(",") for picture in pictures]
        assert tuple(base64.b64decode(data) for _, _, data in urls) == problem.images
        assert [head for head, _, _ in urls][:2] == [
            f"data:image/{kind};base64" for kind in ("png", "jpeg")
        ][: len(problem.images)]


def test_any_text_stays_inside_its_delimiters() -> None:
    server = Server()
    judge = make(server.url)
    loop = asyncio.new_event_loop()
    delimiters: dict[str, str] = {}

    @given(st.text(max_size=60).filter(lambda t: not re.search(r"</?(perc|reas|answ)", t)))
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    def holds(text: str) -> None:
        one = seen(text)
        assert loop.run_until_complete(judge(TASK, one)) == [0.7]
        check_sent(server.bodies[-1], text.strip(), one.problem.images[0])
        delimiters[text.strip()] = data_message(server.bodies[-1])[0]

    for text in HOSTILE:
        holds = example(text)(holds)
    try:
        holds()
        loop.run_until_complete(judge.aclose())
    finally:
        loop.close()
        server.stop()
    assert len(set(delimiters.values())) == len(delimiters) > 10


def test_a_delimiter_depends_on_what_is_asked_and_on_nothing_else(server: Server) -> None:
    for url_args in ({}, {}, {"rubric": "Is it neat?"}, {"max_tokens": 9}):
        run(make(server.url, **url_args), seen("a"))
    run(make(server.url), seen("a", n=2))
    run(make(server.url), seen("b"))
    first, again, *others = [data_message(body)[0] for body in server.bodies]
    assert first == again
    assert len({first, *others}) == 5


def test_without_the_image_the_judge_sees_question_and_perception(server: Server) -> None:
    server.script(Reply(200, says('\n {"score":\t6}\n')))  # white space is fine
    assert run(make(server.url, send_image=False, rubric="Is it neat?"), seen("a")) == [[0.6]]
    assert "Authorization" not in server.headers[0]
    (question,) = server.bodies[0]["messages"][1]["content"]
    assert question["type"] == "text"
    assert "base64" not in json.dumps(server.bodies[0])


def test_the_form_of_a_reply_is_asked_for_as_the_recipe_says(server: Server) -> None:
    for structured in (True, False, "choice"):
        run(make(server.url, structured=structured, temperature=0.5), seen("a"))
    schema, words, choice = server.bodies
    properties = schema["response_format"]["json_schema"]["schema"]["properties"]
    assert properties["score"]["enum"] == list(range(11))
    assert not {"response_format", "structured_outputs"} & set(words)
    replies = [json.loads(reply) for reply in choice["structured_outputs"]["choice"]]
    assert replies == [{"score": n} for n in range(11)]
    assert (words["temperature"], words["max_tokens"], words["model"]) == (0.5, 64, "m")


# --- failures ---------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("", "empty_reply"),
        (None, "empty_reply"),
        (["10"], "empty_reply"),
        ("10", "malformed"),
        ("Score: 10", "malformed"),
        ('{"score": 10', "malformed"),
        ('{"score": 10} or so', "malformed"),
        ('```json\n{"score": 10}\n```', "malformed"),
        ('{"score": "10"}', "malformed"),
        ('{"score": 10.0}', "malformed"),
        ('{"score": true}', "malformed"),
        ('{"score": NaN}', "malformed"),
        ('{"score": null}', "malformed"),
        ('{"score": [10]}', "malformed"),
        ('{"score": 10, "why": "told to"}', "malformed"),
        ('{"score": 1, "score": 10}', "malformed"),
        ('{"score": ' + "9" * 5000 + "}", "malformed"),
        ("[" * 50_000, "malformed"),
        ('{"score": 11}', "out_of_range"),
        ('{"score": -1}', "out_of_range"),
    ],
)
def test_a_reply_that_is_no_score_is_never_a_zero(server: Server, content: Any, kind: str) -> None:
    server.script(Reply(200, says(content, "length")))
    # Asked the same way, a greedy judge says the same; a sample, or a slip of the server, may not.
    for args, tries in (
        ({"structured": False}, 1),
        ({"structured": False, "temperature": 1.0}, 3),
        ({"structured": True}, 3),
        ({"structured": "choice"}, 3),
    ):
        error = error_of(make(server.url, retries=2, **args), seen("a"))
        assert (error.kind, error.status, error.tries) == (kind, 200, tries)
        assert "finish_reason 'length'" in str(error) and str(error).isprintable()


def test_one_failure_fails_the_group_and_keeps_what_the_others_earned(
    server: Server, tmp_path: Path
) -> None:
    server.reply = lambda n, body: (
        Reply(404) if json.loads(data_message(body)[1]) == "bad" else gives(5)
    )
    judge = make(server.url, cache=str(tmp_path))
    error_of(judge, seen("good", "bad", "fine"))
    assert run(judge, seen("good", "fine")) == [[0.5, 0.5]]
    assert len(server.bodies) == 3
    copy = pickle.loads(pickle.dumps(error_of(judge, seen("bad"))))
    assert (copy.kind, copy.status, copy.tries) == ("refused", 404, 1)


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


def test_a_score_in_the_cache_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    assert run(make(server.url, cache=str(folder)), seen("a", "b")) == [[0.7, 0.7]]
    server.script(gives(1))
    judge = make(server.url, cache=str(folder))
    assert run(judge, seen("b", "a", None)) == [[0.7, 0.7, 0.0]]
    assert len(server.bodies) == 2
    assert (judge.counts()["cache_hits"], judge.counts()["requests"]) == (2, 0)
    assert {path.suffix for path in folder.iterdir()} == {".json"}

    # Whatever the score may hang on makes it another entry.
    for args, one in (
        ({"rubric": "Is it neat?"}, seen("a")),
        ({"temperature": 0.1}, seen("a")),
        ({"max_tokens": 9}, seen("a")),
        ({"structured": False}, seen("a")),
        ({}, seen("A")),
        ({}, seen("a", n=2)),
    ):
        assert run(make(server.url, cache=str(folder), **args), one) == [[0.1]]
    other = Judge(base_url=server.url, model="other", cache=str(folder))
    assert run(other, seen("a")) == [[0.1]]
    # What it cannot hang on does not.
    kept = make(server.url, cache=str(folder), retries=0, concurrency=1, name="again")
    assert run(kept, seen("a")) == [[0.7]]
    assert len(server.bodies) == 9


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b'{"score": 7',
        b'{"score": 77}',
        b"\xff\x00",
        b"[" * 5000,
        b'{"score": 7}',
        b"null",
        None,
    ],
)
def test_a_damaged_entry_is_named_and_asked_again(
    server: Server, tmp_path: Path, damage: bytes | None
) -> None:
    run(make(server.url, cache=str(tmp_path)), seen("a"))
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    # None: a whole entry, but that of another request.
    entry.write_bytes(whole.replace(entry.stem.encode(), b"0" * 64) if damage is None else damage)
    judge = make(server.url, cache=str(tmp_path))
    with pytest.warns(UserWarning, match=re.escape(str(entry))):
        assert run(judge, seen("a")) == [[0.7]]
    assert entry.read_bytes() == whole
    assert (judge.counts()["cache_corrupt"], len(server.bodies)) == (1, 2)


def test_writers_at_the_same_time_leave_whole_entries(server: Server, tmp_path: Path) -> None:
    judges = [make(server.url, cache=str(tmp_path)) for _ in range(4)]
    texts = [f"p{i}" for i in range(8)]
    threads = [threading.Thread(target=run, args=(judge, seen(*texts))) for judge in judges]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    entries = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    assert [entry["score"] for entry in entries] == [7] * 8
    assert sum(judge.counts()["given_up"] for judge in judges) == 0


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
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
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
