"""What tests of reports share: scored rollouts of each cell, hostile text, a page taken apart."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from html.parser import HTMLParser
from typing import Any

import numpy as np

from cluster.record.evaluation import EvalTable, before_after
from cluster.record.tracker import Tracker
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


def table_of(**values: Sequence[float]) -> EvalTable:
    per = {m: {f"p{i}": float(v) for i, v in enumerate(vs)} for m, vs in values.items()}
    return EvalTable(per)


def evaluation(before: EvalTable, after: EvalTable) -> dict[str, Any]:
    change = before_after(before, after)
    return {
        "before": before.to_dict(),
        "after": after.to_dict(),
        "change": {"rows": [asdict(row) for row in change]},
    }


def coins(share: float, n: int = 200) -> list[float]:
    return [float(i < share * n) for i in range(n)]


SEEING = evaluation(
    table_of(a=coins(0.3), a_p=coins(0.3), a_r=coins(0.5)),
    table_of(a=coins(0.5), a_p=coins(0.8), a_r=coins(0.5)),
)


RUN_RECIPE = """
name = "trial"
question = "Is it seeing?"
seed = 3
[model]
path = "/somewhere/secret/tiny-vlm"
dtype = "float32"
[[tasks]]
name = "sudoku"
[reward]
alpha = 0.25
[algorithm]
steps = 3
problems_per_step = 2
group_size = 4
"""


def log_steps(tracker: Tracker, steps: int = 3) -> None:
    for step in range(1, steps + 1):
        tracker.log(
            step,
            {
                "acc/a": 0.1 * step,
                "acc/a_p": 0.2 * step,
                "acc/self_consistency": 0.5,
                "reward/outcome/mean": 0.1 * step,
                "reward/outcome/failures": float(step == 2),
                "reliability/outcome/within": 0.3,
                "reliability/outcome/auc": 0.6,
                "coupling/outcome_perception/within": 0.2,
                "learner/loss": 0.1,
                "learner/entropy/perception": 0.2,
                "learner/logprob_gap": 1e-5,
                "response/share/perception": 0.4,
                "response/share/reasoning": 0.6,
                "group/dropped": 0.0,
                "time/sample": 2.0,
                "time/learn": 1.0,
                "time/step": 3.0,
                "idle/learner": 0.6,
            },
        )
        problem = grid_problem(step % 2)  # that of step 1 comes again at step 3
        groups = [rollouts(Sudoku(), problem, four_cells(problem), step)]
        graph = graph_problem(step)
        texts = [GraphColoring().demonstrate(graph, "terse"), "nothing", *HOSTILE]
        groups.append(rollouts(GraphColoring(), graph, texts, step))
        tracker.log_rollouts(step, groups)
