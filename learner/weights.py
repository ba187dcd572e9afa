"""The weights a learner offers to samplers: checkpoint names, one layer group at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from rollout.record import Piece, checksum

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


@dataclass(frozen=True)
class ParameterMeta:
    """What a weight source will yield: a checkpoint name, dtype and whole shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class OfferedWeights(ABC):
    """The weights a trainer offers; the shape of vLLM's `WeightSource`.

    Iterating may be a collective: every rank does it, in the same order.
    """

    @abstractmethod
    def metadata(self) -> list[ParameterMeta]:
        """What iteration will yield, in its order, without gathering anything."""

    @abstractmethod
    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        """Yield (names, whole tensors) by layer group; tensors are valid until the next group."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor), one at a time."""
        for names, tensors in self.iter_groups():
            yield from zip(names, tensors, strict=True)


class GatheredWeights(OfferedWeights):
    """A model's parameters under their checkpoint names, one layer group at a time.

    transformers may hold a parameter under another name, or split otherwise, than its checkpoint
    does; names, shapes and splits here are those of `save_pretrained`, which samplers read.
    Under ZeRO-3 a group is gathered while it is handed out and let go after, so the extra
    memory is one group. Groups that are small go together, as many as fit into a bucket: a round
    trip to the samplers takes a tiny group longer than its bytes. Tensors have the dtype the
    sampler computes in.

    A layer group without a trained parameter is left out: samplers hold it already. One with any
    goes whole, since a sampler fuses neighbours (q, k and v) and loads the fused one whole.
    """

    def __init__(
        self, model: Any, gather: Gather, dtype: torch.dtype, bucket_bytes: int = 0
    ) -> None:
        """`gather`: a context in which parameters are whole."""
        self._model, self._gather, self._dtype = model, gather, dtype
        self._parameters = dict(model.named_parameters())
        self._all = layer_groups(list(self._parameters))
        trained = [
            names for names in self._all if any(self._parameters[n].requires_grad for n in names)
        ]
        self._trained = in_buckets(trained, self._bytes, bucket_bytes)

    def metadata(self) -> list[ParameterMeta]:
        metadata = []
        for names in self._trained:
            parameters = [self._parameters[name] for name in names]
            shapes = [getattr(p, "ds_shape", p.shape) for p in parameters]
            empty = [torch.empty(shape, dtype=self._dtype, device="meta") for shape in shapes]
            for name, tensor in self._checkpoint_form(names, empty).items():
                metadata.append(ParameterMeta(name, tensor.dtype, tuple(tensor.shape)))
        return metadata

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        for names, tensors in self._gathered(self._trained):
            converted = self._checkpoint_form(names, tensors)
            yield list(converted), list(converted.values())

    def parameter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        """All parameters, frozen ones too, under the names and in the form of the module tree."""
        return self._gathered(self._all)

    def _bytes(self, names: list[str]) -> int:
        parameters = [self._parameters[name] for name in names]
        return sum(getattr(p, "ds_numel", p.numel()) for p in parameters) * self._dtype.itemsize

    def _gathered(self, groups: list[list[str]]) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        for names in groups:
            parameters = [self._parameters[name] for name in names]
            with self._gather(parameters):
                yield names, [p.data.to(self._dtype) for p in parameters]

    def _checkpoint_form(
        self, names: list[str], tensors: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        state = dict(zip(names, tensors, strict=True))
        converted: dict[str, torch.Tensor] = revert_weight_conversion(self._model, state)
        return converted


def stored(
    source: Iterable[tuple[list[str], list[torch.Tensor]]],
) -> Iterator[list[np.ndarray] | tuple[tuple[Piece, ...], ...]]:
    """What a version of the weights is stored as: each group's bytes, and the manifest at last.

    Bytes are uint8 arrays, one a tensor, which share its memory where it is the host's already:
    whoever takes a bucket copies it before it asks for the next.
    """
    manifest = []
    for names, tensors in source:
        flat = [tensor.detach().cpu().contiguous().reshape(-1) for tensor in tensors]
        arrays = [tensor.view(torch.uint8).numpy() for tensor in flat]
        manifest.append(
            tuple(
                Piece(
                    name,
                    str(tensor.dtype).removeprefix("torch."),
                    tuple(tensor.shape),
                    array.nbytes,
                    checksum(array),
                )
                for name, tensor, array in zip(names, tensors, arrays, strict=True)
            )
        )
        yield arrays
    yield tuple(manifest)


def layer_groups(names: list[str]) -> list[list[str]]:
    """Names by layer: consecutive names that share everything up to their first number."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        key = ".".join(parts[: number + 1]) if number is not None else ""
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def in_buckets(
    groups: list[list[str]], size: Callable[[list[str]], int], bucket_bytes: int
) -> list[list[str]]:
    """Neighbouring groups joined while they hold at most `bucket_bytes`; a larger one is alone."""
    buckets: list[list[str]] = []
    room = 0
    for group in groups:
        group_bytes = size(group)
        if buckets and group_bytes <= room:
            buckets[-1].extend(group)
        else:
            buckets.append(list(group))
            room = bucket_bytes
        room -= group_bytes
    return buckets
