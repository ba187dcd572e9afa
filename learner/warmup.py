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

from learner.policy import Policy, make_collator
from tasks.core import Problem

LabelledProblems = Iterator[Sequence[tuple[str, Problem, np.ndarray]]]
"""Batches of (task name, problem, labels int64 [K])."""


class _Probes(nn.Module):
    """One linear probe a task: all visual features of an image to K labels of C classes."""

    def __init__(self, features: int, shapes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.shapes = shapes
        self.heads = nn.ModuleDict(
            {_key(name): nn.Linear(features, k * c) for name, (k, c) in shapes.items()}
        )

    def loss(self, name: str, features: torch.Tensor, labels: torch.Tensor) -> tuple[Any, Any]:
        """(cross-entropy, share of labels read right) of features [B, F] and labels [B, K]."""
        k, c = self.shapes[name]
        logits = self.heads[_key(name)](features).view(-1, k, c)
        right = (logits.argmax(-1) == labels).float().mean()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), right


def warm_up_vision(
    policy: Policy,
    processor: Any,
    problems: LabelledProblems,
    steps: int,
    learning_rate: float,
    report: Callable[[int, dict[str, float]], None],
) -> dict[str, float]:
    """Train the vision tower (and nothing else) for `steps` batches; returns the last metrics.

    Every image of a task must give the same number of visual features. Metrics:
    `warmup/<task>/loss` and `warmup/<task>/accuracy` (share of labels read right).
    """
    model: Any = policy.model
    collate = make_collator(policy, processor)
    seeing, part_of = ("vision", "merger"), policy.family.part_of
    tower = [p for name, p in model.named_parameters() if part_of(name) in seeing]
    probes: _Probes | None = None
    optimizer: torch.optim.Optimizer | None = None
    metrics: dict[str, float] = {}
    model.train()
    for step in range(steps):
        batch = next(problems)
        by_task: dict[str, list[tuple[Problem, np.ndarray]]] = {}
        for name, problem, labels in batch:
            by_task.setdefault(name, []).append((problem, labels))
        features = {
            name: _features(policy, collate, [p.image for p, _ in rows])
            for name, rows in by_task.items()
        }
        if probes is None or optimizer is None:
            shapes = {
                name: (len(rows[0][1]), 1 + max(int(labels.max()) for _, labels in rows))
                for name, rows in by_task.items()
            }
            probes = _Probes(next(iter(features.values())).shape[1], shapes)
            optimizer = torch.optim.AdamW([*tower, *probes.parameters()], lr=learning_rate)
        total = torch.zeros(())
        for name, rows in by_task.items():
            truth = torch.from_numpy(np.stack([labels for _, labels in rows])).long()
            loss, right = probes.loss(name, features[name], truth)
            total = total + loss
            metrics[f"warmup/{name}/loss"] = float(loss.detach())
            metrics[f"warmup/{name}/accuracy"] = float(right)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        collate.forget()
        report(step, metrics)
    model.zero_grad()
    return metrics


def _features(policy: Policy, collate: Any, images: Sequence[bytes]) -> torch.Tensor:
    """[B, F] visual features of each image, flattened in reading order."""
    encoded = collate.encode_images(images)
    names = encoded[0].inputs
    inputs = {name: torch.cat([image.inputs[name] for image in encoded]) for name in names}
    output = policy.family.image_features(policy.model, inputs).pooler_output
    tensors = output if isinstance(output, list | tuple) else list(output)
    return torch.stack([t.flatten() for t in tensors])


def _key(task: str) -> str:
    """A task's name as a module name, which may hold no dot."""
    return task.replace(".", "_")
