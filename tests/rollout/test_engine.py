"""The engine against the learner: same weights, same tokens, same log-probs, on real vLLM.

One engine a family serves the whole module; it is started from *perturbed* weights, so that a
transfer of the original ones has something to change and a way back to compare with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from learner.lora import Adapters, AdapterWeights
from learner.parts import freeze
from learner.policy import load_policy
from learner.settings import LoraConfig
from learner.weights import GatheredWeights
from rollout.engine import EngineDied, SamplerError
from rollout.record import SampleRequest, Sampling, ScoreRequest
from rollout.tokens import Chat, encode, special_tokens
from rollout.transfer import HostSender, WeightTransferError
from tasks.core import SEGMENTS
from tests.support.live_engine import (
    TASK,
    Live,
    PolicyWeights,
    drawn,
    mixed_sizes,
    perturbed_engine,
    worst,
)

FAMILIES = ("qwen3_vl", "internvl")


@pytest.fixture(scope="module", params=FAMILIES)
def live(
    request: pytest.FixtureRequest,
    tiny_models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Live]:
    yield from perturbed_engine(tiny_models[request.param], tmp_path_factory)


def test_log_probs_agree_over_images_of_different_sizes(live: Live) -> None:
    live.send("perturbed", 0)
    groups = live.sample(mixed_sizes(9), n=4)
    assert live.learner_gap("perturbed", groups) < 1e-4
    # And the comparison can fail: other weights give other log-probs.
    assert live.learner_gap("original", groups) > 1e-2


def test_a_transfer_changes_what_the_engine_holds_and_the_way_back_is_exact(live: Live) -> None:
    problems = mixed_sizes(6)
    live.send("perturbed", 0)
    live.sample(problems)
    assert live.checksums() == live.first_checksums
    live.send("original", 1)
    checksums = live.checksums()
    assert checksums.keys() == live.first_checksums.keys()
    changed = [name for name in checksums if checksums[name] != live.first_checksums[name]]
    # The CPU backend keeps packed linear layers outside the parameters, so their checksums say
    # nothing; embeddings and norms do, and the log-probs below speak for everything.
    assert any("embed_tokens" in name for name in changed)
    assert sum("norm" in name for name in changed) > 10
    # The same images again: features that a trained tower made stale would show here.
    groups = live.sample(problems)
    assert live.learner_gap("original", groups) < 1e-4
    assert all((r.versions == 1).all() for g in groups for r in g.rollouts)
    live.send("perturbed", 2)
    assert live.checksums() == live.first_checksums


class OutOfCheese:
    """A sampler that fails in its third bucket."""

    name = "sampler-1"

    def __init__(self) -> None:
        self.buckets = 0

    def call(self, method: str, *args: Any) -> None:
        self.buckets += method == "load_weights"

    def wait(self, future: Any, seconds: float) -> None:
        if self.buckets == 3:
            raise ValueError("out of cheese")


def test_a_transfer_that_another_sampler_failed_is_made_again(live: Live) -> None:
    problems = mixed_sizes(2)
    source = PolicyWeights(live.weights["original"])
    with pytest.raises(WeightTransferError, match="'sampler-1' failed in load_weights") as failed:
        HostSender([live, OutOfCheese()], 60).send(source, 1, rank=0)
    assert failed.value.sampler == "sampler-1"
    # Asked while some weights are newer than others, drawn when all are.
    waiting = live.call("sample", SampleRequest("g", problems[0], 2, Sampling(max_tokens=9)), TASK)
    live.send("original", 1)
    groups = [live.wait(waiting, 300), *live.sample(problems)]
    assert live.learner_gap("original", groups) < 1e-4
    live.send("perturbed", 2)
    assert live.checksums() == live.first_checksums
    assert live.wait(live.call("ping"), 60) is None


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
    problems = mixed_sizes(6)
    live.send("perturbed", 0)
    live.sample(problems)  # fills the caches of what the older vision tower saw
    source = AdapterWeights(adapters, lambda _: nullcontext(), torch.float32)
    for version in (1, 2):
        # The second time the engine must not add to what the first time left.
        report = HostSender([live], 60).send(source, version, rank=0)
        assert report is not None
        assert report.bytes == 4 * 3 * sum(sum(shape) for shape in adapters.layers.values())
        groups = live.sample(problems, n=4)
        assert live.learner_gap("adapted", groups) < 1e-4
        assert live.learner_gap("perturbed", groups) > 1e-2
        assert all((r.versions == version).all() for g in groups for r in g.rollouts)
    # And the way back, by whole weights.
    live.send("perturbed", 3)
    assert live.checksums() == live.first_checksums


def test_what_is_frozen_is_not_sent_and_the_engine_is_right_all_the_same(live: Live) -> None:
    policy, _ = load_policy(str(live.folder))
    freeze(policy, ("vision", "*.layers.1.*", "*.layers.2.self_attn.q_proj.*"))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    live.weights["trained"] = policy
    live.send("perturbed", 0)
    alone = GatheredWeights(policy.model, nullcontext, torch.float32)
    sizes = [sum(t.nbytes for t in tensors) for _, tensors in alone.iter_groups()]
    half = sum(sizes) // 2
    source = GatheredWeights(policy.model, nullcontext, torch.float32, bucket_bytes=half)
    report = HostSender([live], 60).send(source, 1, rank=0)
    assert report is not None
    assert report.bytes == sum(sizes) and 1 < report.groups < len(sizes)
    assert report.largest_group_bytes <= max(half, *sizes)
    assert report.bytes < 0.9 * sum(4 * p.numel() for p in policy.model.parameters())
    groups = live.sample(mixed_sizes(6), n=4)
    assert live.learner_gap("trained", groups) < 1e-4
    assert live.learner_gap("perturbed", groups) > 1e-2
    live.send("perturbed", 2)
    assert live.checksums() == live.first_checksums


def test_what_a_group_draws_hangs_on_its_id_and_not_on_its_company(live: Live) -> None:
    """More prompts than are read at once: on a CPU a seeded one must not be read in pieces."""
    problems = mixed_sizes(96)
    live.send("perturbed", 0)
    crowd = live.sample(problems, n=2)
    assert sum(len(g.rollouts[0].prompt_ids) for g in crowd) > 2 * 2048
    for first, again in zip(crowd, live.sample(problems[:3], n=2), strict=False):
        for one, other in zip(first.rollouts, again.rollouts, strict=True):
            assert np.array_equal(one.response_ids, other.response_ids)
    # Responses of one group, and groups of one problem, are draws of their own.
    twice = live.sample([problems[0], problems[0]], n=4)
    assert len({tuple(r.response_ids) for g in twice for r in g.rollouts}) == 8


def test_oracle_rollouts_start_after_the_true_perception(live: Live) -> None:
    problem = mixed_sizes(1)[0]
    live.send("perturbed", 0)
    (group,) = live.sample([problem], kind="oracle")
    prefix = encode(live.processor.tokenizer, TASK.oracle_prefix(problem))
    for rollout in group.rollouts:
        assert rollout.prompt_ids[-len(prefix) :].tolist() == prefix
        assert rollout.prefix == TASK.oracle_prefix(problem)
        assert rollout.parsed == TASK.parse(rollout.prefix + rollout.text)
        assert not (rollout.segments == SEGMENTS.index("perception")).any()
    assert live.learner_gap("perturbed", [group]) < 1e-4


def test_views_without_the_image(live: Live) -> None:
    problem = mixed_sizes(1)[0]
    live.send("perturbed", 0)
    greedy = Sampling(temperature=0.0, max_tokens=8)
    image_token = live.weights["original"].model.config.image_token_id  # type: ignore[union-attr]
    counts = {}
    for view in ("shown", "blank", "none"):
        kind = "free" if view == "shown" else "blind"
        (group,) = live.sample([problem], n=1, kind=kind, view=view, sampling=greedy)
        rollout = group.rollouts[0]
        counts[view] = int((rollout.prompt_ids == image_token).sum())
    assert counts["shown"] == counts["blank"] > 0
    assert counts["none"] == 0


def test_greedy_is_deterministic_and_placeholders_only_end_a_response(live: Live) -> None:
    problems = mixed_sizes(3)
    live.send("perturbed", 0)
    greedy = Sampling(temperature=0.0, max_tokens=24)
    first, second = (live.sample(problems, n=1, sampling=greedy) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.rollouts[0].response_ids.tolist() == b.rollouts[0].response_ids.tolist()
    # Padding stands for nothing: a policy that samples it does no harm.
    tokenizer = live.processor.tokenizer
    specials = set(special_tokens(tokenizer)) - {tokenizer.pad_token_id}
    for group in live.sample(problems, n=8, sampling=Sampling(temperature=2.0, max_tokens=60)):
        for rollout in group.rollouts:
            assert not specials & set(rollout.response_ids[:-1].tolist())


def test_a_forced_prefix_is_what_the_response_goes_on_from(live: Live) -> None:
    problem = mixed_sizes(1)[0]
    live.send("perturbed", 0)
    tokenizer = live.processor.tokenizer
    given = TASK.oracle_prefix(problem) + "<reasoning>\nr1"
    (seen,) = live.sample([problem], kind="oracle", prefix=given)
    (blind,) = live.sample([problem], kind="blind", view="none", prefix="<perception>\n1-2\n")
    for group, prefix in (
        (seen, given),
        (blind, "<perception>\n1-2\n"),
    ):
        shown = group is seen
        ids = encode(tokenizer, prefix)
        prompt = Chat(live.processor).prompt(problem.prompt, with_image=shown)
        for rollout in group.rollouts:
            assert rollout.prefix == prefix
            assert rollout.prompt_ids[-len(ids) :].tolist() == ids
            assert rollout.parsed == TASK.parse(prefix + rollout.text)
            assert shown or rollout.prompt_ids.tolist() == prompt + ids
    assert live.learner_gap("perturbed", [seen, blind]) < 1e-4


def test_a_special_token_spelled_out_in_a_prefix_stays_text(live: Live) -> None:
    problem = mixed_sizes(1)[0]
    specials = special_tokens(live.processor.tokenizer)
    live.send("perturbed", 0)
    (plain,) = live.sample([problem])
    hostile = "<perception>\n" + "".join(specials.values())
    (group,) = live.sample([problem], prefix=hostile)
    count = len(plain.rollouts[0].prompt_ids)
    for rollout in group.rollouts:
        assert rollout.prompt_ids[:count].tolist() == plain.rollouts[0].prompt_ids.tolist()
        assert not set(specials) & set(rollout.prompt_ids[count:].tolist())
        decoded = live.processor.tokenizer.decode(rollout.prompt_ids[count:].tolist())
        assert decoded == hostile == rollout.prefix
    assert live.learner_gap("perturbed", [group]) < 1e-4


def test_scores_are_the_rollouts_own_log_probs(live: Live) -> None:
    live.send("perturbed", 0)
    problems = mixed_sizes(9)
    scored, rollouts = drawn(live.sample(problems, n=8, sampling=Sampling(max_tokens=90)))
    images = [problem.image for problem, _ in scored]
    found = live.score(scored, images)
    assert worst(found, rollouts) < 1e-4
    # Again: nothing that scoring itself left in a cache changes what it says.
    assert worst(live.score(scored, images), rollouts) < 1e-4
    # Among them are responses that end in a placeholder, which must not become an image.
    last = {int(ids[-1]) for _, ids in scored}
    image_token = live.weights["original"].model.config.image_token_id  # type: ignore[union-attr]
    assert last & set(Chat(live.processor).placeholders)
    forced = [(p, np.append(ids[:-1], image_token).astype(np.int32)) for p, ids in scored[:9]]
    inputs = [(r.prompt_ids, ids, p.image) for (p, ids), r in zip(forced, rollouts, strict=False)]
    assert live.gap("perturbed", inputs, live.score(forced, images[:9])) < 1e-4


def test_scores_under_another_image_and_under_none(live: Live) -> None:
    live.send("perturbed", 0)
    problems = mixed_sizes(6)
    groups = live.sample(problems)
    scored, rollouts = drawn(groups)
    others = [problems[(i // 2 + 1) % 6].image for i in range(len(scored))]
    swapped = [
        replace(problem, image=image) for problem, image in zip(problems, others[::2], strict=True)
    ]
    prompts = [g.rollouts[0].prompt_ids for g in live.sample(swapped, n=1)]
    inputs = [(prompts[i // 2], ids, others[i]) for i, (_, ids) in enumerate(scored)]
    found = live.score(scored, others)
    assert live.gap("perturbed", inputs, found) < 1e-4
    assert worst(found, rollouts) > 1e-3, "another image must make a difference"
    chat = Chat(live.processor)
    text = [chat.prompt(p.prompt, with_image=False) for p, _ in scored]
    inputs = [
        (np.asarray(t, np.int32), ids, None) for t, (_, ids) in zip(text, scored, strict=True)
    ]
    found = live.score(scored, [None] * len(scored))
    assert live.gap("perturbed", inputs, found) < 1e-4


def test_scores_beside_sampling_and_through_weight_updates(live: Live) -> None:
    """Many at once, so that prompts are read in chunks and mixed with decoding."""
    problems = mixed_sizes(9)
    long = Sampling(max_tokens=120)
    live.send("perturbed", 0)
    scored, rollouts = drawn(live.sample(problems, n=8, sampling=long))
    images = [problem.image for problem, _ in scored]
    requests = [
        ScoreRequest(f"s{i}", problem, ids, image)
        for i, ((problem, ids), image) in enumerate(zip(scored, images, strict=True))
    ]
    sampling = [
        live.call("sample", SampleRequest(f"g{i}", problem, 8, long), TASK)
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
    for index, future in enumerate(scoring):
        found = live.wait(future, 300)
        new, old = (
            live.gap(which, [inputs[index]], [found]) for which in ("perturbed", "original")
        )
        assert min(new, old) < 1e-4 < max(new, old)
    assert worst(live.score(scored, images), rollouts) < 1e-4


def test_what_cannot_be_scored_is_refused_and_the_rest_is_scored(live: Live) -> None:
    live.send("perturbed", 0)
    problem = mixed_sizes(1)[0]
    scored, rollouts = drawn(live.sample([problem], n=1, sampling=Sampling(max_tokens=500)))
    ids = rollouts[0].response_ids
    none = np.zeros(0, np.int32)
    (found,) = live.score([(problem, none)], [problem.image])
    assert found.shape == (0,) and found.dtype == np.float32
    # A response that fills the context to its last place, and one token more.
    room = 512 - len(rollouts[0].prompt_ids)
    text = next(int(i) for i in ids if i not in Chat(live.processor).placeholders)
    full = np.full(room, text, np.int32)
    (found,) = live.score([(problem, full)], [problem.image])
    assert live.gap("perturbed", [(rollouts[0].prompt_ids, full, problem.image)], [found]) < 1e-4
    with pytest.raises(SamplerError, match=rf"problem {problem.id}: .*512"):
        live.score([(problem, np.append(full, text))], [problem.image])
    for token in Chat(live.processor).placeholders:
        with pytest.raises(SamplerError, match=f"special token {token} before the last place"):
            live.score([(problem, np.array([text, token, text], np.int32))], [problem.image])
    for token in (10**6, -1):
        for odd in ([text, token], [token, text]):
            with pytest.raises(SamplerError, match=f"problem {problem.id}"):
                live.score([(problem, np.array(odd, np.int32))], [problem.image])
    assert worst(live.score(scored, [problem.image]), rollouts) < 1e-4


def test_a_dead_engine_is_told_to_all_who_wait_for_it(live: Live) -> None:
    """Ends the family's engine, so it is this module's last test."""
    problem = mixed_sizes(1)[0]
    cores = [
        process
        for process in psutil.Process().children(recursive=True)
        if "VLLM::EngineCore" in " ".join(process.cmdline())
    ]
    assert len(cores) == 1
    # Stopped, it cannot answer: what follows is in flight for certain when it dies.
    cores[0].suspend()
    request = SampleRequest("g0", problem, 2, Sampling(max_tokens=8))
    waiting = [
        live.call("weight_checksums"),
        live.call("sample", request, TASK),
        live.call("score", ScoreRequest("s0", problem, np.asarray([300, 301]), problem.image)),
        live.call("begin_weight_update"),
    ]
    with pytest.raises(TimeoutError):
        waiting[0].result(2)
    cores[0].kill()
    for future in waiting:
        with pytest.raises(EngineDied, match="sampler-0: the engine's process died"):
            future.result(60)
    for method, args in (("weight_checksums", ()), ("sample", (request, TASK))):
        with pytest.raises(EngineDied):
            live.call(method, *args).result(60)
