"""Which node of a cluster has room for which actor of a recipe. Pure arithmetic.

Ray itself decides where an actor goes; what is worked out here says, before anything is started,
whether all of them can go anywhere, and which cannot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.recipe.hardware import Machine
from cluster.recipe.placement import Actor, Command, PlacementError, Role, plan, require_cluster
from cluster.recipe.recipe import Recipe
from cluster.recipe.sections import PlacementConfig

OWN_LABELS = "ray.io/"
"""What the names of labels begin with that Ray gives to nodes of itself."""


@dataclass(frozen=True)
class Node:
    """One node of a cluster, by its address; `cpus` and `gpus` as it was told to offer."""

    address: str
    cpus: float
    gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)

    def described(self) -> str:
        """Address and labels."""
        own_labels = {k: v for k, v in self.labels.items() if not k.startswith(OWN_LABELS)}
        return f"{self.address}{f' ({labels_text(own_labels)})' if own_labels else ''}"


@dataclass(frozen=True)
class Seating:
    """Where actors can go: node -> their names; and of each that cannot, why."""

    on: tuple[tuple[Node, tuple[Actor, ...]], ...]
    missing: tuple[str, ...]


def labels_text(labels: Mapping[str, str]) -> str:
    """`role=sampler, zone=a`."""
    return ", ".join(f"{name}={value}" for name, value in labels.items())


def labels_for(role: Role, placement: PlacementConfig) -> Mapping[str, str]:
    """What a node must have for an actor of a role."""
    if role in ("sampler", "frozen model"):
        return placement.samplers
    return placement.learner if role == "learner" else placement.reward_workers


def seated(actors: Sequence[Actor], placement: PlacementConfig, nodes: Sequence[Node]) -> Seating:
    """Give each actor a node: first those that the fewest nodes will do for, the largest first.

    Reward workers, and samplers that are to be spread, go to the node with the fewest of them, all
    else to the fullest that has room. The driver is where the command is.
    """
    free_of = [[node.cpus, node.gpus] for node in nodes]
    on: list[list[Actor]] = [[] for _ in nodes]
    missing: list[str] = []
    fits = {a.role: _labelled(nodes, labels_for(a.role, placement)) for a in actors}
    spread = {"reward worker"} | ({"sampler"} if placement.spread_samplers else set())
    for actor in sorted(actors, key=lambda a: (len(fits[a.role]), -a.gpus, -a.cpus)):
        if actor.role == "driver":
            continue
        free = [
            n
            for n in fits[actor.role]
            if free_of[n][0] >= actor.cpus and free_of[n][1] >= actor.gpus
        ]
        if not free:
            missing.append(_why_not(actor, nodes, free_of, fits[actor.role], placement))
            continue
        alike = [sum(other.role == actor.role for other in node_actors) for node_actors in on]
        node_index = min(
            free, key=lambda n: (alike[n] if actor.role in spread else 0, *free_of[n][::-1])
        )
        free_of[node_index][0] -= actor.cpus
        free_of[node_index][1] -= actor.gpus
        on[node_index].append(actor)
    pairs = zip(nodes, map(tuple, on), strict=True)
    return Seating(tuple(pairs), tuple(missing))


def lacking(recipe: Recipe, command: Command, nodes: Sequence[Node]) -> str:
    """What these nodes lack for all actors of a command, in lines; "" where that is nothing."""
    resources = {"CPU": sum(node.cpus for node in nodes), "GPU": sum(node.gpus for node in nodes)}
    try:
        require_cluster(recipe, resources, command)
    except PlacementError as error:
        return str(error)
    actors = plan(recipe, Machine(0, 0), command).actors
    return "\n".join(seated(actors, recipe.placement, nodes).missing)


def describe_nodes(seating: Seating) -> str:
    """Node by node who can go there, then who cannot go anywhere, for `--dry-run --address`."""
    lines = []
    for node, actors in seating.on:
        cpus, gpus = sum(a.cpus for a in actors), sum(a.gpus for a in actors)
        usage = f"{cpus:g} of {node.cpus:g} cores, {gpus:g} of {node.gpus:g} GPUs"
        names = ", ".join(f"{a.role} {a.index}" for a in actors) or "nothing"
        lines.append(f"node {node.described()}: {usage}: {names}")
    return "\n".join([*lines, *(f"does not fit: {why}" for why in seating.missing)])


def _labelled(nodes: Sequence[Node], labels: Mapping[str, str]) -> list[int]:
    return [n for n, node in enumerate(nodes) if labels.items() <= node.labels.items()]


def _why_not(
    actor: Actor,
    nodes: Sequence[Node],
    free_of: Sequence[Sequence[float]],
    fits: Sequence[int],
    placement: PlacementConfig,
) -> str:
    """A sentence: whom no node has room for, what it needs, and what the nodes have left."""
    labels = labels_for(actor.role, placement)
    needs = [f"{actor.cpus:g} cores"] * bool(actor.cpus) + [f"{actor.gpus:g} GPUs"] * bool(
        actor.gpus
    )
    label_text = f" with {labels_text(labels)}" if labels else ""
    shortage = f" has {' and '.join(needs)} left" if needs and fits else " is there"
    listed = "; ".join(
        f"{nodes[n].described()} has {free_of[n][0]:g} cores and {free_of[n][1]:g} GPUs left"
        for n in fits
    )
    if not fits:
        listed = "there are " + (", ".join(node.described() for node in nodes) or "none")
    return f"{actor.role} {actor.index}: no node{label_text}{shortage} ({listed})"
