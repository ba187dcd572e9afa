"""Chats: one question, a response of one turn or several, the answers between with their images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.core import DataError
from tasks.vqa.chat import read_chat
from tests.support.vqa_files import opened, picture, write_lines, write_pictures

CALL = "Closer. <look>0 0 500 500</look>"
END = "<perception>a</perception><reasoning>r</reasoning><answer>2</answer>"


def said(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_turns_and_images_go_to_the_question_and_to_the_answers(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.png", "b.png", "c.png", "d.png")
    names = ["a.png", "b.png", "c.png", "d.png"]
    chat = said(
        ("system", "Be brief."),
        ("user", "<image>How many bars, <image> or here?"),
        ("assistant", CALL),
        ("tool", "<image>\n<image>\nLook."),
        ("assistant", "And?"),
        ("user", "Nothing else."),
        ("assistant", END),
    )
    plain = said(
        ("user", "How many?"), ("assistant", CALL), ("user", "<image>"), ("assistant", END)
    )
    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "How many?"},
    ]
    more = [{"type": "image", "image": "d.png"}, {"type": "text", "text": "So."}]
    by_parts = said(("user", parts), ("assistant", CALL), ("user", more), ("assistant", END))
    rows = [
        {"messages": chat, "images": names},
        {"messages": plain, "images": names[:2]},
        {"messages": by_parts},
    ]
    found = opened(str(write_lines(tmp_path / "train.jsonl", rows)))
    assert not found.bad
    splits = found.rows.values()
    first, second, third = sorted(
        (example for split in splits for example in split),
        key=lambda e: (len(e.problem.images), e.earlier[0].text),
        reverse=True,
    )
    own = [picture(number) for number in range(1, 5)]
    assert first.problem.images == (own[0], own[1])
    assert [tuple(exchange) for exchange in first.earlier] == [
        (CALL, "Look.", (own[2], own[3])),
        ("And?", "Nothing else.", ()),
    ]
    assert first.response == END and first.problem.extra["system"] == "Be brief."
    assert second.problem.images == third.problem.images == (own[0],)
    assert [tuple(e) for e in second.earlier] == [(CALL, "So.", (own[3],))]
    assert [tuple(e) for e in third.earlier] == [(CALL, "", (own[1],))]
    # What is known without reading a row again, and what is read without its images.
    facts = {split.fact(at).later for split in splits for at in range(len(split))}
    assert facts == {((24, 16), (24, 16)), ((24, 16),)}
    bare = [len(e.earlier[0].images) for split in splits for e in split.without_images()]
    assert sorted(bare) == [1, 1, 2]


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([("user", "a"), ("user", "b")], "wanted one of the user's"),
        ([("user", "a"), ("assistant", "b"), ("user", "c")], "the last of them at the end"),
        ([("assistant", "b")], "wanted one of the user's"),
        ([("system", "b")], "wanted one of the user's"),
        ([("user", "a"), ("system", "b")], "wanted one of the user's"),
        (
            [("user", "a"), ("assistant", "b"), ("user", "see <image>"), ("assistant", "c")],
            "put images before its text",
        ),
        (
            [("user", "a"), ("assistant", "<image>"), ("user", "see"), ("assistant", "c")],
            "cannot show images",
        ),
    ],
)
def test_another_order_is_refused(turns: list[tuple[str, str]], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_chat(said(*turns))


def test_answers_that_show_more_images_than_there_are_make_a_bad_row(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.png")
    turns = said(
        ("user", "a"), ("assistant", CALL), ("user", "<image><image>b"), ("assistant", END)
    )
    row = {"messages": turns, "images": ["a.png"]}
    found = opened(str(write_lines(tmp_path / "train.jsonl", [row])))
    assert "answers to turns show 2 images, and there are 1" in str(found.bad)
