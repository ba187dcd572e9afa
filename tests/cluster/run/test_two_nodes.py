"""A run on two nodes that share nothing but a cable, which is slow, and cut; both nodes are lost.

The driver and the learner are on one node, the sampler on the other, a reward worker on each. The
samplers' node is lost, another joins; then the learner's, and another machine goes on from the
run's copy. What is sampled must be what the same recipe samples on one machine, where no more than
a reward worker dies; that run is also the soak of `benchmarks.soak`, in short. The model is named
by URI on the nodes, which have caches of their own, and by path on the one machine.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import soak
from cluster.recipe.recipe import load_recipe
from cluster.record.events import read_events
from cluster.record.stored import read_rollouts, stored_steps
from cluster.run.checkpoints import newest
from tasks.fetched import PIN
from tests.support.live_driver import PATIENCE
from tests.support.nodes import BUCKET, HOME, Cluster, Node, cluster
from tests.support.recipes import TINY_POLICY, recipe_text

STEPS = 10
RECIPE = f"""
seed = 5
model.max_model_len = 256

[sampler]
max_tokens = 60
cpus = 0.5
start_timeout_seconds = 900.0
heartbeat_seconds = 120.0

[reward]
terms = [
    {{ name = "perception_graded" }},
    {{ name = "tests.support.wordiness:Wordiness" }},  # each step has something to learn
]
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

[checkpoint]
every = 2
keep = 2
"""
PLACED = f"""{RECIPE}
[output]
mirror = "file://{BUCKET}"

