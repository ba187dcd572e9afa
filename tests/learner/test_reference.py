"""The policy before training: its log-probs in every layout, whatever the trained one became."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from learner.batch import Layout
from learner.collate import Collator
from learner.policy import load_policy
from learner.reference import Reference
from tests.support.plain import plain_logprobs
from tests.support.ranks import setup
from tests.support.samples import mixed_batch


@pytest.mark.parametrize("layout", get_args(Layout))
def test_it_reads_a_micro_batch_as_the_plain_model_reads_each_sequence(
    model_path: str, layout: Layout
) -> None:
    policy, processor = load_policy(model_path)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    batch = mixed_batch(processor)
    reference = Reference(setup(model_path, layout=layout), None, torch.device("cpu"))
    micro = Collator(policy, processor, layout)(batch.sequences)
    found = reference.logprobs(policy, micro)
    plain, _ = load_policy(model_path)
    with torch.no_grad():
        expected = torch.cat([plain_logprobs(plain, processor, s)[0] for s in batch.sequences])
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=1e-4)
    assert (policy.run(micro)[0] - found).abs().max() > 0.1 and not found.requires_grad
