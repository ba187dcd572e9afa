"""The policy's log-probs are those of the plain model, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from learner.collate import Collator
from learner.policy import Policy, load_policy
from rollout.tokens import ModelError
from tests.support.plain import plain_logprobs
from tests.support.samples import Loaded, mixed_batch, sequence


def test_log_probs_are_the_plain_models_over_all_kinds_of_sequences(loaded: Loaded) -> None:
    policy, processor = loaded
    policy.eval()
    batch = mixed_batch(processor)
    with torch.no_grad():
        found, _ = policy.run(Collator(policy, processor)(batch.sequences))
        expected = torch.cat([plain_logprobs(policy, processor, s)[0] for s in batch.sequences])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


class Widest(TorchDispatchMode):
    """The most rows of any tensor as wide as the vocabulary, the head's [hidden, V] left out."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.vocabulary, self.hidden = head.weight.shape
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, torch.Tensor) and one.ndim and one.shape[-1] == self.vocabulary:
                rows = one.numel() // self.vocabulary
                self.rows = max(self.rows, 0 if rows == self.hidden else rows)
        return made


def test_logits_in_turns_are_the_same_and_never_all_there(loaded: Loaded) -> None:
    policy, processor = loaded
    micro = Collator(policy, processor)(mixed_batch(processor).sequences)
    tokens = len(micro.tokens.ids)
    head: Any = policy.model.lm_head
    vocabulary, hidden = head.weight.shape
    weights = torch.randn(2, tokens, generator=torch.Generator().manual_seed(0))
    at_a_time = 7
    assert tokens > 3 * at_a_time and tokens % at_a_time and tokens != hidden
    found: dict[float, tuple[torch.Tensor, ...]] = {}
    whole = policy.logits_mib
    try:
        for mib in (whole, (at_a_time + 0.5) * 4 * vocabulary / 2**20):
            policy.logits_mib = mib
            policy.zero_grad()
            with Widest(head) as widest:
                logprobs, entropies = policy(micro, entropy_gradient=True)
                (logprobs @ weights[0] + entropies @ weights[1]).backward()
            assert widest.rows == (tokens if mib == whole else at_a_time)
            gradients = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
            found[mib] = (logprobs.detach(), entropies.detach(), *gradients)
    finally:
        policy.logits_mib = whole
        policy.zero_grad()
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator had handed out at once while `work` ran."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    assert moves
    return int(np.cumsum([size for _, size in moves]).max())


def test_logits_in_turns_need_the_memory_of_a_turn(loaded: Loaded) -> None:
    policy, _ = loaded
    head: Any = policy.model.lm_head
    vocabulary, width = head.weight.shape
    tokens = 4000
    hidden = torch.randn(tokens, width, requires_grad=True)
    ids = torch.randint(vocabulary, (tokens,))

    def learn() -> None:
        logprobs, entropies = head(hidden, ids, True)
        (logprobs.sum() + entropies.sum()).backward()
        policy.zero_grad()
        hidden.grad = None

    table, whole = 4 * tokens * vocabulary, policy.logits_mib
    try:
        assert peak_bytes(learn) > 4 * table
        policy.logits_mib = table / 20 / 2**20
        found = peak_bytes(learn)
    finally:
        policy.logits_mib = whole
    # The gradients of the states, in all and of a turn, and of the head are there however it is
    # done; a turn has a few tables of its own.
    assert found < 2 * 4 * tokens * width + 2 * 4 * vocabulary * width + 8 * table / 20


def test_the_image_matters_and_only_to_its_own_sequence(loaded: Loaded) -> None:
    policy, processor = loaded
    policy.eval()
    a, b = sequence(processor, 0, (64, 64), 20), sequence(processor, 1, (64, 64), 20)
    collate = Collator(policy, processor)
    with torch.no_grad():
        both, _ = policy.run(collate([a, b]))
        swapped, _ = policy.run(collate([a, replace(b, images=a.images)]))
    torch.testing.assert_close(both[:20], swapped[:20], rtol=0, atol=1e-5)
    assert (both[20:] - swapped[20:]).abs().max() > 1e-4


def test_entropy_and_temperature_are_those_of_the_softmax(model_path: str, loaded: Loaded) -> None:
    policy, processor = loaded
    warm, _ = load_policy(model_path, temperature=0.7)
    s = sequence(processor, 0, (64, 64), 15)
    micro = Collator(policy, processor)([s])
    seen: list[torch.Tensor] = []
    head: Any = warm.model.lm_head
    head.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    with torch.no_grad():
        logprobs, entropy = warm.eval().run(micro)
        seen = [head(seen[0])]
    p = torch.softmax(seen[0].double() / 0.7, -1)
    chosen = p.gather(-1, micro.tokens.ids[:, None])[:, 0].log()
    torch.testing.assert_close(logprobs.double(), chosen, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(p * p.log()).sum(-1), rtol=0, atol=1e-5)


