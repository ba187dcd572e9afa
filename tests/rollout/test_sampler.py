"""The pool on a real local Ray: whatever becomes of a request, the others get their answers.

The first half uses actors that answer, raise, hang and die as they are told; the second a real
engine on a text-only language model, which no weight update reaches.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from learner.actor import LearnerGroup
from learner.weights import stored
from rewards.questions import BlindQuestions
from rewards.reader import Reader, readings
from rollout.decoding import encode
from rollout.dispatch import SamplerLost
from rollout.engine import SamplerError
from rollout.pool import SamplerPool
from rollout.record import Group, ReplyError, SampleRequest, Sampling, ScoreRequest, Weights
from rollout.sampler import RaySamplerClient, ray_samplers
from rollout.settings import ModelConfig, SamplerConfig
from rollout.tokens import Chat, ModelError, load_processor, load_reader
from rollout.transfer import fetched
from tasks.core import Problem
from tasks.load import load_task
from tasks.splits import draw_problem
from tests.support.light_sampler import LightSampler
from tests.support.prose import LabelledProse, prose, says
from tests.support.ray_heads import local_ray
from tests.support.surrogate_groups import rollout_of
from tests.support.waiting import until

TASK = load_task("graph_coloring")
ONE = np.zeros(1, np.int32)


@pytest.fixture(scope="module", autouse=True)
def ray_is_up() -> Iterator[None]:
    with local_ray(cpus=2):
        yield


def problems(count: int) -> list[Problem]:
    spec = TASK.spec(vertices=4, canvas=64, layout="circle", label_size=0, prompt="brief")
    return [draw_problem(TASK, spec, "train", 5, i) for i in range(count)]


@ray.remote(num_cpus=0)
class Rank:
    """A learner's rank, as far as publishing goes: three buckets, one tensor each."""

    def __init__(self, fails: bool) -> None:
        self._fails = fails

    def publish_weights(self) -> Iterator[Any]:
        def groups() -> Iterator[tuple[list[str], list[torch.Tensor]]]:
            for place in range(3):
                if self._fails and place:
                    raise ValueError("out of cheese")
                yield [f"layer.{place}"], [torch.full((2**18,), float(place))]

        yield from stored(groups())

    def gather_weights(self) -> None:
        time.sleep(3600 if self._fails else 0)  # in a collective that its peer has left

    def pid(self) -> int:
        return os.getpid()


@ray.remote(num_cpus=0)
class Fetches:
    """A sampler's end without an engine."""

    async def renew(self, weights: Weights) -> dict[str, float]:
        found = {}
        async for held, update in fetched(weights, "sampler-0"):
            data = np.fromfile(update["path"], np.float32)
            os.close(held)
            ((name, dtype, shape, start),) = update["tensors"]
            assert (dtype, shape, start, len(data)) == ("float32", [2**18], 0, 2**18)
            found[name] = float(data.max())
        return found


def learner(fails: bool) -> LearnerGroup:
    """Two ranks of a learner that only publish."""
    group = object.__new__(LearnerGroup)
    group._ranks = [Rank.remote(fails), Rank.remote(fails)]  # type: ignore[attr-defined]
    setup: Any = SimpleNamespace(learner=SimpleNamespace(timeout_seconds=60.0))
    group._setup = setup
    return group


def test_what_was_published_is_fetched_from_a_learner_that_is_stopped_and_then_gone() -> None:
    group = learner(fails=False)
    weights = group.publish_weights(3)
    assert weights.version == 3 and [p.name for b in weights.manifest for p in b] == [
        "layer.0",
        "layer.1",
        "layer.2",
    ]
    pid = ray.get(group._ranks[0].pid.remote())
    for blow in (signal.SIGSTOP, signal.SIGKILL):
        os.kill(pid, blow)
        found = ray.get(Fetches.remote().renew.remote(weights), timeout=60)  # type: ignore[attr-defined]
        assert found == {"layer.0": 0.0, "layer.1": 1.0, "layer.2": 2.0}


def test_a_rank_that_fails_while_it_publishes_is_told_though_the_others_wait_for_it() -> None:
    group, begun = learner(fails=True), time.monotonic()
    with pytest.raises(ValueError, match="out of cheese"):
        group.publish_weights(3)
    assert time.monotonic() - begun < 50
    for rank in group._ranks:
        ray.kill(rank)


