"""The places of a run's actors, reserved in Ray by placement groups before any of them starts."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from cluster.recipe.nodes import NODE_ID, Bundle, Seating, labels_for, seated_for
from cluster.recipe.placement import Actor, PlacementError, Role
from cluster.recipe.recipe import Recipe
from cluster.run.nodes import free_nodes

LOOK_SECONDS = 0.2
SETTLES_SECONDS = 15.0
"""How long Ray may take to reserve what is free; then somebody else was there first."""

Options = dict[str, Any]
"""Of a Ray actor."""


class Places:
    """Which node each actor goes to, as `cluster.recipe.nodes.seated` says.

    The learner's ranks are reserved at once, each engine for itself, so that nobody else takes
    what a run still needs, and two runs do not hold half of what each needs for long. An engine
    that ends gives its place back; where it is started again is for Ray to say, by the labels of
    its role: its node may be the reason why it ended.
    """

    def __init__(self, recipe: Recipe, actors: Sequence[Actor]) -> None:
        """Reserve; raises PlacementError where there was no room for `placement.wait_seconds`."""
        self._recipe = recipe
        self._reserved: dict[tuple[Role, int], tuple[PlacementGroup, int]] = {}
        self._nodes: dict[tuple[Role, int], str] = {}
        limit = max(recipe.placement.wait_seconds, SETTLES_SECONDS)
        until = time.monotonic() + limit
        while True:
            seating = seated_for(recipe, actors, free_nodes())
            if not seating.missing and self._reserve(seating):
                return
            if time.monotonic() >= until:
                why = "\n".join(seating.missing) or "others took the room that nodes had left"
                raise PlacementError(f"{why}\nwaited {limit:g} s for it (placement.wait_seconds)")
            # Not all alike, so that two runs do not get in each other's way once more.
            time.sleep(LOOK_SECONDS * random.uniform(1, 3))

    def options(self, role: Role, index: int) -> Options:
        """Where an actor is to start: at its place, or, without one, by the labels of its role."""
        placement = self._recipe.placement
        if (reserved := self._reserved.get((role, index))) is not None:
            group, bundle = reserved
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
            return {"scheduling_strategy": strategy}
        options: Options = {}
        if labels := labels_for(role, placement):
            options["label_selector"] = dict(labels)
        if (node := self._nodes.get((role, index))) is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
            # A byte, as Ray puts one that takes nothing on any node, whatever it is told.
            options["memory"] = 1
        elif placement.spread_samplers and role == "sampler":
            options["scheduling_strategy"] = "SPREAD"
        return options

    def leave(self, role: Role, index: int) -> None:
        """An actor has ended; its place is given back, unless it shares that with another.

        May be called from any thread.
        """
        group, _ = self._reserved.get((role, index), (None, 0))
        if group is not None:
            if sum(other == group for other, _ in list(self._reserved.values())) > 1:
                return
            self._reserved.pop((role, index), None)
            remove_placement_group(group)
        self._nodes.pop((role, index), None)

    def release(self) -> None:
        """Give all places back; ends who is still there."""
        for group in {group for group, _ in list(self._reserved.values())}:
            remove_placement_group(group)
        self._reserved.clear()

    def _reserve(self, seating: Seating) -> bool:
        """Whether Ray has given all of it to this run, which has nothing of it otherwise."""
        until = time.monotonic() + SETTLES_SECONDS
        for group in seating.groups():
            made = placement_group(
                [_resources(bundle) for bundle, _ in group.seats],
                group.strategy,
                bundle_label_selector=[{NODE_ID: node.id} for _, node in group.seats],
            )
            for index, (bundle, _) in enumerate(group.seats):
                self._reserved |= {(a.role, a.index): (made, index) for a in bundle.actors}
        self._nodes = {
            (actor.role, actor.index): node.id for node, actors in seating.on for actor in actors
        }
        for made in {made for made, _ in self._reserved.values()}:
            if not made.wait(max(1, int(until - time.monotonic()))):
                self.release()
                return False
        return True


@contextmanager
def places_of(recipe: Recipe, actors: Sequence[Actor]) -> Iterator[Places]:
    """Theirs, given back at the end."""
    places = Places(recipe, actors)
    try:
        yield places
    finally:
        places.release()


def _resources(bundle: Bundle) -> dict[str, float]:
    amounts = {"CPU": bundle.cpus, "GPU": bundle.gpus}
    return {name: amount for name, amount in amounts.items() if amount}
