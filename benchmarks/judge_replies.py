"""How many replies of a real judge can be used, and whether they tell true from false.

`python -m benchmarks.judge_replies --model NAME --base-url http://127.0.0.1:8000/v1` asks a model
behind an OpenAI-compatible server, as the term `judge` asks it, about perceptions of scenes: the
true one and one in which every number is wrong. The judge is shown the true list in place of the
picture, so a model that reads text can do it. Printed: what share of replies was no verdict, why,
and how often the true perception got the higher score (.5 where it cannot tell).
"""

from __future__ import annotations

import argparse
import asyncio
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from rewards.judge import Judge
from rewards.judge_client import JudgeError
from tasks.core import Problem
from tasks.load import load_task
from tasks.splits import draw_problem

RUBRIC = """\
You compare a text with a list. The list, in the question, says what a picture shows; the text is \
what somebody states to see in it. {score} Things that are missing, wrong or made up all cost \
points. Length, confidence and explanations earn nothing."""
SCORE = "Give an integer from 0 to 10: 10 if all of the list is stated and right, 0 if nothing is."
CLAIMS = "Say of each claim of the text whether the list supports it, and what the text misses."
CASES = (
    ("score", False), ("score", True), ("score", "choice"), ("claims", False), ("claims", True),
)  # fmt: skip


@dataclass
class Replies:
    """What came of one way to ask: failures by kind, and pairs of (true, false) scores."""

    failures: Counter[str]
    pairs: list[tuple[float, float]]
    asked: int = 0
    seconds: float = 0.0

    @property
    def line(self) -> str:
        """As a row of a Markdown table."""
        lost = f"{sum(self.failures.values()) / max(1, self.asked):.2f} of {self.asked}"
        kinds = ", ".join(f"{kind} {n}" for kind, n in self.failures.most_common()) or "none"
        told = [0.5 * ((true > false) + (true >= false)) for true, false in self.pairs]
        tells = f"{sum(told) / len(told):.2f} of {len(told)}" if told else "none came in pairs"
        pause = self.seconds / max(1, self.asked)
        return f"| {lost} | {kinds} | {tells} | {pause:.2f} |"


def asked_of(count: int, seed: int) -> list[tuple[Problem, str, str]]:
    """Problems whose question holds the true list, the true perception, and a false one."""
    task = load_task("scenes")
    spec = task.spec(rows=2, columns=2, kinds=2, most=2)  # type: ignore[attr-defined]
    found = []
    for index in range(count):
        drawn = draw_problem(task, spec, "test", seed, index)  # type: ignore[arg-type]
        false = re.sub(r"\d+", lambda n: str(int(n[0]) + 3), drawn.perception)
        question = f"The list of what the picture shows: {drawn.perception}"
        found.append(
            (Problem(drawn.id, "scenes", question, "", {}, {}, ""), drawn.perception, false)
        )
    return found


async def replies_of(judge: Judge, problems: list[tuple[Problem, str, str]]) -> Replies:
    """Every perception asked about once, a problem after the other as the server takes them."""
    replies, began = Replies(Counter(), []), time.perf_counter()

    async def verdict(problem: Problem, text: str) -> float | None:
        replies.asked += 1
        try:
            return judge.form.numbers(await judge.verdict(problem, text))["value"]
        except JudgeError as error:
            replies.failures[error.kind] += 1
            return None

    for true, false in await asyncio.gather(
        *(asyncio.gather(verdict(p, t), verdict(p, f)) for p, t, f in problems)
    ):
        if true is not None and false is not None:
            replies.pairs.append((true, false))
    replies.seconds = time.perf_counter() - began
    await judge.aclose()
    return replies


def main() -> None:
    """Ask in every form and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--problems", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1234567)
    options = parser.parse_args()
    problems = asked_of(options.problems, options.seed)
    print("| mode | structured | no verdict | why | true above false | s a reply |")
    print("|---|---|---|---|---|---|")
    for mode, structured in CASES:
        args: dict[str, Any] = {"mode": mode, "structured": structured, "send_image": False}
        rubric = RUBRIC.format(score=SCORE if mode == "score" else CLAIMS)
        args |= {"base_url": options.base_url, "model": options.model, "rubric": rubric}
        judge = Judge(timeout_seconds=300.0, retries=0, **args)
        replies = asyncio.run(replies_of(judge, problems))
        print(f"| {mode} | {str(structured).lower()} {replies.line}", flush=True)


if __name__ == "__main__":
    main()
