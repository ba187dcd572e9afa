"""Which node has room for whom: nobody on a node without his labels or his room, nobody twice."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product
from math import isclose

import pytest

from cluster.recipe.hardware import Machine
from cluster.recipe.nodes import (
    Bundle,
    Node,
    Seating,
    bundled,
    describe_nodes,
    labels_for,
    lacking,
    seated,
    seated_for,
)
from cluster.recipe.placement import Actor, Command, Role, plan
from cluster.recipe.recipe import Recipe, RecipeError
from cluster.recipe.sections import PlacementConfig
from tests.support.recipes import made_recipe

LEARNERS, SAMPLERS = {"role": "learner"}, {"role": "sampler"}
APART = ('placement.learner={role="learner"}', 'placement.samplers={role="sampler"}')


def seating(recipe: Recipe, *nodes: Node, command: Command = "train") -> Seating:
    return seated_for(recipe, plan(recipe, Machine(0, 0), command).actors, nodes)


Seats = tuple[tuple[Bundle, int], ...]
Case = tuple[list[Actor], PlacementConfig, list[Node], bool]


def random_case(dice: random.Random) -> Case:
    """Actors, labels, up to three nodes, and whether ranks share GPUs with samplers."""
    labels = [{}] * 6 + [LEARNERS, SAMPLERS]
    placement = PlacementConfig(
        learner=dice.choice(labels),
        samplers=dice.choice(labels),
        reward_workers=dice.choice(labels),
        spread_samplers=dice.random() < 0.5,
    )
    share = dice.random() < 0.2
    actors = [Actor("driver", 0)]
    most_of: dict[Role, int] = {"learner": 3, "sampler": 3, "frozen model": 1, "reward model": 1}
    for role, most in most_of.items():
        cpus = dice.choice([0.3, 0.5, 1, 2])
        gpus = 0.5 if share else dice.choice([0, 0, 1, 1, 2 if role == "sampler" else 0.5])
        actors += [Actor(role, index, cpus, gpus) for index in range(dice.randrange(most + 1))]
    actors += [Actor("reward worker", index) for index in range(dice.randrange(3))]
    there, home = dice.choice([0, 1, 2, 2, 3, 3, 3, 3]), dice.randrange(4)
    nodes = [
        Node(
            str(n),
            dice.choice([0, 1, 2, 4, 8]),
            dice.choice([0, 1, 2, 3, 4]),
            dice.choice([{}, LEARNERS, SAMPLERS]) | {"ray.io/node-id": str(n)},
            home=n == home,
        )
        for n in range(there)
    ]
    return actors, placement, nodes, share


def may(bundle: Bundle, node: Node, placement: PlacementConfig) -> bool:
    wanted = [labels_for(actor.role, placement) for actor in bundle.actors[:1]]
    return all(node.labels.get(k) == v for one in wanted for k, v in one.items())


def fit(bundles: list[Bundle], node: Node) -> bool:
    cpus, gpus = sum(b.cpus for b in bundles), sum(b.gpus for b in bundles)
    return all(
        need <= there or isclose(need, there)
        for need, there in ((cpus, node.cpus), (gpus, node.gpus))
    )


def ways(bundles: list[Bundle], placement: PlacementConfig, nodes: list[Node]) -> Iterator[Seats]:
    """Every way of placing all of them that is one, by trying every way."""
    taking = [b for b in bundles if b.cpus or b.gpus]
    for way in product(range(len(nodes)), repeat=len(taking)):
        if all(may(b, nodes[n], placement) for b, n in zip(taking, way, strict=True)) and all(
            fit([b for b, at in zip(taking, way, strict=True) if at == n], node)
            for n, node in enumerate(nodes)
        ):
            yield tuple(zip(taking, way, strict=True))


def ranks_on(seats: Iterable[tuple[Bundle, int]]) -> set[int]:
    return {n for bundle, n in seats if bundle.role == "learner"}


def test_who_is_seated_fits_and_who_is_not_has_no_place() -> None:
    dice, counts = random.Random(0), Counter[str]()
    for _ in range(600):
        actors, placement, nodes, share = random_case(dice)
        found = seated(actors, placement, nodes, share)
        on = [actor for _, there in found.on for actor in there]
        assert len(on) == len({(a.role, a.index) for a in on}), "nobody twice, nobody on two nodes"
        assert len(on) + len(found.missing) == len(actors) - 1, "all but the driver"
        for n, node in enumerate(nodes):
            there = [bundle for bundle, at in found.seats if at == n]
            assert fit(there, node) and all(may(b, node, placement) for b in there)
        bundles = bundled(actors, share)
        every = list(ways(bundles, placement, nodes))
        lost = [b for b in bundles if not any(may(b, node, placement) for node in nodes)]
        if found.missing:
            assert lost or not every, "there is a way, and it was not found"
            counts["refused"] += 1
            continue
        assert every
        together = any(len(ranks_on(way)) == 1 for way in every)
        assert not together or len(ranks_on(found.seats)) == 1, "ranks are on one node if they can"
        counts["learner on several nodes"] += len(ranks_on(found.seats)) > 1
        counts["shared"] += any(len(bundle.actors) > 1 for bundle, _ in found.seats)
        counts["fits"] += 1
    assert min(counts.values()) >= 3 and counts["fits"] > 100 < counts["refused"], counts


def test_what_is_reserved_is_each_rank_and_engine_once_with_the_ranks_all_or_none() -> None:
    dice, strategies = random.Random(1), Counter[str]()
    for _ in range(300):
        actors, placement, nodes, share = random_case(dice)
        found = seated(actors, placement, nodes, share)
        groups = found.groups()
        reserved = [a for group in groups for bundle, _ in group.seats for a in bundle.actors]
        seats = {(a.role, a.index): node.address for node, there in found.on for a in there}
        roles = ("learner", "sampler", "frozen model")
        assert {(a.role, a.index) for a in reserved} == {k for k in seats if k[0] in roles}
        assert len(reserved) == len({(a.role, a.index) for a in reserved})
        for group in groups:
            for bundle, node in group.seats:
                assert all(seats[a.role, a.index] == node.address for a in bundle.actors)
            with_ranks = group.seats[0][0].role == "learner"
            assert with_ranks or len(group.seats) == 1, "engines come and go one by one"
            one_node = len({node.address for _, node in group.seats}) == 1
            assert group.strategy == ("STRICT_PACK" if one_node else "PACK")
            strategies[group.strategy] += 1
        ranks = [g for g in groups if g.seats[0][0].role == "learner"]
        assert len(ranks) <= 1
    assert min(strategies.values()) >= 5


def test_the_learner_is_on_the_drivers_node_if_it_will_do_and_else_on_few() -> None:
    ranks = ["learner.ranks=4", "learner.gpus=1"]
    small, other = Node("a", 4, 2, home=True), Node("b", 8, 8)
    seats = seating(made_recipe(*ranks), small, other, command="replay").on
    assert [len(there) for _, there in seats] == [0, 4]
    fuller = Node("c", 4, 4)
    seats = seating(made_recipe(*ranks), other, fuller, command="replay").on
    assert [len(there) for _, there in seats] == [0, 4], "which leaves the larger one for others"
    home = Node("a", 8, 8, home=True)
    seats = seating(made_recipe(*ranks), fuller, home, command="replay").on
    assert [len(there) for _, there in seats] == [0, 4], "its folder and checkpoints are there"
    three = (Node("a", 4, 1), Node("b", 4, 3), Node("c", 4, 2))
    found = seating(made_recipe(*ranks), *three, command="replay")
    assert [[a.index for a in there] for _, there in found.on] == [[], [0, 1, 2], [3]]
    assert "has room for all ranks of the learner, which are on 2" in describe_nodes(found)


def test_an_engine_of_two_gpus_is_on_no_two_nodes() -> None:
    recipe = made_recipe("sampler.tensor_parallel=2", "sampler.gpus=2")
    (why,) = seating(recipe, Node("a", 4, 1), Node("b", 4, 1), command="sample").missing
    assert why.startswith("sampler 0: no node has 1 cores and 2 GPUs left (a has ")
    assert not seating(recipe, Node("a", 4, 1), Node("b", 4, 2), command="sample").missing


def test_reward_workers_are_on_nodes_without_gpus_where_there_are_some() -> None:
    recipe = made_recipe("reward.workers=4")
    gpus, closed = Node("g", 8, 8), Node("closed", 0)
    one, two = Node("c", 4), Node("d", 4)
    for nodes, counts in (
        ((gpus, closed, one, two), [0, 0, 2, 2]),
        ((gpus, closed), [4, 0]),
        ((closed,), [4]),
    ):
        found = seating(recipe, *nodes, command="sample").on
        assert [sum(a.role == "reward worker" for a in there) for _, there in found] == counts


@pytest.mark.parametrize("how", ['transfer.transport="ipc"', "placement.mode=colocated"])
def test_sharing_a_gpu_takes_all_of_it(how: str) -> None:
    recipe = made_recipe(
        how, "sampler.count=2", "learner.ranks=2", "sampler.gpus=0.3",
        "sampler.gpu_memory_utilization=0.3", "learner.gpus=0.5",
    )  # fmt: skip
    found = seating(recipe, Node("a", 4, 2))
    assert [[a.index for a in b.actors] for b, _ in found.seats if b.gpus] == [[0, 0], [1, 1]]
    assert [b.gpus for b, _ in found.seats if b.gpus] == [1, 1]
    assert "on the GPU of" in lacking(recipe, "train", [Node("a", 2, 1), Node("b", 2, 0.6)])
    assert len(seating(recipe, Node("a", 4, 2), command="replay").seats) == 2, "no samplers there"
    alone = seating(recipe, Node("a", 4, 2), command="sample")
    assert [b.gpus for b, _ in alone.seats if b.gpus] == [1, 1], "nor two engines on one"


def test_fractions_of_a_core_add_up_to_it() -> None:
    recipe = made_recipe("sampler.count=10", "sampler.cpus=0.1", "learner.cpus=1.0")
    assert lacking(recipe, "train", [Node("a", 2)]) == ""
    assert lacking(recipe, "train", [Node("a", 1), Node("b", 1)]) == ""
    assert lacking(recipe, "train", [Node("a", 1.9)]) != ""
    # In floating point three tenths from three tenths leave less than nothing.
    recipe = made_recipe("sampler.count=3", "sampler.cpus=0.1")
    assert lacking(recipe, "sample", [Node("a", 0.3)]) == ""


def test_roles_are_kept_apart_by_their_labels_and_reward_workers_are_spread() -> None:
    recipe = made_recipe(*APART, "reward.workers=2", "sampler.count=2")
    a, b = Node("a", 1, 0, LEARNERS), Node("b", 2, 0, SAMPLERS | {"ray.io/node-id": "x"})
    found = seating(recipe, a, b)
    assert not found.missing
    assert describe_nodes(found).splitlines() == [
        "node a (role=learner): 1 of 1 cores, 0 of 0 GPUs: learner 0, reward worker 0",
        "node b (role=sampler): 2 of 2 cores, 0 of 0 GPUs: sampler 0, sampler 1, reward worker 1",
    ]


def test_samplers_are_packed_unless_they_are_to_be_spread() -> None:
    nodes = [Node(name, 4) for name in "ab"]
    for spread, counts in (("false", {0, 2}), ("true", {1})):
        recipe = made_recipe("sampler.count=2", f"placement.spread_samplers={spread}")
        found = seating(recipe, *nodes, command="sample")
        assert {sum(a.role == "sampler" for a in there) for _, there in found.on} == counts


def test_what_does_not_fit_is_named_with_what_it_needs_and_what_there_is() -> None:
    recipe = made_recipe(*APART, "sampler.gpus=1", "sampler.cpus=2")
    (why,) = seating(recipe, Node("a", 1, 0, LEARNERS)).missing
    assert why == "sampler 0: no node with role=sampler is there (there are a (role=learner))"
    (why,) = seating(recipe, Node("a", 1, 0, LEARNERS), Node("b", 8, 0, SAMPLERS)).missing
    assert why == (
        "sampler 0: no node with role=sampler has 2 cores and 1 GPUs left "
        "(b (role=sampler) has 8 cores and 0 GPUs left)"
    )


def test_labels_that_ray_would_read_as_more_than_a_label_are_refused() -> None:
    for wrong in ('"!sampler"', '"in(a,b)"', '""', '" a"'):
        with pytest.raises(RecipeError, match=r"placement\.samplers"):
            made_recipe(f"placement.samplers={{role={wrong}}}")
