"""LoRA (arXiv 2106.09685) through PEFT: a frozen policy with trained low-rank matrices beside it.

An adapted linear layer computes W·x + (alpha/rank)·B·A·x, with B = 0 at the start. W keeps its
place in the module tree under `base_layer`; A and B are all that has gradients, optimizer state
and a way to the samplers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from learner.families.base import Family
from learner.parts import require_matches
from learner.policy import Policy
from learner.settings import LoraConfig
from learner.weights import Gather, OfferedWeights, ParameterMeta, layer_groups
from rollout.tokens import ModelError

ADAPTER = "adapter"
"""Folder of the adapters in PEFT's format, beside the merged weights."""
PEFT_PREFIX = "base_model.model."


class Adapters:
    """The adapters of a policy, made on construction; everything else is frozen."""

    def __init__(self, policy: Policy, settings: LoraConfig, base: str) -> None:
        """`base`: where the model's weights are from; told in what is saved.

        Raises ModelError for a target that is no linear layer, or cannot be adapted.
        """
        import peft

        model = policy.model
        self._model, self._settings = model, settings
        self.layers = _linear_layers(model, settings.targets, policy.family)
        self._config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            target_modules=list(self.layers),
            base_model_name_or_path=base,
        )
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        peft.inject_adapter_in_model(self._config, model)
        for layer in self.layers:
            for matrix in self.matrices(layer):
                matrix.requires_grad_(True)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Within, the policy is what it was without adapters.

        They count zero times instead of being left out: under ZeRO-3 the ranks gather the same
        parameters in the same order as ever.
        """
        modules: list[Any] = [self._model.get_submodule(layer) for layer in self.layers]
        for module in modules:
            module.scaling["default"] = 0.0
        try:
            yield
        finally:
            for module in modules:
                module.scaling["default"] = self.scale

    def merged(
        self, names: Iterable[str], tensors: Iterable[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The weights without adapters, as if the model had been trained whole.

        `names` and `tensors` are those of whole layers of the module tree, adapters with them.
        """
        by_name = dict(zip(names, tensors, strict=True))
        merged = {}
        for name, tensor in by_name.items():
            layer, _, last = name.partition(".base_layer.")
            if last == "weight":
                a, b = (by_name[f"{layer}.lora_{which}.default.weight"] for which in "AB")
                merged[f"{layer}.weight"] = merge(tensor, a, b * self.scale)
            elif last:
                merged[f"{layer}.{last}"] = tensor
            elif ".lora_" not in name:
                merged[name] = tensor
        return merged

    @property
    def scale(self) -> float:
        """alpha/rank."""
        return self._settings.alpha / self._settings.rank

    def adapter_tensors(
        self, names: Iterable[str], tensors: Iterable[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The A and B among parameters, under the names that PEFT's format has."""
        return {
            PEFT_PREFIX + name.replace(".default.", "."): tensor
            for name, tensor in zip(names, tensors, strict=True)
            if ".lora_" in name
        }

    def write(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Write adapters, of `adapter_tensors`, in PEFT's format; `PeftModel` loads them."""
        self._config.save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})

    def load(self, folder: Path) -> None:
        """Take over the adapters that `write` left; the model must not be sharded yet.

        Raises ModelError where they are not those of the same layers and sizes.
        """
        path = folder / "adapter_model.safetensors"
        stored = load_file(path)
        named = {n: p for n, p in self._model.named_parameters() if ".lora_" in n}
        expected = self.adapter_tensors(named, named.values())
        if {n: t.shape for n, t in stored.items()} != {n: t.shape for n, t in expected.items()}:
            raise ModelError(
                f"{path}: holds other adapters than learner.lora asks for; resume with the "
                "targets and the rank it was trained with"
            )
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(stored[name])

    def checkpoint_layers(self) -> dict[str, str]:
        """Layer of the module tree -> its weight's name in a checkpoint, without `.weight`.

        Raises ModelError for one that a checkpoint keeps in another form than as that matrix:
        what B·A adds to it there has no name.
        """
        from transformers.core_model_loading import revert_weight_conversion

        checkpoint_names = {}
        for layer, shape in self.layers.items():
            empty = torch.empty(shape, device="meta")
            reverted = revert_weight_conversion(self._model, {f"{layer}.weight": empty})
            ((name, tensor),) = reverted.items() if len(reverted) == 1 else (("", empty[:0]),)
            if tensor.shape != shape or not name.endswith(".weight"):
                raise ModelError(
                    f"learner.lora.targets: {layer} has another form in checkpoints than in "
                    "transformers, so its adapter cannot be sent; leave it out"
                )
            checkpoint_names[layer] = name.removesuffix(".weight")
        return checkpoint_names

    def matrices(self, layer: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [rank, in] and B [out, rank] of a layer."""
        module: Any = self._model.get_submodule(layer)
        return module.lora_A["default"].weight, module.lora_B["default"].weight


class AdapterWeights(OfferedWeights):
    """A and B of every adapted layer as a weight source, one layer group at a time.

    Named `<weight in a checkpoint>.lora_A.weight` and `.lora_B.weight`, with alpha/rank in B, so
    that the engine's weight is W + B·A (`rollout/adapters.py`).
    """

    def __init__(self, adapters: Adapters, gather: Gather, dtype: torch.dtype) -> None:
        self._adapters, self._gather, self._dtype = adapters, gather, dtype
        self._names = adapters.checkpoint_layers()
        self._groups = layer_groups(list(self._names))

    def metadata(self) -> list[ParameterMeta]:
        return [
            ParameterMeta(name, self._dtype, tuple(getattr(p, "ds_shape", p.shape)))
            for layers in self._groups
            for name, p in zip(*self._matrices(layers), strict=True)
        ]

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        for layers in self._groups:
            names, parameters = self._matrices(layers)
            with self._gather(parameters):
                scaled = [
                    p.data * self._adapters.scale if name.endswith(".lora_B.weight") else p.data
                    for name, p in zip(names, parameters, strict=True)
                ]
                yield names, [t.to(self._dtype) for t in scaled]

    def _matrices(self, layers: list[str]) -> tuple[list[str], list[nn.Parameter]]:
        names, parameters = [], []
        for layer in layers:
            for which, matrix in zip("AB", self._adapters.matrices(layer), strict=True):
                names.append(f"{self._names[layer]}.lora_{which}.weight")
                parameters.append(matrix)
        return names, parameters


def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """W + B·A, computed in float32, in the dtype of W [out, in]."""
    return (weight.float() + b.float() @ a.float()).to(weight.dtype)


def _linear_layers(
    model: nn.Module, targets: Iterable[str], family: Family
) -> dict[str, torch.Size]:
    """The linear layers that the targets stand for, with the shapes of their weights.

    Raises ModelError for a target without one, and for the LM head, which reads log-probs off by
    itself (`learner.policy`).
    """
    every = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    every.pop("lm_head", None)
    chosen: dict[str, torch.Size] = {}
    for target in targets:
        fault = f"learner.lora.targets: {target!r} matches no linear layer but the LM head's"
        chosen |= {n: every[n] for n in require_matches(target, list(every), family, fault)}
    return {name: shape for name, shape in every.items() if name in chosen}
