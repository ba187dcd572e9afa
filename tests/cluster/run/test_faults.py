"""A run with groups in flight between its steps: whatever dies, hangs, comes or goes, it goes on.

One run proves it all, since engines are slow to start. It samples a step ahead (`max_staleness =
1`), learns while its weights travel (`overlap`) and replaces groups without variance (dynamic
sampling); a turn that ends is answered with a picture. It gets a second sampler and gives it back;
a sampler is killed, a reward worker, the driver, and in the end the learner; a sampler hangs, and
the driver stands still for a while. It helps itself, below a supervisor. What it leaves behind must
be what its seed says, each group once, each token under the weights it names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.recipe.problems import open_sources, step_problems
from cluster.recipe.recipe import load_recipe
from cluster.record.events import read_events
from cluster.record.mirror import fetch
from cluster.record.mismatch import MISMATCH_LIMIT
from cluster.record.stored import read_metrics, read_rollouts, read_scored, stored_steps
from cluster.run.checkpoints import Position, newest
from cluster.run.refill import extra_requests
from cluster.run.stream import free_requests
from learner.batch import TrainSequence
from learner.checkpoint import check, checkpoint_folder, checkpoint_folders
from learner.collate import Collator
from learner.policy import load_policy
from rollout.buffer import BufferState
from tasks.images import check_image
from tests.support.faulty_run import EXTRA, PLACES, ROUNDS, SIZE, Lived, live, told
from tests.support.wordiness import cares_for

CLOSE = 2e-3
"""Nats between a sampler's log-prob and the learner's own under the same weights."""


@pytest.fixture(scope="module")
def lived(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Lived:
    return live(tmp_path_factory.mktemp("faults"), tiny_models["qwen3_vl"])


@pytest.fixture(scope="module")
def metrics(lived: Lived) -> dict[str, dict[int, float]]:
    """name -> step -> value."""
    found: dict[str, dict[int, float]] = {}
    for row in read_metrics(lived.run).to_pylist():
        found.setdefault(row["name"], {})[row["step"]] = row["value"]
    return found


@pytest.fixture(scope="module")
def saved(lived: Lived) -> list[Position]:
    """What the checkpoints say of the run."""
    return [Position.from_dict(check(folder)) for folder in checkpoint_folders(lived.run)]


def test_all_of_it_happened(lived: Lived, metrics: dict[str, dict[int, float]]) -> None:
    assert set(metrics["sampler/asked"].values()) == {1, 2}
    assert max(metrics["sampler/restarts/actor"].values()) >= 1
    assert max(metrics["sampler/resampled"].values()) >= 1
    assert max(metrics["reward/worker_restarts"].values()) >= 1
    assert lived.samplers and not lived.outlived


def test_its_ray_is_for_this_machine_and_for_who_has_its_token(lived: Lived) -> None:
    assert "127.0.0.1" in lived.doors
    assert lived.doors <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert {name: got_in for name, (got_in, _) in lived.guests.items()} == {
        "nothing": False,
        "another token": False,
        "its token": True,
    }, lived.guests


def test_a_key_of_the_environment_is_in_no_file_and_a_token_of_ray_in_none(lived: Lived) -> None:
    """Of the run's folder, what it printed, its tables, Ray's sessions and their logs."""
    for found in lived.told_in:
        assert [*found.values()][:2] == [[], []]
    run, *rays = lived.told_in
    assert run["Moody"] and all(found["RewardWorker"] for found in rays), "it finds what is there"


def test_a_run_that_hangs_tells_where_each_of_its_processes_stands(lived: Lived) -> None:
    """A sampler hung: its silence is longer than `watch.stall_seconds`; and nothing came of it."""
    assert ("driver", "stalled") in told(lived.run)
    files = [file.read_text() for file in (lived.before / "stacks").iterdir()]
    hung = [text for text in files if re.search(r"== Sampler, process \d+\n.*T \(stopped\)", text)]
    assert hung
    for text in hung:
        assert "== driver\n" in text and "in run_training" in text
        assert re.search(r"== LearnerRank, process \d+\n(Thread|Current thread) 0x", text)
        assert re.search(r"== RewardWorker, process \d+\n(Thread|Current thread) 0x", text)


def test_no_step_is_lost_and_what_was_done_and_lost_comes_again(
    lived: Lived, saved: list[Position]
) -> None:
    assert lived.killed_at > lived.saved.step
    assert stored_steps(lived.run) == [*range(1, saved[-1].step + 1)]
    assert stored_steps(lived.before) == [*range(1, lived.killed_at + 1)]
    for step in range(lived.saved.step + 1, lived.killed_at + 1):
        assert group_ids(lived.before, step) == group_ids(lived.run, step)
    # Each checkpoint names the groups that were begun and not yet used: the next step's.
    for at in saved:
        due = PLACES * at.step
        assert at.buffer == BufferState(due + PLACES, tuple(range(due, due + PLACES)))


def test_the_copy_of_the_run_is_whole_after_all_that(lived: Lived, tmp_path: Path) -> None:
    fetch(f"file://{lived.run.parent}/copies/run", tmp_path / "run", print)
    at_home, fetched = contents(lived.run), contents(tmp_path / "run")
    stays = {name for name in at_home if name.startswith("logs/")}
    assert stays and fetched.keys() == at_home.keys() - stays - {"report.html"}  # drawn at the end
    assert all(at_home[name] == digest for name, digest in fetched.items())
    assert newest(tmp_path / "run").position == newest(lived.run).position


def contents(folder: Path) -> dict[str, str]:
    """name -> digest of each file, but for what `mirror.json` keeps of the copy."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file() and file.name not in ("mirror.json", "lock") and file.name[0] != "."
    }


