"""What of a policy is trained, found on its structure alone: no weight is read.

So that a recipe can be refused, and its memory counted, before anything is started.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from learner.lora import Adapters
from learner.parts import freeze, parameter_groups
from learner.policy import Policy
from learner.settings import LoraConfig
from rollout.tokens import NOT_ITS_CODE, ModelError
from tasks.fetched import local


@dataclass(frozen=True)
class Trained:
    """Counts of parameters: with gradients and optimizer state, and those that adapters add."""

    trained: int
    added: int


def what_is_trained(
    path: str, frozen: Sequence[str], rates: Mapping[str, float], lora: LoraConfig | None
) -> Trained:
    """What a learner of these settings would train of the policy in a folder.

    Raises ModelError where the learner would: a part or pattern that matches nothing, nothing
    left to train, adapters that cannot be sent.
    """
    policy = _outline(path)
    total = sum(p.numel() for p in policy.model.parameters())
    if lora:
        Adapters(policy, lora, path).checkpoint_layers()
    freeze(policy, frozen)
    parameter_groups(policy, rates, learning_rate=1.0)
    parameters = list(policy.model.parameters())
    return Trained(
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        added=sum(p.numel() for p in parameters) - total,
    )


def _outline(path: str) -> Policy:
    """The policy of a folder with shapes and names in place of weights."""
    try:
        config = AutoConfig.from_pretrained(local(path), local_files_only=True, **NOT_ITS_CODE)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except (OSError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise ModelError(
            f"model.path: {path}: config.json describes no image-text-to-text model ({why})"
        ) from error
    return Policy(model)
