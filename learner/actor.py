"""The learner as Ray sees it: one actor a rank, driven together."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from learner.balance import NormOf, SegmentGradients
from learner.batch import TrainBatch
from learner.losses import Loss
from learner.trainer import LearnerSettings, Trainer, WorldPlace

WRITE_SECONDS = 60.0
"""How long a run that failed waits for the checkpoint that is being written."""


@ray.remote
class LearnerRank:
    """One rank's trainer in its own process."""

    _trainer: Trainer

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def free_address(self) -> str:
        """`host:port` free on this rank's node, for rank 0 to listen on."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, settings: LearnerSettings, master: str) -> None:
        # Here, so that the driver, which knows this class too, does without DeepSpeed.
        from learner.engine import DeepSpeedLearner

        self._trainer = DeepSpeedLearner(settings, WorldPlace(self._rank, self._size, master))

    def update(self, batch: TrainBatch, loss: Loss, rate: float | None) -> dict[str, float]:
        return self._trainer.update(batch, loss, rate)

    def segment_gradients(self, batch: TrainBatch, of: NormOf) -> SegmentGradients:
        return self._trainer.segment_gradients(batch, of)

    def attach_sender(self, sender: Any) -> None:
        self._sender = sender

    def send_weights(self, version: int) -> Any:
        return self._sender.send(self._trainer.weights(), version, self._rank)

    def begin_weights(self, version: int) -> None:
        self._sender.begin(self._trainer.weights(), version, self._rank)

    def finish_weights(self) -> Any:
        return self._sender.finish()

    def logprobs(self, batch: TrainBatch) -> list[np.ndarray]:
        return self._trainer.logprobs(batch)

    def save(self, folder: str) -> None:
        self._trainer.save(Path(folder))

    def save_training(self, folder: str, state: dict[str, Any], keep: int) -> None:
        self._trainer.save_training(Path(folder), state, keep)

    def finish_saving(self) -> None:
        self._trainer.finish_saving()


class LearnerGroup:
    """All ranks of the learner; each call runs on every rank and returns rank 0's result.

    An error of any rank is raised at once, with that rank's own traceback on top.
    """

    def __init__(
        self,
        settings: LearnerSettings,
        ranks: int = 1,
        cpus: float = 1,
        gpus: float = 0,
        timeout_seconds: float = 3600.0,
    ) -> None:
        options = {"num_cpus": cpus, "num_gpus": gpus}
        self._ranks = [
            LearnerRank.options(**options, name=None).remote(rank, ranks)  # type: ignore[attr-defined]
            for rank in range(ranks)
        ]
        self._settings, self._timeout = settings, timeout_seconds
        self.updates = 0
        """Updates that were begun; two equal readings bracket weights that did not change."""

    def start(self) -> None:
        """Load the model and start the trainer on every rank."""
        self.wait(self.start_async())

    def start_async(self) -> list[Any]:
        """Begin `start`; pass the result to `wait`."""
        master = ray.get(self._ranks[0].free_address.remote())
        return [rank.start.remote(self._settings, master) for rank in self._ranks]

    def wait(self, futures: list[Any]) -> Any:
        """Rank 0's result once all ranks are done; the first failure is raised as it happens.

        Raises TimeoutError naming the ranks that did not answer in time.
        """
        pending = list(futures)
        until = time.monotonic() + self._timeout
        while pending:
            done, pending = ray.wait(pending, timeout=max(0.0, until - time.monotonic()))
            ray.get(done)
            if pending and not done:
                silent = [str(rank) for rank, f in enumerate(futures) if f in pending]
                raise TimeoutError(
                    f"no answer from learner rank {', '.join(silent)} within {self._timeout:g} s "
                    "(learner.timeout_seconds); does the cluster have its cores and GPUs free?"
                )
        return ray.get(futures[0])

    def update(
        self, batch: TrainBatch, loss: Loss, learning_rate: float | None = None
    ) -> dict[str, float]:
        """One policy update (see `learner.trainer.Trainer.update`)."""
        self.updates += 1
        shared = ray.put(batch)
        return self.wait([r.update.remote(shared, loss, learning_rate) for r in self._ranks])

    def segment_gradients(self, batch: TrainBatch, of: NormOf = "all") -> SegmentGradients:
        """Gradient norms by segment (see `learner.trainer.Trainer.segment_gradients`)."""
        shared = ray.put(batch)
        return self.wait([r.segment_gradients.remote(shared, of) for r in self._ranks])

    def attach_sender(self, sender: Any) -> None:
        """Give every rank its `rollout.transfer.WeightSender`, kept until the next."""
        self.wait([r.attach_sender.remote(sender) for r in self._ranks])

    def send_weights(self, version: int) -> Any:
        """Send the weights to all samplers as a policy version; returns rank 0's report."""
        return self.wait([r.send_weights.remote(version) for r in self._ranks])

    def begin_weights(self, version: int) -> None:
        """Begin to send them beside what the ranks do next (see `BackgroundSender`)."""
        self.wait([r.begin_weights.remote(version) for r in self._ranks])

    def finish_weights(self) -> Any:
        """Wait for what was begun, once the ranks are idle; returns rank 0's report."""
        return self.wait([r.finish_weights.remote() for r in self._ranks])

    def logprobs(self, batch: TrainBatch) -> list[np.ndarray]:
        """Log-probs of a batch under the current weights."""
        shared = ray.put(batch)
        return self.wait([r.logprobs.remote(shared) for r in self._ranks])

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder."""
        self.wait([r.save.remote(str(folder)) for r in self._ranks])

    def save_training(self, folder: Path, state: dict[str, Any], keep: int) -> None:
        """Write a training checkpoint (see `learner.trainer.Trainer.save_training`)."""
        self.wait([r.save_training.remote(str(folder), state, keep) for r in self._ranks])

    def finish_saving(self) -> None:
        """Wait for a checkpoint that is written in the background; raises its error."""
        self.wait([r.finish_saving.remote() for r in self._ranks])

    def stop(self) -> None:
        """Kill the ranks' processes, once a checkpoint that is being written is whole."""
        if self._settings.background_saving:
            # Not `finish_saving`: what ended the run is the error to tell.
            ray.wait([self._ranks[0].finish_saving.remote()], timeout=WRITE_SECONDS)
        for rank in self._ranks:
            ray.kill(rank)
