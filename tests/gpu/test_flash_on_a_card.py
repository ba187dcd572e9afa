"""FlashAttention (torch's `varlen_attn`) against SDPA, on the card that alone has the kernel."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from learner.batch import Layout
from learner.collate import Collator
from learner.policy import load_policy
from tests.support.recipes import TINY_POLICY
from tests.support.samples import mixed_batch


def learnt(
    layout: Layout, device: torch.device, dtype: str, attention: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs, and the gradient of their sum, of one micro-batch."""
    policy, processor = load_policy(str(TINY_POLICY), dtype, attention)
    policy.to(device).train()
    batch = Collator(policy, processor, layout)(mixed_batch(processor).sequences).to(device)
    logprobs, _ = policy.run(batch)
    logprobs.sum().backward()
    found = [p.grad.flatten().float() for p in policy.parameters() if p.grad is not None]
    return logprobs.detach().float(), torch.cat(found)


@pytest.mark.parametrize("layout", get_args(Layout))
def test_flash_is_as_near_to_float32_as_sdpa_is(layout: Layout, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CPUs have no such kernel")
    exact = learnt(layout, device, "float32", "sdpa")
    errors = []
    for attention in ("sdpa", "flash"):
        found = learnt(layout, device, "bfloat16", attention)
        pairs = zip(found, exact, strict=True)
        errors.append([float((a - b).norm() / b.norm()) for a, b in pairs])
    print(f"{layout}: relative errors of log-probs and gradient, sdpa and flash: {errors}")
    for sdpa, flash in zip(*errors, strict=True):
        assert flash < 1.5 * sdpa + 1e-3
