"""The policy loss against TRL's own code, where TRL has the same variant.

TRL's trainer is not started: its loss is called on ready log-probs, without a model. Its advantages
are no twins of ours: it divides by the sample standard deviation plus 1e-4.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.learner.test_correction import BOUNDS, correction, stale
from tests.support.equations import (
    CLIP,
    LENGTHS,
    MAX_TOKENS,
    SPANS,
    Draw,
    draw,
    loss_of,
    total,
)

SAME: dict[str, tuple[str, str, str, str]] = {
    "GRPO": ("clip", "sequence_mean", "grpo", "token"),
    "DAPO": ("clip", "token_mean", "dapo", "token"),
    "Dr. GRPO": ("clip", "constant", "dr_grpo", "token"),
    "CISPO": ("cispo", "token_mean", "cispo", "token"),
    "GSPO": ("gspo", "sequence_mean", "grpo", "sequence"),
}


AS_TRL: dict[str, Any] = {"cispo": {"clip_low": 1.0}}
"""TRL clips the weight from above only."""


@cache
def trainer_class() -> Any:
    """TRL's, as where vLLM is not installed: its loss needs none, and to import it takes long."""
    asked = importlib.import_module("trl.import_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asked, "is_vllm_available", lambda *a, **k: False)
        from trl.trainer.grpo_trainer import GRPOTrainer

    return GRPOTrainer


def padded(flat: torch.Tensor) -> torch.Tensor:
    """[sequences, longest] of [N], zeros behind each sequence."""
    rows = [flat[span.start : span.stop] for span in SPANS]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


SAME_CORRECTION: dict[str, str] = {
    "token_tis": "token_truncate",
    "sequence_tis": "sequence_truncate",
    "token_mask": "token_mask",
    "icepop": "token_mask",
    "sequence_mask": "sequence_mask",
}
"""Ours and TRL's `vllm_importance_sampling_mode`. Those lines of TRL stand in the middle of its
generation, where no test can call them: they are repeated in `trl_weights`."""


def trl_weights(drawn: Draw, mode: str, low: float, high: float) -> torch.Tensor:
    """[sequences, longest or 1], as TRL's `_generate_and_score_completions` makes them."""
    assert drawn.tokens.old_logprobs is not None
    gap = padded(drawn.tokens.old_logprobs) - padded(drawn.tokens.sampler_logprobs)
    ratio = torch.exp(gap.sum(dim=-1, keepdim=True) if mode.startswith("sequence") else gap)
    if mode.endswith("truncate"):
        return torch.clamp(ratio, max=high)
    return ratio.masked_fill((ratio < low) | (ratio > high), value=0.0)


def trl_loss(
    drawn: Draw,
    x: torch.Tensor,
    objective: str,
    loss_type: str,
    level: str,
    weights: torch.Tensor | None = None,
    beta: float = 0.0,
) -> torch.Tensor:
    low, high = CLIP[objective]
    assert drawn.tokens.reference_logprobs is not None
    mask = padded(torch.ones(len(x), dtype=torch.long))
    drawn_by = drawn.tokens.sampler_logprobs if weights is None else drawn.tokens.old_logprobs
    assert drawn_by is not None
    logprobs, old = padded(x), padded(drawn_by)
    entropies = torch.zeros_like(logprobs)
    trainer: Any = object.__new__(trainer_class())
    vars(trainer).update(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, entropies, None),
        args=SimpleNamespace(
            delta=None, use_bias_correction_kl=False, steps_per_generation=1,
            gradient_accumulation_steps=1, use_adaptive_entropy=False,
        ),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda value: value, gather_for_metrics=lambda value: value,
            reduce=lambda value, *a, **k: value,
        ),
        _metrics={"train": defaultdict(list)},
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level=level, beta=beta, loss_type=loss_type,
        epsilon_low=low, epsilon_high=1 + high if objective == "cispo" else high,
        use_vllm=weights is not None, vllm_importance_sampling_correction=weights is not None,
        current_gradient_accumulation_steps=1, max_completion_length=MAX_TOKENS,
        _entropy_bonus_enabled=False, use_adaptive_entropy=False, entropy_coef=0.0,
    )  # fmt: skip
    advantages = torch.stack([drawn.tokens.advantages[span.start] for span in SPANS])
    return trainer._compute_loss(
        None,
        {
            "prompt_ids": torch.zeros(len(LENGTHS), 1, dtype=torch.long),
            "prompt_mask": torch.ones(len(LENGTHS), 1, dtype=torch.long),
            "completion_ids": mask,
            "completion_mask": mask,
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": padded(drawn.tokens.reference_logprobs),
            "importance_sampling_ratio": weights,
            "num_items_in_batch": mask.sum(),
        },
    )


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("name", SAME)
def test_losses_and_gradients_are_those_of_trl(name: str, beta: float) -> None:
    objective, aggregation, loss_type, level = SAME[name]
    for seed in range(4):
        drawn = draw(seed, one_advantage=True)
        ours = torch.from_numpy(drawn.logprobs).requires_grad_()
        theirs = torch.from_numpy(drawn.logprobs).requires_grad_()
        how = {"reference_kl_weight": beta} | AS_TRL.get(objective, {})
        loss = loss_of(objective, aggregation=aggregation, **how)
        value = total(loss, ours, torch.from_numpy(drawn.entropy), drawn)
        expected = trl_loss(drawn, theirs, objective, loss_type, level, beta=beta)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
        value.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("kind", SAME_CORRECTION)
def test_corrected_losses_and_gradients_are_those_of_trl(kind: str, name: str) -> None:
    objective, aggregation, loss_type, level = SAME[name]
    drawn = stale(list(SAME).index(name), one_advantage=True)
    weights = trl_weights(drawn, SAME_CORRECTION[kind], *BOUNDS[kind])
    ours = torch.from_numpy(drawn.logprobs).requires_grad_()
    theirs = torch.from_numpy(drawn.logprobs).requires_grad_()
    how = {"correction": correction(kind)} | AS_TRL.get(objective, {})
    loss = loss_of(objective, aggregation=aggregation, **how)
    value = total(loss, ours, torch.from_numpy(drawn.entropy), drawn)
    expected = trl_loss(drawn, theirs, objective, loss_type, level, weights)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    value.backward()
    expected.backward()
    if objective == "gspo" and not kind.startswith("sequence"):
        return  # a token's weight goes with its own gradient in our token form, theirs averages
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