def test_sampler_and_learner_stay_one_policy(metrics: dict[str, dict[int, float]]) -> None:
    """Up to the version between them; whoever sampled had the weights of its time."""
    for step, gap in metrics["learner/logprob_gap"].items():
        assert metrics["policy/lag_max"][step] or gap < MISMATCH_LIMIT["float32", False]


def test_the_run_tells_what_befell_it_and_goes_on_when_its_driver_or_learner_dies(
    lived: Lived,
) -> None:
    """That no group is lost by it is what the tests of the whole run below say."""
    events = [
        event
        for event in told(lived.run)
        if event[0] in ("driver", "supervisor") and event[1] != "stalled"
    ]
    assert events == [
        *[("driver", "began"), ("driver", "died"), ("supervisor", "restart")],
        *[("driver", "went on"), ("driver", "failed"), ("supervisor", "restart")],
        *[("driver", "went on"), ("driver", "stopped")],
    ]
    by = {event[:2]: event for event in read_events(lived.run)}  # the last of each
    restart, went_on = by["supervisor", "restart"], by["driver", "went on"]
    assert restart.why.endswith("(LearnerRank)")
    assert (went_on.recovered_seconds or 0) > 0
    assert {("sampler-0", "lost"), ("sampler-0", "back")} <= set(told(lived.run))


def group_ids(run: Path, step: int) -> list[str]:
    """In the order in which the step learnt from them."""
    return list(dict.fromkeys(read_rollouts(run, step)["group_id"].to_pylist()))


def test_each_group_that_the_seed_asks_for_is_there_once_in_its_place_and_within_the_bound(
    lived: Lived, metrics: dict[str, dict[int, float]]
) -> None:
    recipe, run = load_recipe(lived.run / "recipe.toml"), lived.run
    sources, steps = open_sources(recipe.tasks), stored_steps(run)
    for name in ("policy/version", "sampler/count", "refill/missing", "learner/lr"):
        assert sorted(metrics[name]) == steps, "one value a step, none of a life that is over"
    seen: set[str] = set()
    version, lags, budgets = 0, set[int](), set[tuple[bool, bool]]()
    for step in steps:
        scored = read_scored(run, step)
        extra = len(scored) - PLACES
        own = step_problems(sources, recipe.seed, step - 1, PLACES)
        asked = free_requests(recipe, step, own)
        asked += extra_requests(recipe, sources, step, range(extra))
        ids = [one.group.group_id for one in scored]
        assert ids == [request.group_id for request in asked] and not seen & set(ids)
        seen |= set(ids)
        assert all(len(one.group.rollouts) == SIZE for one in scored)
        # Dynamic sampling: what it counts is so, and it gave up for want of budget alone.
        assert [one.has_gradient for one in scored] == [cares_for(name) for name in ids]
        missing = PLACES - sum(cares_for(name) for name in ids)
        rounds = metrics["refill/rounds"][step]
        assert metrics["refill/extra_groups"][step] == extra <= EXTRA and rounds <= ROUNDS
        assert metrics["refill/missing"][step] == missing >= 0
        assert not missing or extra == EXTRA or rounds == ROUNDS
        budgets.add((extra > 0, missing > 0))
        # No token is older than the bound, and there are some of that age.
        found = {version - int(v) for one in scored for r in one.group.rollouts for v in r.versions}
        assert found <= {0, 1} and metrics["policy/lag_max"][step] == max(found)
        lags |= found
        version += any(one.has_gradient for one in scored)
        assert metrics["policy/version"][step] == version
    assert lags == {0, 1}
    assert budgets == {(False, False), (True, False), (True, True)}


