"""What runs where: the actors of a recipe, what each takes, and a rough account of memory.

Arithmetic on a recipe and a machine; nothing is started and no weight is read, so a recipe for
eight GPUs can be looked at on a laptop. Memory is an estimate from parameter counts (sources at
each formula), meant to catch what cannot fit, not to plan the last GiB. Where a recipe says what is
trained (`learner.freeze`, `learner.rates`, `[learner.lora]`) and the policy is in a folder here,
names are looked up in its structure, which takes the seconds of importing torch.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.recipe.recipe import Recipe, UserError
from rewards.scored import TermError
from rewards.terms import find_term, term_facts

if TYPE_CHECKING:
    from learner.outline import Trained
    from learner.settings import LoraConfig

Command = Literal["train", "sft", "eval", "replay", "sample"]

GIB = 2**30
UNKNOWN_SIZES = ("sampler", "frozen model", "learner")
"""Roles whose memory may be unknown; the others take little."""


class PlacementError(UserError):
    """A recipe that asks for more than the machine has."""


@dataclass(frozen=True)
class Gpu:
    """One accelerator as the driver reports it; `memory` in bytes."""

    name: str
    memory: int


@dataclass(frozen=True)
class Machine:
    """What there is to place on: cores this process may use, bytes of memory, GPUs."""

    cores: int
    memory: int
    gpus: tuple[Gpu, ...] = ()

    @classmethod
    def detect(cls) -> Machine:
        """This machine, within its container's limits and `CUDA_VISIBLE_DEVICES`."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        quota = _first_word("/sys/fs/cgroup/cpu.max").split()
        if len(quota) == 2 and quota[0].isdigit():
            cores = min(cores or 1, max(1, int(quota[0]) // int(quota[1])))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = _first_word("/sys/fs/cgroup/memory.max")
        if limit.isdigit():
            memory = min(memory, int(limit))
        return cls(cores=cores or 1, memory=memory, gpus=_detect_gpus())


@dataclass(frozen=True)
class PolicySize:
    """What memory depends on: parameters, and the text model's width, depth and vocabulary."""

    parameters: int
    hidden: int
    layers: int
    vocabulary: int


KNOWN_POLICIES = {
    "Qwen/Qwen3-VL-4B-Instruct": PolicySize(4_438_000_000, 2560, 36, 151_936),
    "OpenGVLab/InternVL3_5-4B-HF": PolicySize(4_700_000_000, 2560, 36, 151_936),
    "Qwen/Qwen2.5-VL-3B-Instruct": PolicySize(3_755_000_000, 2048, 36, 151_936),
}
"""Hub names that recipes here use, so that they can be placed offline. Parameter counts as
their model cards round them, the last one counted on its config class."""


@dataclass(frozen=True)
class Actor:
    """One Ray actor: its role, what it takes, and its memory parts in bytes by name.

    Memory is in GPU memory where `gpus` > 0 and in main memory elsewhere; `offloaded` is in main
    memory in any case.
    """

    role: Literal["sampler", "frozen model", "learner", "reward worker", "driver"]
    index: int
    cpus: float
    gpus: float
    memory: dict[str, int]
    offloaded: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Placement:
    """Where a recipe's actors go, and what stands in the way (`shortages`) or is worth a look.

    `shortages` are sentences naming the fields to lower; empty means that it fits.
    """

    actors: tuple[Actor, ...]
    machine: Machine
    shortages: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def cpus(self) -> float:
        """Cores taken by all actors."""
        return sum(actor.cpus for actor in self.actors)

    @property
    def gpus(self) -> float:
        """GPUs taken by all actors."""
        return sum(actor.gpus for actor in self.actors)

    def require(self) -> None:
        """Raise PlacementError unless the machine has all that the recipe asks for."""
        if self.shortages:
            raise PlacementError("\n".join(self.shortages))


def plan(recipe: Recipe, machine: Machine, command: Command = "train") -> Placement:
    """Place a recipe's actors on a machine.

    `sft` runs its samplers after its learner, or beside it where it measures on the way;
    `replay` has no samplers, `sample` no learner.

    Never raises for a recipe that does not fit: see `Placement.require`. Raises ModelError for a
    part or pattern of `learner` that matches nothing in a policy whose folder is here.
    """
    size = policy_size(recipe.model.path)
    learners = _learners(recipe, size, command) if command in ("train", "sft", "replay") else []
    samplers, frozen, workers = [], [], []
    if command in ("train", "sample") or (command == "sft" and recipe.eval.every):
        memory = sampler_memory(recipe, size, machine)
        samplers = [
            Actor("sampler", i, recipe.sampler.cpus, recipe.sampler.gpus, memory)
            for i in range(recipe.sampler.count)
        ]
    if command in ("train", "sample"):
        frozen = [
            Actor(
                "frozen model",
                i,
                recipe.sampler.cpus,
                recipe.sampler.gpus,
                sampler_memory(recipe, policy_size(model), machine),
            )
            for i, model in enumerate(frozen_models(recipe))
        ]
        # Scoring is short and comes while the engines wait, so it reserves no core.
        workers = [Actor("reward worker", i, 0, 0, {}) for i in range(recipe.reward.workers)]
    actors = (Actor("driver", 0, 0, 0, {}), *samplers, *frozen, *learners, *workers)
    notes = []
    if command == "sft" and not recipe.eval.every:
        notes.append("the samplers that measure the result start when the learner has ended")
    if size is None:
        notes.append(
            f"model.path = {recipe.model.path} is neither a folder with safetensors weights here "
            "nor a hub name of known size, so its memory is not estimated"
        )
    unknown = bool(recipe.learner.freeze or recipe.learner.lora) and trained_of(recipe) is None
    if learners and size and unknown:
        notes.append(
            "model.path is no folder here, so what learner.freeze or learner.lora leaves untrained "
            "is not known; the learner's memory is counted as if all of it were trained"
        )
    if any(actor.gpus for actor in samplers):
        share = recipe.sampler.gpu_memory_utilization
        notes.append(f"each engine fills {share:.0%} of its GPU with KV cache")
    for where, estimate, present in _memory_totals(actors, machine):
        if estimate > present:
            notes.append(
                f"{where} may not suffice: the estimate is {gib(estimate)} of {gib(present)}; "
                "lower learner.micro_batch_tokens or sampler.kv_cache_gib, or raise "
                "learner.zero_stage"
            )
    there = {"cores": machine.cores, "GPUs": len(machine.gpus)}
    shortages = _shortages(_need(recipe, command), there, "this machine has")
    return Placement(actors, machine, shortages, tuple(notes))


def _learners(recipe: Recipe, size: PolicySize | None, command: Command) -> list[Actor]:
    learner, trained = recipe.learner, trained_of(recipe)
    memory = learner_memory(recipe, size, trained)
    offloaded = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "weights")}
    away = [name for name in offloaded[learner.offload] if learner.gpus and name in memory]
    there = {name: memory.pop(name) for name in away}
    copy = {}
    if size and command == "train" and recipe.transfer.overlap:
        sent = trained.added if trained and learner.lora else size.parameters
        copy = {"copy to send": _width(recipe) * sent}
    return [
        Actor("learner", i, learner.cpus, learner.gpus, memory, there | ({} if i else copy))
        for i in range(learner.ranks)
    ]


