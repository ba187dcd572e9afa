"""Families beside the two of `test_engine`: one engine each, from sampling to a weight transfer.

Idefics3 is started with images in tiles: a square one is 2 x 2 tiles and the whole of it.
Qwen2.5-VL's folder is one as other people leave them (see `tests.support.habits`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from learner.batch import TrainSequence
from learner.collate import Collator
from learner.policy import load_policy
from learner.weights import GatheredWeights
from rollout.record import Sampling
from rollout.tokens import Chat, special_tokens
from rollout.transfer import HostSender
from tests.support.habits import no_pad, sentencepiece, several_ends, with_habits
from tests.support.live_engine import Live, drawn, mixed_sizes, perturbed_engine, worst
from tests.support.samples import problem as picture

FAMILIES = ("qwen2_5_vl", "idefics3")


@pytest.fixture(scope="module", params=FAMILIES)
def live(
    request: pytest.FixtureRequest,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Live]:
    if request.param == "idefics3":
        folder, tiles = tiny_models["idefics3"], {"longest_edge": 128}
    else:
        habits = (sentencepiece, several_ends, no_pad)
        made = tmp_path_factory.mktemp("habits") / request.param
        folder, tiles = with_habits(tiny_models[request.param], made, *habits), None
    yield from perturbed_engine(folder, tmp_path_factory, tiles)


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
    assert ends & set(Chat(live.processor).placeholders)


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


def test_every_end_ends_a_response_and_is_none_of_its_text(live: Live) -> None:
    chat = Chat(live.processor)
    groups = live.sample(mixed_sizes(9), n=16, sampling=Sampling(max_tokens=90))
    ended = [r for g in groups for r in g.rollouts if int(r.response_ids[-1]) in chat.ends]
    assert {int(r.response_ids[-1]) for r in ended} == chat.ends
    specials = special_tokens(chat.tokenizer).values()
    for rollout in ended:
        assert rollout.finish_reason == "stop"
        assert not any(special in rollout.text for special in specials)
        assert not chat.ends & set(rollout.response_ids[:-1].tolist())


def test_two_updates_on_what_was_sampled_keep_sampler_and_learner_agreed(live: Live) -> None:
    policy, _ = load_policy(str(live.folder))
    live.weights["trained"] = policy
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    for version in (3, 4):
        HostSender([live], 60).send(
            GatheredWeights(policy.model, lambda _: nullcontext(), torch.float32), version, rank=0
        )
        groups = live.sample(mixed_sizes(6))
        assert live.learner_gap("trained", groups) < 1e-4
        assert version == 3 or live.learner_gap("perturbed", groups) > 1e-2
        sequences = [
            TrainSequence(r.prompt_ids, r.response_ids, g.problem.image, r.segments, r.logprobs, a)
            for g in groups
            for r in g.rollouts
            for a in [np.ones_like(r.logprobs)]
        ]
        logprobs, _ = policy.train().run(Collator(policy, live.processor)(sequences))
        optimizer.zero_grad()
        (-logprobs.mean()).backward()
        optimizer.step()
