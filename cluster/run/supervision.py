"""Weights to samplers that may fail: a transfer is made again without the one that failed it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from rollout.pool import PoolClient, SamplerPool
from rollout.transfer import TransferReport, WeightSender, WeightTransferError


class Learner(Protocol):
    """What the delivery needs of `learner.actor.LearnerGroup`."""

    updates: int

    def attach_sender(self, sender: WeightSender) -> None: ...

    def send_weights(self, version: int) -> TransferReport: ...

    def begin_weights(self, version: int) -> None: ...

    def finish_weights(self) -> TransferReport: ...


class Delivery:
    """Sends the learner's weights to a pool's samplers, whichever these are by now."""

    def __init__(
        self,
        pool: SamplerPool,
        learner: Learner,
        sender_to: Callable[[list[PoolClient]], WeightSender],
        reaches_some: bool,
    ) -> None:
        """`reaches_some`: the transport can reach some samplers and leave the others at work."""
        self._pool, self._learner, self._sender_to = pool, learner, sender_to
        self._reaches_some = reaches_some
        self._lock = threading.RLock()
        self._attached: list[PoolClient] = []
        self._sent = (-1, -1)
        self._begun: tuple[int, list[PoolClient]] | None = None
        self._report: TransferReport | None = None
        pool.catch_up = self._catch_up

    def send(self, version: int) -> TransferReport:
        """Send the weights to every sampler that is up, as a policy version.

        A sampler that fails the transfer or its deadline is started again, and the transfer is
        made again to the others. Raises SamplerLost where a sampler failed too often, and
        WeightTransferError for a fault that is none of a sampler's.
        """
        with self._lock:
            self.settle()
            report = self._transfer(version, self._pool.wait_clients)
            self._sent = (version, self._learner.updates)
            return report

    def begin(self, version: int) -> TransferReport | None:
        """As `send`, but return as soon as the samplers are paused and the weights are copied.

        The learner may go on to other weights; the samplers go on when they have these. Returns
        the report of the transfer begun before, if there was one. A sampler that fails is met by
        `settle`, at the latest by the next transfer.
        """
        with self._lock:
            self.settle()
            while True:
                clients = self._open(self._pool.wait_clients)
                try:
                    self._learner.begin_weights(version)
                    break
                except WeightTransferError as error:
                    self._replace_failed(error, clients)
            self._begun = (version, clients)
            self._sent = (version, self._learner.updates)
            before, self._report = self._report, None
            return before

    def settle(self) -> None:
        """Wait for a transfer that was begun, if one was.

        Where a sampler failed it, it is made again to the others, as `send` does; but for weights
        that the learner does not have any more: the next transfer brings newer ones.
        """
        with self._lock:
            if self._begun is None:
                return
            (version, clients), self._begun = self._begun, None
            try:
                self._report = self._learner.finish_weights()
            except WeightTransferError as error:
                self._replace_failed(error, clients)
                if self._sent[1] == self._learner.updates:
                    self._report = self._transfer(version, self._pool.wait_clients)
                else:
                    # The others are paused with half of the weights: whoever waits for their
                    # groups must know that nothing comes before the next transfer.
                    self._pool.holds(version, [])
            else:
                self._pool.holds(version, clients)

    def _catch_up(self) -> None:
        """Somebody waits for samplers: end a transfer that was begun, see who has no weights.

        Samplers that were started since the last transfer get its version. Where the learner
        has, or is making, newer weights, these are left to bring it: they would arrive under the
        name of the older version.
        """
        with self._lock:
            self.settle()
            version, updates = self._sent
            if version >= 0 and updates == self._learner.updates and self._pool.behind():
                some = self._pool.clients_behind if self._reaches_some else self._pool.wait_clients
                self._transfer(version, some)

    def _transfer(self, version: int, receivers: Callable[[], list[PoolClient]]) -> TransferReport:
        while True:
            clients = self._open(receivers)
            try:
                report = self._learner.send_weights(version)
            except WeightTransferError as error:
                self._replace_failed(error, clients)
                continue
            self._pool.holds(version, clients)
            return report

    def _open(self, receivers: Callable[[], list[PoolClient]]) -> list[PoolClient]:
        """Let the learner's sender reach these samplers, and the pool leave them alone."""
        clients = receivers()
        if clients != self._attached:
            self._learner.attach_sender(self._sender_to(clients))
            self._attached = clients
        self._pool.begin_transfer()
        return clients

    def _replace_failed(self, error: WeightTransferError, clients: list[PoolClient]) -> None:
        """Start the sampler again that failed a transfer; raises the error if it is none's."""
        # Ray's own kind of this error holds the one that was raised.
        own = getattr(error, "cause", error)
        failed = next((c for c in clients if c.name == own.sampler), None)
        if failed is None:
            raise error
        self._pool.replace(failed, "transfer", str(own))