LIMITS = SamplerConfig(
    max_num_seqs=8, start_timeout_seconds=300, request_timeout_seconds=300, max_restarts=2
)


@contextlib.contextmanager
def told(count: int, limits: SamplerConfig = LIMITS) -> Iterator[SamplerPool]:
    pool = SamplerPool(
        lambda name: RaySamplerClient(name, LightSampler.remote(name)), count, limits, "told"
    )
    try:
        pool.wait_ready(300)
        yield pool
    finally:
        pool.stop()


def asked(*ids: str) -> list[ScoreRequest]:
    (problem,) = problems(1)
    return [ScoreRequest(name, problem, ONE, ()) for name in ids]


def kinds(replies: Sequence[Any]) -> list[Any]:
    """A score as its number, an error as its kind."""
    return [r.kind if isinstance(r, ReplyError) else -float(r[0]) for r in replies]


def cancelled(pool: SamplerPool, *ids: str) -> None:
    """Wait until none of these calls runs in the one sampler any more."""

    def over() -> bool:
        (client,) = pool.clients
        begun, ended = ray.get(client.call("log"))
        return not (set(begun) - set(ended)) & set(ids)

    until(over, 30, "still running")


def test_replies_come_in_order_and_a_refusal_spoils_nothing() -> None:
    requests = asked(*(f"ok-{i}" for i in range(7)), "refuse-0", "crash-0", "ok-9")
    with told(2) as pool:
        replies = pool.answer(requests, 60)
        assert kinds(replies) == [*range(7), "refused", "refused", 9]
        refused, crashed = replies[7:9]
        assert isinstance(refused, ReplyError) and refused.request_id == "refuse-0"
        assert refused.message.endswith("SamplerError: problem p: too long")
        assert isinstance(crashed, ReplyError) and "KeyError" in crashed.message
        assert pool.answer([], 60) == []
        assert pool.counts()["refused"] == 2 and pool.counts()["restarts"] == 0


def test_what_hangs_is_late_and_is_cancelled() -> None:
    with told(1) as pool:
        for seconds in (2.0, 20.0, 200.0):  # a busy machine may be late with all four
            replies = pool.answer(asked("hang-0", "ok-1", "hang-2", "ok-3"), seconds)
            if not any(isinstance(replies[i], ReplyError) for i in (1, 3)):
                break
        assert kinds(replies) == ["deadline", 1, "deadline", 3]
        late = replies[0]
        assert isinstance(late, ReplyError) and late.message == "told-0: no answer in time"
        cancelled(pool, "hang-0", "hang-2")
        assert kinds(pool.answer(asked("ok-4"), 60)) == [4]


def test_a_sampler_that_does_not_listen_costs_the_deadline_and_then_drops_what_was_late(
    tmp_path: Path,
) -> None:
    with told(1) as pool:
        busy = pool.clients[0].call("answer", asked(f"block-{tmp_path}")[0])
        until((tmp_path / "begun").exists, 120)
        replies = pool.answer(asked("hang-1", "hang-2"), 0.5)
        assert kinds(replies) == ["deadline", "deadline"]
        assert not ray.wait([busy], timeout=0)[0], "the answer came while the sampler was busy"
        (tmp_path / "end").touch()
        assert kinds(pool.answer(asked("ok-3"), 60)) == [3]
        cancelled(pool, "hang-1", "hang-2")


@pytest.mark.parametrize("how", ["exit", "dead", "garbage"])
def test_what_a_lost_sampler_had_is_asked_again(how: str, tmp_path: Path) -> None:
    """`exit` ends the process, `dead` says that its engine is; once each, by a file's word."""
    with told(2) as pool:
        first = {client.name: client for client in pool.clients}
        requests = asked(f"{how}-{tmp_path}", "ok-1", "slow-2", "ok-3", "ok-4", "ok-5")
        assert kinds(pool.answer(requests, 60)) == [0, 1, 2, 3, 4, 5]
        cause = {"exit": "actor", "dead": "engine"}.get(how, how)
        counts = pool.counts()
        assert counts["restarts"] == counts[f"restarts/{cause}"] == 1
        pool.wait_ready(60)
        now = {client.name: client for client in pool.clients}
        assert [first[name] is now[name] for name in ("told-0", "told-1")] == [False, True]


