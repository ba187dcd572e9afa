"""LoRA: adapters train as they should; what is sent and saved is the policy that was trained."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from learner.collate import Collator
from learner.lora import Adapters, AdapterWeights
from learner.policy import Policy, load_policy
from learner.settings import LoraConfig
from rollout.tokens import ModelError
from tests.support.samples import Loaded, mixed_batch

LORA = LoraConfig(rank=4, alpha=6.0, targets=("*.q_proj", "*.down_proj", "vision", "merger"))


def adapted(model_path: str, seed: int = 3) -> tuple[Policy, Any, Adapters]:
    """A policy with adapters that do something (fresh ones have B = 0)."""
    policy, processor = load_policy(model_path)
    adapters = Adapters(policy, LORA, model_path)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapters.layers:
            for matrix in adapters.matrices(layer):
                matrix.copy_(0.2 * torch.randn(matrix.shape, generator=generator))
    return policy, processor, adapters


def test_adapters_are_all_that_trains_and_begin_as_nothing(model_path: str, loaded: Loaded) -> None:
    policy, processor = load_policy(model_path)
    adapters = Adapters(policy, LORA, model_path)
    trained = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert len(trained) == 2 * len(adapters.layers)
    assert {policy.family.part_of(name) for name in adapters.layers} == {
        "language",
        "vision",
        "merger",
    }
    for layer, shape in adapters.layers.items():
        a, b = adapters.matrices(layer)
        assert (b.shape[0], a.shape[1]) == tuple(shape) and a.shape[0] == b.shape[1] == 4
    batch = Collator(policy, processor)(mixed_batch(processor).sequences)
    with torch.no_grad():
        found, expected = policy.eval().run(batch)[0], loaded[0].eval().run(batch)[0]
    assert torch.equal(found, expected)


def test_the_layer_computes_what_the_paper_says_and_so_does_the_merged_one(model_path: str) -> None:
    """Against float64 matrices made here: W + (alpha/r) B A."""
    policy, processor, adapters = adapted(model_path)
    named = dict(policy.model.named_parameters())
    merged = adapters.merged(named, (p.data for p in named.values()))
    plain = load_policy(model_path)[0]
    start = dict(plain.model.named_parameters())
    assert merged.keys() == start.keys()
    batch = Collator(policy, processor)(mixed_batch(processor).sequences)
    with torch.no_grad():
        base = plain.eval().run(batch)[0]
        with adapters.silent():
            assert torch.equal(policy.eval().run(batch)[0], base)
        for name, parameter in start.items():
            layer = name.removesuffix(".weight")
            expected = parameter.double()
            if layer in adapters.layers:
                a, b = (m.double() for m in adapters.matrices(layer))
                expected = expected + 6.0 / 4 * b @ a
                assert (merged[name] - parameter).abs().max() > 0.1
            torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-5)
            parameter.copy_(merged[name])
        found, expected = policy.eval().run(batch)[0], plain.eval().run(batch)[0]
    assert (found - base).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_only_a_and_b_travel_under_the_names_of_the_checkpoint(model_path: str) -> None:
    _, _, adapters = adapted(model_path)
    source = AdapterWeights(adapters, lambda _: nullcontext(), torch.float32)
    stored = load_file(Path(model_path) / "model.safetensors")
    sent = dict(source)
    assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sent.items()
    ]
    assert sum(t.numel() for t in sent.values()) == sum(
        4 * sum(shape) for shape in adapters.layers.values()
    )
    weights = {name.rsplit(".lora_", 1)[0] for name in sent}
    assert len(weights) == len(adapters.layers)
    for weight in weights:
        a, b = sent[f"{weight}.lora_A.weight"], sent[f"{weight}.lora_B.weight"]
        assert (b @ a).shape == stored[f"{weight}.weight"].shape


@pytest.mark.parametrize(
    ("target", "said"),
    (
        ("*.q_prj", r"'\*\.q_prj' matches no linear layer but the LM head's.*q_proj"),
        ("head", "'head' matches no linear layer"),
        ("lm_head", "'lm_head' matches no linear layer"),
        ("*.input_layernorm", "matches no linear layer"),
    ),
)
def test_targets_that_cannot_be_adapted_are_refused(
    model_path: str, target: str, said: str
) -> None:
    policy, _ = load_policy(model_path)
    with pytest.raises(ModelError, match=r"learner\.lora\.targets: .*" + said):
        Adapters(policy, LORA.model_copy(update={"targets": ("*.q_proj", target)}), model_path)
