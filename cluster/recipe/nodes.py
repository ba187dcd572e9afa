"""Which node of a cluster each actor of a recipe goes to. Pure arithmetic.

What is worked out here says, before anything is started, whether all of them can go anywhere, and
which cannot; `cluster.run.places` then has Ray reserve exactly these places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.recipe.hardware import Machine
from cluster.recipe.placement import (
    ROUNDING,
    Actor,
    Command,
    PlacementError,
    Role,
    plan,
    require_cluster,
)
from cluster.recipe.recipe import Recipe
from cluster.recipe.sections import PlacementConfig

OWN_LABELS = "ray.io/"
"""What the names of labels begin with that Ray gives to nodes of itself."""
NODE_ID = "ray.io/node-id"
ENGINES: tuple[Role, ...] = ("sampler", "frozen model")
TRIES = 3000
"""How often somebody is given a node before it is said that not all can have one."""


@dataclass(frozen=True)
class Node:
    """One node of a cluster, by its address.

    `cpus` and `gpus`: what it offers, or has left. `home`: the driver is on it.
    """

    address: str
    cpus: float
    gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)
    home: bool = False

    @property
    def id(self) -> str:
        """Ray's name for it, "" of a node that no Ray has told of."""
        return self.labels.get(NODE_ID, "")

    def described(self) -> str:
        """Address and labels."""
        own = dict(self.own_labels)
        return f"{self.address}{f' ({labels_text(own)})' if own else ''}"

    @property
    def own_labels(self) -> tuple[tuple[str, str], ...]:
        """Those that somebody gave to it."""
        return tuple((k, v) for k, v in self.labels.items() if not k.startswith(OWN_LABELS))


@dataclass(frozen=True)
class Bundle:
    """Actors that are on one node together, and what is taken of it for them.

    One actor, but for those that share a GPU. An engine is one actor with all its GPUs, so it
    never straddles nodes.
    """

    actors: tuple[Actor, ...]
    cpus: float
    gpus: float

    @property
    def role(self) -> Role:
        """Of its first actor, whose labels count."""
        return self.actors[0].role


Item = tuple[Bundle, ...]


@dataclass(frozen=True)
class Group:
    """Bundles that are reserved together or not at all, each with its node."""

    seats: tuple[tuple[Bundle, Node], ...]

    @property
    def strategy(self) -> Literal["PACK", "STRICT_PACK"]:
        """Ray's word for it."""
        return "STRICT_PACK" if len({node.id for _, node in self.seats}) == 1 else "PACK"


@dataclass(frozen=True)
class Seating:
    """Where actors go, as bundles with the number of their node; and of each that cannot, why."""

    nodes: tuple[Node, ...]
    seats: tuple[tuple[Bundle, int], ...]
    missing: tuple[str, ...]

    @property
    def on(self) -> tuple[tuple[Node, tuple[Actor, ...]], ...]:
        """Node by node, who is there."""
        return tuple(
            (node, tuple(a for bundle, at in self.seats if at == n for a in bundle.actors))
            for n, node in enumerate(self.nodes)
        )

    def groups(self) -> tuple[Group, ...]:
        """What is to be reserved: all ranks of the learner at once, then each engine for itself.

        A learner has all its ranks or none, and engines come and go. Reward workers take nothing
        that could be reserved, and a reward model is started again by Ray on whatever node there
        is, which a reserved place on a lost node would keep it from.
        """
        seats = [(bundle, self.nodes[n]) for bundle, n in self.seats if bundle.cpus or bundle.gpus]
        ranks = tuple(seat for seat in seats if seat[0].role == "learner")
        engines = [Group((seat,)) for seat in seats if seat[0].role in ENGINES]
        return (*([Group(ranks)] if ranks else []), *engines)


def labels_text(labels: Mapping[str, str]) -> str:
    """`role=sampler, zone=a`."""
    return ", ".join(f"{name}={value}" for name, value in labels.items())


def labels_for(role: Role, placement: PlacementConfig) -> Mapping[str, str]:
    """What a node must have for an actor of a role."""
    if role in ENGINES:
        return placement.samplers
    return placement.learner if role == "learner" else placement.reward_workers


