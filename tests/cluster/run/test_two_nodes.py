"""A run on two nodes that share nothing but a cable, which is slow, and cut; one node is lost.

The driver and the learner are on one node, the sampler on the other, a reward worker on each. What
is sampled must be what the same recipe samples on one machine where nothing happens.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.record.events import read_events
from cluster.record.stored import read_rollouts, stored_steps
from tests.support.live_driver import PATIENCE, Driver
from tests.support.nodes import Cluster, Node, cluster
from tests.support.recipes import TINY_POLICY, recipe_text

STEPS = 8
RECIPE = f"""
seed = 5
model.max_model_len = 256

[sampler]
max_tokens = 60
cpus = 0.5
start_timeout_seconds = 900.0
heartbeat_seconds = 120.0

[reward]
terms = [{{ name = "perception_graded" }}]
workers = 2

[algorithm]
group_size = 4
problems_per_step = 4
steps = {STEPS}

[learner]
learning_rate = 1e-3
cpus = 0.5

[transfer]
deadline_seconds = 300.0

[eval]
problems = 4
passes = ["greedy"]
"""
PLACED = f"""{RECIPE}
[placement]
learner = {{ role = "learner" }}
samplers = {{ role = "sampler" }}
wait_seconds = 600.0
"""
FOLDER = "/tmp/run"


@dataclass(frozen=True)
class Lived:
    """A run's folder, copied from the node of its driver, and what was on which node."""

    run: Path
    actors: dict[str, set[str]]


class Run:
    """The driver on a node, watched from outside."""

    def __init__(self, node: Node, address: str, log: Path) -> None:
        node.path("/tmp/recipe.toml").write_text(recipe_text(PLACED, model=TINY_POLICY))
        command = (sys.executable, "-m", "cluster", "train", "/tmp/recipe.toml")
        self._log = log
        with log.open("w") as out:
            self.process = node.start(*command, "--output", FOLDER, "--address", address, log=out)
        self.folder = node.path(FOLDER)

    def steps(self) -> int:
        return len([*(self.folder / "rollouts").glob("step-*.parquet")])

    def wait(self, what: str, until: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not until():
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, f"{what}\n{self._log.read_text()}"
            time.sleep(0.1)

    def wait_step(self, step: int) -> None:
        self.wait(f"step {step}", lambda: self.steps() >= step)

    def end(self) -> None:
        assert self.process.wait(PATIENCE) == 0, self._log.read_text()


def actors(node: Node) -> set[str]:
    """Which of a run's actors are on a node."""
    titles = ("Sampler", "LearnerRank", "RewardWorker")
    return {title for title in titles if node.processes(f"ray::{title}")}


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lived]:
    folder = tmp_path_factory.mktemp("two")
    with cluster(folder) as nodes:
        head, other = nodes.add("head"), nodes.add("other")
        nodes.join(head, 2, role="learner")
        nodes.wait_head(PATIENCE)
        nodes.join(other, 2, role="sampler")
        run = Run(head, nodes.address, folder / "driver.log")
        run.wait_step(1)
        where = {"head": actors(head), "other": actors(other)}
        befall(nodes, run, other)
        run.end()
        shutil.copytree(run.folder, folder / "run")
        yield Lived(folder / "run", where)


def befall(nodes: Cluster, run: Run, other: Node) -> None:
    """What happens to the samplers' node, each in the middle of the run."""
    nodes.cable("slow", seconds=0.05, loss=0.01)
    run.wait_step(3)
    nodes.cable("slow", seconds=0.0, loss=0.0)
    busy(run, other)
    nodes.cable("cut", "other")
    time.sleep(3)
    nodes.cable("mend", "other")
    run.wait_step(run.steps() + 1)
    nodes.join(nodes.add("third"), 2, role="sampler")
    busy(run, other)
    other.kill()


def busy(run: Run, node: Node) -> None:
    """Return while the sampler of a node samples."""
    (sampler,) = node.processes("ray::Sampler")
    before = cpu_seconds(sampler)
    run.wait("its work", lambda: cpu_seconds(sampler) > before + 0.2)


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def test_each_actor_is_on_a_node_with_its_labels(lived: Lived) -> None:
    assert lived.actors == {
        "head": {"LearnerRank", "RewardWorker"},
        "other": {"Sampler", "RewardWorker"},
    }


def test_a_lost_node_costs_its_sampler_and_no_group(lived: Lived) -> None:
    assert stored_steps(lived.run) == [*range(1, STEPS + 1)]
    events = [(event.who, event.what) for event in read_events(lived.run)]
    assert {("sampler-0", "lost"), ("sampler-0", "back")} <= {*events}
    assert events[0] == ("driver", "began") and events[-1] == ("driver", "ended")


def test_it_samples_what_one_machine_samples(lived: Lived, tmp_path: Path) -> None:
    calm = Driver(tmp_path, recipe_text(RECIPE, model=TINY_POLICY))
    try:
        assert calm.end() == 0, calm.printed()
    finally:
        calm.clean_up()
    for step in range(1, STEPS + 1):
        here, there = (
            read_rollouts(run, step).select(["group_id", "response_ids"]).to_pylist()
            for run in (calm.run, lived.run)
        )
        assert here == there, f"step {step}"
