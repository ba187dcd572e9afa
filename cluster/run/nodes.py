"""The nodes of the Ray that a run is connected to, and where on them its actors are put."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private.state import state

from cluster.recipe.nodes import Node, lacking
from cluster.recipe.placement import Command, PlacementError
from cluster.recipe.preflight import Say
from cluster.recipe.recipe import Recipe

LOOK_SECONDS = 1.0


def live_nodes() -> list[Node]:
    """The nodes that are alive, as they were started: what others have taken is not looked at."""
    return [
        Node(
            node["NodeManagerAddress"],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            node["Labels"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def wait_for_nodes(recipe: Recipe, command: Command, say: Say, own_ray: bool) -> None:
    """Return once the cluster has nodes for all of a recipe's actors.

    `own_ray`: this is the run's own Ray, which no node will join. Raises PlacementError that names
    what is missing, after `placement.wait_seconds`; Ray itself would wait for ever.
    """
    start, limit = time.monotonic(), 0.0 if own_ray else recipe.placement.wait_seconds
    announced = ""
    while True:
        missing = lacking(recipe, command, live_nodes())
        if not missing:
            return
        if time.monotonic() - start >= limit:
            waited = f"\nwaited {limit:g} s (placement.wait_seconds) for it" if limit else ""
            raise PlacementError(missing + waited)
        if missing != announced:
            say(f"waiting for nodes, {limit:g} s at most (placement.wait_seconds): {missing}")
            announced = missing
        time.sleep(LOOK_SECONDS)


def leaving(roles: Sequence[str] = ("LearnerRank",)) -> str:
    """Who is on a node that its cluster takes away soon, this driver or actors of these classes;
    "" where nobody is. Losing a sampler's node, or a reward worker's, ends no run."""
    if not ray.is_initialized() or not (nodes := state.get_draining_nodes()):
        return ""
    actors_lost = ["the driver"] if ray.get_runtime_context().get_node_id() in nodes else []
    for actor in own_actors():
        if actor["ActorClassName"] in roles and actor["Address"]["NodeID"] in nodes:
            actors_lost.append(actor["ActorClassName"])
    return ", ".join(dict.fromkeys(actors_lost))


def own_actors() -> list[dict[str, Any]]:
    """The actors of this driver that live, as Ray tells of them: `Name`, `ActorClassName`, `Pid`,
    `Address`; asked of its head, no dashboard is needed."""
    job = ray.get_runtime_context().get_job_id()
    living = state.actor_table(None, actor_state_name="ALIVE").values()
    return [actor for actor in living if actor["JobID"] == job]


def on_nodes(labels: Mapping[str, str], spread: bool = False) -> dict[str, Any]:
    """Options of a Ray actor that is to be on a node with these labels."""
    options: dict[str, Any] = {"label_selector": dict(labels)} if labels else {}
    return options | ({"scheduling_strategy": "SPREAD"} if spread else {})