def bundled(actors: Sequence[Actor], share_gpus: bool) -> list[Bundle]:
    """Who is on a node with whom; the driver, who is where the command is, is left out.

    `share_gpus`: each learner rank has a whole GPU together with the sampler of its number, where
    there is one, and so has a sampler without a rank. Ray alone would put two parts of any actors
    on one GPU.
    """
    sharing = {a.index: a for a in actors if a.role == "sampler"} if share_gpus else {}
    paired = {a.index for a in actors if a.role == "learner"} & set(sharing)
    bundles = []
    for actor in actors:
        if actor.role == "learner" and actor.index in paired:
            other = sharing[actor.index]
            bundles.append(Bundle((actor, other), actor.cpus + other.cpus, 1.0))
        elif actor.role != "driver" and not (actor.role == "sampler" and actor.index in paired):
            alone = share_gpus and actor.role == "sampler"
            bundles.append(Bundle((actor,), actor.cpus, 1.0 if alone else actor.gpus))
    return bundles


def seated(
    actors: Sequence[Actor],
    placement: PlacementConfig,
    nodes: Sequence[Node],
    share_gpus: bool = False,
) -> Seating:
    """Give each actor a node.

    The learner's ranks go to one node, the driver's if it will do, or else to few. Reward workers
    go to nodes without GPUs where there are some, and like samplers that are to be spread to the
    node with the fewest of them; all else to the fullest that has room. Those that the fewest nodes
    will do for choose first, the largest first; where somebody then has none, they choose anew.
    """
    bundles = bundled(actors, share_gpus)
    large = sorted(
        (one for one in bundles if one.cpus or one.gpus),
        key=lambda one: (
            len(_labelled(nodes, labels_for(one.role, placement))), -one.gpus, -one.cpus, one.role,
        ),
    )  # fmt: skip
    ranks = tuple(one for one in large if one.role == "learner")
    others = [(one,) for one in large if one.role != "learner"]
    together = sorted([*([ranks] if ranks else []), *others], key=lambda item: large.index(item[0]))
    room = _Room(placement, nodes, len(ranks))
    for items in (together, [(one,) for one in large]):
        if room.give_all(items):
            break
    else:
        room.give_some([(one,) for one in large])
    room.give_some([(one,) for one in bundles if one not in large])
    return Seating(tuple(nodes), tuple(room.seats), tuple(room.missing))


def actors_of(recipe: Recipe, command: Command) -> tuple[Actor, ...]:
    """All actors of a command; what memory they take is not looked at."""
    return plan(recipe, Machine(0, 0), command).actors


def seated_for(recipe: Recipe, actors: Sequence[Actor], nodes: Sequence[Node]) -> Seating:
    """`seated` as a recipe says: a sampler and the rank of its number may share a GPU."""
    return seated(actors, recipe.placement, nodes, recipe.paired)


def lacking(recipe: Recipe, command: Command, nodes: Sequence[Node]) -> str:
    """What these nodes lack for all actors of a command, in lines; "" where that is nothing."""
    resources = {"CPU": sum(node.cpus for node in nodes), "GPU": sum(node.gpus for node in nodes)}
    try:
        require_cluster(recipe, resources, command)
    except PlacementError as error:
        return str(error)
    return "\n".join(seated_for(recipe, actors_of(recipe, command), nodes).missing)


def describe_nodes(seating: Seating) -> str:
    """Node by node who goes there, then who cannot go anywhere, for `--dry-run --address`."""
    lines = []
    for n, (node, actors) in enumerate(seating.on):
        taken = [bundle for bundle, at in seating.seats if at == n]
        cpus, gpus = sum(b.cpus for b in taken), sum(b.gpus for b in taken)
        usage = f"{cpus:g} of {node.cpus:g} cores, {gpus:g} of {node.gpus:g} GPUs"
        names = ", ".join(f"{a.role} {a.index}" for a in actors) or "nothing"
        lines.append(f"node {node.described()}: {usage}: {names}")
    ranks_on = {at for bundle, at in seating.seats if bundle.role == "learner"}
    if len(ranks_on) > 1:
        lines.append(
            f"note: no node has room for all ranks of the learner, which are on {len(ranks_on)}"
        )
    return "\n".join([*lines, *(f"does not fit: {why}" for why in seating.missing)])


