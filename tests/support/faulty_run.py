"""A run in which whatever can dies, hangs, comes or goes, step by step (see test_faults)."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.record.events import read_events
from cluster.record.stored import read_rollouts, stored_steps
from cluster.run.checkpoints import Position
from cluster.run.scaling import ask
from learner.checkpoint import check
from tests.support.doors import guests, listening, ray_of, with_words
from tests.support.live_driver import Driver, stopped
from tests.support.recipes import recipe_text

EVERY, ROUNDS, EXTRA, PLACES, SIZE = 2, 2, 2, 4, 4
PLANTED = "planted-3f9d27"
HANGING = ("sampler/restarts/silent", "sampler/restarts/transfer")
RECIPE = f"""
seed = 3
model.max_model_len = 256

[environment]
name = "tests.support.again:Again"
workers = 1
step_seconds = 300.0  # a machine may have other work
seconds = 500.0

[sampler]
max_tokens = 100
max_num_seqs = 64
cpus = 0.5
max_restarts = 10
start_timeout_seconds = 900.0
heartbeat_seconds = 60.0  # an engine's first tokens take long where other work has the cores

[reward]
terms = [
    {{ name = "outcome", weight = 0.5 }},
    {{ name = "tests.support.wordiness:Moody", weight = 0.1, args = {{ seconds = 0.05 }} }},
    {{ name = "environment", weight = 0.0 }},
]

[algorithm]
group_size = {SIZE}
problems_per_step = {PLACES}
steps = 100000
max_staleness = 1
dynamic_sampling = {{ max_rounds = {ROUNDS}, max_groups = {EXTRA} }}

[learner]
learning_rate = 1e-3
warmup_steps = 6
cpus = 0.5

[transfer]
overlap = true
deadline_seconds = 60.0

[watch]
stall_seconds = 15.0  # well below the silence of a sampler that hangs

[eval]
problems = 4
passes = ["greedy"]

[checkpoint]
every = {EVERY}
keep = 1000
background = true
"""


@dataclass(frozen=True)
class Lived:
    """A run whose driver was killed after `killed_at` steps, and that was told to stop later.

    Attributes:
        before: its folder when it was killed; saved: where it then went on.
        outlived: processes below the driver that lived when the next began.
        doors, guests: `listening` and `guests` of its first Ray.
        told_in: where a planted key, that Ray's token and a word of the recipe are: below the run,
            in that Ray's session, in the last one's.
    """

    run: Path
    before: Path
    killed_at: int
    saved: Position
    outlived: list[int]
    samplers: list[int]
    doors: set[str]
    guests: dict[str, tuple[bool, str]]
    told_in: list[dict[str, list[str]]]


def live(folder: Path, model: Path) -> Lived:
    """The run of `test_faults`, below `folder`."""
    text = recipe_text(RECIPE, model=model)
    mirror = f'output.mirror="file://{folder}/copies"'
    restarts = "checkpoint.restarts=2"
    driver = Driver(folder, text, mirror, restarts, HF_TOKEN=PLANTED, WANDB_API_KEY=PLANTED)

    def samplers(count: int) -> None:
        driver.wait(f"{count} samplers", lambda: driver.metric("sampler/count") == count)

    try:
        driver.wait("the first step", lambda: driver.steps() >= 1)
        ours = driver.below("")
        address, token, session = ray_of(ours)
        # Torch, in ranks and engines, opens ports of its own to all.
        torch_s = {*driver.below("ray::LearnerRank"), *driver.below("ray::Sampler")}
        doors = (listening({*ours} - torch_s), guests(address, token))
        ask(driver.run, 2)
        driver.wait("one more", lambda: "samplers: 1 -> 2" in driver.printed(), pause=0.1)
        # While it starts, the only one there is dies in the middle of its groups.
        sampler = driver.samplers()[0]
        driver.wait_steps(1)
        used = cpu_seconds(sampler)
        # More than fetching the step's weights takes it: by now it samples.
        driver.wait("its work", lambda: cpu_seconds(sampler) > used + 0.6, pause=0.05)
        with stopped([sampler]):
            sampler.kill()
        driver.wait("a sampler's loss", lambda: driver.metric("sampler/restarts/actor") >= 1)
        samplers(2)
        (worker,) = driver.below("ray::RewardWorker")
        with stopped([worker]):
            worker.kill()
        # Steps of both, after a checkpoint and of groups that were begun under it.
        start = driver.steps()
        driver.wait("both at work", lambda: shared_steps(driver.run, start) >= 4)
        driver.samplers()[0].suspend()
        # Met by its silence, or by the deadline of a transfer where it had no time to sample.
        driver.wait("a hanging one", lambda: sum(map(driver.metric, HANGING)) >= 1)
        ask(driver.run, 1)
        driver.wait("its wish", lambda: driver.metric("sampler/asked") == 1)
        samplers(1)
        driver.wait("the other's end", lambda: len(driver.samplers()) == 1)
        samplers_left = driver.samplers()
        # A step that was never saved is done, and the groups of others are in flight.
        training, all_of_it = driver.training(), driver.below("")
        while training.suspend() or driver.steps() % EVERY == 0:
            training.resume()
            driver.wait("an unsaved step", lambda: driver.steps() % EVERY == 1, pause=0.02)
        killed_at = driver.steps()
        with stopped(driver.below("ray::LearnerRank")):  # nobody writes to the folder
            shutil.copytree(driver.run, driver.before)
            training.kill()
        driver.wait("its next life", lambda: told(driver.run)[-1] == ("driver", "went on"))
        outlived = [process for process in all_of_it if process.is_running()]
        saved_in = driver.run / "checkpoints" / read_events(driver.run)[-1].why.split()[-1]
        saved = Position.from_dict(check(saved_in))
        driver.wait("new steps", lambda: driver.steps() >= killed_at + 2, pause=0.05)
        driver.below("ray::LearnerRank")[0].kill()
        driver.wait("and its next", lambda: told(driver.run)[-1] == ("driver", "went on"))
        again = driver.steps()
        driver.wait("steps of it", lambda: driver.steps() >= again + 1, pause=0.05)
        *_, last = ray_of(driver.below(""))
        driver.stop()
        words = (PLANTED, token, "Moody", "RewardWorker")
        told_in = [with_words(each, *words) for each in (folder, session, last)]
    finally:
        driver.clean_up()
    pids = ([p.pid for p in outlived], [p.pid for p in samplers_left])
    return Lived(driver.run, driver.before, killed_at, saved, *pids, *doors, told_in)


def told(run: Path) -> list[tuple[str, str]]:
    """Who did what, as far as it was told."""
    return [(event.who, event.what) for event in read_events(run)]


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def shared_steps(run: Path, after: int) -> int:
    """Steps with groups of two samplers."""
    steps = [step for step in stored_steps(run) if step > after]
    return sum(len(set(read_rollouts(run, step)["sampler"].to_pylist())) == 2 for step in steps)
