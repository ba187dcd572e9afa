"""From the learner's tensors to files that an engine reads: every byte, two buckets at a time."""

from __future__ import annotations

import asyncio
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.weights import stored
from rollout.record import Weights
from rollout.transfer import TransferReport, WeightTransferError, fetched, in_memory

ROOT = Path(__file__).resolve().parents[2]


def groups() -> Iterator[tuple[list[str], list[torch.Tensor]]]:
    """Of several shapes and dtypes, one tensor not contiguous, one a number."""
    generator = torch.Generator().manual_seed(0)
    for i in range(5):
        tensors = {
            f"layers.{i}.weight": torch.randn(4, 8, generator=generator).t(),
            f"layers.{i}.bias": torch.randn(3, generator=generator).bfloat16(),
            f"layers.{i}.scale": torch.tensor(float(i)),
        }
        yield list(tensors), list(tensors.values())


class Arriving:
    """A bucket on its way; `asked` counts those that were waited for."""

    asked = 0

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self._arrays = arrays

    def __await__(self) -> Any:
        Arriving.asked += 1
        yield from asyncio.sleep(0).__await__()
        return self._arrays


def weights(version: int = 7) -> Weights:
    *buckets, manifest = stored(groups())
    Arriving.asked = 0
    return Weights(version, manifest, tuple(map(Arriving, buckets)))  # type: ignore[arg-type]


def load(given: Weights, then: Callable[[int], None] = lambda place: None) -> dict[str, Any]:
    """What a process of the engine would read, by the path alone."""
    found: dict[str, torch.Tensor] = {}

    async def run() -> None:
        place = 0
        async for held, update in fetched(given, "sampler-3"):
            with open(update["path"], "rb") as file:
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            os.close(held)
            assert not os.path.exists(update["path"])
            for name, dtype, shape, at in update["tensors"]:
                kind = getattr(torch, dtype)
                found[name] = torch.frombuffer(pages, dtype=kind, count=prod(shape), offset=at)
                found[name] = found[name].reshape(shape)
            then(place)
            place += 1

    asyncio.run(run())
    return found


def test_every_tensor_arrives_as_it_was_and_one_bucket_is_fetched_ahead() -> None:
    given, ahead = weights(), []
    found = load(given, lambda place: ahead.append(Arriving.asked - place - 1))
    expected = {n: t for names, tensors in groups() for n, t in zip(names, tensors, strict=True)}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert ahead == [1, 1, 1, 1, 0]
    report = TransferReport.of(given, 2.0)
    assert report == TransferReport(2.0, 5 * (128 + 6 + 4), 5, 138)


@pytest.mark.parametrize("what", ["byte", "order", "missing"])
def test_what_is_not_as_the_learner_put_it_is_named(what: str) -> None:
    given = weights()
    *buckets, _ = stored(groups())
    arrays: list[np.ndarray] = [np.array(a) for a in buckets[3]]
    if what == "byte":
        arrays[1][-1] ^= 1
    elif what == "order":
        arrays[1:] = arrays[:0:-1]
    else:
        del arrays[1:]
    there = list(given.buckets)
    there[3] = Arriving(arrays)
    said = r"sampler 'sampler-3' fetched version 7, and 'layers\.3\.bias' is not what the learner"
    with pytest.raises(WeightTransferError, match=said) as failed:
        load(replace(given, buckets=tuple(there)))
    assert failed.value.sampler == "sampler-3"


def test_a_sampler_that_is_killed_leaves_no_memory_behind() -> None:
    code = "from tests.rollout.test_transfer import weights, groups, stored, in_memory\n"
    code += "*buckets, manifest = stored(groups())\n"
    code += "print(in_memory(manifest[0], buckets[0])[1]['path'], flush=True); input()"
    before = set(os.listdir("/dev/shm"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as other:  # type: ignore[call-overload]
        path = other.stdout.readline().strip()
        assert len(Path(path).read_bytes()) == 196, "any process of this user reads it"
        assert set(os.listdir("/dev/shm")) <= before
        other.kill()
        other.wait()
    assert not os.path.exists(path)
    assert in_memory  # imported above by its process
