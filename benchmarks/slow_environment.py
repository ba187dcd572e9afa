"""An environment that takes its time; in a module without torch, as its processes import it."""

from __future__ import annotations

import time

import numpy as np

from tasks.core import Problem
from tasks.environments import DONE, Observation

TURNS = 3


class Slow:
    """Takes its time, and says so."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds, self.left = seconds, TURNS - 1

    def reset(self, problem: Problem, rng: np.random.Generator) -> Observation | None:
        return None

    def step(self, text: str) -> Observation:
        time.sleep(self.seconds)
        self.left -= 1
        return Observation("Go on.") if self.left else DONE
