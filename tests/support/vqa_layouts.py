"""The layouts of public data sets, each with what its rows must be read as. One file: one table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.vqa_files import (
    cell,
    picture,
    write_lines,
    write_parquet,
    write_pictures,
    zip_pictures,
)


@dataclass(frozen=True)
class Case:
    """A layout: what writes its file, and what its rows must be read as."""

    name: str
    write: Callable[[Path], Path]
    golds: Sequence[tuple[str, ...]]
    checker: str
    images: Sequence[int]
    """How many images each row has."""
    asks: str
    """Stands in the first row's prompt."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Some of what the first row's other columns hold."""


def _parquet(*rows: dict[str, Any]) -> Callable[[Path], Path]:
    return lambda folder: write_parquet(folder / "train.parquet", rows)


def _lines(*rows: dict[str, Any], pictures: Sequence[str] = ()) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_pictures(folder, *pictures)
        return write_lines(folder / "train.jsonl", rows)

    return write


def _zipped(zip_name: str, names: Sequence[str], *rows: dict[str, Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        zip_pictures(folder / zip_name, *names)
        return write_parquet(folder / "train.parquet", rows)

    return write


def _verl(question: str, number: int, gold: str, **more: Any) -> dict[str, Any]:
    return {
        "data_source": "own/bars",
        "prompt": [{"role": "user", "content": question}],
        "images": [cell(number)],
        "ability": "count",
        "reward_model": {"style": "rule", "ground_truth": gold},
        **more,
    }


def _orsta(question: str, number: int, gold: str, verifier: str) -> dict[str, Any]:
    judged = {"answer": gold, "ground_truth": gold, "verifier": verifier}
    judged |= {"accuracy_ratio": 1.0, "format_ratio": 0.0, "verifier_parm": {"det": 0.5}}
    return {**_verl(question, number, gold), "reward_model": judged}


def _blink(number: int, count: int, answer: str) -> dict[str, Any]:
    pictures = {f"image_{n}": cell(number + n) if n <= count else None for n in range(1, 5)}
    return {
        "idx": f"bars_{number}",
        "question": "Which picture has more bars?",
        "sub_task": "Relative_Count",
        **pictures,
        "choices": ["the first", "the second"],
        "answer": answer,
        "prompt": "Which picture has more bars?\nChoose:\n(A) the first\n(B) the second",
    }


_HUMAN = "<image>Give the box of the tallest bar."
_CHAT = [
    {"role": "system", "content": "You count."},
    {
        "role": "user",
        "content": [
            {"type": "image", "image": "a.png"},
            {"type": "text", "text": "How many bars?"},
        ],
    },
]

CASES = (
    Case(
        "hiyouga/geometry3k",
        _parquet(
            {
                "images": [cell(3)],
                "problem": "<image>Find x.",
                "answer": r"2 \sqrt { 3 }",
                "id": "7",
                "choices": ["1", "2"],
                "ground_truth": "B",
            },
            {
                "images": [cell(4)],
                "problem": "<image>Find y.",
                "answer": "12",
                "id": "8",
                "choices": ["12", "2"],
                "ground_truth": "A",
            },
        ),
        [(r"2 \sqrt { 3 }",), ("12",)],
        "expression",
        [1, 1],
        "Find x.",
        {"id": "7", "choices": ["1", "2"], "ground_truth": "B"},
    ),
    Case(
        "FanqingM/MMK12",
        _parquet(
            {"id": "a", "question": "How many?", "answer": "3", "subject": "math", "image": cell(3)}
        ),
        [("3",)],
        "expression",
        [1],
        "How many?",
        {"subject": "math"},
    ),
    Case(
        "TIGER-Lab/ViRL39K",
        lambda folder: (
            write_pictures(folder, "images/a.png", "images/b.png"),
            write_parquet(
                folder / "39Krelease.parquet",
                [
                    {
                        "question": "<image>How many?",
                        "answer": r"\boxed{\frac{1}{2}}",
                        "image": ["images/a.png"],
                        "category": "bars",
                        "source": "own",
                        "qid": "q1",
                        "PassRate_32BTrained": 0.5,
                    },
                    {
                        "question": "Which?",
                        "answer": r"\boxed{B}",
                        "image": ["images/b.png"],
                        "category": "bars",
                        "source": "own",
                        "qid": "q2",
                        "PassRate_32BTrained": -1.0,
                    },
                ],
            ),
        )[1],
        [(r"\frac{1}{2}",), ("B",)],
        "expression",
        [1, 1],
        "How many?",
        {"qid": "q1", "category": "bars", "PassRate_32BTrained": 0.5},
    ),
    Case(
        "BUAADreamer/clevr_count_70k",
        _parquet({"images": [cell(5)], "problem": "<image>How many bars?", "answer": "5"}),
        [("5",)],
        "expression",
        [1],
        "How many bars?",
    ),
    Case(
        "CLEVR CoGenT / GEOQA R1V",
        _parquet(
            {"image": cell(3), "problem": "How many?", "solution": "<answer> 3 </answer>"},
            {"image": cell(4), "problem": "What angle?", "solution": "<answer> 145° </answer>"},
            {"image": cell(5), "problem": "How many?", "solution": "5"},
        ),
        [("3",), ("145°",), ("5",)],
        "expression",
        [1, 1, 1],
        "How many?",
    ),
    Case(
        "multimodal-open-r1-8k-verified",
        _parquet(
            {
                "image": cell(3),
                "problem": "Which? A. 2 B. 3",
                "original_question": "Which?",
                "original_answer": "B",
                "solution": "<think>\nI count three.\n</think>\n\n<answer>B</answer>",
            }
        ),
        [("B",)],
        "expression",
        [1],
        "Which? A. 2 B. 3",
        {"original_answer": "B"},
    ),
    Case(
        "OpenGVLab/MMPR-Tiny",
        _zipped(
            "images.zip",
            ["images/x.png", "images/y.png"],
            {
                "data_source": "own",
                "images": [{"path": "images/x.png"}, {"path": "images/y.png"}],
                "extra_info": {"question": "<image_1> and <image_2>: how many more?", "index": 4},
                "reward_model": {"ground_truth": "1", "style": "rule"},
            },
        ),
        [("1",)],
        "expression",
        [2],
        "how many more?",
        {"data_source": "own"},
    ),
    Case(
        "DeepEyes 47k",
        _parquet(
            _verl(
                "<image>\nWhat is the colour of the first bar?",
                3,
                "It is dark blue.",
                env_name="zoom",
                extra_info={"index": "1"},
            ),
            _verl("<image>\nHow many?", 4, "4", env_name="zoom", extra_info={"index": "2"}),
        ),
        [("It is dark blue.",), ("4",)],
        "",
        [1, 1],
        "the first bar?",
        {"env_name": "zoom", "ability": "count"},
    ),
    Case(
        "Orsta 47k",
        _parquet(
            _orsta("<image>How many?", 3, "3", "mathverify"),
            _orsta("<image>Where?", 4, "[[1, 2, 10, 12]]", "detection"),
        ),
        [("3",), ("[[1, 2, 10, 12]]",)],
        "",
        [1, 1],
        "How many?",
        {"ability": "count"},
    ),
    Case(
        "PixelReasoner RL",
        _zipped(
            "images.zip",
            ["p1.png", "p2.png"],
            {
                "qid": "1",
                "question": "Which? A. 1 B. 2",
                "image": ["images/p1.png"],
                "is_video": False,
                "answer": "A",
            },
            {
                "qid": "2",
                "question": "Which? A. 1 B. 2",
                "image": ["images/p2.png"],
                "is_video": False,
                "answer": "B",
            },
        ),
        [("A",), ("B",)],
        "expression",
        [1, 1],
        "A. 1 B. 2",
        {"qid": "1", "is_video": False},
    ),
    Case(
        "VLM-R1 REC",
        _lines(
            {
                "id": 1,
                "image": "a.png",
                "conversations": [
                    {"from": "human", "value": _HUMAN},
                    {"from": "gpt", "value": "[2, 0, 8, 14]"},
                ],
            },
            {
                "id": 2,
                "image": ["a.png", "b.png"],
                "conversations": [
                    {
                        "from": "human",
                        "value": "<image><image>Give the box of the bar that both have.",
                    },
                    {"from": "gpt", "value": "[2, 0, 6, 14]"},
                ],
            },
            pictures=["a.png", "b.png"],
        ),
        [("[2, 0, 8, 14]",), ("[2, 0, 6, 14]",)],
        "box",
        [1, 2],
        "the tallest bar",
        {"id": 1},
    ),
    Case(
        "jxu124/refcoco",
        lambda folder: (
            write_pictures(folder, "coco/1.png", "coco/2.png"),
            write_parquet(
                folder / "all.parquet",
                [
                    {
                        "captions": ["the bar on the left", "left bar"],
                        "bbox": [0.0, 0.0, 4.0, 16.0],
                        "image_path": "coco/1.png",
                        "split": "train",
                        "ref_id": 3,
                    },
                    {
                        "captions": ["the second bar"],
                        "bbox": [2.0, 0.0, 4.5, 16.0],
                        "image_path": "coco/2.png",
                        "split": "val",
                        "ref_id": 4,
                    },
                ],
            ),
        )[1],
        [("[0.0, 0.0, 4.0, 16.0]",), ("[2.0, 0.0, 4.5, 16.0]",)],
        "box",
        [1, 1],
        "the bar on the left",
        {"ref_id": 3, "split": "train"},
    ),
    Case(
        "ViRFT",
        _parquet(
            {
                "image": cell(3),
                "problem": "What is it?",
                "solution": "<answer>a bar chart</answer>",
            },
            {
                "image": cell(4),
                "problem": "Where are the bars?",
                "solution": "<answer>[{'Position': [1, 2, 3, 14], 'Confidence': 1}]</answer>",
            },
        ),
        [("a bar chart",), ("[[1, 2, 3, 14]]",)],
        "",
        [1, 1],
        "What is it?",
    ),
    Case(
        "lmms-lab/ChartQA",
        _parquet(
            {"type": "human_test", "question": "How tall?", "answer": "42.5", "image": cell(3)},
            {"type": "human_test", "question": "Does it grow?", "answer": "Yes", "image": cell(4)},
        ),
        [("42.5",), ("Yes",)],
        "number",
        [1, 1],
        "How tall?",
        {"type": "human_test"},
    ),
    Case(
        "DocVQA",
        _parquet(
            {
                "questionId": "9",
                "question": "What is the title?",
                "image": cell(3),
                "docId": 4,
                "answers": ["Annual Report", "annual report 2020"],
            }
        ),
        [("Annual Report", "annual report 2020")],
        "text",
        [1],
        "the title?",
        {"questionId": "9"},
    ),
    Case(
        "ScreenSpot",
        _parquet(
            {
                "file_name": "x.png",
                "bbox": [0.1, 0.2, 0.5, 0.4],
                "instruction": "close the window",
                "data_type": "icon",
                "data_source": "windows",
                "image": cell(3),
            }
        ),
        [("[0.1, 0.2, 0.5, 0.4]",)],
        "point",
        [1],
        "close the window",
        {"data_type": "icon"},
    ),
    Case(
        "SAT",
        _parquet(
            {
                "image_bytes": [picture(3), picture(4)],
                "question": "Did it grow?",
                "answers": ["yes", "no"],
                "question_type": "action",
                "correct_answer": "yes",
                "correct_answer_idx": 0,
            }
        ),
        [("yes",)],
        "choice",
        [2],
        "(B) no",
        {"question_type": "action"},
    ),
    Case(
        "V* bench",
        _parquet(
            {
                "image": cell(3),
                "text": "Which colour?\n(A) red\n(B) blue",
                "label": "B",
                "category": "direct_attributes",
                "question_id": "4",
            }
        ),
        [("B",)],
        "choice",
        [1],
        "(A) red",
        {"category": "direct_attributes"},
    ),
    Case(
        "BLINK",
        _parquet(_blink(2, 2, "(B)"), _blink(7, 1, "(A)")),
        [("(B)",), ("(A)",)],
        "choice",
        [2, 1],
        "(B) the second",
        {"sub_task": "Relative_Count"},
    ),
    Case(
        "MM-Eureka",
        _lines({"id": "1", "message": json.dumps(_CHAT), "answer": "3"}, pictures=["a.png"]),
        [("3",)],
        "expression",
        [1],
        "How many bars?",
        {"system": "You count.", "id": "1"},
    ),
    Case(
        "LLaMA-Factory",
        _lines(
            {
                "messages": [
                    {"role": "user", "content": "<image>How many?"},
                    {"role": "assistant", "content": "There is one bar."},
                ],
                "images": ["a.png"],
            },
            pictures=["a.png"],
        ),
        [("There is one bar.",)],
        "",
        [1],
        "How many?",
    ),
    Case(
        "query, image, ground_truth, response",
        _parquet(
            {
                "query": "How many?",
                "image": cell(3),
                "ground_truth": "3",
                "response": "<perception>3</perception>",
            }
        ),
        [("3",)],
        "expression",
        [1],
        "How many?",
    ),
)
"""All of the 22 but the one with URLs, which needs a server (see `test_layouts.py`)."""
