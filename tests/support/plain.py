"""What policies are held against: the plain Hugging Face model, a sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from learner.batch import MicroBatch, TrainBatch, TrainSequence
from learner.losses import Loss, View
from learner.policy import Policy
from tasks.images import check_image
from tests.support.samples import placeholder


def plain_logprobs(
    policy: Policy, processor: Any, s: TrainSequence
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [n] of a sequence's targets by `model(...)` itself, unpadded."""
    model: Any = policy.model
    ids = np.concatenate([s.prompt_ids, s.response_ids]).astype(np.int64)[:-1]
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(ids)[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if s.images:
        token = processor.tokenizer.convert_ids_to_tokens(placeholder(processor))
        images = [check_image(image, "test") for image in s.images]
        made = processor(images=[images], text=[token * len(images)], return_tensors="pt")
        names = ("pixel_values", "image_grid_thw", "pixel_attention_mask")
        inputs |= {k: v for k, v in made.items() if k in names}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == placeholder(processor)).int()
    logits = model(**inputs).logits[0].double()
    table = torch.log_softmax(logits, -1)[len(s.prompt_ids) - 1 :][s.targets]
    ids = s.response_ids[s.targets].astype(np.int64)
    logprobs = table.gather(-1, torch.from_numpy(ids)[:, None])
    return logprobs[:, 0], -(table.exp() * table).sum(-1)


def summed(loss: Loss, batch: TrainBatch, micro: MicroBatch, seen: View) -> torch.Tensor:
    """A micro-batch's share of the loss of a batch; `seen`: its log-probs and entropies."""
    counts = loss.denominators(batch)
    terms = loss.sums(seen, micro.tokens)
    return torch.stack([value / counts[name] for name, value in terms.items()]).sum()


def learn(
    policy: Policy, micro_batches: Iterable[MicroBatch], value: Callable[[MicroBatch], torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    """The sum of `value` over micro-batches and its gradient by parameter, where there is one."""
    policy.zero_grad()
    total = 0.0
    for micro in micro_batches:
        part = value(micro)
        part.backward()
        total += float(part.detach())
    found = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return total, found
