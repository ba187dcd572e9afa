"""The engine against the learner: same weights, same tokens, same log-probs, on real vLLM.

One file, as one engine a family serves all of it; it is started from *perturbed* weights, so that a
transfer of the original ones has something to change and a way back to compare with. Idefics3 is
started with images in tiles: a square one is 2 x 2 tiles and the whole of it. Qwen2.5-VL's folder
is one as other people leave them (see `tests.support.habits`), with a system prompt and a limit of
pixels below that of some images.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cluster.recipe.hardware import Machine
from cluster.recipe.memory import cached_tokens, policy_size
from learner.batch import Layout, TrainSequence
from learner.collate import Collator
from learner.lora import Adapters, AdapterWeights
from learner.parts import freeze
from learner.policy import load_policy
from learner.settings import LoraConfig
from learner.weights import GatheredWeights
from rollout.decoding import special_tokens
from rollout.engine import EngineDied, SamplerError
from rollout.record import Group, SampleRequest, Sampling, ScoreRequest
from rollout.settings import EnvironmentConfig, ModelConfig, SamplerConfig
from rollout.tokens import Chat
from rollout.transfer import WeightTransferError
from tasks.core import SEGMENTS
from tasks.returns import Returns
from tests.support.habits import no_pad, sentencepiece, several_ends, with_habits
from tests.support.live_engine import (
    TASK,
    Live,
    Showing,
    drawn,
    mixed_sizes,
    perturbed_engine,
    steps_in_flight,
    worst,
)
from tests.support.samples import problem as picture
from tests.support.shaken import shake
from tests.support.waiting import until


def on(*families: str) -> pytest.MarkDecorator:
    """The families whose engines a test is run with."""
    return pytest.mark.parametrize("live", families, indirect=True, scope="module")


every_family = on("qwen3_vl", "internvl", "qwen2_5_vl", "idefics3")
two_families = on("qwen3_vl", "internvl")
"""M-RoPE and plain positions; what is the same for all families is shown on these."""


@pytest.fixture(scope="module")
def live(
    request: pytest.FixtureRequest,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Live]:
    folder, tiles = tiny_models[request.param], None
    reading: dict[str, Any] = {}
    if request.param == "idefics3":
        tiles = {"longest_edge": 128}
    if request.param == "qwen2_5_vl":
        reading = {"system_prompt": "Look <|im_end|> twice.", "max_pixels": 64 * 80}
        made = tmp_path_factory.mktemp("habits") / request.param
        folder = with_habits(folder, made, sentencepiece, several_ends, no_pad)
    yield from perturbed_engine(folder, tmp_path_factory, tiles, **reading)


@every_family
def test_log_probs_agree_with_images_of_any_shape_and_without(live: Live) -> None:
    live.send("perturbed", 0)
    wide = [replace(p, images=picture(i, (96, 40)).images) for i, p in enumerate(mixed_sizes(3))]
    shown = live.sample([*mixed_sizes(6), *wide])
    blind = live.sample(mixed_sizes(3), kind="blind", view="none")
    blank = live.sample(mixed_sizes(3), kind="blind", view="blank")
    for groups in (shown, blind, blank):
        assert live.learner_gap("perturbed", groups) < 1e-4
    # And the comparison can fail: other weights give other log-probs.
    assert live.learner_gap("original", shown) > 1e-2
    # Lengths differ with the images' sizes; InternVL's tiles are of one.
    lengths = {len(g.rollouts[0].prompt_ids) for g in (*shown, *blind)}
    assert len(lengths) > (1 if live.folder.name == "internvl" else 2)
    # The image is seen: beside a blank one, the same prompt gives other first tokens' log-probs.
    seen = {g.problem.id: g.rollouts[0] for g in shown[:6]}
    image = Chat(live.processor).image_token
    for group, none in zip(blank, blind, strict=True):
        rollout, other = group.rollouts[0], seen[group.problem.id]
        assert rollout.logprobs[0] != other.logprobs[0]
        assert rollout.prompt_ids.tolist() == other.prompt_ids.tolist()
        assert image in rollout.prompt_ids and image not in none.rollouts[0].prompt_ids


@every_family
def test_the_kv_cache_has_the_room_that_the_dry_run_tells(live: Live) -> None:
    def ask(llm: Any) -> int:
        cache = llm.vllm_config.cache_config
        return int(cache.num_gpu_blocks * cache.block_size)

    there = live.do(ask)
    size = policy_size(str(live.folder))
    assert size is not None
    model = ModelConfig(path=str(live.folder), max_model_len=512)
    told = cached_tokens(model, SamplerConfig(max_num_seqs=64), size, Machine(1, 1))
    assert 0.99 * told <= there <= told


@every_family
def test_log_probs_agree_with_several_images_and_none_in_one_batch(live: Live) -> None:
    """In every layout: placeholders in the text and out of order, sizes that differ."""
    live.send("perturbed", 0)
    plain = mixed_sizes(4)
    one, other = picture(7, (96, 40), (64, 64)).images
    places = ("<image_2> {} <image_1>", "{}", "<image>{}<image>")
    several = [
        replace(p, prompt=place.format(p.prompt), images=(one, other))
        for place, p in zip(places, plain, strict=False)
    ]
    text_only = [replace(p, id=f"{p.id}-text", images=()) for p in plain[:2]]
    asked = [several[0], text_only[0], plain[3], several[1], text_only[1], several[2]]
    groups = live.sample(asked)
    for layout in get_args(Layout):
        assert live.learner_gap("perturbed", groups, layout) < 1e-4
    blocks = [(g.rollouts[0].prompt_ids == Chat(live.processor).image_token).sum() for g in groups]
    assert blocks[1] == blocks[4] == 0 < blocks[2] and blocks[0] == blocks[3] == blocks[5] > 0
    scored, rollouts = drawn(groups)
    assert worst(live.score(scored, [p.images for p, _ in scored]), rollouts) < 1e-4
    turned = live.score(scored[:2], [(other, one)] * 2)
    assert worst(turned, rollouts[:2]) > 1e-3, "which image stands where makes a difference"
    for view in ("blank", "none"):
        assert live.learner_gap("perturbed", live.sample(several, kind="blind", view=view)) < 1e-4


@every_family
def test_log_probs_agree_on_episodes_of_several_turns_with_returned_images(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random policy ends no turn, so a sixth of all tokens is taken for an end."""
    live.send("perturbed", 0)
    chat = live.engine._chat
    monkeypatch.setattr(chat, "ends", frozenset({*chat.ends, *range(300, 400)}))
    budgets = EnvironmentConfig(name="zoom", turns=4, images=4, image_tokens=480, seconds=600.0)
    one, other = picture(7, (96, 40), (64, 64)).images
    asked = mixed_sizes(3)
    asked[1] = replace(asked[1], prompt="<image_2> or <image_1>?", images=(one, other))
    asked[2] = replace(asked[2], images=())
    sampling = Sampling(max_tokens=14)
    requests = [
        SampleRequest(f"g{i}", p, 6, sampling, environment=budgets) for i, p in enumerate(asked)
    ]
    requests[1] = replace(requests[1], returns=Returns("blank"))
    Showing.returns.clear()
    groups, again = (
        [live.wait(future, 300) for future in futures]
        for futures in (
            [live.call("converse", request, TASK, Showing()) for request in requests],
            [live.call("converse", requests[0], TASK, Showing())],
        )
    )
    rollouts = [r for g in groups for r in g.rollouts]
    assert all(len(r.turns) == 1 + (np.diff(r.sampled.astype(int)) == 1).sum() for r in rollouts)
    assert Showing.returns == [*[None] * 6, *[Returns("blank")] * 6, *[None] * 12]
    assert {len(r.turns) for r in rollouts} >= {1, 2, 3}
    assert "length" in {r.finish_reason for r in rollouts}
    assert {len(r.images) for r in rollouts} >= {0, 1, 2}
    assert any(turn.images for r in rollouts for turn in r.turns[:1])
    for layout in get_args(Layout):
        assert live.learner_gap("perturbed", groups, layout) < 1e-4
    assert live.learner_gap("original", groups) > 1e-2
    # What is drawn hangs on the group's name alone.
    for first, second in zip(groups[0].rollouts, again[0].rollouts, strict=True):
        assert first.response_ids.tolist() == second.response_ids.tolist()


