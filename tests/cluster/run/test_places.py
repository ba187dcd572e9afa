"""Real placement groups put actors where the plan said, on a Ray of several nodes with GPUs that
it is only told of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.recipe.nodes import actors_of, seated_for
from cluster.recipe.placement import Actor, PlacementError
from cluster.recipe.recipe import Recipe, RunFailed
from cluster.recipe.sections import PlacementConfig
from cluster.run.nodes import fetch_on_nodes, free_nodes
from cluster.run.places import Places, places_of
from tests.support.ray_heads import local_cluster, node_args
from tests.support.recipes import made_recipe
from tests.support.waiting import until

APART = (
    "learner.ranks=2", "learner.gpus=1", "sampler.count=2", "sampler.gpus=2",
    "sampler.tensor_parallel=2",
)  # fmt: skip
SHARING = (
    'transfer.transport="ipc"', "sampler.count=2", "learner.ranks=2", "sampler.gpus=0.5",
    "sampler.gpu_memory_utilization=0.5", "learner.gpus=0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without GPUs, where the driver is, and two nodes that have some."""
    some = [{"num_cpus": 6, "num_gpus": n, "labels": {"gpus": str(n)}} for n in (2, 4)]
    with local_cluster(*some, num_cpus=1, num_gpus=0) as made:
        yield made


@ray.remote
class Trivial:
    """Of any role."""

    def where(self) -> tuple[str, tuple[str, ...]]:
        """Its node and its GPUs."""
        return ray.get_runtime_context().get_node_id(), tuple(map(str, ray.get_gpu_ids()))


def started(places: Places, actors: Sequence[Actor]) -> list[Any]:
    return [
        Trivial.options(  # type: ignore[attr-defined]
            num_cpus=a.cpus, num_gpus=a.gpus, **places.options(a.role, a.index)
        ).remote()
        for a in actors
    ]


def where(actors: Sequence[Any]) -> list[tuple[str, tuple[str, ...]]]:
    return ray.get([actor.where.remote() for actor in actors], timeout=120)


def actors_but_driver(recipe: Recipe) -> list[Actor]:
    return [actor for actor in actors_of(recipe, "train") if actor.role != "driver"]


def test_actors_are_where_the_plan_said_and_an_engine_starts_again_elsewhere(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, near = made_recipe(*APART), made_recipe('placement.reward_workers={gpus="2"}')
    late = made_recipe("placement.wait_seconds=0")
    actors = actors_but_driver(recipe)
    plan = seated_for(recipe, actors, free_nodes())
    planned = {(a.role, a.index): node for node, there in plan.on for a in there}
    head, two, four = (node.node_id for node in (cluster.head_node, *sorted_nodes(cluster)))
    assert planned["learner", 0].id == planned["learner", 1].id == four
    assert {planned["sampler", i].id for i in (0, 1)} == {two, four}
    assert planned["reward worker", 0].id == head
    with places_of(recipe, actors) as places:
        monkeypatch.setattr("cluster.run.places.SETTLES_SECONDS", 0.0)
        with pytest.raises(PlacementError, match=r"0 GPUs left.*\n.*placement\.wait_seconds"):
            Places(late, [Actor("frozen model", 0, 1, 1)])  # all are reserved, none yet used
        worker = Trivial.options(  # type: ignore[attr-defined]
            num_cpus=0, max_restarts=-1, max_task_retries=-1,
            **Places(near, [Actor("reward worker", 0)]).options("reward worker", 0),
        ).remote()  # fmt: skip
        assert where([worker])[0][0] == two
        # The last to be reserved are the first to be started.
        handles = started(places, actors[::-1])
        seen = where(handles)
        assert [node for node, _ in seen] == [planned[a.role, a.index].id for a in actors[::-1]]
        # The node of an engine is lost: it is to start on whatever node there is then.
        lost = next(a for a in actors if a.role == "sampler" and planned[a.role, a.index].id == two)
        cluster.remove_node(sorted_nodes(cluster)[0])
        places.leave(lost.role, lost.index)
        (again,) = started(places, [lost])
        joined = cluster.add_node(**node_args(num_cpus=6, num_gpus=2, labels={"gpus": "2"}))
        assert where([again])[0][0] == joined.node_id
        # Its old process may answer for a while.
        until(lambda: where([worker])[0][0] == joined.node_id, 120)
        for handle in (*handles, again, worker):
            ray.kill(handle)


def sorted_nodes(cluster: Cluster) -> list[Any]:
    """The workers, the one with the fewest GPUs first."""
    return sorted(cluster.worker_nodes, key=lambda node: node._ray_params.num_gpus)


@pytest.mark.usefixtures("cluster")
def test_each_rank_shares_a_gpu_with_the_sampler_of_its_number_and_keeps_it() -> None:
    recipe = made_recipe(*SHARING)
    actors = [a for a in actors_but_driver(recipe) if a.gpus]
    with places_of(recipe, actors) as places:
        # In an order in which Ray alone would fill GPUs with samplers first.
        handles = started(places, actors)
        seen = dict(zip([(a.role, a.index) for a in actors], where(handles), strict=True))
        for index in range(2):
            assert seen["sampler", index] == seen["learner", index]
        assert len(set(seen.values())) == 2
        ray.kill(handles[0])
        places.leave(actors[0].role, actors[0].index)
        (again,) = started(places, actors[:1])
        assert where([again]) == [seen[actors[0].role, actors[0].index]]
        for handle in (*handles[1:], again):
            ray.kill(handle)


@pytest.mark.usefixtures("cluster")
def test_a_node_that_finds_other_content_at_a_uri_ends_the_run_with_its_address(
    tmp_path: Path,
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    here = ray.util.get_node_ip_address()
    with pytest.raises(RunFailed, match=rf"^node {here}: file://{tmp_path}: other content lies "):
        fetch_on_nodes([f"file://{tmp_path}#sha256={'0' * 64}"], PlacementConfig(), print)
