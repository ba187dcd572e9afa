"""Commands on a card, in processes of their own: the doctor, each transport, the demo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from cluster.record.mismatch import MISMATCH_LIMIT
from cluster.record.stored import read_metrics
from tests.support.ray_heads import environment
from tests.support.recipes import ROOT

SHARED = ("sampler.gpus=0.5", "learner.gpus=0.5", "sampler.gpu_memory_utilization=0.4")
APART = ("sampler.gpus=1", "learner.gpus=1")
TURNS = (
    "placement.mode=colocated",
    "sampler.gpus=0.5",
    "learner.gpus=0.5",
    "sampler.gpu_memory_utilization=0.85",
)
SECONDS = 1200


def command(*words: str) -> str:
    """What a command printed; it must end well."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def trained(recipe: str, run: Path, *sets: str) -> dict[str, list[float]]:
    """Metric -> its values in order of steps, of a run that ended well."""
    words = [word for change in sets for word in ("--set", change)]
    command("train", f"recipes/tiny/{recipe}.toml", "--output", str(run), *words)
    found: dict[str, list[float]] = {}
    for row in sorted(read_metrics(run).to_pylist(), key=lambda row: row["step"]):
        found.setdefault(row["name"], []).append(row["value"])
    return found


def test_the_doctor_finds_nothing_that_would_stop_a_run() -> None:
    print(command("doctor", "recipes/gpu/qwen3_vl_4b_sudoku.toml"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("transport", ["host", "ipc", "nccl"])
def test_what_a_learner_rank_sends_is_what_a_sampler_holds(
    transport: str, dtype: str, cards: int, tmp_path: Path
) -> None:
    """A real rank, a real sampler: after an update and a transfer both are one policy again."""
    if transport != "host" and not cards:
        pytest.skip(f"{transport} goes from GPU to GPU")
    if transport == "nccl" and cards < 2:
        pytest.skip("NCCL takes no two ranks on one GPU, and there is one")
    where = (APART if transport == "nccl" else SHARED) if cards else ()
    small = ("algorithm.steps=2", "algorithm.problems_per_step=8", "eval.problems=8")
    how = (f"transfer.transport={transport}", f"model.dtype={dtype}")
    found = trained("sudoku", tmp_path / "run", *where, *small, *how)
    gap, seconds = found["learner/logprob_gap"], found["transfer/seconds"]
    print(f"{transport} {dtype}: gaps {gap} nats, transfers {seconds} s")
    assert len(gap) == 2 and found["learner/grad_norm"][0] > 0
    assert max(gap) <= MISMATCH_LIMIT[dtype, cards > 0]


@pytest.mark.parametrize("transport", ["host", "ipc"])
def test_by_turns_each_has_nearly_all_of_the_card(
    transport: str, cards: int, tmp_path: Path
) -> None:
    """More than both could have side by side; and they are one policy after each hand-over."""
    if transport != "host" and not cards:
        pytest.skip(f"{transport} goes from GPU to GPU")
    where = TURNS if cards else TURNS[:1]
    small = ("algorithm.steps=3", "algorithm.problems_per_step=8", "eval.problems=8")
    how = (f"transfer.transport={transport}", "model.dtype=bfloat16", "checkpoint.every=2")
    found = trained("sudoku", tmp_path / "run", *where, *small, *how)
    gap, seconds = found["learner/logprob_gap"], found["turns/seconds"]
    print(f"by turns, {transport}: gaps {gap} nats, hand-overs so far {seconds} s")
    assert len(gap) == 3 and max(gap) <= MISMATCH_LIMIT["bfloat16", cards > 0]


def test_the_demo_learns_on_the_card(cards: int, tmp_path: Path) -> None:
    """`make demo`'s recipe; a policy that has learnt more than it lost says that all parts work."""
    steps = () if cards else ("algorithm.steps=1", "eval.problems=8")
    found = trained("demo", tmp_path / "run", *(SHARED if cards else ()), *steps)
    for who in ("sampler", "learner"):
        speed = median(found[f"throughput/{who}_tokens_per_second"])
        print(f"demo: {who} {speed:,.0f} tokens/s, step {median(found['time/step']):.2f} s")
    before, *_, after = found["eval/sudoku/a"]
    assert not cards or after > before