@every_family
def test_the_learners_weights_reach_the_engine_under_their_checkpoints_names(live: Live) -> None:
    stored = load_file(live.folder / "model.safetensors")
    offered = dict(live.source("perturbed"))
    assert offered.keys() == stored.keys()
    assert all(torch.equal(offered[name], stored[name]) for name in stored)
    problems = mixed_sizes(6)
    live.sample(problems)  # fills the caches of what the older vision tower saw
    first = live.first_checksums
    live.send("original", 1)
    changed = live.checksums()
    assert changed.keys() == first.keys()
    # The CPU backend keeps packed linear layers outside the parameters, so their checksums say
    # nothing; embeddings and norms do, and the log-probs below speak for everything.
    moved = [name for name in first if changed[name] != first[name]]
    assert any("embed_tokens" in name for name in moved)
    assert sum("norm" in name for name in moved) > 10
    # The same images again: features that a trained tower made stale would show here.
    groups = live.sample(problems)
    assert live.learner_gap("original", groups) < 1e-4
    assert all((r.versions == 1).all() for g in groups for r in g.rollouts)
    live.send("perturbed", 2)
    assert live.checksums() == first
    assert live.learner_gap("perturbed", live.sample(problems[:3])) < 1e-4


@every_family
def test_given_tokens_are_scored_as_the_rollouts_own(live: Live) -> None:
    live.send("perturbed", 0)
    problems = mixed_sizes(6)
    scored, rollouts = drawn(live.sample(problems, n=8, sampling=Sampling(max_tokens=90)))
    images = [problem.images for problem, _ in scored]
    assert worst(live.score(scored, images), rollouts) < 1e-4
    # Again: nothing that scoring itself left in a cache changes what it says.
    assert worst(live.score(scored, images), rollouts) < 1e-4
    # Among them are responses that end in a placeholder, which must not become an image.
    places = Chat(live.processor).placeholders
    assert {int(ids[-1]) for _, ids in scored} & set(places)
    forced = [(p, np.append(ids[:-1], min(places)).astype(np.int32)) for p, ids in scored[:9]]
    inputs = [(r.prompt_ids, ids, p.images) for (p, ids), r in zip(forced, rollouts, strict=False)]
    assert live.gap("perturbed", inputs, live.score(forced, images[:9])) < 1e-4


