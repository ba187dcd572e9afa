"""One code path, on real parts: without staleness it is the synchronous loop; with it, it overlaps.

The loop that it is compared with is written out here and uses the pool's barrier `sample`. Its
engines and learner then go on with staleness, under the same weights.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.recipe.problems import step_problems
from cluster.recipe.recipe import Recipe, load_recipe
from cluster.record.stored import read_metrics, read_rollouts
from cluster.record.terminal import Progress
from cluster.run.runtime import Run, running
from cluster.run.stream import GroupStream
from cluster.run.train import anchored, learning_rate, policy_loss, train_batches
from learner.batch import TrainBatch, TrainSequence
from rollout.record import Group, SampleRequest, Sampling
from tests.support.ray_heads import environment

ROOT = Path(__file__).resolve().parents[3]
STEPS = 5

RECIPE = f"""
name = "asynchrony"
seed = 7

[model]
path = "{ROOT}/models/tiny-qwen3-vl"
max_model_len = 256

[[tasks]]
name = "sudoku"
[tasks.knobs]
size = 4
blanks = 8
cell_size = 16
font_size = 12
margin = 0
noise = 120
contrast = 0.85
prompt = "brief"

[sampler]
max_tokens = 128
max_num_seqs = 8

[reward]
alpha = 0.5

[algorithm]
group_size = 4
problems_per_step = 6
steps = {STEPS}

[learner]
learning_rate = 2e-4
warmup_steps = 2

[eval]
problems = 2
"""


def plain_step(run: Run, step: int, version: int) -> tuple[list[Group], list[dict[str, float]]]:
    """Step `step` (from 1) of the synchronous loop: ask, wait, score, learn, send.

    Its groups, and the metrics of its update; none where no group has a gradient.
    """
    recipe = run.recipe
    problems = step_problems(run.sources, recipe.seed, step - 1, 6)
    groups = run.samplers.sample(
        [
            SampleRequest(f"step-{step}/{i}/{p.id}", p, 4, Sampling(max_tokens=128))
            for i, p in enumerate(problems)
        ]
    )
    scored, _ = run.scoring.score(groups, (step - 1) / (STEPS - 1))
    rate = learning_rate(recipe.learner, STEPS, step)
    updates = [
        run.learner.update(batch, policy_loss(recipe), rate)
        for batch in train_batches(recipe.algorithm, scored)
    ]
    run.send_weights(version + len(updates))
    return groups, updates


def gaps_by_lag(run: Run, groups: list[Group], version: int) -> dict[int, np.ndarray]:
    """|sampler's log-prob - learner's now| of every token, by the versions it is behind."""
    rollouts = [(r, g.problem.image) for g in groups for r in g.rollouts]
    batch = TrainBatch(
        tuple(
            TrainSequence(r.prompt_ids, r.response_ids, image, r.segments, r.logprobs, r.logprobs)
            for r, image in rollouts
        )
    )
    found = run.learner.logprobs(batch)
    gaps = np.concatenate(
        [np.abs(now - r.logprobs) for now, (r, _) in zip(found, rollouts, strict=True)]
    )
    lags = np.concatenate([version - r.versions for r, _ in rollouts])
    return {int(lag): gaps[lags == lag] for lag in np.unique(lags)}


def overlapped(run: Run, recipe: Recipe, steps_done: int, version: int, steps: int) -> list[str]:
    """Some steps with staleness 1; checks what each token says of its version.

    In the second half the learner goes on while samplers read its weights.
    """
    stream = GroupStream(recipe, lambda: run.sources, run.samplers, steps_done)
    used, mixed, lags = [], 0, set()
    for place in range(steps):
        groups = stream.take(version)
        used += [g.group_id for g in groups]
        mixed += sum(len(set(r.versions.tolist())) > 1 for g in groups for r in g.rollouts)
        by_lag = gaps_by_lag(run, groups, version)
        lags |= set(by_lag)
        # A token of the learner's version has the learner's own log-prob, also where the text
        # before it was sampled under older weights; an older token has another.
        if 0 in by_lag:
            assert by_lag[0].max() < 1e-3
        if 1 in by_lag:
            assert by_lag[1].max() > 3e-3
        scored, _ = run.scoring.score(groups, 0.0)
        batches = train_batches(recipe.algorithm, scored)
        for batch in anchored(recipe.algorithm, batches, run.learner):
            metrics = run.learner.update(batch, policy_loss(recipe), 2e-4)
            assert np.isfinite(metrics["loss"]) and metrics["logprob_gap"] > 0
            version += 1
        stream.renew(run.send_weights if place < steps // 2 else run.renew_weights, version)
    assert lags == {0, 1}
    assert mixed > 0, "no rollout was in flight when weights came"
    stream.end()
    return used


def test_one_path_with_and_without_staleness(tmp_path: Path) -> None:
    path, out = tmp_path / "recipe.toml", tmp_path / "run"
    path.write_text(RECIPE)
    command = [sys.executable, "-m", "cluster", "train", str(path), "--output", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    logged = {(r["step"], r["name"]): r["value"] for r in read_metrics(out).to_pylist()}

    recipe = load_recipe(path)
    with running(recipe, None, tmp_path / "plain", Progress(STEPS)) as run:
        run.send_weights(0)
        version = 0
        for step in range(1, STEPS + 1):
            groups, updates = plain_step(run, step, version)
            rows = read_rollouts(out, step).to_pylist()
            rollouts = [r for g in groups for r in g.rollouts]
            assert [r["rollout_id"] for r in rows] == [r.rollout_id for r in rollouts]
            assert [r["response_ids"] for r in rows] == [r.response_ids.tolist() for r in rollouts]
            assert {v for r in rows for v in r["versions"]} == {version}
            version += len(updates)
            assert logged[step, "policy/version"] == version
            for metrics in updates:
                for name in ("loss", "grad_norm", "kl", "entropy/perception", "nll/answer"):
                    expected = pytest.approx(metrics[name], rel=2e-3, abs=2e-5)
                    assert logged[step, f"learner/{name}"] == expected, (step, name)
            for name in ("policy/lag_max", "policy/mixed", "buffer/in_flight", "buffer/waiting"):
                assert logged[step, name] == 0
        assert version >= STEPS - 1, "steps without a gradient compare nothing"

        ahead = ["algorithm.max_staleness=1", "algorithm.steps=20", "transfer.overlap=true"]
        run.recipe = stale = load_recipe(path, ahead)
        assert stale.algorithm.correction.kind == "token_tis"
        used = overlapped(run, stale, STEPS, version, steps=6)
        asked = [
            f"step-{step + 1}/{i}/{p.id}"
            for step in range(STEPS, STEPS + 6)
            for i, p in enumerate(step_problems(run.sources, recipe.seed, step, 6))
        ]
        assert used == asked
