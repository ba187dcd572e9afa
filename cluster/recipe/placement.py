"""What runs where: the actors of a recipe, what each takes, and whether a machine has it.

Arithmetic on a recipe and a machine; nothing is started, so a recipe for eight GPUs can be looked
at on a laptop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cluster.recipe.hardware import Machine, gib
from cluster.recipe.memory import (
    LEFT_BY_A_SLEEPER,
    PolicySize,
    at_rest,
    cached_tokens,
    learner_memory,
    phases,
    policy_size,
    sampler_memory,
    stored_weights,
    trained_of,
)
from cluster.recipe.recipe import Recipe, UserError
from rewards.scored import TermError
from rewards.terms import TermFacts, find_term, term_facts

Command = Literal["train", "sft", "eval", "replay", "sample"]
Role = Literal["sampler", "frozen model", "learner", "reward worker", "reward model", "driver"]

ROUNDING = 1e-6
"""Of cores and GPUs, which are sums of fractions; Ray counts in steps of 1e-4."""
SHARING = ("sampler", "learner")
"""Roles that take turns under `placement.mode` = "colocated"."""
UNKNOWN_SIZES = ("sampler", "frozen model", "learner", "reward model")
"""Roles whose memory may be unknown; the others take little."""


class PlacementError(UserError):
    """A recipe that asks for more than the machine has."""


@dataclass(frozen=True)
class Actor:
    """One Ray actor: its role, what it takes, and its memory parts in bytes by name.

    Memory is in GPU memory where `gpus` > 0 and in main memory elsewhere; `offloaded` is in main
    memory in any case.
    """

    role: Role
    index: int
    cpus: float = 0
    gpus: float = 0
    memory: dict[str, int] = field(default_factory=dict)
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
    model, sampler = recipe.model, recipe.sampler
    size = policy_size(model.path)
    turns = shares_by_turns(recipe, command)
    learners = _learners(recipe, size, command) if command in ("train", "sft", "replay") else []

    def engine(role: Role, index: int, size: PolicySize | None) -> Actor:
        memory = sampler_memory(model, sampler, size, machine)
        asleep = {"weights while it sleeps": memory["weights"]} if size and turns else {}
        return Actor(role, index, sampler.cpus, sampler.gpus, memory, asleep)

    samplers, others = [], []
    if command in ("train", "sample", "eval") or (command == "sft" and recipe.eval.every):
        samplers = [engine("sampler", i, size) for i in range(sampler.count)]
    if command in ("train", "sample"):
        # Scoring is short and comes while the engines wait, so it reserves no core.
        others = [Actor("reward worker", i) for i in range(recipe.reward.workers)]
        others += [
            Actor("reward model", i, facts.cpus, facts.gpus)
            for i, facts in enumerate(reward_models(recipe))
        ]
    frozen = [policy_size(path) for path in frozen_models(recipe, command)] if samplers else []
    samplers += [engine("frozen model", i, its) for i, its in enumerate(frozen)]
    actors = (Actor("driver", 0), *samplers, *learners, *others)
    available = {"cores": machine.cores, "GPUs": len(machine.gpus)}
    shortages = _shortages(_need(recipe, command), available, "this machine has")
    shortages += _beside_turns(recipe, command)
    notes = _notes(recipe, command, size, actors, machine)
    return Placement(actors, machine, shortages, tuple(notes))


def shares_by_turns(recipe: Recipe, command: Command) -> bool:
    """Whether a command's samplers and learner take turns on GPUs."""
    both = command == "train" or (command == "sft" and recipe.eval.every > 0)
    return both and recipe.placement.by_turns and recipe.sampler.gpus > 0


def _learners(recipe: Recipe, size: PolicySize | None, command: Command) -> list[Actor]:
    learner, trained = recipe.learner, trained_of(recipe.model.path, recipe.learner)
    reference = command != "sft" and recipe.algorithm.reference_kl_weight > 0
    memory = learner_memory(recipe.model, learner, size, trained, reference)
    offloaded = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "weights")}
    away = [name for name in offloaded[learner.offload] if learner.gpus and name in memory]
    host_memory = {name: memory.pop(name) for name in away}
    if shares_by_turns(recipe, command):
        host_memory |= {"states at rest": at_rest(memory)}
    stored = stored_weights(recipe, command)
    fetched = {"two versions to fetch": stored} if stored else {}
    return [
        Actor(
            "learner", i, learner.cpus, learner.gpus, memory, host_memory | ({} if i else fetched)
        )
        for i in range(learner.ranks)
    ]