@every_family
def test_every_end_ends_a_response_and_is_none_of_its_text(live: Live) -> None:
    live.send("perturbed", 0)
    chat = Chat(live.processor)
    groups = live.sample(mixed_sizes(9), n=16, sampling=Sampling(max_tokens=60))
    # Padding stands for nothing: a policy that samples it does no harm.
    specials = set(special_tokens(chat.tokenizer)) - {chat.tokenizer.pad_token_id}
    rollouts = [r for g in groups for r in g.rollouts]
    assert not any(specials & set(r.response_ids[:-1].tolist()) for r in rollouts)
    ended = [r for r in rollouts if int(r.response_ids[-1]) in chat.ends]
    assert {int(r.response_ids[-1]) for r in ended} == chat.ends
    for rollout in ended:
        assert rollout.finish_reason == "stop"
        assert not any(said in rollout.text for said in special_tokens(chat.tokenizer).values())


@two_families
def test_a_byte_that_changed_on_the_way_is_found_and_a_transfer_left_open_is_made_good(
    live: Live,
) -> None:
    problems = mixed_sizes(2)
    source = live.source("original")
    spoilt = next(names for place, (names, _) in enumerate(source.iter_groups()) if place == 2)[-1]
    said = rf"'sampler-0' fetched version 1, and '{re.escape(spoilt)}' is not what the learner put"
    with pytest.raises(WeightTransferError, match=said) as failed:
        live.send(source, 1, spoilt)
    assert failed.value.sampler == "sampler-0"
    # Asked while some weights are newer than others, drawn when all are.
    waiting = live.call("sample", SampleRequest("g", problems[0], 2, Sampling(max_tokens=9)), TASK)
    live.send("original", 1)
    groups = [live.wait(waiting, 300), *live.sample(problems)]
    assert live.learner_gap("original", groups) < 1e-4
    live.send("perturbed", 2)
    assert live.checksums() == live.first_checksums
    assert live.wait(live.call("ping"), 60) is None


