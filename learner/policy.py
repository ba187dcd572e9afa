"""The policy as the learner sees it: a Hugging Face VLM that gives log-probs and entropies.

Loading goes through `AutoModelForImageTextToText`, by folder or hub name. The log-prob of a
token is that of the softmax at temperature `temperature`, as the sampler reports it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText

from learner.batch import Collator, MicroBatch, Vision
from rollout.tokens import ModelError, load_processor

LOGITS_MIB = 256.0
"""Of one table of logits; a few of the same size live beside it."""


class Policy(nn.Module):
    """Wraps a VLM so that one forward pass gives what every loss needs.

    The LM head runs in float32 whatever the body's dtype: bfloat16 logits are the main source
    of sampler-learner mismatch (2506.13585). It runs on as many tokens at a time as keep their
    [tokens, vocabulary] logits within `logits_mib`; with more tokens than that no logits are kept
    for the backward pass, which makes them again.
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 1.0,
        head_float32: bool = True,
        logits_mib: float = LOGITS_MIB,
    ):
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.head_float32 = head_float32
        self.logits_mib = logits_mib
        _read_in_turns(model.lm_head, self)

    def forward(
        self, batch: MicroBatch, entropy_gradient: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probs [N], entropies [N]) in nats of a micro-batch's response tokens.

        Entropies carry a gradient only if asked to: it keeps another table of logits alive.
        """
        model: Any = self.model
        features = model.model.get_image_features(**batch.vision.inputs, return_dict=True)
        inputs: dict[str, Any] = dict(batch.inputs)
        if len(batch.vision.images):
            inputs["mm_encoder_outputs"] = {"image": _use(features, batch.vision)}
        hidden = model.model(**inputs, use_cache=False).last_hidden_state  # [B, L, hidden]
        chosen = hidden[batch.rows, batch.columns]  # [N, hidden]
        if not len(batch.vision.images):
            chosen = chosen + 0.0 * _total(features)
        # One call of the head however many turns it takes: under ZeRO-3 a call is a collective, and
        # ranks have other numbers of tokens.
        found: tuple[torch.Tensor, torch.Tensor] = model.lm_head(
            chosen, batch.tokens.ids, entropy_gradient
        )
        return found

    def run(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, typed."""
        found: tuple[torch.Tensor, torch.Tensor] = self(batch)
        return found


def _read_in_turns(head: Any, policy: Policy) -> None:
    """Make `head(hidden [N, hidden], ids [N], entropy_gradient)` give log-probs and entropies [N].

    `head(hidden)` still gives logits. Its module hooks, which gather its weight under ZeRO-3, run
    once around all turns.
    """
    logits_of = head.forward

    def read_off(
        hidden: torch.Tensor, ids: torch.Tensor, entropy_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden.float() if policy.head_float32 else hidden
        logits = logits_of(hidden).float()  # [n, V]
        if policy.temperature != 1.0:
            logits = logits / policy.temperature
        logits = torch.log_softmax(logits, dim=-1)
        logprobs = logits.gather(-1, ids[:, None]).squeeze(-1)
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropy = -(logits.exp() * logits).sum(-1)
        return logprobs, entropy

    def forward(
        hidden: torch.Tensor, ids: torch.Tensor | None = None, entropy_gradient: bool = False
    ) -> Any:
        if ids is None:
            return logits_of(hidden)
        size = max(1, int(policy.logits_mib * 2**20 / (4 * head.out_features)))
        if len(ids) <= size:
            return read_off(hidden, ids, entropy_gradient)
        parts = [
            checkpoint(
                read_off,
                hidden[start : start + size],
                ids[start : start + size],
                entropy_gradient,
                use_reentrant=False,
            )
            for start in range(0, len(ids), size)
        ]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    head.forward = forward


def _use(features: Any, vision: Vision) -> Any:
    """Image features, which are of distinct images, laid out as the sequences use them."""

    def pick(value: Any) -> Any:
        if isinstance(value, torch.Tensor):  # [rows of pixel_values, tokens, hidden]
            return value[vision.rows]
        return tuple(value[i] for i in vision.images.tolist())  # a tensor an image

    features.pooler_output = pick(features.pooler_output)
    deepstack = getattr(features, "deepstack_features", None)
    if deepstack is not None:
        features.deepstack_features = [pick(level) for level in deepstack]
    return features


def _total(features: Any) -> torch.Tensor:
    """The sum over everything `_use` would have used."""
    parts = [features.pooler_output, *(getattr(features, "deepstack_features", None) or [])]
    tensors = [t for part in parts for t in ([part] if isinstance(part, torch.Tensor) else part)]
    return torch.stack([t.sum() for t in tensors]).sum()


def load_policy(
    path: str,
    dtype: str = "float32",
    attention: str = "sdpa",
    temperature: float = 1.0,
    head_float32: bool = True,
    logits_mib: float = LOGITS_MIB,
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
    if "mm_encoder_outputs" not in inspect.signature(model.model.forward).parameters:
        raise ModelError(
            f"model.path: {path}: {type(model).__name__} does not take image features computed "
            "beforehand (mm_encoder_outputs); Qwen3-VL, InternVL and most others of transformers do"
        )
    if head_float32 and dtype != "float32":
        _float32_head(model.lm_head)
    return Policy(model, temperature, head_float32, logits_mib), processor


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
