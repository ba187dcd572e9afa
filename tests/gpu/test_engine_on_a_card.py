"""An engine on a card beside the learner's policy on the same: graphs, log-probs, new weights."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cluster.record.mismatch import MISMATCH_LIMIT, ROUNDING_KL_LIMIT
from learner.policy import load_policy
from rollout.record import Group, SampleRequest, Sampling
from rollout.settings import ModelConfig, SamplerConfig
from tests.support.live_engine import TASK, Live, gaps, mixed_sizes
from tests.support.recipes import TINY_POLICY


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def live(request: pytest.FixtureRequest, device: torch.device) -> Iterator[Live]:
    """An engine with a third of the card, and policies with the rest; `perturbed` is other."""
    model = ModelConfig(path=str(TINY_POLICY), dtype=request.param, max_model_len=512)
    policy, processor = load_policy(model.path, model.dtype)
    other = copy.deepcopy(policy.model.state_dict())
    generator = torch.Generator().manual_seed(1)
    for tensor in other.values():
        if tensor.is_floating_point():
            tensor += 0.02 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    perturbed, _ = load_policy(model.path, model.dtype)
    perturbed.model.load_state_dict(other)
    gpus = 1.0 if device.type == "cuda" else 0.0
    sampler = SamplerConfig(max_num_seqs=64, gpus=gpus, gpu_memory_utilization=0.3)
    made = Live(model, policy.to(device), perturbed.to(device), processor, sampler)
    yield made
    made.close()


def told(live: Live, groups: Sequence[Group], which: str) -> np.ndarray:
    """Each token's |log-prob difference| of sampler and learner, in nats."""
    rollouts = [(g.problem, r) for g in groups for r in g.rollouts]
    inputs = [(r.prompt_ids, r.response_ids, p.images) for p, r in rollouts]
    found = gaps(live.weights[which], live.processor, inputs, [r.logprobs for _, r in rollouts])
    return np.concatenate(found)


def limit(live: Live, device: torch.device) -> float:
    return MISMATCH_LIMIT[str(live.dtype).removeprefix("torch."), device.type == "cuda"]


def test_graphs_are_captured_and_replayed_on_the_engines_own_thread(
    live: Live, device: torch.device
) -> None:
    def ask(llm: Any) -> tuple[bool, str]:
        config = llm.vllm_config
        return config.model_config.enforce_eager, config.compilation_config.cudagraph_mode.name

    asked = asyncio.run_coroutine_threadsafe(live.engine._llm.do(ask), live.loop)
    eager, mode = asked.result(60)
    assert (eager, mode == "NONE") == ((False, False) if device.type == "cuda" else (True, True))
    assert all(len(r.response_ids) for g in live.sample(mixed_sizes(2)) for r in g.rollouts)


def test_sampler_and_learner_agree_to_what_the_alarm_allows(
    live: Live, device: torch.device
) -> None:
    """And the alarm can tell: other weights are further away."""
    live.send("original", 1)
    groups = live.sample(mixed_sizes(12), n=4)
    same, other = told(live, groups, "original"), told(live, groups, "perturbed")
    k3 = np.exp(same) - 1 - same  # of |differences|: no less than the mean KL is
    print(
        f"{live.dtype} on {device}: {len(same)} tokens, mean {same.mean():.2e}, largest "
        f"{same.max():.2e} nats, k3 {k3.mean():.2e}; other weights {other.mean():.2e}"
    )
    assert same.max() <= limit(live, device) and k3.mean() <= ROUNDING_KL_LIMIT
    assert other.mean() > 10 * same.mean()


def test_weights_that_come_while_steps_are_in_flight_are_those_that_tokens_name(
    live: Live, device: torch.device
) -> None:
    """An accelerator's engine has a step in flight; the new weights come after it."""
    live.send("original", 1)
    asked = SampleRequest("g0", mixed_sizes(1)[0], 8, Sampling(max_tokens=300))
    waiting = live.call("sample", asked, TASK)
    live.send("perturbed", 2)
    group: Group = live.wait(waiting, 300)
    after = live.sample(mixed_sizes(6))
    assert all((r.versions == 2).all() for g in after for r in g.rollouts)
    assert told(live, after, "perturbed").max() <= limit(live, device)
    # A token that names the second version was drawn by it, at its own place.
    rollouts = [(group.problem, r) for r in group.rollouts]
    inputs = [(r.prompt_ids, r.response_ids, p.images) for p, r in rollouts]
    by = [
        np.concatenate(
            gaps(live.weights[w], live.processor, inputs, [r.logprobs for _, r in rollouts])
        )
        for w in ("original", "perturbed")
    ]
    second = np.concatenate([r.versions for _, r in rollouts]) == 2
    for mine, chosen in ((by[0], ~second), (by[1], second)):
        assert not chosen.any() or mine[chosen].max() <= limit(live, device)