class _Room:
    """What nodes have left while bundles are given their nodes.

    An item are bundles that go to one node together.
    """

    def __init__(self, placement: PlacementConfig, nodes: Sequence[Node], ranks: int) -> None:
        """`ranks`: how many the learner has."""
        self.seats: list[tuple[Bundle, int]] = []
        self.missing: list[str] = []
        self._placement, self._nodes, self._ranks = placement, nodes, ranks
        self._left = [[node.cpus, node.gpus] for node in nodes]
        self._there = Counter[tuple[Role, int]]()

    def give_all(self, items: Sequence[Item]) -> bool:
        """Give each a node, the wished one first; False, and nobody has one, where it is not found
        in `TRIES` tries that they all can have one."""
        choices: list[Iterator[int]] = []
        given: list[int] = []
        for _ in range(TRIES):
            if len(given) == len(items):
                return True
            if len(choices) == len(given):
                choices.append(iter(self._for(items[len(given)])))
            if (n := next(choices[-1], None)) is not None:
                self._give(items[len(given)], n)
                given.append(n)
            else:
                choices.pop()
                if not given:
                    return False
                self._take_back(items[len(given) - 1], given.pop())
        while given:
            self._take_back(items[len(given) - 1], given.pop())
        return not items

    def give_some(self, items: Sequence[Item]) -> None:
        """Give each a node that can have one; of the others say why."""
        for item in items:
            if fitting := self._for(item):
                self._give(item, fitting[0])
            else:
                self.missing += [self._why_not(a, one) for one in item for a in one.actors]

    def _for(self, item: Item) -> list[int]:
        """Nodes with its labels and room for it, the one that it wishes first; of nodes that are
        alike in all that counts here the first."""
        role, (cpus, gpus) = item[0].role, _sums(item)
        alike: dict[Any, int] = {}
        for n in _labelled(self._nodes, labels_for(role, self._placement)):
            left = self._left[n]
            if left[0] >= cpus - ROUNDING and left[1] >= gpus - ROUNDING:
                alike.setdefault((self._wish(item, n), *self._nodes[n].own_labels), n)
        return sorted(alike.values(), key=lambda n: self._wish(item, n))

    def _wish(self, item: Item, n: int) -> tuple[float, ...]:
        """Least for the node that an item is to have."""
        role, node, (cpus, gpus) = item[0].role, self._nodes[n], self._left[n]
        there = self._there[role, n]
        if role == "learner":
            # Together on the fullest; one by one, to be on few, where most are or most can be.
            sign = 1 if len(item) == self._ranks else -1
            return (-there, not node.home, sign * gpus, sign * cpus)
        if role == "reward worker":
            return (node.cpus == 0, node.gpus > 0, there, gpus, cpus)
        spread = role == "sampler" and self._placement.spread_samplers
        return (there if spread else 0, gpus, cpus)

    def _give(self, item: Item, n: int) -> None:
        cpus, gpus = _sums(item)
        self._left[n] = [self._left[n][0] - cpus, self._left[n][1] - gpus]
        self._there[item[0].role, n] += len(item)
        self.seats += [(one, n) for one in item]

    def _take_back(self, item: Item, n: int) -> None:
        cpus, gpus = _sums(item)
        self._left[n] = [self._left[n][0] + cpus, self._left[n][1] + gpus]
        self._there[item[0].role, n] -= len(item)
        del self.seats[-len(item) :]

    def _why_not(self, actor: Actor, bundle: Bundle) -> str:
        """A sentence: whom no node has room for, what it needs, what the nodes have left."""
        labels = labels_for(bundle.role, self._placement)
        labelled = _labelled(self._nodes, labels)
        needs = [f"{bundle.cpus:g} cores"] * bool(bundle.cpus)
        needs += [f"{bundle.gpus:g} GPUs"] * bool(bundle.gpus)
        label_text = f" with {labels_text(labels)}" if labels else ""
        shortage = f" has {' and '.join(needs)} left" if needs and labelled else " is there"
        listed = "; ".join(
            f"{self._nodes[n].described()} has {self._left[n][0]:g} cores and "
            f"{self._left[n][1]:g} GPUs left"
            for n in labelled
        )
        if not labelled:
            listed = "there are " + (", ".join(node.described() for node in self._nodes) or "none")
        pair = " with ".join(f"{a.role} {a.index}" for a in bundle.actors if a is not actor)
        return (
            f"{actor.role} {actor.index}{f' on the GPU of {pair}' if pair else ''}: "
            f"no node{label_text}{shortage} ({listed})"
        )


def _sums(item: Item) -> tuple[float, float]:
    return sum(one.cpus for one in item), sum(one.gpus for one in item)


def _labelled(nodes: Sequence[Node], labels: Mapping[str, str]) -> list[int]:
    return [n for n, node in enumerate(nodes) if labels.items() <= node.labels.items()]
