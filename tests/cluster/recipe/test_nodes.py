"""Which node has room for whom: nobody on a node without his labels or his room, nobody twice."""

from __future__ import annotations

import random
from itertools import product

import pytest

from cluster.recipe.hardware import Machine
from cluster.recipe.nodes import Node, Seating, describe_nodes, labels_for, seated
from cluster.recipe.placement import Actor, Command, plan
from cluster.recipe.recipe import Recipe, RecipeError
from cluster.recipe.sections import PlacementConfig
from tests.support.recipes import made_recipe

LEARNERS, SAMPLERS = {"role": "learner"}, {"role": "sampler"}
APART = ('placement.learner={role="learner"}', 'placement.samplers={role="sampler"}')


def seating(recipe: Recipe, *nodes: Node, command: Command = "train") -> Seating:
    return seated(plan(recipe, Machine(0, 0), command).actors, recipe.placement, nodes)


def random_case(dice: random.Random) -> tuple[list[Actor], PlacementConfig, list[Node]]:
    labels = [{}, LEARNERS, SAMPLERS]
    placement = PlacementConfig(
        learner=dice.choice(labels),
        samplers=dice.choice(labels),
        reward_workers=dice.choice(labels),
        spread_samplers=dice.random() < 0.5,
    )
    actors = [Actor("driver", 0)]
    for role, most in (("learner", 2), ("sampler", 3), ("reward worker", 2)):
        cpus, gpus = dice.choice([0.5, 1, 2]), dice.choice([0, 0, 1])
        for index in range(dice.randrange(most + 1)):
            free = role == "reward worker"
            actors.append(Actor(role, index, 0 if free else cpus, 0 if free else gpus))  # type: ignore[arg-type]
    nodes = [
        Node(str(n), dice.choice([0, 1, 2, 4]), dice.choice([0, 1, 2]), dice.choice(labels))
        for n in range(dice.randrange(4))
    ]
    return actors, placement, nodes


def may(actor: Actor, node: Node, placement: PlacementConfig) -> bool:
    return all(node.labels.get(k) == v for k, v in labels_for(actor.role, placement).items())


def fit(actors: list[Actor], node: Node) -> bool:
    return sum(a.cpus for a in actors) <= node.cpus and sum(a.gpus for a in actors) <= node.gpus


def can_be(actors: list[Actor], placement: PlacementConfig, nodes: list[Node]) -> bool:
    """Whether any way of placing all of them is one, by trying every way."""
    for way in product(nodes, repeat=len(actors)):
        if all(may(a, n, placement) for a, n in zip(actors, way, strict=True)) and all(
            fit([a for a, n in zip(actors, way, strict=True) if n is node], node) for node in nodes
        ):
            return True
    return not actors


def test_who_is_seated_fits_and_who_is_not_has_no_place() -> None:
    dice, refused = random.Random(0), 0
    for _ in range(400):
        actors, placement, nodes = random_case(dice)
        found = seated(actors, placement, nodes)
        on = [actor for _, there in found.on for actor in there]
        assert len(on) == len({(a.role, a.index) for a in on})
        assert len(on) + len(found.missing) == len(actors) - 1, "all but the driver"
        for node, there in found.on:
            assert fit(list(there), node) and all(may(a, node, placement) for a in there)
        if not can_be(actors[1:], placement, nodes):
            assert found.missing
            refused += 1
        elif all(a.gpus == 0 for a in actors):
            assert not found.missing, "with cores alone the largest first is enough here"
    assert 50 < refused < 350


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