def test_a_pool_past_hope_says_so_to_everyone_and_names_sampler_and_cause() -> None:
    with told(1) as pool:
        (reply,) = pool.answer(asked("dead-"), 60)
        assert isinstance(reply, ReplyError) and reply.kind == "sampler_died"
        says = r"'told-0' failed 3 times .* told-0: the engine's process died"
        assert re.search(says, reply.message)
        with pytest.raises(SamplerLost, match=says):
            pool.sample([SampleRequest("g", problems(1)[0], 1, Sampling())])


def test_a_stopped_process_is_seen_by_its_silence_and_replaced() -> None:
    # A busy machine may keep the other silent as well: it is then replaced too.
    limits = LIMITS.model_copy(update={"heartbeat_seconds": 4.0, "max_restarts": 20})
    with told(2, limits) as pool:
        pid = ray.get(pool.clients[0].call("pid"))
        requests = [SampleRequest(f"slow-{i}", problems(1)[0], 1, Sampling()) for i in range(6)]
        os.kill(pid, signal.SIGSTOP)  # first, or all might be answered before it
        pool.submit(requests)
        groups = pool.collect(6, 120)
        assert sorted(g.group_id for g in groups) == [r.group_id for r in requests]
        assert pool.counts()["restarts/silent"] >= 1 and pool.pending() == 0
        zombie = psutil.STATUS_ZOMBIE
        until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == zombie, 30)


@pytest.fixture(scope="module")
def frozen(tiny_text_model: Path) -> Iterator[SamplerPool]:
    model = ModelConfig(path=str(tiny_text_model), max_model_len=256)
    settings = LIMITS.model_copy(update={"max_restarts": 0, "start_timeout_seconds": 300.0})
    pool = SamplerPool(ray_samplers(model, settings, frozen=True), 1, settings, "frozen")
    pool.wait_ready(300)
    yield pool
    pool.stop()


def test_a_text_only_model_answers_without_an_image(
    frozen: SamplerPool, tiny_text_model: Path
) -> None:
    from transformers import AutoModelForCausalLM

    asked = problems(3)
    blind = Sampling(max_tokens=30)
    requests = [
        SampleRequest(f"g{i}", p, 2, blind, "blind", "none", "<perception>\n")
        for i, p in enumerate(asked)
    ]
    replies = frozen.answer(requests, 120)
    groups = [reply for reply in replies if isinstance(reply, Group)]
    assert [g.group_id for g in groups] == ["g0", "g1", "g2"]
    reader = load_reader(str(tiny_text_model))
    model = AutoModelForCausalLM.from_pretrained(tiny_text_model).eval()
    for group in groups:
        prompt = Chat(reader).prompt([group.problem.prompt])
        for rollout in group.rollouts:
            assert rollout.prompt_ids.tolist() == prompt + encode(reader, "<perception>\n")
            assert rollout.prefix == "<perception>\n" and rollout.sampler == "frozen-0"
            ids = torch.as_tensor(np.concatenate([rollout.prompt_ids, rollout.response_ids]))
            with torch.no_grad():
                logits = model(ids[None].long()).logits[0, len(rollout.prompt_ids) - 1 : -1]
            expected = logits.log_softmax(-1).numpy()
            expected = expected[np.arange(len(expected)), rollout.response_ids]
            assert np.abs(expected - rollout.logprobs).max() < 1e-4
    # Scoring prefix and response together is scoring the same text.
    forced = np.asarray(encode(reader, "<perception>\n"), np.int32)
    rollouts = [(g.problem, r) for g in groups for r in g.rollouts]
    scores = frozen.answer(
        [
            ScoreRequest(r.rollout_id, p, np.concatenate([forced, r.response_ids]), ())
            for p, r in rollouts
        ],
        120,
    )
    for score, (_, rollout) in zip(scores, rollouts, strict=True):
        assert isinstance(score, np.ndarray)
        assert np.abs(score[len(forced) :] - rollout.logprobs).max() < 1e-4