@two_families
def test_adapters_alone_make_the_engine_the_learner_and_other_layers_stay(live: Live) -> None:
    """Of both towers and what joins them; q alone of the three that an engine fuses."""
    policy, _ = load_policy(str(live.folder))
    chosen = LoraConfig(rank=3, alpha=4.5, targets=("*.q_proj", "*.down_proj", "*vis*", "merger"))
    adapters = Adapters(policy, chosen, "unused")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapters.layers:
            for matrix in adapters.matrices(layer):
                matrix.copy_(0.1 * torch.randn(matrix.shape, generator=generator))
    live.weights["adapted"] = policy
    problems = mixed_sizes(3)
    live.send("perturbed", 0)
    live.sample(problems)  # fills the caches of what the older vision tower saw
    source = AdapterWeights(adapters, lambda _: nullcontext(), torch.float32)
    for version in (1, 2):
        # The second time the engine must not add to what the first time left.
        report = live.send(source, version)
        assert report.bytes == 4 * 3 * sum(sum(shape) for shape in adapters.layers.values())
        groups = live.sample(problems)
        assert live.learner_gap("adapted", groups) < 1e-4
        assert live.learner_gap("perturbed", groups) > 1e-2
        assert all((r.versions == version).all() for g in groups for r in g.rollouts)
    # And the way back, by whole weights.
    live.send("perturbed", 3)
    assert live.checksums() == live.first_checksums


@on("qwen3_vl")
def test_an_engine_takes_a_step_a_token_and_computes_no_token_twice(live: Live) -> None:
    """Counts that no busy machine changes: a group's rows go together, none is begun again."""
    live.send("perturbed", 0)
    tokens: list[int] = []

    def count(llm: Any) -> None:
        executor = llm.engine_core.engine_core.model_executor
        execute = executor.execute_model

        def counted(scheduled: Any, *given: Any, **more: Any) -> Any:
            tokens.append(scheduled.total_num_scheduled_tokens)
            return execute(scheduled, *given, **more)

        executor.execute_model = counted

    def stop(llm: Any) -> None:
        del llm.engine_core.engine_core.model_executor.execute_model

    live.do(count)
    groups = live.sample(mixed_sizes(2), n=4)
    live.do(stop)
    rows = [rollout for group in groups for rollout in group.rollouts]
    longest = max(len(r.response_ids) for r in rows)
    steps = [count for count in tokens if count]
    # The second group may come a step later than the first; the last token is no input.
    assert longest <= len(steps) <= longest + len(groups)
    assert sum(steps) <= sum(len(r.prompt_ids) + len(r.response_ids) - 1 for r in rows)


@two_families
def test_what_is_frozen_is_not_sent_and_the_engine_is_right_all_the_same(live: Live) -> None:
    policy, _ = load_policy(str(live.folder))
    freeze(policy, ("vision", "*.layers.1.*", "*.layers.2.self_attn.q_proj.*"))
    shake(policy, seed=4, by=0.03)
    live.weights["trained"] = policy
    live.send("perturbed", 0)
    alone = GatheredWeights(policy.model, nullcontext, torch.float32)
    sizes = [sum(t.nbytes for t in tensors) for _, tensors in alone.iter_groups()]
    half = sum(sizes) // 2
    source = GatheredWeights(policy.model, nullcontext, torch.float32, bucket_bytes=half)
    report = live.send(source, 1)
    assert report.bytes == sum(sizes) and 1 < report.groups < len(sizes)
    assert report.largest_group_bytes <= max(half, *sizes)
    assert report.bytes < 0.9 * sum(4 * p.numel() for p in policy.model.parameters())
    groups = live.sample(mixed_sizes(3))
    assert live.learner_gap("trained", groups) < 1e-4
    assert live.learner_gap("perturbed", groups) > 1e-2
    live.send("perturbed", 2)
    assert live.checksums() == live.first_checksums


@two_families
def test_what_a_group_draws_hangs_on_its_id_and_not_on_its_company(live: Live) -> None:
    """More prompts than are read at once: on a CPU a seeded one must not be read in pieces."""
    problems = mixed_sizes(96)
    live.send("perturbed", 0)
    short = Sampling(max_tokens=12)
    crowd = live.sample(problems, sampling=short)
    assert sum(len(g.rollouts[0].prompt_ids) for g in crowd) > 2 * 2048
    alone = live.sample(problems[:3], sampling=short)
    for first, again in zip(crowd, alone, strict=False):
        for one, other in zip(first.rollouts, again.rollouts, strict=True):
            assert np.array_equal(one.response_ids, other.response_ids)
    # Responses of one group, and groups of one problem, are draws of their own.
    twice = live.sample([problems[0], problems[0]], n=4)
    assert len({tuple(r.response_ids) for g in twice for r in g.rollouts}) == 8


