"""One run on real parts, Ray, vLLM and DeepSpeed, from its first step to its report.

One file, as engines are slow to start and one run shows it all. InternVL trains on two ZeRO-3
ranks; its engine is killed and may not start again, which ends the run; its last checkpoint is
torn; and it goes on as a job of a Ray head on loopback, by turns as on a GPU that sampler and
learner share, until its budget of tokens is spent. The job's driver is killed while its engine
starts.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from cluster.recipe.problems import open_sources, step_problems
from cluster.recipe.recipe import load_recipe
from cluster.record.events import read_events
from cluster.record.stored import read_metrics, read_rollouts
from cluster.run.checkpoints import newest
from cluster.run.stream import free_requests
from learner.checkpoint import checkpoint_folder, checkpoint_folders
from tests.support.live_driver import Driver
from tests.support.ray_heads import RAY, environment, ray_head
from tests.support.recipes import GRAPH, ROOT, SUDOKU, recipe_text
from tests.support.submitter import PLANTED, WANTED, Said
from tests.support.submitter import submitted as at_the_head
from tests.support.terminal import Equipoise

KEY = "planted-71c04e"
PLACES, SIZE, TOKENS, EVERY, KILLED_AT = 4, 4, 24, 2, 5
BUDGET = 9 * PLACES * SIZE * TOKENS
"""Response tokens; a policy with random weights hardly ends one early."""
RECIPE = f"""
seed = 3
model.max_model_len = 192

[sampler]
max_tokens = {TOKENS}
max_num_seqs = 64
max_restarts = 0
start_timeout_seconds = 900.0  # a machine may have other work

[reward]
terms = [
    {{ name = "outcome", weight = 0.5 }},
    {{ name = "perception", weight = 0.5 }},
    {{ name = "tests.support.wordiness:Loud", weight = 0.1 }},
    {{ name = "group_agreement", weight = 0.1, segments = ["perception"] }},
    {{ name = "blind_solver", weight = 0.0, gate = "perception" }},
    {{ name = "blind_policy", weight = 0.1, args = {{ max_tokens = 8 }} }},
    {{ name = "image_dependence", weight = 0.1, final_weight = 0.0, schedule = "linear" }},
    {{ name = "blind_questions", weight = 0.0, args = {{ place = "prefix", max_tokens = 8 }} }},
    {{ name = "view_agreement", weight = 0.0, args = {{ readings = 2, max_tokens = 8 }} }},
]

[algorithm]
group_size = {SIZE}
problems_per_step = {PLACES}
steps = 1000
budget = {{ kind = "tokens", amount = {BUDGET} }}

[learner]
learning_rate = 1e-3
warmup_steps = 6
ranks = 2
cpus = 0.5  # so that a sampler and two ranks fit on the smallest machine
zero_stage = 3

[transfer]
deadline_seconds = 600.0

[eval]
problems = 4