def test_entropy_has_a_gradient_only_where_it_is_asked_for(loaded: Loaded) -> None:
    policy, processor = loaded
    micro = Collator(policy, processor)([sequence(processor, 0, (64, 64), 5)])
    assert not policy(micro)[1].requires_grad
    assert policy(micro, entropy_gradient=True)[1].requires_grad


def test_without_an_image_the_tower_runs_and_counts_for_nothing(loaded: Loaded) -> None:
    policy, processor = loaded
    blind = mixed_batch(processor).sequences[2]
    policy.zero_grad()
    logprobs, _ = policy(Collator(policy, processor)([blind]))
    logprobs.sum().backward()
    silent = [n for n, p in policy.model.named_parameters() if p.grad is None]
    # The same parameters as with an image: ZeRO's collectives stay in step.
    tower = [
        p.grad for n, p in policy.model.named_parameters() if "vis" in n and p.grad is not None
    ]
    assert len(tower) > 20
    assert all(not g.any() for g in tower)
    with_image = without_gradient(policy, processor)
    assert silent == with_image
    policy.zero_grad()


def without_gradient(policy: Policy, processor: Any) -> list[str]:
    """Parameters that get no gradient from a sequence with an image."""
    policy.zero_grad()
    micro = Collator(policy, processor)([sequence(processor, 0, (64, 64), 9)])
    policy(micro)[0].sum().backward()
    return [n for n, p in policy.model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
def test_the_head_computes_in_float32_whatever_the_body(model_path: str, dtype: str) -> None:
    policy, processor = load_policy(model_path, dtype=dtype)
    micro = Collator(policy, processor)([sequence(processor, 0, (64, 64), 15)])
    seen: list[torch.Tensor] = []
    head: Any = policy.model.lm_head
    head.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    with torch.no_grad():
        policy.eval().run(micro)
        seen = [head(seen[0])]
    assert seen[0].dtype == torch.float32
    assert not torch.equal(seen[0], seen[0].bfloat16().float())


def test_a_mixed_policy_multiplies_in_bfloat16_and_learns_in_float32(model_path: str) -> None:
    of = {name: load_policy(model_path, dtype=name)[0] for name in ("float32", "mixed")}
    _, processor = load_policy(model_path)
    micro = Collator(of["mixed"], processor)([sequence(processor, 0, (64, 64), 15)])
    logprobs, slopes = {}, {}
    for name, policy in of.items():
        logprobs[name], _ = policy.eval().run(micro)
        logprobs[name].sum().backward()
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        gradients = [p.grad for p in policy.parameters() if p.grad is not None]
        slopes[name] = torch.cat([g.flatten() for g in gradients])
    gap = (logprobs["mixed"] - logprobs["float32"]).detach().abs()
    assert 1e-5 < float(gap.max()) < 0.1
    assert torch.cosine_similarity(slopes["mixed"], slopes["float32"], dim=0) > 0.99
    whole, _ = load_policy(model_path, dtype="mixed", head_float32=False)
    hidden = torch.randn(5, whole.model.lm_head.in_features)
    logits = whole.model.lm_head(hidden)
    assert logits.dtype == torch.bfloat16  # as the samplers' is then


def test_the_heads_gradient_is_rounded_once_in_however_many_turns(model_path: str) -> None:
    policy, _ = load_policy(model_path, dtype="bfloat16")
    head: Any = policy.model.lm_head
    vocabulary, width = head.weight.shape
    tokens, generator = 640, torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, width, generator=generator).bfloat16()
    ids = torch.randint(vocabulary, (tokens,), generator=generator)
    weights = torch.randn(tokens, generator=generator)
    p = torch.softmax(hidden.double() @ head.weight.double().T, -1)
    p[torch.arange(tokens), ids] -= 1
    exact = (-(weights.double()[:, None] * p).T @ hidden.double()).detach()  # [V, hidden]
    for turns in (1, 8, 64, 640):
        policy.logits_mib = (tokens / turns + 0.5) * 4 * vocabulary / 2**20
        policy.zero_grad()
        (head(hidden, ids)[0] @ weights).backward()
        # Half a unit in the last of 8 bits, and what float32 adds up to.
        bound = 2**-8 * exact.abs() + 1e-5 * exact.abs().max()
        assert float(((head.weight.grad.double() - exact).abs() / bound).max()) < 1, turns


def test_a_folder_without_weights_is_named(model_path: str, tmp_path: Path) -> None:
    for file in Path(model_path).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match=r"model\.path: .*could not be loaded"):
        load_policy(str(tmp_path))
