"""The term `blind_questions`: what a perception is worth to a reader who never sees the image.

CapRL (arXiv 2509.22647) rewards a caption by the share of a bank of questions that a text-only
model answers right from it alone, among questions that it does not answer right from nothing.
BalCapRL (arXiv 2605.07394) found that this alone brings overlong, made-up captions; the answer
here is a decay with length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from rewards.reader import own_question, perception_text, reader_requests, right_answers
from rewards.scored import Values
from rewards.settings import ARGUMENTS, Place
from rewards.surrogates import PERCEPTION, Blind, different
from rollout.record import Group, Rollout, SampleRequest, Sampling
from tasks.checkers import CHECKERS, Gold
from tasks.checkers.choice import LETTERS
from tasks.core import Problem, Task
from tasks.fields import Amount, Count, Positive
from tasks.files import expanded
from tasks.free_text import instructions


@dataclass(config=ARGUMENTS)
class BlindQuestions(Blind):
    """Share of questions that a reader answers right from the own perception and no image.

    The questions are those of the problem's bank, `problem.extra["questions"]` or the column that
    is named, or where there is none the problem's own. An item of a bank is {"question", "answer"}
    with a text, a number or a list of accepted texts as its answer, and may have "choices" (then
    the answer is one of them or its letter), "checker" and "options" of it. Of more than `k` items
    as many are drawn, anew in every step but the same for all of a group.

    With right_q for question q from the own perception, floor_q from none, and d the decay:

    - `floor = "condition"`: d · mean of right_q over the questions with floor_q = 0; 0 for all
      where there is none: what the reader knows anyway says nothing of the perception.
    - `floor = "subtract"`: d · mean of right_q − mean of floor_q; may be negative.
    - `floor = "keep"`: d · mean of right_q; the floor is not asked for.

    d is 1 up to `length_tokens` tokens of perception and falls to 0 at twice as many. From an
    unreadable perception no question counts as answered right, and with `leakage_check` from none
    that states the answer of the problem's own question (`CanLeak`): what states it may not have
    been seen. Where the question is what is seen ("how many dogs?") an honest perception states it:
    switch the check off there, or give the problems a bank. Answers of bank items may be stated;
    that is what they ask for.

    The part `floor` is the mean of floor_q, the same for all of a group.

    Args:
        model: checkpoint of the frozen reader; "" is the current policy.
        place: where the reader finds the perception, see `rewards.settings.Place`; by default
            `prefix` for the policy, `prompt` for a frozen model.
        column: of `problem.extra`; one that is named every problem must have.
        k: questions at most.
        checker: of bank items that name none and have no choices.
        floor: see above.
        length_tokens: tags included; 0 is no decay.
        max_tokens: of an answer; one that is cut is wrong.
        temperature: 0 is greedy.

    Raises ValueError for a bank that cannot be used, naming problem, column and item.
    """

    name = "blind_questions"
    model: Annotated[str, AfterValidator(expanded)] = ""
    place: Place | None = None
    column: str = ""
    k: Positive = 4
    checker: str = "text"
    floor: Literal["condition", "subtract", "keep"] = "condition"
    length_tokens: Count = 0
    max_tokens: Positive = 256
    temperature: Amount = 0.0

    def __post_init__(self) -> None:
        if self.checker not in CHECKERS:
            raise ValueError(f"checker = {self.checker!r}: there is {', '.join(CHECKERS)}")
        self.at: Place = self.place or ("prompt" if self.model else "prefix")

    def ask(self, task: Task, group: Group, other: Problem | None) -> list[SampleRequest]:
        """Every question, with no perception and with each one that may earn something."""
        texts = self._distinct_texts(self._texts(task, group))
        sampling = Sampling(temperature=self.temperature, max_tokens=self.max_tokens)
        questions = self._questions(group) if texts else []
        name = f"{group.group_id}/{self.name}"
        return reader_requests(name, questions, texts, self.at, sampling)

    def score(self, task: Task, group: Group, replies: Sequence[Group | np.ndarray]) -> Values:
        """float [G] in [−1, 1], in [0, 1] but for `subtract`, and the part `floor`."""
        of_rollout = self._texts(task, group)
        texts = self._distinct_texts(of_rollout)
        if not texts:
            return [0.0] * len(of_rollout)
        right = right_answers(self._questions(group), len(texts), replies)  # [Q, S]
        floor = np.zeros(len(right), bool) if self.floor == "keep" else right[:, 0]
        counted = right[~floor] if self.floor == "condition" else right
        shares = counted.mean(axis=0) if len(counted) else np.zeros(len(texts))
        share_of = dict(zip(texts, shares.tolist(), strict=True)) | {None: 0.0}
        off = float(floor.mean()) if self.floor == "subtract" else 0.0
        values = [
            self._decay(rollout) * share_of[text] - off
            for rollout, text in zip(group.rollouts, of_rollout, strict=True)
        ]
        floors = {"floor": [float(floor.mean())] * len(of_rollout)} if self.floor != "keep" else {}
        return {"value": values, **floors}

    def _decay(self, rollout: Rollout) -> float:
        length, full = int((rollout.segments == PERCEPTION).sum()), self.length_tokens
        return min(1.0, max(0.0, 2 - length / full)) if full else 1.0

    def _texts(self, task: Task, group: Group) -> list[str | None]:
        """What the reader gets of each rollout; None where it earns nothing anyhow."""
        return [
            None
            if self.usable(task, group.problem, rollout) is None or not self._decay(rollout)
            else perception_text(task, rollout, self.at)
            for rollout in group.rollouts
        ]

    def _distinct_texts(self, of_rollout: Sequence[str | None]) -> list[str | None]:
        """The texts to ask with, the floor's none first; none at all where nothing is earned."""
        perceptions: list[str | None] = list(different(of_rollout))
        return [None, *perceptions] if perceptions and self.floor != "keep" else perceptions

    def _questions(self, group: Group) -> list[Problem]:
        """The same for both halves: what is drawn hangs on the group's id alone."""
        column = self.column or "questions"
        bank = group.problem.extra.get(column)
        where = f"problem {group.problem.id}: extra column {column!r}"
        if bank is None and self.column:
            raise ValueError(f"{where}: missing; leave `column` out to ask the problem's question")
        if bank is None:
            return [own_question(group.problem, self.at)]
        if not isinstance(bank, list) or not bank:
            raise ValueError(
                f"{where}: expected a list of questions with answers, not {bank!r:.60}"
            )
        seed = hashlib.sha256(group.group_id.encode()).digest()[:8]
        rng = np.random.default_rng(int.from_bytes(seed))
        chosen = sorted(rng.permutation(len(bank))[: self.k].tolist())
        return [self._item(bank[i], f"{where}: item {i}", group.problem) for i in chosen]

    def _item(self, item: Any, where: str, problem: Problem) -> Problem:
        """A bank's question as a problem of the task vqa, without images."""
        if not isinstance(item, Mapping) or not isinstance(item.get("question"), str):
            raise ValueError(f'{where}: expected {{"question": ..., "answer": ...}}: {item!r:.60}')
        answer, choices = item.get("answer"), [str(choice) for choice in item.get("choices") or ()]
        answers = [str(one) for one in (answer if isinstance(answer, list) else [answer])]
        checker = item.get("checker") or ("choice" if choices else self.checker)
        options = item.get("options") or {}
        if checker not in CHECKERS:
            raise ValueError(f"{where}: checker {checker!r}: there is {', '.join(CHECKERS)}")
        fault = CHECKERS[checker].fault(Gold(tuple(answers), tuple(choices), options))
        if answer is None or fault:
            raise ValueError(f"{where}: {fault or 'it has no answer'}")
        listed = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        form = "boxed" if self.at == "prompt" else "segments"
        return Problem(
            id=f"{problem.id}/{where.rpartition(' ')[2]}",
            task="vqa/boxed" if form == "boxed" else "vqa",
            prompt="\n".join([item["question"].strip(), *listed, "", instructions(form)]),
            perception="",
            truth={"checker": checker, "answers": answers, "choices": choices, "options": options},
            knobs={},
            symmetry_key=problem.symmetry_key,
        )
