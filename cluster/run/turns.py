"""Who holds the GPUs that samplers and learner share: one of them at a time.

A phase enters and leaves; whoever enters while another holds the GPUs has them handed over first.
Where each has GPUs of its own there is no such object, and calls enter nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

Phase = Literal["sampling", "learning", "sending"]


class Resting(Protocol):
    """Of samplers (`rollout.pool.SamplerPool`)."""

    def rest(self) -> None:
        """Return once none of them holds memory of a GPU."""

    def wake(self) -> None:
        """They have the GPUs again."""


class Offloaded(Protocol):
    """Of the learner (`learner.actor.LearnerGroup`)."""

    def offload(self, weights: bool = True) -> None:
        """Return once its states, with or without its weights, have left the GPUs."""

    def reload(self) -> None:
        """Return once they are back."""


class Turns:
    """The hand-over between phases, which is made when the next one begins.

    sampling: the learner's states are in main memory, the samplers answer.
    learning: the samplers sleep, the learner has all its states.
    sending: the learner has its weights and no other state; samplers wake as far as they need to
        take them, from GPU to GPU.
    """

    def __init__(self, samplers: Resting, learner: Offloaded) -> None:
        """It is the samplers' turn, and the learner has left the GPUs."""
        self._samplers, self._learner = samplers, learner
        self._phase: Phase = "sampling"
        self._inside = self._count = 0
        self._seconds = 0.0
        self._changed = threading.Condition()

    @contextmanager
    def enter(self, phase: Phase) -> Iterator[None]:
        """Within, this phase has the GPUs; waits for those that are in another.

        Several may be in one phase at a time, and it may be entered again by who is in it. Raises
        what a hand-over raises (`SamplerLost`, an error of a rank).
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._inside or self._phase == phase)
            start = time.monotonic()
            while self._phase != phase:
                self._hand_over(phase)
                self._count += 1
            self._seconds += time.monotonic() - start
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def counts(self) -> dict[str, float]:
        """Under `turns/`, since the run began; see docs/metrics.md."""
        return {"turns/count": float(self._count), "turns/seconds": self._seconds}

    def _hand_over(self, wanted: Phase) -> None:
        """One step on the way: sampling, learning, sending (or not), sampling."""
        if self._phase == "sampling":
            self._samplers.rest()
            self._learner.reload()
            self._phase = "learning"
        elif self._phase == "learning" and wanted == "sending":
            self._learner.offload(weights=False)
            self._phase = "sending"
        else:
            self._learner.offload()
            self._samplers.wake()
            self._phase = "sampling"
