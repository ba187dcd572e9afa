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
        pool.catch_up = self._catch_up

    def send(self, version: int) -> TransferReport:
        """Send the weights to every sampler that is up, as a policy version.

        A sampler that fails the transfer or its deadline is started again, and the transfer is
        made again to the others. Raises SamplerLost where a sampler failed too often, and
        WeightTransferError for a fault that is none of a sampler's.
        """
        with self._lock:
            report = self._transfer(version, self._pool.wait_clients)
            self._sent = (version, self._learner.updates)
            return report

    def _catch_up(self) -> None:
        """Send the version of the last transfer to samplers that were started since.

        Where the learner has, or is making, newer weights, these are left to bring it: they would
        arrive under the name of the older version.
        """
        with self._lock:
            version, updates = self._sent
            if version >= 0 and updates == self._learner.updates and self._pool.behind():
                some = self._pool.clients_behind if self._reaches_some else self._pool.wait_clients
                self._transfer(version, some)

    def _transfer(self, version: int, receivers: Callable[[], list[PoolClient]]) -> TransferReport:
        while True:
            clients = receivers()
            if clients != self._attached:
                self._learner.attach_sender(self._sender_to(clients))
                self._attached = clients
            self._pool.begin_transfer()
            try:
                report = self._learner.send_weights(version)
            except WeightTransferError as error:
                # Ray's own kind of this error holds the one that was raised.
                own = getattr(error, "cause", error)
                failed = next((c for c in clients if c.name == own.sampler), None)
                if failed is None:
                    raise
                self._pool.replace(failed, "transfer", str(own))
                continue
            self._pool.holds(version, clients)
            return report