@two_families
def test_greedy_is_deterministic(live: Live) -> None:
    live.send("perturbed", 0)
    greedy = Sampling(temperature=0.0, max_tokens=24)
    first, second = (live.sample(mixed_sizes(3), n=1, sampling=greedy) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.rollouts[0].response_ids.tolist() == b.rollouts[0].response_ids.tolist()


@two_families
def test_a_text_ends_a_response_of_which_it_is_the_last(live: Live) -> None:
    problems, greedy = mixed_sizes(1), Sampling(temperature=0.0, max_tokens=24)
    (whole,) = live.sample(problems, n=1, sampling=greedy)[0].rollouts
    until = whole.text[8:11]
    (cut,) = live.sample(problems, n=1, sampling=replace(greedy, until=until))[0].rollouts
    end = whole.text.index(until) + len(until)
    assert cut.text[:end] == whole.text[:end]
    assert len(cut.response_ids) < len(whole.response_ids) == 24
    assert cut.response_ids.tolist() == whole.response_ids[: len(cut.response_ids)].tolist()
    assert cut.finish_reason == "stop" and len(cut.logprobs) == len(cut.response_ids)


@two_families
def test_a_response_goes_on_from_what_it_is_forced_to_begin_with(live: Live) -> None:
    problem, chat = mixed_sizes(1)[0], Chat(live.processor)
    specials = special_tokens(chat.tokenizer)
    live.send("perturbed", 0)
    (plain,) = live.sample([problem])
    start = plain.rollouts[0].prompt_ids.tolist()
    blind = chat.prompt([problem.prompt])
    truth = TASK.oracle_prefix(problem)
    # A special token spelled out in a prefix stays text.
    hostile = "<perception>\n" + "".join(specials.values())
    asked: dict[str, dict[str, Any]] = {
        truth: {"kind": "oracle"},
        truth + "<reasoning>\nr1": {"kind": "oracle", "prefix": truth + "<reasoning>\nr1"},
        "<perception>\n1-2\n": {"kind": "blind", "view": "none", "prefix": "<perception>\n1-2\n"},
        hostile: {"prefix": hostile},
    }
    groups = [live.sample([problem], **how)[0] for how in asked.values()]
    for (prefix, how), group in zip(asked.items(), groups, strict=True):
        ids = chat.text(prefix)
        assert not set(specials) & set(ids) and chat.tokenizer.decode(ids) == prefix
        for rollout in group.rollouts:
            assert rollout.prefix == prefix
            assert rollout.prompt_ids.tolist() == (blind if "view" in how else start) + ids
            assert rollout.parsed == TASK.parse(prefix + rollout.text)
            if how.get("kind") == "oracle":
                assert not (rollout.segments == SEGMENTS.index("perception")).any()
    assert live.learner_gap("perturbed", groups) < 1e-4


@two_families
def test_scores_under_another_image_and_under_none(live: Live) -> None:
    live.send("perturbed", 0)
    problems = mixed_sizes(6)
    groups = live.sample(problems)
    scored, rollouts = drawn(groups)
    others = [problems[(i // 2 + 1) % 6].images for i in range(len(scored))]
    swapped = [
        replace(problem, images=images)
        for problem, images in zip(problems, others[::2], strict=True)
    ]
    prompts = [g.rollouts[0].prompt_ids for g in live.sample(swapped, n=1)]
    inputs = [(prompts[i // 2], ids, others[i]) for i, (_, ids) in enumerate(scored)]
    found = live.score(scored, others)
    assert live.gap("perturbed", inputs, found) < 1e-4
    assert worst(found, rollouts) > 1e-3, "another image must make a difference"
    chat = Chat(live.processor)
    text = [chat.prompt([p.prompt]) for p, _ in scored]
    inputs = [(np.asarray(t, np.int32), ids, ()) for t, (_, ids) in zip(text, scored, strict=True)]
    found = live.score(scored, [()] * len(scored))
    assert live.gap("perturbed", inputs, found) < 1e-4


def renewed_while_sampling(live: Live) -> list[Group]:
    """The original weights come while long responses are drawn under the perturbed ones."""
    problems, long = mixed_sizes(3), Sampling(max_tokens=300)
    waiting = [
        live.call("sample", SampleRequest(f"g{i}", p, 8, long), TASK)
        for i, p in enumerate(problems)
    ]
    live.sample(problems[:1], sampling=Sampling(max_tokens=4))  # by then the others have begun
    live.send("original", 1)
    return [live.wait(future, 300) for future in waiting]


@two_families
@pytest.mark.parametrize("around", [nullcontext, steps_in_flight])
def test_tokens_of_a_response_that_weights_came_into_are_of_the_weights_they_name(
    live: Live, around: Callable[..., AbstractContextManager[None]]
) -> None:
    live.send("perturbed", 0)
    with around(live):
        groups = renewed_while_sampling(live)
    assert any(len(set(r.versions.tolist())) > 1 for g in groups for r in g.rollouts)
    found = [r for g in groups for r in g.rollouts]
    inputs = [(r.prompt_ids, r.response_ids, r.images) for r in found]
    gaps = {
        which: np.concatenate(live.gaps(which, inputs, [r.logprobs for r in found]))
        for which in ("perturbed", "original")
    }
    versions = np.concatenate([r.versions for g in groups for r in g.rollouts])
    # Also where the text before a token was drawn under older weights.
    assert gaps["perturbed"][versions == 0].max(initial=0.0) < 1e-4
    assert gaps["original"][versions == 1].max() < 1e-4
    assert gaps["perturbed"][versions == 1].max() > 1e-2


@two_families
def test_scores_beside_sampling_and_through_weight_updates(live: Live) -> None:
    """Many at once, so that prompts are read in chunks and mixed with decoding."""
    problems = mixed_sizes(9)
    long = Sampling(max_tokens=90)
    live.send("perturbed", 0)
    scored, rollouts = drawn(live.sample(problems, n=4, sampling=long))
    images = [problem.images for problem, _ in scored]
    requests = [
        ScoreRequest(f"s{i}", problem, ids, images)
        for i, ((problem, ids), images) in enumerate(zip(scored, images, strict=True))
    ]
    sampling = [
        live.call("sample", SampleRequest(f"g{i}", problem, 4, long), TASK)
        for i, problem in enumerate(problems)
    ]
    scoring = [live.call("score", request) for request in requests]
    assert worst([live.wait(f, 300) for f in scoring], rollouts) < 1e-4
    assert live.learner_gap("perturbed", [live.wait(f, 300) for f in sampling]) < 1e-4

    live.send("original", 1)
    inputs = [(r.prompt_ids, r.response_ids, i) for r, i in zip(rollouts, images, strict=True)]
    assert live.gap("original", inputs, live.score(scored, images)) < 1e-4

    # An update in the middle: each request is wholly of the one version or of the other.
    scoring = [live.call("score", request) for request in requests]
    live.send("perturbed", 2)
    found = [live.wait(future, 300) for future in scoring]
    gaps = [live.gaps(which, inputs, found) for which in ("perturbed", "original")]
    for of_one in zip(*gaps, strict=True):
        new, old = (gap.max() for gap in of_one)
        assert min(new, old) < 1e-4 < max(new, old)
    assert worst(live.score(scored, images), rollouts) < 1e-4


@two_families
def test_what_cannot_be_scored_is_refused_and_the_rest_is_scored(live: Live) -> None:
    live.send("perturbed", 0)
    problem = mixed_sizes(1)[0]
    scored, rollouts = drawn(live.sample([problem], n=1, sampling=Sampling(max_tokens=500)))
    ids = rollouts[0].response_ids
    none = np.zeros(0, np.int32)
    (found,) = live.score([(problem, none)], [problem.images])
    assert found.shape == (0,) and found.dtype == np.float32
    # A response that fills the context to its last place, and one token more.
    room = 512 - len(rollouts[0].prompt_ids)
    text = next(int(i) for i in ids if i not in Chat(live.processor).placeholders)
    full = np.full(room, text, np.int32)
    (found,) = live.score([(problem, full)], [problem.images])
    assert live.gap("perturbed", [(rollouts[0].prompt_ids, full, problem.images)], [found]) < 1e-4
    with pytest.raises(SamplerError, match=rf"problem {problem.id}: .*512"):
        live.score([(problem, np.append(full, text))], [problem.images])
    for token in Chat(live.processor).placeholders:
        with pytest.raises(SamplerError, match=f"special token {token} before the last position"):
            live.score([(problem, np.array([text, token, text], np.int32))], [problem.images])
    for token in (10**6, -1):
        for odd in ([text, token], [token, text]):
            with pytest.raises(SamplerError, match=f"problem {problem.id}"):
                live.score([(problem, np.array(odd, np.int32))], [problem.images])
    # An image of more tokens than the context has is not made smaller on the way.
    if live.folder.name == "qwen3_vl":
        with pytest.raises(SamplerError, match="longer than the maximum model length of 512"):
            live.sample([picture(0, (512, 288))])
    assert worst(live.score(scored, [problem.images]), rollouts) < 1e-4


@on("qwen2_5_vl", "idefics3")
def test_two_updates_on_what_was_sampled_keep_sampler_and_learner_agreed(live: Live) -> None:
    policy, _ = load_policy(str(live.folder))
    live.weights["trained"] = policy
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    for version in (3, 4):
        live.send("trained", version)
        groups = live.sample(mixed_sizes(6))
        assert live.learner_gap("trained", groups) < 1e-4
        assert version == 3 or live.learner_gap("perturbed", groups) > 1e-2
        sequences = [
            TrainSequence(r.prompt_ids, r.response_ids, r.images, r.segments, r.logprobs, a)
            for g in groups
            for r in g.rollouts
            for a in [np.ones_like(r.logprobs)]
        ]
        logprobs, _ = policy.train().run(Collator(policy, live.processor)(sequences))
        optimizer.zero_grad()
        (-logprobs.mean()).backward()
        optimizer.step()


@on("qwen3_vl")
def test_a_request_to_one_that_sleeps_is_answered_under_the_weights_it_wakes_with(
    live: Live,
) -> None:
    """vLLM's own calls; on a CPU its worker frees nothing, and all else is as on a GPU."""
    live.send("original", 7)
    assert live.learner_gap("original", live.sample(mixed_sizes(2))) < 1e-4
    live.wait(live.call("sleep"), 60)
    asked = SampleRequest("slept", mixed_sizes(1)[0], 2, Sampling(max_tokens=40))
    answer = live.call("sample", asked, TASK)
    live.wait(live.call("ping"), 60)
    live.send("perturbed", 8)
    live.wait(live.call("ping"), 60)
    assert not answer.done(), "no request before the cache is there"
    live.wait(live.call("wake"), 60)
    group = live.wait(answer, 300)
    assert live.learner_gap("perturbed", [group]) < 1e-4 < live.learner_gap("original", [group])
    assert {int(v) for r in group.rollouts for v in r.versions} == {8}
    live.wait(live.call("sleep"), 60)
    live.wait(live.call("wake"), 60)  # with the weights that it slept with
    assert live.learner_gap("perturbed", live.sample(mixed_sizes(2))) < 1e-4


@two_families
def test_a_request_that_nobody_waits_for_any_more_is_dropped(live: Live) -> None:
    def do(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, live.loop).result(60)

    def unfinished() -> int:
        return int(live.do(lambda llm: llm.get_num_unfinished_requests()))

    problem = mixed_sizes(1)[0]
    do(live.engine._llm.pause())  # it would end by itself
    future = live.call("sample", SampleRequest("g0", problem, 4, Sampling(max_tokens=8)), TASK)
    until(lambda: unfinished() == 4, 60)
    future.cancel()
    until(lambda: not unfinished(), 60)
    do(live.engine._llm.resume())
    assert live.sample([problem])


@two_families
def test_a_failed_engine_is_told_to_all_who_wait_for_it(live: Live) -> None:
    """Ends the family's engine, so it is this module's last test."""
    problem = mixed_sizes(1)[0]
    held = threading.Event()

    def broken() -> None:
        raise MemoryError("no room for the next step")

    def hold(llm: Any) -> None:
        llm.engine_core.engine_core.step_fn = broken
        held.wait(60)

    # Held between two steps, it cannot answer: what follows is in flight for certain when it fails.
    holding = asyncio.run_coroutine_threadsafe(live.engine._llm.do(hold), live.loop)
    request = SampleRequest("g0", problem, 2, Sampling(max_tokens=8))
    waiting = [
        live.call("sample", request, TASK),
        live.call("score", ScoreRequest("s0", problem, np.asarray([300, 301]), problem.images)),
    ]
    with pytest.raises(TimeoutError):
        waiting[0].result(1)
    held.set()
    holding.result(60)
    for future in waiting:
        with pytest.raises(EngineDied, match="sampler-0: the engine failed: MemoryError: no room"):
            future.result(60)
    calls: list[tuple[Any, ...]] = [
        ("weight_checksums",), ("sample", request, TASK), ("begin_weight_update",), ("ping",)
    ]  # fmt: skip
    for method, *args in calls:
        with pytest.raises(EngineDied, match="MemoryError"):
            live.call(method, *args).result(60)
