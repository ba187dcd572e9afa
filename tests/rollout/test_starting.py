"""What an engine is told, as vLLM itself understands it; nothing is started."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rollout.settings import ModelConfig, SamplerConfig
from rollout.starting import engine_args


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
