"""Families beside the two of `test_engine`: one engine each, from sampling to a weight transfer.

Idefics3 is started with images in tiles: a square one is 2 x 2 tiles and the whole of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learner.weights import GatheredWeights
from rollout.record import Sampling
from rollout.tokens import placeholder_ids
from rollout.transfer import HostSender
from tests.learner.samples import problem as picture
from tests.rollout.live_engine import Live, drawn, mixed_sizes, perturbed_engine, worst

FAMILIES = ("qwen2_5_vl", "idefics3")


@pytest.fixture(scope="module", params=FAMILIES)
def live(
    request: pytest.FixtureRequest,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Live]:
    tiles = {"longest_edge": 128} if request.param == "idefics3" else None
    yield from perturbed_engine(tiny_models[request.param], tmp_path_factory, tiles)


def test_log_probs_agree_with_images_of_any_shape_and_without(live: Live) -> None:
    wide = [replace(p, image=picture(i, (96, 40)).image) for i, p in enumerate(mixed_sizes(3))]
    shown = live.sample([*mixed_sizes(6), *wide], n=4)
    assert live.learner_gap("perturbed", shown) < 1e-4
    blind = live.sample(mixed_sizes(3), n=4, kind="blind", view="none")
    assert live.learner_gap("perturbed", blind) < 1e-4
    blank = live.sample(mixed_sizes(3), n=2, kind="blind", view="blank")
    assert len({len(g.rollouts[0].prompt_ids) for g in (*shown, *blind)}) > 2
    assert live.learner_gap("original", shown) > 1e-2
    # The image is seen: beside a blank one, the same prompt gives other first tokens' log-probs.
    seen = {g.problem.id: g.rollouts[0].logprobs[0] for g in shown}
    assert all(g.rollouts[0].logprobs[0] != seen[g.problem.id] for g in blank)


def test_given_tokens_are_scored_as_the_rollouts_own(live: Live) -> None:
    problems = mixed_sizes(6)
    scored, rollouts = drawn(live.sample(problems, n=8, sampling=Sampling(max_tokens=90)))
    found = live.score(scored, [problem.image for problem, _ in scored])
    assert worst(found, rollouts) < 1e-4
    # Some end in a placeholder, which a learner must not take for an image.
    ends = {int(ids[-1]) for _, ids in scored}
    assert ends & set(placeholder_ids(live.processor.tokenizer))


def test_the_learners_weights_reach_the_engine_under_their_checkpoints_names(live: Live) -> None:
    def source(which: str) -> GatheredWeights:
        return GatheredWeights(live.weights[which].model, lambda _: nullcontext(), torch.float32)

    stored = load_file(live.folder / "model.safetensors")
    offered = dict(source("perturbed"))
    assert offered.keys() == stored.keys()
    assert all(torch.equal(offered[name], stored[name]) for name in stored)
    first = live.first_checksums
    HostSender([live], 60).send(source("original"), 1, rank=0)
    changed = live.checksums()
    assert changed.keys() == first.keys()
    # Packed linear layers have no checksum on a CPU; the log-probs below speak for them.
    moved = [name for name in first if changed[name] != first[name]]
    assert any("embed_tokens" in name for name in moved)
    assert sum("norm" in name for name in moved) > 10
    groups = live.sample(mixed_sizes(6))
    assert {int(v) for g in groups for r in g.rollouts for v in r.versions} == {1}
    assert live.learner_gap("original", groups) < 1e-4
    HostSender([live], 60).send(source("perturbed"), 2, rank=0)
    assert live.checksums() == first
    assert live.learner_gap("perturbed", live.sample(mixed_sizes(3))) < 1e-4
