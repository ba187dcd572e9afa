"""A rough account of memory: what a learner rank and an engine hold of a policy.

No weight is read. Estimates from parameter counts (sources at each formula), meant to catch what
cannot fit, not to plan the last GiB.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.recipe.hardware import GIB, Machine
from cluster.recipe.recipe import Recipe, UserError
from learner.settings import LearnerConfig, LoraConfig
from rollout.settings import ModelConfig, SamplerConfig
from tasks.fetched import local

if TYPE_CHECKING:
    from learner.outline import Trained


@dataclass(frozen=True)
class PolicySize:
    """What memory depends on: all parameters, and the text model's shape.

    inner: of an MLP; queries, keys: of all attention heads together, and of those of the keys.
    """

    parameters: int
    hidden: int
    layers: int
    vocabulary: int
    inner: int
    queries: int
    keys: int

    def kept_by_a_layer(self, exact: bool) -> int:
        """Values that a layer keeps of a token for its gradient, in the weights' type.

        Counted on Qwen3's layer as transformers 5.19 runs it (`benchmarks/learner_memory.py
        --activations`; other layers keep less): inputs and outputs of its products, gate, product
        and their like, and unless the weights are `exact` (float32) what the norms widen to it.
        """
        norms, attention = (6, 4) if exact else (8, 5)
        return norms * self.hidden + 4 * self.inner + attention * (self.queries + self.keys)


KNOWN_POLICIES = {
    "Qwen/Qwen3-VL-2B-Instruct": PolicySize(
        2_127_532_032, 2048, 28, 151_936, inner=6144, queries=2048, keys=1024
    ),
    "Qwen/Qwen3-VL-4B-Instruct": PolicySize(
        4_437_815_808, 2560, 36, 151_936, inner=9728, queries=4096, keys=1024
    ),
    "Qwen/Qwen3-VL-8B-Instruct": PolicySize(
        8_767_123_696, 4096, 36, 151_936, inner=12_288, queries=4096, keys=1024
    ),
    "Qwen/Qwen3-VL-32B-Instruct": PolicySize(
        33_357_390_064, 5120, 64, 151_936, inner=25_600, queries=8192, keys=1024
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": PolicySize(
        3_754_622_976, 2048, 36, 151_936, inner=11_008, queries=2048, keys=256
    ),
    "OpenGVLab/InternVL3_5-4B-HF": PolicySize(
        4_732_489_216, 2560, 36, 151_936, inner=9728, queries=4096, keys=1024
    ),
    "OpenGVLab/InternVL3_5-8B-HF": PolicySize(
        8_528_318_464, 4096, 36, 151_936, inner=12_288, queries=4096, keys=1024
    ),
}
"""Hub names that can be placed offline, counted on their config classes with the shapes that were
published (`benchmarks/memory_that_fits.py`)."""


def policy_size(path: str) -> PolicySize | None:
    """Size of a policy from its folder's files, or of a known hub name; None where unknown.

    Raises UserError for a folder whose files cannot be read.
    """
    folder = Path(local(path))
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        return KNOWN_POLICIES.get(path)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config", config)
        hidden, heads = text["hidden_size"], text.get("num_attention_heads", 1)
        head = text.get("head_dim") or hidden // heads
        return PolicySize(
            parameters=sum(map(_count_parameters, weights)),
            hidden=hidden,
            layers=text["num_hidden_layers"],
            vocabulary=text["vocab_size"],
            inner=text.get("intermediate_size") or 4 * hidden,
            queries=heads * head,
            keys=(text.get("num_key_value_heads") or heads) * head,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(
            f"{path}: config.json or a safetensors header there cannot be read "
            f"({type(error).__name__}: {error}); is the checkpoint whole?"
        ) from error


def _count_parameters(path: Path) -> int:
    """Parameters in a safetensors file, from its header alone (8 bytes of length, then JSON)."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(min(length, 100_000_000)))
    return sum(math.prod(v["shape"]) for k, v in header.items() if k != "__metadata__")


def trained_of(policy: str, learner: LearnerConfig) -> Trained | None:
    """What is trained of a policy whose folder is here; None where all of it is, or unknown.

    Names are looked up in the policy's structure, which takes the seconds of importing torch.
    Raises ModelError for a part or pattern that matches nothing.
    """
    partial = learner.freeze or learner.rates or learner.lora
    if not partial or not (Path(local(policy)) / "config.json").is_file():
        return None
    return _trained(policy, learner.freeze, tuple(learner.rates.items()), learner.lora)


@cache
def _trained(
    path: str,
    frozen: tuple[str, ...],
    rates: tuple[tuple[str, float], ...],
    lora: LoraConfig | None,
) -> Trained:
    from learner.outline import what_is_trained

    return what_is_trained(path, frozen, dict(rates), lora)


def width(model: ModelConfig) -> int:
    """Bytes of a weight of the learner."""
    return 4 if model.learner_dtype == "float32" else 2


def sampler_width(model: ModelConfig) -> int:
    """Bytes of a weight of an engine, and of one that is sent."""
    return 4 if model.sampler_dtype == "float32" else 2


def learner_memory(
    model: ModelConfig,
    learner: LearnerConfig,
    size: PolicySize | None,
    trained: Trained | None = None,
    reference: bool = False,
) -> dict[str, int]:
    """Bytes on one learner rank, by part; `trained` None: all parameters are.

    `reference`: with the frozen copy that a KL to it takes (`learner.reference`), whole on a rank.

    Model states follow ZeRO (arXiv 1910.02054, section 3.1 and figure 1): weights and gradients
    in the recipe's dtype (from stage 2 gradients are added up in float32), a float32 master
    copy and two Adam moments, divided over the ranks from the stage that shards them. What is
    frozen has weights only. At stage 0 float32 weights are stepped on themselves, with no
    master copy beside them. Activations are those of the language model's layers
    (`PolicySize.kept_by_a_layer`), without the vision tower's; with activation checkpointing one
    layer has them, and of the others the input is kept (arXiv 2205.05198, section 5). To them
    comes one table of float32 logits (`learner.logits_mib`) and its gradient. A
    float32 head of bfloat16 weights is a copy, whole on every rank, with its gradient and that of
    one turn beside it where it is trained. `mixed` counts as float32, with the weights once more in
    bfloat16. What each stands on: docs/capacity.md.
    """
    if size is None:
        return {}

    def shard(total: int, from_stage: int) -> int:
        return math.ceil(total / (learner.ranks if learner.zero_stage >= from_stage else 1))

    stored = size.parameters + (trained.added if trained else 0)
    stepped = trained.trained if trained else size.parameters
    no_master = learner.zero_stage == 0 and model.learner_dtype == "float32"
    tokens = learner.micro_batch_tokens
    activations = size.kept_by_a_layer(exact=model.learner_dtype == "float32")
    again = learner.activation_checkpointing
    per_token = activations + size.layers * size.hidden if again else size.layers * activations
    copied = model.lm_head_float32 and model.learner_dtype != "float32"
    copies = 1 if learner.lora or "head" in learner.freeze else 3
    head = {"head in float32": copies * 4 * size.hidden * size.vocabulary} if copied else {}
    copy = {"reference": width(model) * size.parameters} if reference and not learner.lora else {}
    cast = {"weights in bfloat16": 2 * stored} if model.dtype == "mixed" else {}
    return (
        head
        | {
            "weights": shard(width(model) * stored, 3),
            "gradients": shard((4 if learner.zero_stage >= 2 else width(model)) * stepped, 2),
            "optimizer": shard((8 if no_master else 12) * stepped, 1),
            "activations": width(model) * tokens * per_token
            + min(8 * tokens * size.vocabulary, 2 * math.ceil(learner.logits_mib * 2**20)),
        }
        | copy
        | cast
    )


def sampler_memory(
    model: ModelConfig, sampler: SamplerConfig, size: PolicySize | None, machine: Machine
) -> dict[str, int]:
    """Bytes of one engine, on each of its GPUs or in main memory, by part.

    On a GPU the engine fills `gpu_memory_utilization` of it, whatever the policy's size.
    """
    whole = sampler_width(model) * size.parameters if size else 0
    weights = math.ceil(whole / sampler.tensor_parallel)
    parts = {"weights": weights} if size else {}
    if not sampler.gpus:
        return parts | {"KV cache": int(sampler.kv_cache_gib * GIB)}
    if machine.gpus:
        share = sampler.gpu_memory_utilization * min(gpu.memory for gpu in machine.gpus)
        return parts | {"KV cache and buffers": max(0, int(share) - weights)}
    return parts


LEFT_BY_A_SLEEPER = GIB
"""Bytes on a GPU of a process whose states are in main memory: CUDA's context, an engine's graphs,
NCCL's buffers. A guess, since nothing was measured on a card."""


def at_rest(learner: Mapping[str, int]) -> int:
    """Bytes of main memory that a rank's states take while samplers have its GPU."""
    kept = ("weights", "optimizer", "reference")
    return sum(size for part, size in learner.items() if part in kept)


def phases(engine: Mapping[str, int], learner: Mapping[str, int], transport: str) -> dict[str, int]:
    """Bytes on a GPU in each phase of samplers and learner that take turns (`cluster.run.turns`).

    `engine`, `learner`: parts of an engine, and of the rank on its GPU, as above. By transport
    `ipc` the new weights are there twice while they are handed over.
    """
    phases = {
        "sampling": sum(engine.values()) + LEFT_BY_A_SLEEPER,
        "learning": sum(learner.values()) + LEFT_BY_A_SLEEPER,
    }
    if transport == "ipc":
        both = engine.get("weights", 0) + learner.get("weights", 0)
        phases["sending"] = both + 2 * LEFT_BY_A_SLEEPER
    return phases


def cached_tokens(
    model: ModelConfig, sampler: SamplerConfig, size: PolicySize, machine: Machine
) -> int:
    """How many tokens an engine's KV cache has room for; on a GPU at most, with no buffers beside.

    A token has a key and a value of each layer, divided over tensor-parallel ranks.
    """
    token = 2 * size.layers * size.keys * sampler_width(model) / sampler.tensor_parallel
    parts = sampler_memory(model, sampler, size, machine)
    room = sum(memory for part, memory in parts.items() if part.startswith("KV cache"))
    return int(room / token)


def stored_weights(recipe: Recipe, command: str) -> int:
    """Bytes in Ray's object store on the first learner rank's node: the last two versions.

    0 where samplers fetch none, or the policy's size is unknown. Ray keeps them in shared memory,
    and in its temporary folder what does not fit there.
    """
    size = policy_size(recipe.model.path)
    fetched = command == "train" or (command == "sft" and recipe.eval.every)
    if size is None or not fetched or recipe.transfer.transport != "host":
        return 0
    trained = trained_of(recipe.model.path, recipe.learner)
    if trained and recipe.learner.lora:
        return 2 * width(recipe.model) * trained.added
    return 2 * sampler_width(recipe.model) * size.parameters
