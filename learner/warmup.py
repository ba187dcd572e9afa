"""Vision warm-up: teach a vision tower to tell its symbols apart before it learns to speak.

A randomly initialised tower under a language-model loss spends most of its time finding out
which visual token belongs to which word. A linear probe on the tower's features, trained on the
task's own labels (`tasks.core.HasVisionLabels`) and then thrown away, gives it a start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from learner.collate import Collator
from learner.policy import Policy
from tasks.core import Problem

LabelledProblems = Iterator[Sequence[tuple[str, Problem, np.ndarray]]]
"""Batches of (task name, problem, labels int64 [K])."""


def warm_up_vision(
    policy: Policy,
    processor: Any,
    problems: LabelledProblems,
    steps: int,
    learning_rate: float,
    report: Callable[[int, dict[str, float]], None],
    as_words: bool = False,
) -> dict[str, float]:
    """Train the vision tower (and nothing else) for `steps` batches; returns the last metrics.

    The images of each problem of a task must give the same number of visual features. `as_words`:
    these are left as large as the language model's words (`size_as_words`). Metrics:
    `warmup/<task>/loss` and `warmup/<task>/accuracy` (share of labels read right).
    """
    model: Any = policy.model
    collate = Collator(policy, processor)
    seeing, part_of = ("vision", "merger"), policy.family.part_of
    tower = [p for name, p in model.named_parameters() if part_of(name) in seeing]
    probes: dict[str, nn.Linear] = {}  # of each task: all features of an image to K labels of C
    optimizer = torch.optim.AdamW(tower, lr=learning_rate)
    metrics: dict[str, float] = {}
    model.train()
    for step in range(steps):
        batch = next(problems)
        by_task: dict[str, list[tuple[Problem, np.ndarray]]] = {}
        for name, problem, labels in batch:
            by_task.setdefault(name, []).append((problem, labels))
        features = {
            name: visual_features(policy, collate, [p.images for p, _ in rows])
            for name, rows in by_task.items()
        }
        total = torch.zeros(())
        for name, rows in by_task.items():
            truth = torch.from_numpy(np.stack([labels for _, labels in rows])).long()
            count, needed = truth.shape[1], 1 + int(truth.max())
            known = probes.get(name)
            if known is None or known.out_features < count * needed:
                probes[name] = _probe(features[name].shape[1], count, needed, known)
                optimizer.add_param_group({"params": list(probes[name].parameters())})
            logits = probes[name](features[name]).view(*truth.shape, -1)
            right = (logits.argmax(-1) == truth).float().mean()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), truth.flatten())
            total = total + loss
            metrics[f"warmup/{name}/loss"] = float(loss.detach())
            metrics[f"warmup/{name}/accuracy"] = float(right)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        collate.forget()
        report(step, metrics)
    model.zero_grad()
    if as_words:
        images = [problem.images for _, problem, _ in batch[:16]]
        size_as_words(policy, lambda: visual_features(policy, collate, images))
        collate.forget()
    return metrics


@torch.no_grad()
def size_as_words(policy: Policy, features: Callable[[], torch.Tensor]) -> float:
    """Scale the merger's last linear layer so that `features` are as large as words; the factor.

    A probe asks for no size, and features grow under it, to eight times a word's. For a language
    model that stays as it is such inputs drown what its layers add to them, and a step of the
    merger hardly turns them. Sizes are roots of mean squares. A merger that ends with something
    else is left as it is: 1.
    """
    model: Any = policy.model
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and policy.family.part_of(f"{name}.weight") == "merger"
    ]
    wanted, before = _size(model.get_input_embeddings().weight), _size(features())
    factor = wanted / before
    for layer in reversed(linear):  # a family may have mergers for other depths beside it
        for parameter in layer.parameters():
            parameter.mul_(factor)
        if abs(_size(features()) / wanted - 1) < 0.05:
            return factor
        for parameter in layer.parameters():
            parameter.div_(factor)
    return 1.0


def _size(values: torch.Tensor) -> float:
    return float(values.float().square().mean().sqrt())


def _probe(inputs: int, labels: int, classes: int, narrower: nn.Linear | None) -> nn.Linear:
    """A new probe, which knows what one of fewer classes knew."""
    probe = nn.Linear(inputs, labels * classes)
    if narrower:
        with torch.no_grad():
            for new, old in zip(probe.parameters(), narrower.parameters(), strict=True):
                shape = (labels, -1, *old.shape[1:])
                known = old.view(shape)
                new.view(shape)[:, : known.shape[1]] = known
    return probe


def visual_features(
    policy: Policy, collate: Any, images: Sequence[Sequence[bytes]]
) -> torch.Tensor:
    """[B, F] visual features of each problem's images, flattened in reading order."""
    encoded = collate.encode_images([image for of in images for image in of])
    names = encoded[0].inputs
    inputs = {name: torch.cat([image.inputs[name] for image in encoded]) for name in names}
    with policy.multiplying():
        output = policy.family.image_features(policy.model, inputs).pooler_output
    tensors = output if isinstance(output, list | tuple) else list(output)
    return torch.cat([t.flatten() for t in tensors]).view(len(images), -1).float()
