"""The nodes of the Ray that a run is connected to: which there are, and which are missing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray._private.state import state
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.recipe.nodes import Node, lacking
from cluster.recipe.placement import Command, PlacementError
from cluster.recipe.recipe import Recipe, RunFailed, Say
from cluster.recipe.sections import PlacementConfig
from tasks.fetched import fetched
from tasks.liveness import beat

LOOK_SECONDS = 1.0
TELL_SECONDS = 30.0
FETCH_SECONDS = 6 * 3600.0
"""For what nodes fetch; a transfer that stands still is ended by its own protocol before."""


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


def fetch_on_nodes(uris: Sequence[str], placement: PlacementConfig, say: Say) -> None:
    """Have every node but this one that actors may go to fetch what is pinned in `uris`.

    One that joins later fetches when an actor starts on it. Raises RunFailed naming the node.
    """
    if not uris:
        return
    here, calls = ray.get_runtime_context().get_node_id(), {}
    places = (placement.learner, placement.samplers, placement.reward_workers)
    for node in ray.nodes():
        asked_of = any(labels.items() <= node["Labels"].items() for labels in places)
        if node["Alive"] and asked_of and node["NodeID"] != here:
            on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            fetching = ray.remote(num_cpus=0, max_retries=0)(_fetch)
            call = fetching.options(scheduling_strategy=on_node).remote(uris)
            calls[call] = node["NodeManagerAddress"]
    pending, until = [*calls], time.monotonic() + FETCH_SECONDS
    while pending:
        done, pending = ray.wait(pending, timeout=TELL_SECONDS)
        beat()
        for call in done:
            try:
                ray.get(call)
            except RayError as error:
                cause = getattr(error, "cause", None) or error
                raise RunFailed(f"node {calls[call]}: {cause}") from error
        waiting = ", ".join(calls[call] for call in pending)
        if pending and time.monotonic() > until:
            raise RunFailed(f"node {waiting}: nothing fetched within {FETCH_SECONDS / 3600:g} h")
        if pending:
            say(f"{waiting}: fetching {', '.join(uris)} ...")


def _fetch(uris: Sequence[str]) -> None:
    for uri in uris:
        fetched(uri)


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
