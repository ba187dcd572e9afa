"""An environment that misbehaves when a turn asks for it: "now raises", and no sooner."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from tasks.core import Problem
from tasks.drawing import to_png
from tasks.environments import Observation


@dataclass
class Counting:
    """Says how many turns it has heard, and a number that hangs on its generator alone."""

    first: str = ""
    heard: int = field(default=0, init=False)

    def reset(self, problem: Problem, rng: np.random.Generator) -> Observation | None:
        self.number = int(rng.integers(1000))
        if self.first:
            self.misbehave(self.first)
        print("what an environment prints goes nowhere", flush=True)
        return Observation(f"{problem.id} in {os.getpid()}")

    def step(self, text: str) -> Any:
        self.heard += 1
        if text.startswith("now "):
            return self.misbehave(text.removeprefix("now "))
        return Observation(f"{self.heard} {self.number} {os.getpid()}", reward=0.5)

    def misbehave(self, how: str) -> Any:
        if how == "raises":
            raise KeyError("no such room\nand more")
        if how == "hangs":
            time.sleep(1000)
        if how == "dies":
            os._exit(3)
        if how == "eats":
            return Observation(str(len(np.ones(2**33))))
        if how == "text":
            return Observation("a" * 10**6)
        if how == "broken":
            return Observation(images=(to_png(Image.new("RGB", (40, 40)))[:60],))
        if how == "huge":
            return Observation(images=(to_png(Image.new("1", (10_000, 10_000))),))
        if how == "reward":
            return Observation(reward=float("nan"))
        if how == "one image":
            return Observation(images=7)  # type: ignore[arg-type]
        if how == "surrogate":
            return Observation("a\ud800b")
        return "no observation"
