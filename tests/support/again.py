"""An environment that answers whatever the policy says with a picture of it, as long as it may."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tasks.core import Problem
from tasks.drawing import to_png
from tasks.environments import Observation


class Again:
    """The picture's colour hangs on the turns so far, so one that is lost would be seen."""

    def reset(self, problem: Problem, rng: np.random.Generator) -> Observation | None:
        self.colour = int(rng.integers(256))
        return None

    def step(self, text: str) -> Observation:
        self.colour = (self.colour + len(text)) % 256
        picture = Image.new("RGB", (32, 32), (self.colour, len(text) % 256, 0))
        return Observation("More.", (to_png(picture),), reward=0.01 * len(text))
