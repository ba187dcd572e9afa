"""New weights on their way to the samplers: fetched by each, or sent to all over GPUs."""

from __future__ import annotations

import time
from typing import Any, Protocol

from rollout.pool import SamplerPool
from rollout.record import Weights
from rollout.settings import TransferConfig
from rollout.transfer import TransferReport, WeightTransferError


class Learner(Protocol):
    """What a delivery needs of `learner.actor.LearnerGroup`."""

    def publish_weights(self, version: int) -> Weights: ...

    def attach_sender(self, sender: Any) -> None: ...

    def send_weights(self, version: int) -> TransferReport: ...


class Delivery:
    """Transport `host`: the weights lie in Ray's object store, and samplers fetch them.

    What was published last stays there, so a sampler that is lost needs no learner. Earlier
    versions are let go as soon as no sampler reads them.
    """

    def __init__(self, pool: SamplerPool, learner: Learner) -> None:
        self._pool, self._learner = pool, learner
        self._in_progress: tuple[float, Weights] | None = None

    def begin(self, version: int) -> TransferReport | None:
        """Publish the learner's weights as a policy version, and tell the samplers.

        The learner may go on; samplers take work again as each has them. Returns what the version
        that was begun before cost, if there is one to tell.
        """
        before = self.settle()
        start = time.monotonic()
        weights = self._learner.publish_weights(version)
        self._pool.renew(weights)
        self._in_progress = (start, weights)
        return before

    def send(self, version: int) -> TransferReport:
        """Begin a version and settle it."""
        self.begin(version)
        report = self.settle()
        assert report is not None
        return report

    def settle(self) -> TransferReport | None:
        """Return once all samplers that are up hold what was begun, and what that cost.

        Raises SamplerLost where a sampler failed too often.
        """
        if self._in_progress is None:
            return None
        (start, weights), self._in_progress = self._in_progress, None
        return TransferReport.of(weights, self._pool.wait_renewed() - start)


class GpuDelivery(Delivery):
    """Transports `nccl` and `ipc`: all ranks gather, rank 0 sends to all samplers that are up.

    Nothing stays behind: a sampler that starts later waits for the next version, and where none
    is left that holds the last one, the pool's error says so. Type checked; not run.
    """

    def __init__(
        self, pool: SamplerPool, learner: Learner, transfer: TransferConfig, ranks_each: int
    ) -> None:
        """`ranks_each`: tensor-parallel ranks of one sampler."""
        super().__init__(pool, learner)
        self._transfer, self._ranks_each = transfer, ranks_each
        self._attached: list[Any] = []
        self._sent: TransferReport | None = None

    def begin(self, version: int) -> TransferReport | None:
        """Send the learner's weights; made again without a sampler that failed or was late."""
        from rollout.transports_gpu import GpuSender

        before = self.settle()
        while self._sent is None:
            clients: list[Any] = [*self._pool.wait_clients()]
            if clients != self._attached:
                sender = GpuSender(self._transfer, clients, self._ranks_each)
                self._learner.attach_sender(sender)
                self._attached = clients
            self._pool.begin_transfer()
            try:
                self._sent = self._learner.send_weights(version)
            except WeightTransferError as error:
                # Ray's own kind of this error holds the one that was raised.
                cause = getattr(error, "cause", error)
                failed = next((c for c in clients if c.name == cause.sampler), None)
                if failed is None:
                    raise
                self._pool.replace(failed, "transfer", str(cause))
            else:
                self._pool.holds(version, clients)
        return before

    def settle(self) -> TransferReport | None:
        """What the last transfer cost, once; it is over when `begin` returns."""
        sent, self._sent = self._sent, None
        return sent
