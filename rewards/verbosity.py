"""Terms on how a response is written: how long it is and how much it repeats itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import field_validator
from pydantic.dataclasses import dataclass

from rewards.settings import ARGUMENTS
from rollout.record import Group
from tasks.core import Task
from tasks.fields import Amount, Positive


@dataclass(config=ARGUMENTS)
class Length:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13).

    With |y| the response's tokens, end of turn included:

        0                                     |y| <= max_tokens − buffer
        ((max_tokens − buffer) − |y|)/buffer  up to max_tokens
        −1                                    longer

    Args:
        max_tokens: L_max. With `sampler.max_tokens` here, a response that was cut earns −1.
        buffer: L_cache, the last tokens before it, over which the punishment grows.
    """

    name = "length"
    max_tokens: Positive
    buffer: Positive

    @field_validator("buffer")
    @classmethod
    def _fits(cls, buffer: int, info: Any) -> int:
        most = info.data.get("max_tokens", buffer)
        if buffer > most:
            raise ValueError(f"at most max_tokens ({most})")
        return buffer

    def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G] in [−1, 0]."""
        free = self.max_tokens - self.buffer
        return [
            0.0 - min(1.0, max(0, int(r.sampled.sum()) - free) / self.buffer)
            for r in group.rollouts
        ]


@dataclass(config=ARGUMENTS)
class Repetition:
    """−max_penalty · (1 − different n-grams / n-grams) of the response's tokens.

    The n-gram penalty of arXiv 2502.03373 (appendix C.2) with the numbers of Perception-R1
    (arXiv 2506.07218). Both count words of the text; here it is token ids, as sampled: a
    policy that leaves out spaces, or repeats digits in a grid, is counted all the same.
    A response of fewer than n tokens earns 0.

    Args:
        n: tokens an n-gram has.
        max_penalty: what a response of nothing but repeats approaches.
    """

    name = "repetition"
    n: Positive = 20
    max_penalty: Amount = 2.0

    def __call__(self, task: Task, group: Group) -> list[float]:
        """float [G] in [−max_penalty, 0]."""
        return [
            0.0 - self.max_penalty * self._repeated(r.response_ids[r.sampled])
            for r in group.rollouts
        ]

    def _repeated(self, ids: np.ndarray) -> float:
        count = len(ids) - self.n + 1
        if count < 1:
            return 0.0
        packed = np.asarray(ids, dtype=np.int64).tobytes()
        different = {packed[8 * i : 8 * (i + self.n)] for i in range(count)}
        return (count - len(different)) / count
