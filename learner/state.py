"""What a learner must remember besides its weights: AdamW's moments and the random streams.

Every parameter's moments are stored whole and under its own name, so that a checkpoint fits any
ZeRO stage and any number of ranks. Where the model computes in less than float32, the
optimizer's float32 weights are stored too.

    training/optimizer-0003.safetensors   one layer group: `<kind>/<parameter>`, float32
    training/random.json                  the random streams of each rank
"""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"
"""The optimizer's own float32 weights, where the model's are of another type."""
STEPS = "steps"
"""AdamW's count of steps, a parameter: without ZeRO one that never had a gradient took none."""


class OptimizerState:
    """The optimizer state of a DeepSpeed engine by parameter.

    Every rank must make the same calls: ZeRO's partitions are gathered by collectives.
    """

    def __init__(self, engine: Any, deepspeed: Any, stage: int) -> None:
        self._engine, self._access, self._stage = engine, deepspeed.utils, stage
        self._parameters = {
            name: parameter
            for name, parameter in engine.module.model.named_parameters()
            if parameter.requires_grad
        }
        self._masters = {} if stage else self._unsharded_masters()
        if stage in (1, 2) and any(engine.optimizer.state.values()):
            # DeepSpeed links parameters to their state after the step of the first parameter
            # group, when the others have none yet.
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()

    def tensors(self, names: list[str]) -> dict[str, torch.Tensor]:
        """`<kind>/<name>` -> whole float32 tensor; no moments before the first update."""
        tensors = {}
        for name in names:
            if name not in self._parameters:
                continue
            parameter = self._parameters[name]
            if parameter.dtype != torch.float32:
                tensors[f"{MASTER}/{name}"] = self._master(name)
            for kind, tensor in self._state(name).items():
                tensors[f"{kind}/{name}"] = tensor
        return {name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}

    def load(self, files: list[Path]) -> int:
        """Take over what `tensors` gave, from whatever stage and number of ranks.

        Returns the optimizer steps taken so far.
        """
        stored = _Stored(files)
        steps = stored.steps()
        if self._stage and steps:
            self._begin_flat(steps)
        for name in self._parameters:
            if stored.has(MASTER, name):
                self._set_master(name, stored.read(MASTER, name))
            if not stored.has(STEPS, name):
                continue
            moments = {kind: stored.read(kind, name) for kind in MOMENTS}
            if self._stage:
                for kind, value in moments.items():
                    self._set_sharded(name, value, kind)
            else:
                master = self._masters[name]
                self._engine.optimizer.state[master] = {
                    "step": stored.read(STEPS, name).reshape(()),
                    **{k: v.to(master.device) for k, v in moments.items()},
                }
        return steps

    def _unsharded_masters(self) -> dict[str, torch.Tensor]:
        """What the optimizer steps on without ZeRO: the parameters, or float32 twins of them."""
        optimizer = self._engine.optimizer
        twins: dict[int, torch.Tensor] = {}
        if hasattr(optimizer, "fp32_groups"):
            for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                twins |= {id(p): twin for p, twin in zip(low, high, strict=True)}
        return {name: twins.get(id(p), p) for name, p in self._parameters.items()}

    def _state(self, name: str) -> dict[str, torch.Tensor]:
        state = self._engine.optimizer.state
        if not self._stage:
            moments = state.get(self._masters[name], {})
            return (
                {kind: moments[kind] for kind in MOMENTS} | {STEPS: moments["step"]}
                if moments
                else {}
            )
        if not state:
            return {}
        parameter = self._parameters[name]
        get = self._access.safe_get_full_optimizer_state
        moments = {kind: get(parameter, kind) for kind in MOMENTS}
        return moments | {STEPS: next(iter(state.values()))["step"].clone()}

    def _master(self, name: str) -> torch.Tensor:
        if self._stage:
            full: torch.Tensor = self._access.safe_get_full_fp32_param(self._parameters[name])
            return full
        return self._masters[name]

    def _set_master(self, name: str, value: torch.Tensor) -> None:
        if self._stage:
            self._set_sharded(name, value, None)
        else:
            self._masters[name].data.copy_(value)

    def _set_sharded(self, name: str, value: torch.Tensor, kind: str | None) -> None:
        """Write this rank's part of a parameter's moment, or of its float32 weights."""
        parameter, access = self._parameters[name], self._access
        if self._stage < 3:
            value = value.to(parameter.device)
            if kind:
                access.safe_set_full_optimizer_state(parameter, value, kind)
            else:
                access.safe_set_full_fp32_param(parameter, value)
            return
        # The `full` setters of stage 3 have no room for the padding of the last rank's part.
        size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
        mine = own_part(value, size, rank).to(parameter.device)
        if kind:
            access.safe_set_local_optimizer_state(parameter, mine, kind)
        else:
            access.safe_set_local_fp32_param(parameter, mine)

    def _begin_flat(self, steps: int) -> None:
        """Give ZeRO's flat partitions the state that AdamW only makes in its first step."""
        optimizer = self._engine.optimizer
        if self._stage == 3:
            flats = optimizer.fp32_partitioned_groups_flat
        else:
            flats = optimizer.single_partition_of_fp32_groups
        for flat in flats:
            zeros = {kind: torch.zeros_like(flat.data) for kind in MOMENTS}
            optimizer.state[flat] = {"step": torch.tensor(float(steps)), **zeros}
        if self._stage < 3:
            optimizer._lazy_init_hp_params_optimizer_state()


