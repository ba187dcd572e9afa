"""The vision warm-up teaches the tower, and only the tower."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.collate import Collator
from learner.policy import load_policy
from learner.warmup import size_as_words, visual_features, warm_up_vision
from tasks.core import Problem
from tests.support.samples import TASK

# Nearly full grids: each digit fills a quarter of them, so guessing reads 0.25 of the cells right.
SPEC = TASK.spec(size=4, blanks=1, cell_size=16, margin=0, font_size=12, prompt="brief")
Labelled = list[tuple[str, Problem, np.ndarray]]


def batches(size: int) -> Iterator[Labelled]:
    index = 0
    while True:
        drawn = [TASK.generate(np.random.default_rng([3, index + i]), SPEC) for i in range(size)]
        index += size
        yield [(TASK.name, p, TASK.vision_labels(p)) for p in drawn]  # type: ignore[attr-defined]


def test_a_few_steps_read_digits_better_and_leave_the_language_model_alone(
    model_path: str,
) -> None:
    policy, processor = load_policy(model_path)
    torch.manual_seed(0)  # the probe's first weights
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    curve: list[dict[str, float]] = []
    last = warm_up_vision(
        policy, processor, batches(16), 16, 1e-3, lambda step, m: curve.append(dict(m))
    )
    assert len(curve) == 16
    assert curve[-1] == last
    read = [metrics[f"warmup/{TASK.name}/accuracy"] for metrics in curve]
    assert np.mean(read[:3]) < 0.35
    assert np.mean(read[-3:]) > 0.45
    moved = {n for n, p in policy.model.named_parameters() if not torch.equal(p, before[n])}
    rest = ("model.language_model", "model.text_model", "lm_head")
    tower = {n for n in before if not n.startswith(rest)}
    assert moved <= tower
    assert len(moved) > 0.8 * len(tower)
    gradients: list[Any] = [p.grad for p in policy.model.parameters()]
    assert not any(g is not None and g.any() for g in gradients)


def test_labels_that_come_late_are_learnt_too(tiny_models: dict[str, Path]) -> None:
    """The first batch knows two classes only; what the probe read by then it still reads."""
    policy, processor = load_policy(str(tiny_models["idefics3"]))
    torch.manual_seed(0)
    drawn = next(batches(8))
    few = [(name, p, np.minimum(labels, 1)) for name, p, labels in drawn]
    curve: list[dict[str, float]] = []
    stream = iter([*[few] * 8, *[drawn] * 24])
    warm_up_vision(policy, processor, stream, 32, 1e-3, lambda step, m: curve.append(dict(m)))
    read = [metrics[f"warmup/{TASK.name}/accuracy"] for metrics in curve]
    same = np.mean([(few[i][2] == drawn[i][2]).mean() for i in range(8)])
    assert read[7] > 0.9 and read[8] == pytest.approx(same, abs=0.1)
    assert read[-1] > 0.9


def test_features_are_left_as_large_as_words_and_say_the_same(model_path: str) -> None:
    policy, processor = load_policy(model_path)
    torch.manual_seed(0)
    warm_up_vision(policy, processor, batches(8), 4, 1e-2, lambda step, m: None)
    collate = Collator(policy, processor)
    images = [problem.images for _, problem, _ in next(batches(4))]

    def features() -> torch.Tensor:
        with torch.no_grad():
            return visual_features(policy, collate, images)

    words: torch.Tensor = policy.model.get_input_embeddings().weight  # type: ignore[operator]
    before = features()
    factor = size_as_words(policy, features)
    assert factor != 1.0
    after = features()
    assert after.square().mean().sqrt() == pytest.approx(
        words.square().mean().sqrt().item(), rel=0.05
    )
    assert torch.allclose(after, before * factor, rtol=1e-3, atol=1e-5)