def _notes(
    recipe: Recipe,
    command: Command,
    size: PolicySize | None,
    actors: tuple[Actor, ...],
    machine: Machine,
) -> list[str]:
    notes = []
    path, learner = recipe.model.path, recipe.learner
    roles = {actor.role for actor in actors}
    if command == "sft" and not recipe.eval.every:
        notes.append("the samplers that measure the result start when the learner has ended")
    if size is None:
        notes.append(
            f"model.path = {path} is neither a folder with safetensors weights here "
            "nor a hub name of known size, so its memory is not estimated"
        )
    unknown = bool(learner.freeze or learner.lora) and trained_of(path, learner) is None
    if "learner" in roles and size and unknown:
        notes.append(
            "model.path is no folder here, so what learner.freeze or learner.lora leaves untrained "
            "is not known; the learner's memory is counted as if all of it were trained"
        )
    if "sampler" in roles and recipe.sampler.gpus:
        share = recipe.sampler.gpu_memory_utilization
        notes.append(f"each engine fills {share:.0%} of its GPU with KV cache")
    if "sampler" in roles and size and (machine.gpus or not recipe.sampler.gpus):
        notes.append(_cache_note(recipe, size, machine))
    by_phase = _phases(actors, recipe) if shares_by_turns(recipe, command) else {}
    if size and by_phase and machine.gpus:
        told = ", ".join(f"{phase} {gib(used)}" for phase, used in by_phase.items())
        notes.append(
            f"by turns, on each GPU of {gib(min(g.memory for g in machine.gpus))}: {told}; "
            f"{gib(LEFT_BY_A_SLEEPER)} is counted for whoever sleeps"
        )
    for where, estimate, present in _memory_totals(actors, machine, by_phase):
        if estimate > present:
            notes.append(
                f"{where} may not suffice: the estimate is {gib(estimate)} of {gib(present)}; "
                "lower learner.micro_batch_tokens or sampler.kv_cache_gib, or raise "
                "learner.zero_stage"
            )
    return notes


def _cache_note(recipe: Recipe, size: PolicySize, machine: Machine) -> str:
    model, sampler = recipe.model, recipe.sampler
    tokens = cached_tokens(model, sampler, size, machine)
    fitting = tokens // model.max_model_len
    longest = f"model.max_model_len = {model.max_model_len:,}"
    most = " at most" if sampler.gpus else ""
    if not fitting:
        field = "sampler.gpu_memory_utilization" if sampler.gpus else "sampler.kv_cache_gib"
        return (
            f"an engine's KV cache has room for {tokens:,} tokens{most}, less than {longest}, and "
            f"will not start; raise {field} or sampler.tensor_parallel"
        )
    count = min(fitting, sampler.max_num_seqs)
    return (
        f"an engine's KV cache has room for {tokens:,} tokens{most}: {count:,} "
        f"response{'s' * (count > 1)} at a time if each grows to {longest}"
    )


def _phases(actors: tuple[Actor, ...], recipe: Recipe) -> dict[str, int]:
    engine, rank = (
        next(a.memory for a in actors if a.role == role) for role in ("sampler", "learner")
    )
    return phases(engine, rank, recipe.transfer.transport)


def _memory_totals(
    actors: tuple[Actor, ...], machine: Machine, by_phase: Mapping[str, int]
) -> list[tuple[str, int, int]]:
    """(what memory, bytes estimated, bytes there): main memory, and the smallest GPU.

    `by_phase`: of samplers and learner that take turns, and have no part of a GPU of their own.
    """
    main = sum(sum(a.memory.values()) for a in actors if not a.gpus)
    main += sum(sum(a.offloaded.values()) for a in actors)
    totals = [("main memory", main, machine.memory)]
    if machine.gpus:
        # An actor that has a part of a GPU has that part of its memory.
        alone = [a for a in actors if a.gpus and not (by_phase and a.role in SHARING)]
        on_one = [int(sum(a.memory.values()) / min(a.gpus, 1)) for a in alone]
        most = max([*on_one, *by_phase.values()], default=0)
        totals.append(("GPU memory", most, min(g.memory for g in machine.gpus)))
    return totals


