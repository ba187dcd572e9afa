"""Cells one after another in one process, on real parts: who stays, and that it changes nothing."""

from __future__ import annotations

import json
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from safetensors.numpy import load_file

from cluster.ablation.grid import load_ablation
from cluster.ablation.processes import arguments, program, runner_of
from cluster.record.stored import read_rollouts
from tests.support.recipes import recipe_text
from tests.support.toy_runs import marked, run_cells

BASE = """
model.max_model_len = 192
sampler = { max_tokens = 24, max_num_seqs = 64, start_timeout_seconds = 900.0 }
algorithm = { group_size = 4, problems_per_step = 4, steps = 2 }
learner = { learning_rate = 1e-3, zero_stage = 0 }
eval.problems = 4
"""
GRID = """
question = "Does it matter who was there before?"
base = "base.toml"
seeds = [1, 2]
[budget]
kind = "updates"
amount = 2
[[arms]]
name = "loud"
reward = { terms = [{ name = "tests.support.wordiness:Loud" }] }
[[arms]]
name = "louder"
reward = { terms = [{ name = "tests.support.wordiness:Loud", weight = 2.0 }] }
"""
ACTORS = ("ray::Sampler", "ray::LearnerRank")
LAST = "louder--seed-2"


@contextmanager
def actors_seen() -> Iterator[dict[str, Counter[int]]]:
    """By class, how often each process of an actor below this one was seen meanwhile."""
    seen: dict[str, Counter[int]] = {name: Counter() for name in ACTORS}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    words = process.cmdline()
                except psutil.Error:
                    continue
                for name in ACTORS:
                    seen[name][process.pid] += bool(words) and words[0].startswith(name)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def test_engines_and_learner_stay_and_a_cell_finds_what_it_finds_alone(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    (tmp_path / "base.toml").write_text(recipe_text(BASE, model=tiny_models["qwen3_vl"]))
    grid, folder = tmp_path / "grid.toml", tmp_path / "out"
    grid.write_text(GRID)
    with actors_seen() as seen:
        assert run_cells(grid, folder, runner_of("train", None)) == []
    assert [cell.id for cell in load_ablation(grid).cells][-1] == LAST
    for name, pids in seen.items():
        lasting = [pid for pid, times in pids.items() if times > 5]  # not a moment's fork of one
        assert len(lasting) == 1, name
    assert not marked(folder)

    alone = tmp_path / "alone"
    recipe = folder / "cells" / LAST / "recipe.toml"
    subprocess.run([*program("train"), *arguments(recipe, alone)], check=True, timeout=900)
    after = recipe.parent / "run"
    for step in (1, 2):
        here, there = (
            {row["rollout_id"]: row["response_ids"] for row in read_rollouts(run, step).to_pylist()}
            for run in (after, alone)
        )
        assert here.keys() == there.keys()
        # The same seeds and weights; in what company a token is sampled may change its last bit.
        assert sum(here[rollout] == there[rollout] for rollout in here) > 0.75 * len(here)
    before = [json.loads((run / "evaluation.json").read_text())["sudoku"] for run in (after, alone)]
    assert before[0]["before"] == before[1]["before"]
    weights = [load_file(run / "checkpoint" / "model.safetensors") for run in (after, alone)]
    start = load_file(tiny_models["qwen3_vl"] / "model.safetensors")
    moved = [
        np.concatenate([(held[name] - start[name]).ravel() for name in sorted(start)])
        for held in weights
    ]
    assert np.corrcoef(*moved)[0, 1] > 0.9
