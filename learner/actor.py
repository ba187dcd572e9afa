"""The learner as Ray sees it: one actor a rank, driven together."""

from __future__ import annotations

import functools
import gc
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
import torch

from learner.trainer import LearnerSetup, Trainer, WorldPlace
from learner.weights import stored
from rollout.record import Weights
from tasks.importing import importing
from tasks.liveness import beat, listen

P = ParamSpec("P")
R = TypeVar("R")

WRITE_SECONDS = 60.0
"""How long a run that failed waits for the checkpoint that is being written."""


@ray.remote
class LearnerRank:
    """One rank's trainer in its own process."""

    _trainer: Any = None
    """A `Trainer` once it is started."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        listen(repr(self))

    def __repr__(self) -> str:
        return f"learner-{self._rank}"  # Ray's dashboard and logs show it

    def free_address(self) -> str:
        """`host:port` free on this rank's node, for rank 0 to listen on."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, setup: LearnerSetup, master: str) -> None:
        if not torch.accelerator.is_available():
            # Nothing is compiled, but DeepSpeed has functions that would be: the compiler of CPU
            # code would be imported for them. Read when torch._dynamo is imported.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # Here, so that the driver, which knows this class too, does without DeepSpeed.
        with importing():
            from learner.engine import DeepSpeedLearner

        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None
            gc.collect()
        self._trainer = DeepSpeedLearner(setup, WorldPlace(self._rank, self._size, master))

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of the trainer."""
        return getattr(self._trainer, method)(*args, **options)

    def publish_weights(self) -> Iterator[Any]:
        yield from stored(self._trainer.weights().iter_groups())

    def gather_weights(self) -> None:
        for _ in self._trainer.weights().iter_groups():
            pass

    def attach_sender(self, sender: Any) -> None:
        self._sender = sender

    def send_weights(self, version: int) -> Any:
        return self._sender.send(self._trainer.weights(), version, self._rank)


def on_every_rank(
    method: Callable[Concatenate[Trainer, P], R],
) -> Callable[Concatenate[LearnerGroup, P], R]:
    """A method of `Trainer` as one of the group: called on every rank, with rank 0's result."""

    @functools.wraps(method)
    def call(group: LearnerGroup, /, *args: P.args, **options: P.kwargs) -> R:
        once = [ray.put(value) for value in args]  # not once a rank
        with group.turn():
            results: R = group.on_ranks("call", method.__name__, *once, **options)
        return results

    return call


class LearnerGroup:
    """All ranks of the learner; each call runs on every rank and returns rank 0's result.

    An error of any rank is raised at once, with that rank's own traceback on top.
    """

    turn: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Entered while the ranks work: it is the learner's turn then."""
    sending: Callable[[], AbstractContextManager[Any]] = nullcontext
    """The same while they send weights from their GPUs to the samplers'."""
    update = on_every_rank(Trainer.update)
    segment_gradients = on_every_rank(Trainer.segment_gradients)
    logprobs = on_every_rank(Trainer.logprobs)
    save = on_every_rank(Trainer.save)
    save_training = on_every_rank(Trainer.save_training)

    def __init__(
        self, setup: LearnerSetup, placed: Callable[[int], dict[str, Any]] = lambda rank: {}
    ) -> None:
        """Make the actors of `setup.learner`; they are not yet started.

        `placed`: where a rank is to run, as options of its actor.
        """
        learner = setup.learner
        options = {"num_cpus": learner.cpus, "num_gpus": learner.gpus, "name": None}
        self._ranks = [
            LearnerRank.options(**options, **placed(rank)).remote(rank, learner.ranks)  # type: ignore[attr-defined]
            for rank in range(learner.ranks)
        ]
        self._setup = setup

    def begin(self, setup: LearnerSetup) -> None:
        """Take another setup for the same ranks; the next `start` makes their trainers anew."""
        self._setup = setup

    def start(self) -> None:
        """Load the model and start the trainer on every rank."""
        self.wait(self.start_async())

    def start_async(self) -> list[Any]:
        """Begin `start`; pass the result to `wait`."""
        master = self.wait([self._ranks[0].free_address.remote()])
        return [rank.start.remote(self._setup, master) for rank in self._ranks]

    def on_ranks(self, name: str, *args: Any, **options: Any) -> Any:
        """Call a method of `LearnerRank` on every rank, and `wait`."""
        return self.wait([getattr(r, name).remote(*args, **options) for r in self._ranks])

    def wait(self, futures: list[Any], then: Callable[[list[Any]], None] | None = None) -> Any:
        """Rank 0's result once all ranks are done; the first failure is raised as it happens.

        `then` hears of those that are done, as they are.
        Raises TimeoutError naming the ranks that did not answer in time.
        """
        pending, limit = list(futures), self._setup.learner.timeout_seconds
        until = time.monotonic() + limit
        while pending:
            done, pending = ray.wait(pending, timeout=max(0.0, until - time.monotonic()))
            ray.get(done)
            if done:
                beat()
            if then is not None:
                then(done)
            if pending and not done:
                silent = [str(rank) for rank, f in enumerate(futures) if f in pending]
                raise TimeoutError(
                    f"no answer from learner rank {', '.join(silent)} within {limit:g} s "
                    "(learner.timeout_seconds); does the cluster have its cores and GPUs free?"
                )
        return ray.get(futures[0])

    def finish_saving(self) -> None:
        """See `Trainer.finish_saving`."""
        self.on_ranks("call", "finish_saving")

    def offload(self, weights: bool = True) -> None:
        """See `Trainer.offload`."""
        self.on_ranks("call", "offload", weights)

    def reload(self) -> None:
        """See `Trainer.reload`."""
        self.on_ranks("call", "reload")

    def publish_weights(self, version: int) -> Weights:
        """Put the weights into Ray's object store as a policy version.

        They are what rank 0's stream returns, so this process, which called it, owns them: they
        stay while it refers to them, on the node where they were made, and are fetched from there
        by Ray alone, whether rank 0 lives, is stopped or is gone.
        """
        with self.turn():
            return self._published(version)

    def _published(self, version: int) -> Weights:
        stream = self._ranks[0].publish_weights.remote()
        others = [rank.gather_weights.remote() for rank in self._ranks[1:]]
        published: list[Any] = []

        def take(done: list[Any]) -> None:
            # A stream that broke off is complete like any other; its last value is the error.
            if stream.completed() in done:
                published.extend(stream)
                published.append(ray.get(published.pop()))

        self.wait([stream.completed(), *others], take)
        *buckets, manifest = published
        return Weights(version, manifest, tuple(buckets))

    def attach_sender(self, sender: Any) -> None:
        """Give every rank the sender of a GPU transport, kept until the next."""
        self.on_ranks("attach_sender", sender)

    def send_weights(self, version: int) -> Any:
        """Send the weights by that to all samplers; returns rank 0's report."""
        with self.sending():
            return self.on_ranks("send_weights", version)

    def stop(self) -> None:
        """Kill the ranks' processes, once a checkpoint that is being written is whole."""
        if self._setup.checkpoint.background:
            # Not `finish_saving`: what ended the run is the error to tell.
            ray.wait([self._ranks[0].call.remote("finish_saving")], timeout=WRITE_SECONDS)
        for rank in self._ranks:
            ray.kill(rank)