def describe(placement: Placement) -> str:
    """The placement as a table of text, for `--dry-run`."""
    rows = [("actor", "cores", "GPUs", "memory (estimate)")]
    for actor in placement.actors:
        parts = ", ".join(f"{name} {gib(size)}" for name, size in actor.memory.items())
        if parts:
            on = " on each GPU" if actor.gpus else ""
            memory = f"{gib(sum(actor.memory.values()))}{on}: {parts}"
            if actor.offloaded:
                memory += "; in main memory " + ", ".join(
                    f"{name} {gib(size)}" for name, size in actor.offloaded.items()
                )
        else:
            memory = "unknown" if actor.role in UNKNOWN_SIZES else "small"
        rows.append((f"{actor.role} {actor.index}", f"{actor.cpus:g}", f"{actor.gpus:g}", memory))
    rows.append(("in all", f"{placement.cpus:g}", f"{placement.gpus:g}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip()
        for row in rows
    ]
    machine = placement.machine
    gpus = ", ".join(f"{gpu.name} {gib(gpu.memory)}" for gpu in machine.gpus) or "no GPU"
    lines += ["", f"this machine: {machine.cores} cores, {gib(machine.memory)}, {gpus}"]
    if placement.gpus > len(machine.gpus):
        lines.append(
            f"needs {placement.gpus:g} GPUs, this machine has {len(machine.gpus)}: dry run only"
        )
    if placement.cpus > machine.cores:
        lines.append(
            f"needs {placement.cpus:g} cores, this machine has {machine.cores}: dry run only"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in placement.notes)])