def forget_first_step(optimizer: Any) -> None:
    """Undo what a DeepSpeed optimizer of bfloat16 weights without ZeRO does when it is made.

    It lets AdamW step on gradients of zero to have its moments: that decays the float32 weights,
    and counts, so that every later step would be corrected for one too many.
    """
    if hasattr(optimizer, "fp32_groups"):
        optimizer.state.clear()
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for weight, master in zip(low, high, strict=True):
                master.data.copy_(weight.data)


def own_part(value: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """[size]: a rank's part of a tensor that is cut into equal parts, the end filled with zeros."""
    mine = torch.zeros(size, dtype=value.dtype)
    part = value.flatten()[size * rank : size * (rank + 1)]
    mine[: len(part)] = part
    return mine


class _Stored:
    """Tensors by kind and parameter in several safetensors files, read one at a time."""

    def __init__(self, files: list[Path]) -> None:
        self._files: dict[str, Path] = {}
        for path in files:
            with safe_open(str(path), "pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def has(self, kind: str, name: str) -> bool:
        return f"{kind}/{name}" in self._files

    def read(self, kind: str, name: str) -> torch.Tensor:
        key = f"{kind}/{name}"
        with safe_open(str(self._files[key]), "pt") as file:
            tensor: torch.Tensor = file.get_tensor(key)
        return tensor

    def steps(self) -> int:
        """The most steps any parameter took."""
        names = [key.partition("/")[2] for key in self._files if key.startswith(f"{STEPS}/")]
        return max((int(self.read(STEPS, name)) for name in names), default=0)


def random_state() -> dict[str, Any]:
    """The random streams of this process (torch, its GPU, NumPy, Python) as JSON can hold them."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, pending = random.getstate()
    cuda = torch.cuda.is_available()
    return {
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state()) if cuda else None,
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": [version, list(numbers), pending],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from what `random_state` gave."""
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, np.uint32), *rest))
    version, numbers, pending = state["python"]
    random.setstate((version, tuple(numbers), pending))


def seed_all(seed: int, steps: int, rank: int) -> None:
    """Random streams for a rank that has none to go on from: seed, progress and rank decide."""
    one, two, three = np.random.SeedSequence([seed, steps, rank]).generate_state(3).tolist()
    torch.manual_seed(one)
    np.random.seed(two)
    random.seed(three)


def read_random_states(path: Path) -> list[dict[str, Any]]:
    """What each rank's `random_state` was, by rank."""
    states: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return states


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
