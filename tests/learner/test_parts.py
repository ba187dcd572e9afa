"""What is frozen and what learns at a rate of its own, by part or pattern of names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from learner.collate import Collator
from learner.parts import freeze, parameter_groups
from learner.policy import Policy, keep_no_activations, load_policy
from rollout.tokens import ModelError
from tests.support.samples import Loaded, mixed_batch


def test_freezing_leaves_the_rest_to_train(model_path: str) -> None:
    policy, _ = load_policy(model_path)
    named = dict(policy.model.named_parameters())
    freeze(policy, ("vision", "*.layers.0.*"))
    for name, parameter in named.items():
        assert parameter.requires_grad == (
            policy.family.part_of(name) != "vision" and ".layers.0." not in name
        )
    with pytest.raises(ModelError, match=r"learner\.freeze: nothing is left to train"):
        freeze(policy, ("merger", "language"))


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names(loaded: Loaded) -> None:
    policy, model = loaded[0], loaded[0].model
    some = next(n for n, _ in model.named_parameters() if n.endswith("q_proj.weight"))
    with pytest.raises(ModelError) as refused:
        freeze(policy, (some.replace("q_proj", "q_prj"),))
    assert "matches no parameter of this model" in str(refused.value)
    assert some in str(refused.value)
    with pytest.raises(ModelError, match=r"'head' matches no parameter.*part of language"):
        freeze(policy, ("head",))
    with pytest.raises(ModelError, match=r"learner\.freeze: 'visoin' matches.*vision"):
        freeze(policy, ("visoin",))
    assert all(p.requires_grad for p in model.parameters())


def test_rates_make_groups_and_the_last_match_counts(model_path: str) -> None:
    policy, _ = load_policy(model_path)
    freeze(policy, ("merger",))
    rates = {"vision": 0.1, "*.layers.1.*": 0.5, "*norm*": 2.0}
    groups = parameter_groups(policy, rates, 1e-2)
    found = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in policy.model.named_parameters():
        expected = 1.0
        for part, hit in (
            (0.1, policy.family.part_of(name) == "vision"),
            (0.5, ".layers.1." in name),
            (2.0, "norm" in name),
        ):
            expected = part if hit else expected
        if policy.family.part_of(name) == "merger":
            assert id(parameter) not in found
        else:
            assert found[id(parameter)]["multiplier"] == expected
            assert found[id(parameter)]["lr"] == pytest.approx(expected * 1e-2)
    assert len(found) == sum(len(group["params"]) for group in groups)
    with pytest.raises(ModelError, match=r"learner\.rates: 'merger' matches no trained parameter"):
        parameter_groups(policy, {"merger": 2.0}, 1e-2)


def test_without_activations_gradients_are_equal_and_less_is_kept(model_path: str) -> None:
    found: list[tuple[dict[str, torch.Tensor], int]] = []
    for option in (False, True):
        policy, processor = load_policy(model_path)
        if option:
            keep_no_activations(policy)
        policy.train()
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = Collator(policy, processor)(mixed_batch(processor).sequences)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logprobs, _ = policy.run(batch)
        logprobs.square().sum().backward()
        gradients = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
        found.append((gradients, sum(kept.values())))
    (plain, most), (again, least) = found
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-6)
    assert least < 0.6 * most


@pytest.mark.parametrize("frozen", [(), ("language",), ("vision",), ("*embed*",)])
def test_which_layers_need_a_gradient_does_not_hang_on_there_being_an_image(
    model_path: str, frozen: tuple[str, ...]
) -> None:
    """Under ZeRO-3 ranks would wait for different collectives of the backward pass."""
    policy, processor = load_policy(model_path)
    freeze(policy, frozen)
    policy.train()
    mixed = mixed_batch(processor).sequences
    blind = [s for s in mixed if not s.images]
    assert needing_a_gradient(policy, processor, blind) == needing_a_gradient(
        policy, processor, mixed
    )


def needing_a_gradient(policy: Policy, processor: Any, sequences: Any) -> set[str]:
    """The layers of a forward pass whose output is one that gradients go through."""
    found: set[str] = set()

    def note(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, out: Any) -> None:
            if isinstance(out, torch.Tensor) and out.requires_grad:
                found.add(name)

        return hook

    leaves = {n: m for n, m in policy.model.named_modules() if not list(m.children())}
    handles = [module.register_forward_hook(note(name)) for name, module in leaves.items()]
    logprobs, _ = policy.run(Collator(policy, processor)(sequences))
    for handle in handles:
        handle.remove()
    assert logprobs.requires_grad and found
    return found
