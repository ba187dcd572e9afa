"""The policy as the learner sees it: a Hugging Face VLM that gives log-probs and entropies.

Loading goes through `AutoModelForImageTextToText`, by folder or hub name. The log-prob of a
token is that of the softmax at temperature `temperature`, as the sampler reports it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from learner.batch import Collator, MicroBatch
from rollout.tokens import ModelError, load_processor


class Policy(nn.Module):
    """Wraps a VLM so that one forward pass gives what every loss needs.

    The LM head runs in float32 whatever the body's dtype: bfloat16 logits are the main source
    of sampler-learner mismatch (2506.13585).
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0, head_float32: bool = True):
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.head_float32 = head_float32

    def forward(
        self,
        inputs: dict[str, torch.Tensor],
        rows: torch.Tensor,
        columns: torch.Tensor,
        targets: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probs [N], entropies [N]) in nats of `targets` [N] at hidden[rows, columns]."""
        model: Any = self.model
        hidden = model.model(**inputs, use_cache=False).last_hidden_state  # [B, L, hidden]
        chosen = hidden[rows, columns]  # [N, hidden]
        if self.head_float32:
            chosen = chosen.float()
        logits = model.lm_head(chosen).float()  # [N, V]
        if self.temperature != 1.0:
            logits = logits / self.temperature
        logits = torch.log_softmax(logits, dim=-1)
        logprobs = logits.gather(-1, targets[:, None]).squeeze(-1)
        entropy = -(logits.exp() * logits).sum(-1)
        return logprobs, entropy

    def run(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` on a micro-batch."""
        log: tuple[torch.Tensor, torch.Tensor] = self(
            batch.inputs, batch.rows, batch.columns, batch.tokens.ids
        )
        return log


def load_policy(
    path: str,
    dtype: str = "float32",
    attention: str = "sdpa",
    temperature: float = 1.0,
    head_float32: bool = True,
) -> tuple[Policy, Any]:
    """(policy, processor) of a checkpoint folder or hub name.

    Raises ModelError when the weights or the processor cannot be loaded.
    """
    processor = load_processor(path)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=attention
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path: {path}: could not be loaded as an image-text-to-text model "
            f"({str(error).splitlines()[0]})"
        ) from error
    if head_float32 and dtype != "float32":
        _float32_head(model.lm_head)
    return Policy(model, temperature, head_float32), processor


def make_collator(policy: Policy, processor: Any) -> Collator:
    """The collator that fits a policy's family: it passes what the model's forward accepts."""
    model: Any = policy.model
    return Collator(
        processor, list(inspect.signature(model.forward).parameters), model.config.image_token_id
    )


def _float32_head(head: nn.Module) -> None:
    """Make a (possibly tied, bfloat16) head compute in float32; its module hooks still run."""

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        weight: Any = head.weight
        return nn.functional.linear(hidden.float(), weight.float())

    head.forward = forward
