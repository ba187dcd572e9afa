"""Whole weights from low-rank updates: the engine's end of an adapter-only transfer.

The learner sends A [rank, in] and B [out, rank] of each adapted weight, and the engine makes
W + B·A of its own copy of W: the checkpoint it was started from, read from the disk through a
memory map, a layer at a time. What comes out is loaded like any other weights.

vLLM can apply LoRA itself (`add_lora`), and was not taken. It wants the greatest rank and the
adapted modules at the start, adds two products to every adapted layer for every token that is
ever sampled, reaches the vision tower for few families, and its adapter belongs to a request, so
that a running response would keep the old policy where the protocol here promises the new one.
The price is to read the adapted layers from the disk (or its cache) and to load them for each
version. In bfloat16 the sum is rounded as weights are, which the learner's A and B are not;
`learner/logprob_gap` shows what that makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

A, B = ".lora_A.weight", ".lora_B.weight"
"""What the name of a weight (without `.weight`) is followed by."""


class AdapterError(RuntimeError):
    """Low-rank updates that do not fit the checkpoint the engine was started from."""


def is_adapter(name: str) -> bool:
    """Whether a tensor of a transfer is half of a low-rank update."""
    return name.endswith((A, B))


class BaseWeights:
    """The tensors of a checkpoint by name, read when they are asked for."""

    def __init__(self, model: str) -> None:
        """`model`: a folder, or a hub name whose files are on this machine already."""
        folder = Path(model)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(model, local_files_only=True))
        self._folder = folder
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(str(path), "pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def neighbours(self, name: str) -> list[str]:
        """All tensors of the layer of one: an engine fuses some, and then loads them whole."""
        layer = layer_of(name)
        return [other for other in self._files if layer_of(other) == layer]

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor. Raises AdapterError where the checkpoint has none of that name."""
        if name not in self._files:
            raise AdapterError(
                f"an adapter came for {name}, which {self._folder} does not hold; are sampler and "
                "learner started from the same model?"
            )
        with safe_open(str(self._files[name]), "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def layer_of(name: str) -> str:
    """A tensor's name up to its first number; without one, up to its module."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: number + 1] if number is not None else parts[:-1])


def with_adapters(
    base: BaseWeights, adapters: Mapping[str, torch.Tensor], merged_layers: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the layers that have adapters, W + B·A where there is one.

    Computed in float32, in the dtype of W. `merged_layers`: those of this transfer so far. Raises
    AdapterError for a layer that comes twice (the second time it would not be loaded) or an
    adapter that does not fit its weight.
    """
    targets = [name.removesuffix(A) for name in adapters if name.endswith(A)]
    for layer in dict.fromkeys(layer_of(f"{target}.weight") for target in targets):
        if layer in merged_layers:
            raise AdapterError(f"adapters of layer {layer} came in two parts")
        merged_layers.add(layer)
    unmerged = {f"{target}.weight": target for target in targets}
    for name in list(unmerged):
        if name not in unmerged:
            continue
        for other in base.neighbours(name) or [name]:
            weight = base.read(other)
            target = unmerged.pop(other, None)
            if target is not None:
                weight = _merged(other, weight, adapters[target + A], adapters[target + B])
            yield other, weight


def _merged(name: str, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if (b.shape[0], a.shape[1]) != tuple(weight.shape):
        raise AdapterError(
            f"an adapter of {b.shape[0]} by {a.shape[1]} came for {name}, which is "
            f"{' by '.join(map(str, weight.shape))}"
        )
    return (weight.float() + b.float() @ a.float()).to(weight.dtype)
