"""Weights as versions that samplers fetch: the sampler's end, and what a transfer cost.

The learner puts the buckets of a version into Ray's object store (`learner.weights.stored`),
where they stay until the next version is there and nobody reads them any more. A sampler fetches
them one by one, looks at each tensor's checksum, and hands the bucket to the processes of its
engine as a file in memory (`rollout/transports.py` reads it). Nothing here imports Ray or vLLM.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollout.record import Piece, Weights, checksum

ALIGNMENT = 64
"""Bytes that each tensor's place in a file is a multiple of."""


class WeightTransferError(RuntimeError):
    """A transfer that failed or passed its deadline; names the sampler and what failed.

    `sampler` is that sampler's name, "" where the fault is none of a sampler's.
    """

    def __init__(self, message: str, sampler: str = "") -> None:
        super().__init__(message)
        self.sampler = sampler


@dataclass(frozen=True)
class TransferReport:
    """What a transfer cost. seconds: wall time; bytes: to each sampler; groups: buckets."""

    seconds: float
    bytes: int
    groups: int
    largest_group_bytes: int

    @classmethod
    def of(cls, weights: Weights, seconds: float) -> TransferReport:
        """Of a version that was fetched."""
        sizes = [sum(piece.bytes for piece in bucket) for bucket in weights.manifest]
        return cls(seconds, sum(sizes), len(sizes), max(sizes, default=0))


async def fetched(weights: Weights, sampler: str) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """Each bucket of a version as `in_memory` makes it, the next on its way meanwhile.

    Raises WeightTransferError naming sampler, version and tensor where a bucket is not what the
    manifest says.
    """
    coming = [asyncio.ensure_future(_arrived(bucket)) for bucket in weights.buckets[:1]]
    for index, pieces in enumerate(weights.manifest):
        coming += [asyncio.ensure_future(_arrived(b)) for b in weights.buckets[index + 1 :][:1]]
        yield await asyncio.to_thread(
            _checked, pieces, await coming.pop(0), weights.version, sampler
        )


async def _arrived(bucket: Any) -> Any:
    return await bucket


def _checked(
    pieces: Sequence[Piece], arrays: Sequence[np.ndarray], version: int, sampler: str
) -> tuple[int, dict[str, Any]]:
    for index, piece in enumerate(pieces):
        actual = checksum(arrays[index]) if index < len(arrays) else "nothing"
        if actual != piece.checksum:
            raise WeightTransferError(
                f"weight transfer: sampler {sampler!r} fetched version {version}, and "
                f"{piece.name!r} is not what the learner put there: checksum {actual}, not "
                f"{piece.checksum}",
                sampler,
            )
    return in_memory(pieces, arrays)


def in_memory(pieces: Sequence[Piece], arrays: Sequence[np.ndarray]) -> tuple[int, dict[str, Any]]:
    """A bucket as a file in memory: its descriptor, and how a process of this user finds it.

    It has no name in /dev/shm and no share of its room, and is gone when the descriptor is closed
    (or this process ended) and no reader has it mapped.
    """
    descriptor = os.memfd_create("weights")
    tensors = []
    with open(descriptor, "wb", closefd=False) as file:
        for piece, array in zip(pieces, arrays, strict=True):
            file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR)
            tensors.append([piece.name, piece.dtype, list(piece.shape), file.tell()])
            file.write(array.data)
    return descriptor, {"path": f"/proc/{os.getpid()}/fd/{descriptor}", "tensors": tensors}