[placement]
learner = {{ role = "learner" }}
samplers = {{ role = "sampler" }}
wait_seconds = 600.0
"""
FOLDER = "/tmp/run"
MODEL = f"file://{TINY_POLICY}"
JUMP = 3600


@dataclass(frozen=True)
class Lived:
    """A run's folder, copied from the last node of its driver, and what was on which node: actors,
    and contents that it had fetched.

    copied: the step of the checkpoint from which that node went on.
    """

    run: Path
    actors: dict[str, set[str]]
    copied: int
    fetched: dict[str, set[str]]


class Run:
    """The driver on a node, watched from outside."""

    def __init__(self, node: Node, log: Path, *what: str) -> None:
        """`what`: words after `train --output FOLDER`."""
        command = (sys.executable, "-m", "cluster", "train", "--output", FOLDER)
        self._log = log
        with log.open("w") as out:
            self.process = node.start(*command, *what, log=out)
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


def contents(node: Node) -> set[str]:
    """The hashes of what a node has fetched."""
    cache = node.path(f"{HOME}/.cache/equipoise/fetched")
    return {entry.name for entry in cache.glob("[0-9a-f]*") if entry.is_dir()}


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lived]:
    folder = tmp_path_factory.mktemp("two")
    bucket = folder / "bucket"
    bucket.mkdir()
    with cluster(folder) as nodes:
        head, other = nodes.add("head", bucket), nodes.add("other")
        nodes.join(head, 2, role="learner")
        nodes.wait_head(PATIENCE)
        nodes.join(other, 2, role="sampler")
        head.path("/tmp/recipe.toml").write_text(recipe_text(PLACED, model=MODEL))
        run = Run(head, folder / "driver.log", "/tmp/recipe.toml", "--address", nodes.address)
        run.wait_step(1)
        where = {"head": actors(head), "other": actors(other)}
        fetched = {"head": contents(head), "other": contents(other)}
        third = befall(nodes, run, other)
        run.wait_step(run.steps() + 2)
        fetched["third"] = contents(third)
        for node in nodes.nodes.values():  # the learner's, and without its head no Ray is left
            node.kill()
        copied = newest(bucket / "run").position.step
        spare = nodes.add("spare", bucket)
        here = [f"--set=placement.{role}={{}}" for role in ("learner", "samplers")]
        again = Run(spare, folder / "again.log", "--resume", f"file://{BUCKET}/run", *here)
        again.end()
        shutil.copytree(again.folder, folder / "run")
        yield Lived(folder / "run", where, copied, fetched | {"spare": contents(spare)})


@dataclass(frozen=True)
class Calm:
    """The run on one machine, and what it took after each step."""

    run: Path
    rows: list[dict[str, Any]]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Calm:
    folder = Path(tempfile.mkdtemp(prefix="calm-", dir="/tmp"))  # below it are sockets
    text = recipe_text(RECIPE, model=TINY_POLICY)
    try:
        rows, run = soak.soaked(folder, text, STEPS // 2, ["reward worker killed"])
        return Calm(Path(shutil.copytree(run, tmp_path_factory.mktemp("calm") / "run")), rows)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def befall(nodes: Cluster, run: Run, other: Node) -> Node:
    """What happens to cable, clocks and the samplers' node, each in the middle of the run; the node
    that takes its place."""
    nodes.cable("slow", seconds=0.05, loss=0.01)
    run.wait_step(3)
    nodes.cable("slow", seconds=0.0, loss=0.0)
    busy(run, other)
    nodes.nodes["head"].jump(JUMP)
    other.jump(JUMP)
    run.wait_step(run.steps() + 1)
    busy(run, other)
    nodes.cable("cut", "other")
    time.sleep(3)
    nodes.cable("mend", "other")
    run.wait_step(run.steps() + 1)
    third = nodes.add("third")
    nodes.join(third, 2, role="sampler")
    busy(run, other)
    other.kill()
    return third


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


def test_each_node_fetches_the_one_content_that_the_recipe_is_pinned_to(lived: Lived) -> None:
    """Also one that joins in the middle, and the machine that goes on from the copy."""
    pin = PIN.fullmatch(load_recipe(lived.run / "recipe.toml").model.path)
    assert pin and pin[1] == MODEL
    assert lived.fetched == {node: {pin[2]} for node in ("head", "other", "third", "spare")}


def test_a_lost_node_costs_its_sampler_and_no_group(lived: Lived) -> None:
    assert stored_steps(lived.run) == [*range(1, STEPS + 1)]
    events = [(event.who, event.what) for event in read_events(lived.run)]
    assert {("sampler-0", "lost"), ("sampler-0", "back")} <= {*events}
    assert events[0] == ("driver", "began") and events[-1] == ("driver", "ended")


def test_a_clock_that_jumps_an_hour_ahead_is_not_missed(lived: Lived) -> None:
    """On two nodes of three, while the run is on; of what goes by time nothing comes of it."""
    events = read_events(lived.run)
    times = [event.wall_seconds for event in events]
    assert max(times) - times[0] > JUMP and times[-1] - times[0] < JUMP
    recovered = [event.recovered_seconds for event in events if event.what == "back"]
    assert recovered and all(0 < seconds < JUMP for seconds in recovered if seconds is not None)
    assert "stalled" not in {event.what for event in events}


def test_another_machine_goes_on_where_the_learners_was_lost(lived: Lived) -> None:
    assert 0 < lived.copied < STEPS
    (went_on,) = [event for event in read_events(lived.run) if event.what == "went on"]
    assert went_on.why == f"from step-{lived.copied:06d}"


def test_it_samples_what_one_machine_samples(lived: Lived, calm: Calm) -> None:
    for step in range(1, STEPS + 1):
        here, there = (
            read_rollouts(run, step).select(["group_id", "response_ids"]).to_pylist()
            for run in (calm.run, lived.run)
        )
        assert here == there, f"step {step}"


def test_a_soak_counts_what_a_run_takes_and_finds_each_group(calm: Calm, tmp_path: Path) -> None:
    assert soak.lost_groups(calm.run) == []
    assert [row["fault"] for row in calm.rows if row["fault"]] == ["reward worker killed"]
    assert {*range(1, STEPS)} <= {row["step"] for row in calm.rows}
    for name in {*calm.rows[-1]} - {"fault"}:
        assert min(row[name] for row in calm.rows) > 0, name
    # What is missing, or is not of the seed, is found.
    shutil.copytree(calm.run / "rollouts", tmp_path / "rollouts")
    shutil.copy(calm.run / "recipe.toml", tmp_path)
    shutil.copy(
        tmp_path / "rollouts/step-000003.parquet", tmp_path / "rollouts/step-000004.parquet"
    )
    (tmp_path / "rollouts/step-000007.parquet").unlink()
    missing, other = soak.lost_groups(tmp_path)
    assert missing == f"steps stored: {STEPS - 1} of {STEPS}" and other.startswith("step 4: ")
