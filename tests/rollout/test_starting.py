"""What an engine is told, as vLLM itself understands it, and its end; no engine is started."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch

from rollout.settings import ModelConfig, SamplerConfig
from rollout.starting import end_with_parent, engine_args


@pytest.mark.parametrize(
    ("fields", "frozen", "head"),
    [
        ({"dtype": "bfloat16"}, False, torch.float32),
        ({"dtype": "bfloat16", "lm_head_float32": False}, False, torch.bfloat16),
        ({"dtype": "bfloat16"}, True, torch.bfloat16),
        ({}, False, torch.float32),
    ],
)
def test_the_head_is_of_the_learners_type(
    tiny_models: dict[str, Path], fields: dict[str, object], frozen: bool, head: torch.dtype
) -> None:
    model = ModelConfig.model_validate({"path": str(tiny_models["qwen3_vl"]), **fields})
    args, _ = engine_args(model, SamplerConfig(), "host", frozen, 0)
    made = args.create_model_config()
    assert made.head_dtype == head
    assert made.dtype == getattr(torch, model.dtype)
    assert made.max_model_len == model.max_model_len and made.enforce_eager
    assert (args.weight_transfer_config is None) == frozen


def core(pids: Connection) -> None:
    end_with_parent()
    pids.send(os.getpid())
    time.sleep(600)


def sampler(pids: Connection) -> None:
    multiprocessing.get_context("spawn").Process(target=core, args=[pids]).start()
    time.sleep(600)


def test_a_core_ends_with_a_sampler_that_is_killed() -> None:
    """What executors call; tests/cluster/run/test_faults.py sees it of a live engine."""
    spawn = multiprocessing.get_context("spawn")
    mine, theirs = spawn.Pipe()
    parent = spawn.Process(target=sampler, args=[theirs])
    parent.start()
    assert mine.poll(120) and parent.pid is not None
    process = psutil.Process(mine.recv())
    assert process.ppid() == parent.pid
    os.kill(parent.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs([process], timeout=60)
    for one in alive:
        one.kill()
    parent.join()
    assert not alive