def frozen_models(recipe: Recipe) -> list[str]:
    """Checkpoints that the recipe's reward terms ask beside the policy, each once.

    Each runs on one engine, placed as [sampler] places one of the policy's. Raises UserError for
    a term that cannot be loaded.
    """
    found: dict[str, None] = {}
    for entry in recipe.reward.effective_terms():
        try:
            if hasattr(find_term(entry.name), "ask"):
                found[term_facts(entry.name, entry.args).model or ""] = None
        except TermError as error:
            raise UserError(f"reward.terms: {error}") from error
    return [model for model in found if model]


def policy_size(path: str) -> PolicySize | None:
    """Size of a policy from its folder's files, or of a known hub name; None where unknown.

    Raises PlacementError for a folder whose files cannot be read.
    """
    folder = Path(path)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        return KNOWN_POLICIES.get(path)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = config.get("text_config", config)
        return PolicySize(
            parameters=sum(map(_count_parameters, weights)),
            hidden=text["hidden_size"],
            layers=text["num_hidden_layers"],
            vocabulary=text["vocab_size"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise PlacementError(
            f"{path}: config.json or a safetensors header there cannot be read "
            f"({type(error).__name__}: {error}); is the checkpoint whole?"
        ) from error


def trained_of(recipe: Recipe) -> Trained | None:
    """What the recipe trains of a policy whose folder is here; None where all of it is, or unknown.

    Raises ModelError for a part or pattern that matches nothing.
    """
    learner = recipe.learner
    told = learner.freeze or learner.rates or learner.lora
    if not told or not (Path(recipe.model.path) / "config.json").is_file():
        return None
    rates = tuple(learner.rates.items())
    return _trained(recipe.model.path, learner.freeze, rates, learner.lora)


@cache
def _trained(
    path: str,
    frozen: tuple[str, ...],
    rates: tuple[tuple[str, float], ...],
    lora: LoraConfig | None,
) -> Trained:
    from learner.lora import LoraSettings
    from learner.outline import what_is_trained

    settings = LoraSettings(**lora.model_dump()) if lora else None
    return what_is_trained(path, frozen, dict(rates), settings)


def learner_memory(
    recipe: Recipe, size: PolicySize | None, trained: Trained | None = None
) -> dict[str, int]:
    """Bytes on one learner rank, by part; `trained` None: all parameters are.

    Model states follow ZeRO (arXiv 1910.02054, section 3.1 and figure 1): weights and gradients in
    the recipe's dtype, a float32 master copy and two Adam moments, divided over the ranks from
    the stage that shards them. What is frozen has weights only. At stage 0 float32 weights
    are stepped on themselves, with no master copy beside them. Activations follow arXiv 2205.05198,
    equation 1 without its attention term: 34 bytes a token, hidden unit and layer at 2-byte
    precision. With activation checkpointing one layer has them, and of the others the input is kept
    (the same paper, section 5). To them comes one table of float32 logits (`learner.logits_mib`)
    and its gradient. A float32 head of bfloat16 weights is a copy, whole on every rank, with its
    gradient and that of one turn beside it where it is trained.
    """
    if size is None:
        return {}
    learner, width = recipe.learner, _width(recipe)

    def shard(total: int, from_stage: int) -> int:
        return math.ceil(total / (learner.ranks if learner.zero_stage >= from_stage else 1))

    held = size.parameters + (trained.added if trained else 0)
    stepped = trained.trained if trained else size.parameters
    no_master = learner.zero_stage == 0 and recipe.model.dtype == "float32"
    tokens = learner.micro_batch_tokens
    again = learner.activation_checkpointing
    per_token = 17 + size.layers if again else 17 * size.layers
    copied = recipe.model.lm_head_float32 and recipe.model.dtype != "float32"
    copies = 1 if learner.lora or "head" in learner.freeze else 3
    head = {"head in float32": copies * 4 * size.hidden * size.vocabulary} if copied else {}
    return head | {
        "weights": shard(width * held, 3),
        "gradients": shard(width * stepped, 2),
        "optimizer": shard((8 if no_master else 12) * stepped, 1),
        "activations": width * tokens * size.hidden * per_token
        + min(8 * tokens * size.vocabulary, 2 * math.ceil(learner.logits_mib * 2**20)),
    }


def sampler_memory(recipe: Recipe, size: PolicySize | None, machine: Machine) -> dict[str, int]:
    """Bytes of one engine, on each of its GPUs or in main memory, by part.

    On a GPU the engine fills `gpu_memory_utilization` of it, whatever the policy's size.
    """
    sampler = recipe.sampler
    weights = math.ceil(_width(recipe) * size.parameters / sampler.tensor_parallel) if size else 0
    parts = {"weights": weights} if size else {}
    if not sampler.gpus:
        return parts | {"KV cache": int(sampler.kv_cache_gib * GIB)}
    if machine.gpus:
        share = sampler.gpu_memory_utilization * min(gpu.memory for gpu in machine.gpus)
        return parts | {"KV cache and buffers": max(0, int(share) - weights)}
    return parts


def require_cluster(recipe: Recipe, resources: Mapping[str, float], command: Command) -> None:
    """Raise PlacementError where a Ray cluster lacks what a recipe asks for.

    `resources` as `ray.cluster_resources()` gives them. Ray itself would wait for ever.
    """
    there = {"cores": resources.get("CPU", 0.0), "GPUs": resources.get("GPU", 0.0)}
    found = _shortages(_need(recipe, command), there, "the cluster has")
    if found:
        raise PlacementError("\n".join(found))


def _need(recipe: Recipe, command: Command) -> dict[str, dict[str, float]]:
    """unit -> {product of fields: amount} that a command holds at one time."""
    sampler, learner = recipe.sampler, recipe.learner
    found = {}
    for unit, taken in (("cores", "cpus"), ("GPUs", "gpus")):
        sample = {f"sampler.count × sampler.{taken}": sampler.count * getattr(sampler, taken)}
        learn = {f"learner.ranks × learner.{taken}": learner.ranks * getattr(learner, taken)}
        if command == "sft" and not recipe.eval.every:  # one after the other
            found[unit] = max(learn, sample, key=lambda product: sum(product.values()))
        else:
            alone = {"eval": sample, "sample": sample, "replay": learn}
            found[unit] = alone.get(command, sample | learn)
        models = len(frozen_models(recipe)) if command in ("train", "sample") else 0
        if models:
            one = models * getattr(sampler, taken)
            found[unit] |= {f"{models} frozen model(s) of reward.terms × sampler.{taken}": one}
    return found


def _shortages(
    need: Mapping[str, Mapping[str, float]], there: Mapping[str, float], who: str
) -> tuple[str, ...]:
    return tuple(
        f"{' + '.join(products)} = {sum(products.values()):g} {unit}, but {who} {there[unit]:g}; "
        "lower one of these fields, or give --address of a cluster that has them"
        for unit, products in need.items()
        if sum(products.values()) > there[unit]
    )


def _memory_totals(actors: tuple[Actor, ...], machine: Machine) -> list[tuple[str, int, int]]:
    """(what memory, bytes estimated, bytes there): main memory, and the smallest GPU."""
    main = sum(sum(a.memory.values()) for a in actors if not a.gpus)
    main += sum(sum(a.offloaded.values()) for a in actors)
    totals = [("main memory", main, machine.memory)]
    if machine.gpus:
        on_one = [sum(a.memory.values()) for a in actors if a.gpus >= 1]
        totals.append(("GPU memory", max(on_one, default=0), min(g.memory for g in machine.gpus)))
    return totals


def _width(recipe: Recipe) -> int:
    return 4 if recipe.model.dtype == "float32" else 2


def _count_parameters(path: Path) -> int:
    """Parameters in a safetensors file, from its header alone (8 bytes of length, then JSON)."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(min(length, 100_000_000)))
    return sum(math.prod(v["shape"]) for k, v in header.items() if k != "__metadata__")


def _detect_gpus() -> tuple[Gpu, ...]:
    """GPUs that `nvidia-smi` lists and `CUDA_VISIBLE_DEVICES` leaves visible."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return ()  # the tool is there and no working device behind it
    rows = [line.rsplit(",", 1) for line in out.splitlines() if "," in line]
    found = [Gpu(name.strip(), int(mib) * 2**20) for name, mib in rows if mib.strip().isdigit()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(found)
    chosen = [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
    return tuple(found[: len(chosen)])


def _first_word(path: str) -> str:
    """First line of a file of the kernel's, "" where there is none."""
    try:
        return Path(path).read_text().split("\n")[0]
    except OSError:
        return ""


def gib(size: float) -> str:
    """A size in GiB, or MiB where it is small, as text."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"
