"""What a policy keeps of language while it learns to see: a text's loss, questions without picture.

Both are asked as log-probs of given words (`own_text.toml`), so that nothing hangs on the form in
which a policy has come to answer. Shapes: S passages, Q questions of A answers.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rollout.record import ScoreRequest
from tasks.core import Problem

FILE = Path(__file__).with_name("own_text.toml")
_PASSAGE = "Write a short text."
_QUESTION = "Answer with one word or two. {ask}"


@dataclass(frozen=True)
class OwnText:
    """passages: S texts; questions: Q of (question, its answers, of which the first is right)."""

    passages: tuple[str, ...]
    questions: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def read(cls, file: Path = FILE) -> OwnText:
        """What a file holds; a line end within a passage is a space."""
        data = tomllib.loads(file.read_text(encoding="utf-8"))
        return cls(
            tuple(passage.replace("\n", " ") for passage in data["passages"]),
            tuple((q["ask"], tuple(q["answers"])) for q in data["questions"]),
        )

    def requests(self, encoded: Callable[[str], Sequence[int]]) -> list[ScoreRequest]:
        """The passages, then each question's answers; `encoded` makes tokens of a text."""
        asked = [(_PASSAGE, passage) for passage in self.passages]
        asked += [(_QUESTION.format(ask=q), a) for q, answers in self.questions for a in answers]
        return [
            ScoreRequest(
                f"own text {index}",
                Problem(f"own text {index}", "own_text", prompt, "", {}, {}, f"own text {index}"),
                np.asarray(encoded(said), np.int32),
                (),
            )
            for index, (prompt, said) in enumerate(asked)
        ]

    def values(self, replies: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
        """From the log-probs of `requests`, metric -> passage or question -> value.

        `text_loss`: nats a token of each passage. `text_right`: 1 where a question's right answer
        is likelier than each other one as a whole; by chance 1/A of them are.
        """
        count = len(self.passages)
        loss = {f"passage {i + 1}": -float(np.mean(replies[i])) for i in range(count)}
        sums = iter([float(np.sum(reply)) for reply in replies[count:]])
        right = {}
        for question, answers in self.questions:
            first, *others = [next(sums) for _ in answers]
            right[question] = float(first > max(others))
        return {"text_loss": loss, "text_right": right}