def describe(placement: Placement) -> str:
    """The placement as a table of text, for `--dry-run`."""
    rows = [("actor", "cores", "GPUs", "memory (estimate)")]
    for actor in placement.actors:
        memory = "unknown" if actor.role in UNKNOWN_SIZES else "small"
        if actor.memory:
            on = " on each GPU" if actor.gpus else ""
            memory = f"{gib(sum(actor.memory.values()))}{on}: {_parts(actor.memory)}"
            if actor.offloaded:
                memory += f"; in main memory {_parts(actor.offloaded)}"
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
    for need, available, unit in (
        (placement.gpus, len(machine.gpus), "GPUs"),
        (placement.cpus, machine.cores, "cores"),
    ):
        if need > available:
            lines.append(f"needs {need:g} {unit}, this machine has {available}: dry run only")
    return "\n".join([*lines, *(f"note: {note}" for note in placement.notes)])


def _parts(memory: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {gib(size)}" for name, size in memory.items())


def frozen_models(recipe: Recipe, command: Command) -> list[str]:
    """Checkpoints that a command asks beside the policy, each once: reward terms, `eval.reader`.

    Each runs on one engine, placed as [sampler] places one of the policy's. Raises UserError for
    a term that cannot be loaded.
    """
    models_of: dict[str, None] = {}
    for entry in recipe.reward.effective_terms() if command in ("train", "sample") else ():
        try:
            if hasattr(find_term(entry.name), "ask"):
                models_of[term_facts(entry.name, entry.args).model or ""] = None
        except TermError as error:
            raise UserError(f"reward.terms: {error}") from error
    if command in ("train", "sft", "eval"):
        models_of[recipe.eval.reader] = None
    return [model for model in models_of if model]


def reward_models(recipe: Recipe) -> list[TermFacts]:
    """The recipe's terms that run a model of their own. Raises UserError as `frozen_models`."""
    entries = [e for e in recipe.reward.effective_terms() if e.name == "reward_model"]
    try:
        return [term_facts(entry.name, entry.args) for entry in entries]
    except TermError as error:
        raise UserError(f"reward.terms: {error}") from error


def require_cluster(recipe: Recipe, resources: Mapping[str, float], command: Command) -> None:
    """Raise PlacementError where a Ray cluster lacks what a recipe asks for.

    `resources` as `ray.cluster_resources()` gives them. Ray itself would wait for ever.
    """
    available = {"cores": resources.get("CPU", 0.0), "GPUs": resources.get("GPU", 0.0)}
    shortages = _shortages(_need(recipe, command), available, "the cluster has")
    shortages += _beside_turns(recipe, command)
    if shortages:
        raise PlacementError("\n".join(shortages))


def _beside_turns(recipe: Recipe, command: Command) -> tuple[str, ...]:
    models = frozen_models(recipe, command)
    if not (models and recipe.placement.by_turns and recipe.sampler.gpus):
        return ()
    return (
        f'placement.mode = "colocated" has no GPU for the engine of {models[0]}, which a reward '
        'term or eval.reader asks: samplers and learner fill theirs by turns; use "disaggregated"',
    )


def _need(recipe: Recipe, command: Command) -> dict[str, dict[str, float]]:
    """unit -> {product of fields: amount} that a command holds at one time."""
    sampler, learner = recipe.sampler, recipe.learner
    models = len(frozen_models(recipe, command))
    needs = {}
    for unit, resource in (("cores", "cpus"), ("GPUs", "gpus")):
        sample = {f"sampler.count × sampler.{resource}": sampler.count * getattr(sampler, resource)}
        if models:
            sample[f"{models} frozen model(s) × sampler.{resource}"] = models * getattr(
                sampler, resource
            )
        rewarding = reward_models(recipe) if command in ("train", "sample") else []
        for facts in rewarding:
            field = f"reward.terms {facts.name} args.{resource}"
            sample[field] = sample.get(field, 0) + getattr(facts, resource)
        learn = {f"learner.ranks × learner.{resource}": learner.ranks * getattr(learner, resource)}
        if command == "sft" and not recipe.eval.every:  # one after the other
            needs[unit] = max(learn, sample, key=lambda product: sum(product.values()))
        else:
            alone = {"eval": sample, "sample": sample, "replay": learn}
            needs[unit] = alone.get(command, sample | learn)
    return needs


def _shortages(
    need: Mapping[str, Mapping[str, float]], offered: Mapping[str, float], who: str
) -> tuple[str, ...]:
    return tuple(
        f"{' + '.join(products)} = {sum(products.values()):g} {unit}, but {who} {offered[unit]:g}; "
        "lower one of these fields, or give --address of a cluster that has them"
        for unit, products in need.items()
        if sum(products.values()) > offered[unit] + ROUNDING
    )
