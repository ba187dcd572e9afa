"""The nodes of the Ray that a run is connected to: which there are, and which are missing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray._private.state import state

from cluster.recipe.nodes import Node, lacking
from cluster.recipe.placement import Command, PlacementError
from cluster.recipe.preflight import Say
from cluster.recipe.recipe import Recipe

LOOK_SECONDS = 1.0


def live_nodes() -> list[Node]:
    """The nodes that are alive, as they were started: what anybody has taken is not looked at."""
    own = ray.get_runtime_context().get_node_id()
    return [
        Node(
            node["NodeManagerAddress"],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            node["Labels"],
            home=node["NodeID"] == own,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def free_nodes() -> list[Node]:
    """The same with what each has left; without those that their cluster takes away soon."""
    left, draining = state.available_resources_per_node(), state.get_draining_nodes()
    return [
        replace(node, cpus=left[node.id].get("CPU", 0.0), gpus=left[node.id].get("GPU", 0.0))
        for node in live_nodes()
        if node.id in left and node.id not in draining
    ]


def wait_for_nodes(recipe: Recipe, command: Command, say: Say, own_ray: bool) -> None:
    """Return once the cluster has nodes for all of a recipe's actors.

    `own_ray`: this is the run's own Ray, which no node will join and nobody else takes of. Raises
    PlacementError that names what is missing, or taken by others, after `placement.wait_seconds`;
    Ray itself would wait for ever.
    """
    nodes = live_nodes if own_ray else free_nodes
    start, limit = time.monotonic(), 0.0 if own_ray else recipe.placement.wait_seconds
    announced = ""
    while True:
        missing = lacking(recipe, command, nodes())
        if not missing:
            return
        if time.monotonic() - start >= limit:
            waited = f"\nwaited {limit:g} s (placement.wait_seconds) for it" if limit else ""
            raise PlacementError(missing + waited)
        if missing != announced:
            limited = f"{limit:g} s at most (placement.wait_seconds)"
            say(f"waiting for nodes with room, {limited}: {missing}")
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