[checkpoint]
every = {EVERY}
keep = 1000
"""


@dataclass(frozen=True)
class Lived:
    """What the run left in its folder after its first life, `before`, and after its second.

    Attributes:
        model: what it started from; code: how its first life ended.
        torn: a file of its last checkpoint, cut short between the two.
        submitted: what a user of `equipoise submit` was told at the head of its second life.
        printed: in its first life, and in its second.
    """

    model: Path
    before: Path
    run: Path
    code: int
    torn: Path
    submitted: Said
    printed: tuple[str, str]


@pytest.fixture(scope="module")
def lived(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Lived:
    folder, model = tmp_path_factory.mktemp("lived"), tiny_models["internvl"]
    text = recipe_text(RECIPE, model=model, tasks=f"{SUDOKU}, {GRAPH}")
    driver = Driver(folder, text, HF_TOKEN=KEY)
    try:
        driver.wait("a step beyond a checkpoint", lambda: driver.steps() >= KILLED_AT, pause=0.05)
        (sampler,) = driver.samplers()
        sampler.kill()
        # Far below every time-out of the recipe: the death is seen, not waited for.
        code = driver.process.wait(120)
    finally:
        driver.clean_up()
    torn = driver.keep_and_tear()
    with ray_head(folder / "head.log", HF_TOKEN=KEY) as address:
        submitted = at_the_head(address, folder / "elsewhere")
        command = [RAY, "job", "submit", "--address", address, "--working-dir", str(ROOT), "--"]
        command += [sys.executable, "-m", "cluster", "train", "--resume", str(driver.run)]
        command += ["--set", "checkpoint.background=true"]
        command += ["--set", "placement.mode=colocated"]
        command += ["--set", "checkpoint.restarts=1"]
        with (folder / "job.log").open("w") as log:
            job = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
        try:
            kill_driver_of(job, driver.run, driver.before)
            job.wait(1200)
        finally:
            job.kill()
    said = (folder / "job.log").read_text()
    assert job.returncode == 0, said[-6000:]
    printed = (driver.printed(), said)
    return Lived(model, driver.before, driver.run, code, torn, submitted, printed)


def kill_driver_of(job: subprocess.Popen[bytes], run: Path, before: Path) -> None:
    """Once its sampler starts, of a job that goes on with a run; its supervisor is above it."""
    log, old = (folder / "logs" / "sampler-0.log" for folder in (run, before))
    until = time.monotonic() + 600
    while log.stat().st_size == old.stat().st_size:
        assert job.poll() is None and time.monotonic() < until
        time.sleep(0.2)
    lines = [(process, words(process)) for process in psutil.process_iter()]
    of_run = [p for p, line in lines if f"cluster train --resume {run}" in line]
    below = [p for p in of_run if p.pid != job.pid and p.pid not in {q.ppid() for q in of_run}]
    (driver,) = below
    driver.kill()


def words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return ""


def metrics_of(run: Path) -> dict[tuple[int, str], float]:
    return {(row["step"], row["name"]): row["value"] for row in read_metrics(run).to_pylist()}


@pytest.fixture(scope="module")
def metrics(lived: Lived) -> dict[tuple[int, str], float]:
    """(step, name) -> value, of the finished run."""
    return metrics_of(lived.run)


@pytest.fixture(scope="module")
def steps(metrics: dict[tuple[int, str], float]) -> range:
    """All steps of the finished run."""
    return range(1, max(step for step, _ in metrics) + 1)


def test_a_killed_sampler_that_may_not_start_again_ends_the_run_with_its_own_error(
    lived: Lived,
) -> None:
    assert lived.code == 1
    # Seen by the next request, or by the weight transfer where that came first.
    assert "the run failed: " in lived.printed[0]
    first = (lived.before / "error.txt").read_text().splitlines()[0]
    assert "SamplerLost: sampler 'sampler-0' failed 1 times" in first
    assert "sampler-0: ActorDiedError: " in first
    # What was finished before is there to debug with.
    assert read_metrics(lived.before).num_rows > 0


def test_random_weights_write_no_tags_which_is_said_before_the_first_step(lived: Lived) -> None:
    for task in ("sudoku", "graph_coloring"):
        lines = lived.printed[0].splitlines()
        (said,) = [line for line in lines if line.startswith(f"warning: {task}: ")]
        assert " of 4 responses, and no answer is right; " in said


def test_it_goes_on_as_if_it_had_not_ended(
    lived: Lived, metrics: dict[tuple[int, str], float]
) -> None:
    """From the checkpoint before the torn one, so that steps come again."""
    last = int(lived.torn.parents[1].name[5:])
    assert f"checkpoint refused: {lived.torn}: has" in lived.printed[1]
    assert f"going on after step {last - EVERY}" in lived.printed[1]
    old = metrics_of(lived.before)
    done = max(step for step, _ in old)
    assert done >= KILLED_AT
    timed = ("time/", "throughput/", "idle/", "transfer/", "eval/")
    compared = {
        key
        for key in old
        if key[0] > last - EVERY and not key[1].startswith(timed) and "seconds" not in key[1]
    }
    assert len({name for _, name in compared if name.startswith("learner/")}) > 5
    for key in compared:
        assert metrics[key] == pytest.approx(old[key], rel=2e-3, abs=2e-5), key
    for step in range(1, done + 1):
        first, again = (read_rollouts(f, step).to_pylist() for f in (lived.before, lived.run))
        for one, other in zip(first, again, strict=True):
            for name in ("rollout_id", "problem_id", "response_ids", "versions"):
                assert one[name] == other[name], (step, name)
            assert one["total"] == pytest.approx(other["total"], rel=1e-3, abs=1e-5)
            gap = np.abs(np.subtract(one["logprobs"], other["logprobs"])).max()
            assert gap < 1e-4


def test_a_job_whose_driver_dies_is_the_same_job_and_goes_on(lived: Lived) -> None:
    """That nothing of the run is lost by it is what the other tests say."""
    events = read_events(lived.run)[len(read_events(lived.before)) :]
    assert [(event.who, event.what) for event in events] == [
        *[("driver", "died"), ("supervisor", "restart")],
        *[("driver", "went on"), ("driver", "ended")],
    ]
    assert events[1].why == "killed by SIGKILL" and (events[2].recovered_seconds or 0) > 0
    assert lived.printed[1].count("supervisor: restart 1 of 1, from the last checkpoint: ") == 1


@pytest.mark.parametrize("life", [0, 1])
def test_what_each_process_printed_is_in_the_file_of_its_role(lived: Lived, life: int) -> None:
    """Of the Ray that the run started, and of a head that it was sent to."""
    folder = (lived.before, lived.run)[life] / "logs"
    logs = {file.stem: file.read_text() for file in folder.iterdir()}
    if life:  # what was there before is still
        before = {file.stem: file.read_text() for file in (lived.before / "logs").iterdir()}
        assert all(logs[role].startswith(text) for role, text in before.items())
        logs = {role: text.removeprefix(before.get(role, "")) for role, text in logs.items()}
        logs = {role: text for role, text in logs.items() if text}
        assert "going on after step " in logs["driver"]
    assert {"driver", "sampler-0", "learner-0", "learner-1", "reward-worker-0"} <= logs.keys()
    assert all(text.startswith("== ") for text in logs.values())
    assert "vLLM" in logs["sampler-0"] and "step" in logs["driver"]
    # What was said there cannot steer a terminal, and holds no key.
    said = logs["reward-worker-0"].splitlines()
    assert [line for line in said if line.startswith("\\x1b]0;")]
    assert [line for line in said if line.endswith("\\x07 <HF_TOKEN>")]
    for text in logs.values():
        assert KEY not in text
        assert all(c.isprintable() for line in text.split("\n") for c in line)


def test_its_second_life_went_by_turns(metrics: dict[tuple[int, str], float], steps: range) -> None:
    """And drew and learnt what the first did, which went beside each other (above)."""
    name = "turns/count"
    counts = {step: metrics[step, name] for step in steps if (step, name) in metrics}
    assert steps[-1] in counts and len(counts) > 2
    for step in sorted(counts)[1:]:
        # To the learner and back, once more for a checkpoint after the step before.
        assert counts[step] - counts[step - 1] == (4 if (step - 1) % EVERY == 0 else 2), step
    apart = range(1, min(counts))
    assert apart and not any((step, name) in metrics for step in apart)


def test_it_ends_when_its_budget_is_spent(
    lived: Lived, metrics: dict[tuple[int, str], float], steps: range
) -> None:
    *_, before, last = (metrics[step, "spent/tokens"] for step in steps)
    assert before < BUDGET <= last and len(steps) > KILLED_AT
    stored = newest(lived.run)
    assert not stored.refused and stored.position.step == steps[-1]
    due = {*range(EVERY, len(steps) + 1, EVERY), steps[-1]}
    folders = checkpoint_folders(lived.run)
    assert folders == [checkpoint_folder(lived.run, step) for step in sorted(due)]


def test_each_step_samples_the_groups_of_its_own_under_the_weights_of_the_last(
    lived: Lived, metrics: dict[tuple[int, str], float], steps: range
) -> None:
    recipe = load_recipe(lived.run / "recipe.toml")
    sources = open_sources(recipe.tasks)
    seen: set[str] = set()
    for step in steps:
        rows = read_rollouts(lived.run, step).to_pylist()
        problems = step_problems(sources, recipe.seed, step - 1, PLACES)
        asked = [request.group_id for request in free_requests(recipe, step, problems)]
        assert [row["rollout_id"] for row in rows] == [f"{g}/{i}" for g in asked for i in range(4)]
        assert not seen & set(asked)
        seen |= set(asked)
        # Without staleness, nothing is started before the weights that it is learnt with are there.
        assert {v for row in rows for v in row["versions"]} == {step - 1}
        for name in ("policy/lag_max", "policy/mixed", "buffer/in_flight", "buffer/waiting"):
            assert metrics[step, name] == 0
        assert metrics[step, "policy/version"] == step
        shas = {sha for row in rows for sha in row["image_sha256"]}
        assert shas and all((lived.run / "images" / f"{sha}.png").exists() for sha in shas)


def test_sampler_and_learner_are_one_policy_and_each_term_gives_its_number(
    metrics: dict[tuple[int, str], float], steps: range
) -> None:
    for step in steps:
        assert metrics[step, "learner/ratio_gap"] < 1e-4
        assert metrics[step, "learner/logprob_gap"] < 1e-4
        assert metrics[step, "learner/clip_fraction"] == 0
        assert metrics[step, "learner/grad_norm"] > 0
        assert metrics[step, "reward/wordiness/std"] > 0
        assert metrics[step, "transfer/bytes"] > 1e6
        for term in (
            *("blind_policy", "image_dependence", "blind_solver", "group_agreement"),
            *("blind_questions", "view_agreement"),
        ):
            assert metrics[step, f"reward/{term}/failures"] == 0
            assert metrics[step, f"reward/{term}/mean"] >= 0
    for name in ("acc/a", "acc/a_p", "group/zero_variance", "idle/sampler", "time/step"):
        assert (1, name) in metrics


def test_the_policy_learnt_is_left_with_its_evaluation_and_its_report(
    lived: Lived, metrics: dict[tuple[int, str], float], steps: range
) -> None:
    trained = load_file(lived.run / "checkpoint" / "model.safetensors")
    start = load_file(lived.model / "model.safetensors")
    assert trained.keys() == start.keys()
    changed = [name for name in start if not np.array_equal(start[name], trained[name])]
    assert len(changed) > 0.9 * len(start)
    assert (lived.run / "checkpoint" / "chat_template.jinja").exists()
    assert "Content-Security-Policy" in (lived.run / "report.html").read_text()
    evaluation = json.loads((lived.run / "evaluation.json").read_text())
    assert set(evaluation) == {"sudoku", "graph_coloring", "all tasks"}
    assert {row["n"] for row in evaluation["all tasks"]["after"]["rows"]} == {8}
    for table in evaluation.values():
        assert {"a", "a_p", "a_r"} <= {row["metric"] for row in table["after"]["rows"]}
    # Measured before the first step, in a life that is over, and after the last.
    for when, step in (("before", 0), ("after", steps[-1])):
        for row in evaluation["sudoku"][when]["rows"]:
            assert row["value"] == metrics[step, f"eval/sudoku/{row['metric']}"]


def test_the_learner_alone_makes_the_updates_of_a_run_again(
    lived: Lived,
    metrics: dict[tuple[int, str], float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    equipoise: Equipoise,
) -> None:
    replay = tmp_path / "replay"
    monkeypatch.chdir(ROOT)
    words = ("train", "--replay", lived.run, "--output", replay)
    assert equipoise(*words, "--set", f"algorithm.steps={EVERY}").code == 0
    again = metrics_of(replay)
    for step in range(1, EVERY + 1):
        for name in ("loss", "grad_norm", "entropy/other", "mismatch/k3", "lr"):
            same = pytest.approx(metrics[step, f"learner/{name}"], rel=1e-4, abs=1e-6)
            assert again[step, f"learner/{name}"] == same, (step, name)
    folders = (checkpoint_folder(lived.run, EVERY), replay / "checkpoint")
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    for name, tensor in before.items():
        assert np.abs(after[name] - tensor).mean() < 1e-5, name


def test_the_samplers_alone_draw_what_a_run_drew_under_the_same_weights(
    lived: Lived, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equipoise: Equipoise
) -> None:
    """A checkpoint holds the weights of the step after it, and of no other."""
    sampled = tmp_path / "sampled"
    monkeypatch.chdir(ROOT)
    words = ("sample", checkpoint_folder(lived.run, EVERY), "--output", sampled)
    assert equipoise(*words, "--steps", EVERY + 1).code == 0
    for step in range(1, EVERY + 2):
        asked, again = (read_rollouts(f, step).to_pylist() for f in (lived.run, sampled))
        for name in ("rollout_id", "problem_id"):
            assert [r[name] for r in again] == [r[name] for r in asked]
        same = [r["response_ids"] for r in again] == [r["response_ids"] for r in asked]
        assert same == (step == EVERY + 1), step
        assert {t["name"] for r in again for t in r["terms"]} == {
            t["name"] for r in asked for t in r["terms"]
        }


def test_a_job_is_submitted_from_any_folder_and_takes_along_what_was_chosen(lived: Lived) -> None:
    code, log = lived.submitted["logs"]
    assert lived.submitted["submit"][0] == code == 0
    words = "words: -m cluster train x.toml --output "
    assert words in log
    for place in ("./mine.py", "./cluster/__main__.py", "./rollout/engine.py", "the small data"):
        assert f"{place}\n" in log
    assert f"\nWANTED={WANTED}\n" in log and "RAY_JOB_STOP_WAIT_TIME_S=600" in log
    assert PLANTED not in "".join(said for _, said in lived.submitted.values())
    # What is printed cannot steer the terminal.
    assert "training \\x1b[31m" in log and "\x1b" not in log
    # The program itself, as it travelled; its refusal is the job's.
    code, log = lived.submitted["real"]
    assert code == 1 and "code that travelled: True" in log
    assert ": FAILED: " in log.splitlines()[-1]


def test_a_job_is_found_stopped_and_gone_on_with_by_its_name(lived: Lived) -> None:
    told = lived.submitted
    assert "job  RUNNING  train x.toml  " in told["jobs"][1]
    code, status = told["status"]
    assert code == 0 and status.startswith("job  RUNNING  train x.toml  ")
    assert re.search(r"\bstep +3 of \d+", status) and "INFO" not in status
    assert len(told["over"][1].splitlines()) == 2, "who asked is no job"
    assert told["busy"] == (2, "job: is RUNNING; stop it first: equipoise stop job\n")
    assert told["unknown"][0] == 2 and "no such job at " in told["unknown"][1]
    assert told["unknown"][1].endswith("; did you mean job?\n")
    assert told["stop"][0] == 0 and told["stop"][1].endswith("\njob: STOPPED\n")
    assert "checkpoint written" in told["logs"][1]
    code, again = told["resume"]
    assert code == 0 and again.endswith("job job.2: SUCCEEDED\n")
    assert "words: -m cluster train --resume " in again
    assert "--set algorithm.steps=9\n" in again and "going on\n" in again
    assert "job  SUCCEEDED  train x.toml (life 2)  " in told["over"][1]


def test_a_head_that_wants_a_token_refuses_who_has_none_in_one_line(lived: Lived) -> None:
    code, line = lived.submitted["no token"]
    assert code == 2 and len(line.splitlines()) == 1
    assert "asks for the cluster's token" in line and "set RAY_AUTH_MODE=token and" in line
