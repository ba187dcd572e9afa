"""Policies whose weights are all in play.

A fresh one has zero biases and unit norms, behind which a swapped or lost tensor hides.
"""

from __future__ import annotations

from pathlib import Path

import torch

from learner.policy import Policy, load_policy


def shake(policy: Policy, seed: int, by: float = 0.02) -> None:
    """Add noise to every weight that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=generator)


def shaken(folder: Path, out: Path, seed: int) -> Path:
    """A policy's folder again, shaken."""
    policy, processor = load_policy(str(folder))
    shake(policy, seed)
    policy.model.save_pretrained(out)  # type: ignore[operator]
    processor.save_pretrained(out)
    return out
