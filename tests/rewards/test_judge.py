"""What a judge is asked and what it says, against a real HTTP server that misbehaves on demand."""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import re
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rewards.judge import Judge
from rewards.judge_forms import RUBRIC
from rewards.terms import RemoteTerm
from tests.support.judge_server import (
    HOSTILE,
    Reply,
    Server,
    error_of,
    gives,
    make,
    run,
    says,
    seen,
)
from tests.support.toys import TASK, group

pytestmark = pytest.mark.usefixtures("no_waiting")


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
    @settings(max_examples=60)
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