def test_responses_of_several_turns_are_whole_whatever_befell_their_sampler(
    lived: Lived, metrics: dict[str, dict[int, float]]
) -> None:
    """Each picture is the one of the turns before it, which the environment alone knew."""
    turns = list[int]()
    for step in stored_steps(lived.run):
        for one in read_scored(lived.run, step):
            for rollout in one.group.rollouts:
                turns.append(len(rollout.turns))
                assert rollout.text == "".join(turn.text for turn in rollout.turns)
                own = len(one.group.problem.images)
                shown = [np.asarray(check_image(i, "shown"))[0, 0].tolist() for i in rollout.images]
                changes = [len(turn.text) for turn in rollout.turns if turn.images]
                assert len(shown) == own + len(changes) and not rollout.failure
                for (red, _, _), (after, _, _), change in zip(
                    shown[own:], shown[own + 1 :], changes[1:], strict=False
                ):
                    assert after == (red + change) % 256
                assert [green for _, green, _ in shown[own:]] == [n % 256 for n in changes]
    assert {1, 2} <= set(turns) and max(turns) <= 3
    assert max(metrics["episode/images_mean"].values()) > 0
    assert not [name for name in metrics if name.startswith("episode/failures")]


def test_each_token_was_drawn_from_the_weights_that_it_names(
    lived: Lived, metrics: dict[str, dict[int, float]], saved: list[Position]
) -> None:
    """Whoever drew it: a sampler that is new, was started again, or resumed."""
    two = [at for at in saved if metrics["sampler/count"][at.step] == 2]
    assert check_weights(lived.run, two) == {"sampler-0", "sampler-1"}
    assert check_weights(lived.run, [lived.saved]) == {"sampler-0"}


def check_weights(run: Path, after: Sequence[Position]) -> set[str]:
    """Tokens of a version were drawn from the weights that a checkpoint of that version holds.

    Looked up on one group of each sampler in the two steps after each of these checkpoints; also
    where the text before a token was drawn under older weights. Returns the samplers that were
    looked at.
    """
    seen: set[str] = set()
    others: list[float] = []
    for at in after:
        policy, processor = load_policy(str(checkpoint_folder(run, at.step)))
        collate = Collator(policy.eval(), processor)
        for step in (at.step + 1, at.step + 2):
            groups = {
                one.group.rollouts[0].sampler: one.group
                for one in read_scored(run, step)
                if (one.group.rollouts[0].versions == at.version).any()
            }
            for sampler, group in groups.items():
                rollouts = group.rollouts
                sequences = [
                    TrainSequence(
                        *(r.prompt_ids, r.response_ids, r.images, r.segments),
                        *(r.logprobs, 0 * r.logprobs),
                    )
                    for r in rollouts
                ]
                with torch.no_grad():
                    own = policy.run(collate(sequences))[0].numpy()
                theirs = np.concatenate([r.logprobs[r.sampled] for r in rollouts])
                drawn = np.concatenate([r.versions[r.sampled] for r in rollouts]) == at.version
                assert np.abs(own - theirs)[drawn].max() < CLOSE, (step, sampler)
                others += np.abs(own - theirs)[~drawn].tolist()
                seen.add(sampler)
    assert not others or max(others) > CLOSE, "a token of other weights has another log-prob"
    return seen
