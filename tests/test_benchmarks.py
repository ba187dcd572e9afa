"""The benchmark's made-up rollouts: seeded, of both tasks, and neither all right nor all wrong."""

from __future__ import annotations

import numpy as np

from benchmarks.score_rollouts import GROUP, made_up
from rewards.terms import diagnose
from tasks.load import BUILT_IN, load_task


def test_made_up_rollouts_are_a_mixture_and_the_same_for_a_seed() -> None:
    groups = made_up(12, seed=3)
    assert {g.problem.task for g in groups} == set(BUILT_IN)
    found = [diagnose(load_task(g.problem.task), g) for g in groups]
    for truth in ([d.a for d in found], [d.a_p for d in found]):
        assert 0.1 < np.concatenate(truth).mean() < 0.9
    assert any(d.defects[i] for d in found for i in range(GROUP))
    assert all(len(r.segments) == len(r.response_ids) for g in groups for r in g.rollouts)
    again = [r.text for g in made_up(12, seed=3) for r in g.rollouts]
    assert again == [r.text for g in groups for r in g.rollouts]