@pytest.mark.parametrize("place", ["prompt", "prefix"])
def test_a_text_only_model_reads_what_others_wrote(frozen: SamplerPool, place: Any) -> None:
    task, problem = load_task(LabelledProse.name), prose(7, LabelledProse, lambda n: f"{n} dots")
    texts = (says("7 <image> dots<|im_end|>", 14), says("8", 16), "unreadable")
    rollouts = tuple(rollout_of(task, text, i) for i, text in enumerate(texts))
    (found,) = readings(Reader("reader", place, 8), frozen, [(task, Group("g", problem, rollouts))])
    # A random model answers nothing right, and was asked all the same.
    assert found is not None and found.sufficient.tolist() == [False] * 3
    assert (found.blind, found.ceiling) == (False, False)
    term = BlindQuestions(place=place, max_tokens=8, floor="keep")
    group = Group("g", problem, rollouts)
    replies = frozen.answer(term.ask(task, group, None), 120)
    assert term.score(task, group, replies) == {"value": [0.0] * 3}  # type: ignore[arg-type]


def test_a_text_only_model_refuses_images_and_a_frozen_one_updates(frozen: SamplerPool) -> None:
    (problem,) = problems(1)
    long = replace(problem, prompt="a b c " * 200)
    special = replace(problem, prompt="<|im_end|>")  # as any other text
    good = ScoreRequest("good", problem, np.arange(50, 60, dtype=np.int32), ())
    replies = frozen.answer(
        [
            SampleRequest("shown", problem, 1, Sampling()),
            replace(good, request_id="image", images=problem.images),
            SampleRequest("long", long, 1, Sampling(), view="none"),
            replace(good, request_id="special", problem=special),
            good,
        ],
        120,
    )
    assert [getattr(reply, "kind", "answered") for reply in replies] == ["refused"] * 3 + [
        "answered"
    ] * 2
    messages = [reply.message for reply in replies if isinstance(reply, ReplyError)]
    assert all('text-only model and cannot be shown an image; ask it with view "none"' in m
               for m in messages[:2])  # fmt: skip
    assert f"problem {problem.id}: " in messages[2] and "256" in messages[2]
    (client,) = frozen.clients
    with pytest.raises(SamplerError, match="frozen-0: a frozen model takes no weight updates"):
        client.wait(client.call("begin_weight_update"), 60)
    assert isinstance(frozen.answer([good], 120)[0], np.ndarray)


def test_readers_of_policies_and_of_frozen_models(
    tiny_text_model: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"model\.path: .* image processor"):
        load_processor(str(tiny_text_model))
    for folder in tiny_models.values():
        assert hasattr(load_reader(str(folder)), "image_processor")
    with pytest.raises(ModelError, match=r"frozen model: .* no config\.json in .*"):
        load_reader(str(tmp_path))
    reader = load_reader(str(tiny_text_model))
    with pytest.raises(ModelError, match=r"frozen model: .* has no chat template"):
        reader.chat_template = None
        reader.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_bytes((tiny_text_model / "config.json").read_bytes())
        load_reader(str(tmp_path))


def test_a_sampler_that_is_killed_takes_its_engine_along(frozen: SamplerPool) -> None:
    """The last test with this engine. Only processes below this one are looked at."""
    (problem,) = problems(1)
    samplers = []
    for process in psutil.Process().children(recursive=True):
        # One that has ended meanwhile is not the one looked for.
        with contextlib.suppress(psutil.Error):
            if "ray::Sampler" in " ".join(process.cmdline()):
                samplers.append(process)
    (sampler,) = samplers
    below = sampler.children(recursive=True)
    slow = SampleRequest("slow", problem, 64, Sampling(max_tokens=180), view="none")
    sampler.kill()
    replies = frozen.answer(
        [slow, ScoreRequest("s", problem, np.array([70, 71], np.int32), ())], 60
    )
    assert [getattr(reply, "kind", "answered") for reply in replies] == ["sampler_died"] * 2
    assert "frozen-0: ActorDiedError" in replies[1].message  # type: ignore[union-attr]
    assert not psutil.wait_procs([sampler, *below], timeout=60)[1]
