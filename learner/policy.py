"""The policy as the learner sees it: a Hugging Face VLM that gives log-probs and entropies.

Loading goes through `AutoModelForImageTextToText`, by folder or hub name. The log-prob of a
token is that of the softmax at temperature `temperature`, as the sampler reports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from learner.batch import MicroBatch
from learner.families import family_of
from rollout.settings import ModelConfig
from rollout.tokens import NOT_ITS_CODE, ModelError, load_processor
from tasks.fetched import fetched

LOGITS_MIB = 256.0
"""Of one table of logits; a few of the same size live beside it."""


class Policy(nn.Module):
    """Wraps a VLM so that one forward pass gives what every loss needs.

    The LM head runs in float32 whatever the body's dtype: bfloat16 logits are the main source
    of sampler-learner mismatch (2506.13585). It runs on as many tokens at a time as keep their
    [tokens, vocabulary] logits within `logits_mib`; with more tokens than that no logits are kept
    for the backward pass, which makes them again. Where it is `mixed`, matrices are multiplied in
    bfloat16 and the weights are of another type; the head is not, if it runs in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 1.0,
        head_float32: bool = True,
        logits_mib: float = LOGITS_MIB,
        mixed: bool = False,
    ):
        super().__init__()
        self.model = model
        self.family = family_of(model)
        self.temperature = temperature
        self.head_float32 = head_float32
        self.logits_mib = logits_mib
        self.mixed = mixed
        _read_in_turns(model.lm_head, self)

    def forward(
        self, batch: MicroBatch, entropy_gradient: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probs [N], entropies [N]) in nats of a micro-batch's response tokens.

        Entropies carry a gradient only if asked to: it keeps another table of logits alive.
        """
        model: Any = self.model
        with self.multiplying():
            hidden = self._hidden(model, batch)
        chosen = hidden[batch.rows, batch.columns]  # [N, hidden]
        # One call of the head however many turns it takes: under ZeRO-3 a call is a collective, and
        # ranks have other numbers of tokens.
        logprobs_entropy: tuple[torch.Tensor, torch.Tensor] = model.lm_head(
            chosen, batch.tokens.ids, entropy_gradient
        )
        return logprobs_entropy

    def multiplying(self, also: bool = True) -> AbstractContextManager[Any]:
        """Within, a mixed policy multiplies in bfloat16, if `also` is true."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.mixed and also)

    def _hidden(self, model: Any, batch: MicroBatch) -> torch.Tensor:
        """[B, L, hidden]: what the head may read."""
        vision = batch.vision
        features = self.family.image_features(model, vision.inputs)
        inputs: dict[str, Any] = dict(batch.inputs)
        if len(vision.images):
            laid_out = self.family.lay_out(features, vision.images.tolist(), vision.rows)
            inputs["mm_encoder_outputs"] = {"image": laid_out}
            visual_inputs: AbstractContextManager[None] = nullcontext()
        else:
            visual_inputs = _seen_by(model.get_input_embeddings(), self.family.total(features))
        with visual_inputs:
            hidden: torch.Tensor = model.model(**inputs, use_cache=False).last_hidden_state
        return hidden

    def run(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, typed."""
        logprobs_entropy: tuple[torch.Tensor, torch.Tensor] = self(batch)
        return logprobs_entropy


@contextmanager
def _seen_by(embedding: nn.Module, features: torch.Tensor) -> Iterator[None]:
    """Within, a sum over features is added, times zero, to whatever an embedding gives.

    So a micro-batch without an image has the graph of one with images, down to which layers need
    a gradient of their input: under ZeRO-3 each such layer is a collective in the backward pass,
    and with frozen embeddings the ranks would otherwise wait for different ones.
    """
    handle = embedding.register_forward_hook(lambda *call: call[-1] + 0.0 * features)
    try:
        yield
    finally:
        handle.remove()


def _read_in_turns(head: Any, policy: Policy) -> None:
    """Make `head(hidden [N, hidden], ids [N], entropy_gradient)` give log-probs and entropies [N].

    `head(hidden)` still gives logits, in float32 too where the policy's head is. Its module hooks,
    which gather its weight under ZeRO-3, run once around all turns. All turns share one float32
    copy of a bfloat16 weight: their gradients add up in float32 and are rounded once.
    """

    def weight() -> torch.Tensor:
        """[V, hidden], possibly tied to the embeddings."""
        parameter: torch.Tensor = head.weight
        return (
            parameter.to(torch.promote_types(parameter.dtype, torch.float32))
            if policy.head_float32
            else parameter
        )

    def logits_of(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with policy.multiplying(not policy.head_float32):
            return nn.functional.linear(hidden.to(weight.dtype), weight, head.bias)

    def read_off(
        hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, entropy_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits_of(hidden, weight).float()  # [n, V]
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
        shared = weight()
        if ids is None:
            return logits_of(hidden, shared)
        size = max(1, int(policy.logits_mib * 2**20 / (4 * head.out_features)))
        if len(ids) <= size:
            return read_off(hidden, shared, ids, entropy_gradient)
        parts = [
            checkpoint(
                read_off,
                hidden[start : start + size],
                shared,
                ids[start : start + size],
                entropy_gradient,
                use_reentrant=False,
            )
            for start in range(0, len(ids), size)
        ]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    head.forward = forward


def load_policy(
    path: str,
    dtype: str = "float32",
    attention: str = "sdpa",
    temperature: float = 1.0,
    head_float32: bool = True,
    logits_mib: float = LOGITS_MIB,
    reading: ModelConfig | None = None,
) -> tuple[Policy, Any]:
    """(policy, processor) of a folder, hub name or pinned URI; `reading`: see `load_processor`.

    `dtype` as in [model].

    Raises ModelError when the weights or the processor cannot be loaded, or the model lacks what
    the learner needs.
    """
    from transformers import AutoModelForImageTextToText

    processor = load_processor(path, reading=reading)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            fetched(path),
            **NOT_ITS_CODE,
            dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32,
            attn_implementation="sdpa" if attention == "flash" else attention,
        )
    except (OSError, ValueError, ImportError) as error:
        why = str(error).partition("\n")[0]
        raise ModelError(
            f"model.path: {path}: could not be loaded as an image-text-to-text model ({why})"
        ) from error
    try:
        family_of(model)
    except ModelError as error:
        raise ModelError(f"model.path: {path}: {error}") from error
    if attention == "flash":
        from learner.packing import FLASH  # transformers' attention is seconds to import

        model.get_decoder().config._attn_implementation = FLASH
    _make_savable(model)
    return Policy(model, temperature, head_float32, logits_mib, dtype == "mixed"), processor


def _make_savable(model: Any) -> None:
    """Keep of a generation config that transformers loads but refuses to save what ends a text.

    It does so where sampling flags stand without `do_sample`, which it ignores then.
    """
    config = model.generation_config
    try:
        config.validate(strict=True)
    except ValueError:
        model.generation_config = type(config)(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )


def keep_no_activations(policy: Policy) -> None:
    """Activation checkpointing: a layer keeps its input only and runs again for its gradient."""
    model: Any = policy.model
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # It also makes the embeddings' output need a gradient, which only the reentrant kind asks
    # for; below frozen layers that would be a backward pass for nothing.
    model.disable_input_require_grads()
