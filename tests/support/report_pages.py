"""What tests of reports share: scored rollouts of each cell, hostile text, a page taken apart."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

import numpy as np

from rewards.compose import Composition, compose_groups
from rewards.scored import ScoredGroup
from rewards.terms import Outcome, Perception, score_group
from rollout.record import Group, Rollout
from tasks.core import Problem, Task
from tasks.graph_coloring import GraphColoring, GraphColoringSpec
from tasks.sudoku import Sudoku, SudokuSpec, grid_text

TERMS = {"outcome": Outcome(), "perception": Perception()}
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!-- <script> --> <!--",
    "<img src=x onerror=alert(1)><svg onload=alert(2)>",
    "\u202eevil\u202c \u2066x\u2069 \u200b\ufeff\x00\x07\x1b[2J\ud7ff",
    "]]>&lt;&#x3c;script&#x3e;{{ 7 * 7 }}{% raw %}\u2028\u2029",
    "line " * 40_000,
)


def grid_problem(seed: int) -> Problem:
    return Sudoku().generate(np.random.default_rng(seed), SudokuSpec(size=4, blanks=6))


def graph_problem(seed: int) -> Problem:
    return GraphColoring().generate(np.random.default_rng(seed), GraphColoringSpec(canvas=96))


def four_cells(problem: Problem) -> list[str]:
    """Sudoku responses of each cell of seeing × thinking, in the order of `CELLS`."""
    solution = [list(row) for row in problem.truth["solution"]]
    right = grid_text(solution)
    wrong = grid_text([[1] * 4] * 4)
    # One more clue erased is a wrong perception that the true solution still completes.
    puzzle = [list(row) for row in problem.truth["puzzle"]]
    r, c = next((r, c) for r in range(4) for c in range(4) if puzzle[r][c])
    puzzle[r][c] = 0
    return [
        f"<perception>\n{seen}\n</perception>\n<reasoning>\nso\n</reasoning>\n"
        f"<answer>\n{answer}\n</answer>"
        for seen in (problem.perception, grid_text(puzzle))
        for answer in (right, wrong)
    ]


def rollouts(task: Task, problem: Problem, texts: Sequence[str], step: int) -> ScoredGroup:
    group_id = f"step-{step}/{problem.id}"
    made = tuple(
        Rollout(
            rollout_id=f"{group_id}/{i}",
            group_id=group_id,
            kind="free",
            view="shown",
            prompt_ids=np.arange(3, dtype=np.int32),
            response_ids=np.arange(4, dtype=np.int32),
            images=(),
            logprobs=np.full(4, -0.5, dtype=np.float32),
            versions=np.full(4, step - 1, dtype=np.int32),
            segments=np.array([0, 1, 2, -1], dtype=np.int8),
            prefix="",
            text=text,
            parsed=task.parse(text),
            finish_reason="stop",
            seconds=0.1,
            sampler="sampler-0",
        )
        for i, text in enumerate(texts)
    )
    one = Group(group_id, problem, made)
    terms = Composition({"outcome": 0.75, "perception": 0.25}, on_failure={"perception": "zero"})
    return compose_groups([one], [score_group(task, one, TERMS)], terms)[0]


class Page(HTMLParser):
    """Every tag with its attributes, and the text of scripts and of the rest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._in = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in != "style":
            self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data[:50]}")


def data(found: Page) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(found.scripts[0])
    return loaded


def assert_described(found: Page, more_than: int) -> None:
    """Every picture has words, more than so many have, and no two ids are equal."""
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    pictures = [a for _, a in found.tags if a.get("role") == "img"]
    assert len(pictures) > more_than
    assert all(a["aria-describedby"] in ids and a["aria-labelledby"] in ids for a in pictures)
    assert all(a.get("aria-hidden") == "true" for tag, a in found.tags if tag == "svg")


def assert_inert(found: Page, html: str) -> None:
    """Two scripts, both ours and the only ones the page's policy allows; no handler, no address."""
    assert [a.get("type") for t, a in found.tags if t == "script"] == ["application/json", None]
    digest = base64.b64encode(hashlib.sha256(found.scripts[1].encode()).digest()).decode()
    policy = next(a["content"] for _, a in found.tags if "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    for tag, attributes in found.tags:
        assert tag not in ("iframe", "object", "embed", "link", "base", "img", "image")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "action", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    rest = html.replace(found.scripts[0], "")
    assert not re.search(r"https?:|//\w|@import|url\((?!#)|innerHTML|eval\(", rest)
    assert not re.search(r"[<>&]", found.scripts[0])
    assert not re.search(r"[\u202a-\u202e\u2066-\u2069\u200b\x00\x07\x1b]", html)
