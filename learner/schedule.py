"""Learning-rate schedules."""

from __future__ import annotations

import math


def learning_rate_at(step: int, steps: int, peak: float, warmup_steps: int, schedule: str) -> float:
    """The learning rate of update `step` (from 0): linear warm-up, then the schedule.

    `constant` stays at the peak; `linear` and `cosine` fall to a tenth of it at the last step.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    if schedule == "linear":
        return peak * (1 - 0.9 * progress)
    if schedule == "cosine":
        return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
    return peak
