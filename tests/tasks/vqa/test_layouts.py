"""Files in the layouts of the public data sets load without a word about their columns."""

from __future__ import annotations

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tasks.checkers import CHECKERS, Gold
from tasks.core import DataError
from tasks.settings import TaskConfig
from tasks.vqa.opening import open_data, row_reader
from tests.support.vqa_files import opened, picture, problems, write_parquet, write_pictures
from tests.support.vqa_layouts import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layout_needs_no_columns(case: Case, tmp_path: Path) -> None:
    found = opened(str(case.write(tmp_path)))
    assert not found.bad
    rows = problems(found)
    assert [tuple(row.truth["answers"]) for row in rows] == list(case.golds)
    assert [len(row.images) for row in rows] == list(case.images)
    assert case.asks in rows[0].prompt
    assert not case.checker or {row.truth["checker"] for row in rows} == {case.checker}
    assert case.extra.items() <= rows[0].extra.items()
    for row in rows:
        truth = row.truth
        gold = Gold(tuple(truth["answers"]), tuple(truth["choices"]), truth["options"])
        said = "[0.3, 0.3]" if truth["checker"] == "point" else truth["answers"][0]
        assert CHECKERS[truth["checker"]].right(said, gold)
        assert not CHECKERS[truth["checker"]].right("", gold)


def test_each_row_has_the_checker_that_its_verifier_or_gold_tells(tmp_path: Path) -> None:
    routed = {case.name: case for case in CASES}
    for name, wanted in (("Orsta 47k", ["expression", "box"]), ("ViRFT", ["expression", "box"])):
        rows = problems(opened(str(routed[name].write(tmp_path / name))))
        assert [row.truth["checker"] for row in rows] == wanted


def test_images_by_url_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_pictures(tmp_path / "web", "a.png")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "web")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}"
    rows = [
        {"images": [f"{home}/{name}"], "problem": "<image>How many?", "answer": "1"}
        for name in ("a.png", "none.png")
    ]
    try:
        file = write_parquet(tmp_path / "train.parquet", rows)
        first = opened(str(file))
    finally:
        server.shutdown()
        server.server_close()
    assert [row.images for row in problems(first)] == [(picture(1),)]
    assert ["cannot be fetched" in bad.reason for bad in first.bad] == [True]
    assert [row.images for row in problems(opened(str(file)))] == [(picture(1),)]


def test_options_are_shown_where_an_option_is_asked_for(tmp_path: Path) -> None:
    row = {"problem": "Which is more?", "answer": "B", "choices": ["one bar", "two bars"]}
    rows = [row | {"verifier": "choice"}, row | {"verifier": "text"}]
    write_parquet(tmp_path / "train.parquet", rows)
    reader = row_reader(TaskConfig(name="vqa", data="x", checker={"column": "verifier"}))
    found = open_data(str(tmp_path), reader)
    asked, plain = (p.prompt.partition("\n\n")[0] for p in problems(found))
    assert asked == "Which is more?\n(A) one bar\n(B) two bars" and plain == "Which is more?"
    assert [p.truth["choices"] for p in problems(found)] == [["one bar", "two bars"], []]


def test_named_columns_go_before_what_is_known(tmp_path: Path) -> None:
    row = {
        "images": [picture(1)],
        "photo": picture(2),
        "problem": "<image>How many?",
        "answer": "1",
        "meta": {"gold": "7", "ask": "What is the last digit?"},
    }
    file = str(write_parquet(tmp_path / "train.parquet", [row]))
    (told,) = problems(opened(file, question="meta.ask", answer="meta.gold", images="photo"))
    assert (told.prompt, told.truth["answers"]) == ("What is the last digit?", ["7"])
    assert told.images == (picture(2),)
    assert told.extra["problem"] == "<image>How many?" and "images" not in told.extra
    (half,) = problems(opened(file, answer="meta.gold"))
    assert (half.prompt, half.truth["answers"]) == ("<image>How many?", ["7"])


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"anwser": "answer"}, "columns: no 'anwser' (did you mean 'answer'?)"),
        ({"answer": "anser"}, "columns.answer: no column 'anser' (did you mean 'answer'?)"),
    ],
)
def test_a_wrong_column_is_named(columns: dict[str, str], said: str, tmp_path: Path) -> None:
    rows = [{"problem": "How many?", "answer": "1"}]
    file = write_parquet(tmp_path / "train.parquet", rows)
    with pytest.raises(DataError) as caught:
        opened(str(file), **columns)
    assert said in str(caught.value) and str(file) in str(caught.value)


def test_columns_that_tell_nothing_are_listed(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "train.parquet", [{"a": "x", "b": "y"}])
    with pytest.raises(DataError, match=r"which is the answer and question.* there are a, b"):
        opened(str(file))
