"""What benchmarks make up: rollouts that are a mixture, samplers that a real pool can work with,
policies that never end; and that what they find lands where it is looked for."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import judge_replies, machine, scaling, soak, tables
from benchmarks.driver_ceiling import Driver
from benchmarks.learner_memory import kept_by_a_layer, storage, tensors_in
from benchmarks.memory_that_fits import configs, folders, parameters, row
from benchmarks.policies import SHIPPED, SIZES, never_end, sized_model
from benchmarks.race import schedule
from benchmarks.score_rollouts import GROUP, TASKS, made_up
from cluster.recipe.memory import KNOWN_POLICIES, PolicySize
from rewards.diagnosis import diagnose
from rewards.judge import Judge
from rollout.record import Group
from rollout.tokens import Chat, load_processor
from tasks.core import DataError
from tasks.load import load_task
from tasks.scenes_things import OPENMOJI
from tests.support.judge_server import Reply, Server, gives, says


def test_made_up_rollouts_are_a_mixture_and_the_same_for_a_seed() -> None:
    groups = made_up(12, seed=3)
    assert {g.problem.task for g in groups} == set(TASKS)
    found = [diagnose(load_task(g.problem.task), g) for g in groups]
    for truth in ([d.a for d in found], [d.a_p for d in found]):
        assert 0.1 < np.concatenate(truth).mean() < 0.9
    assert any(d.defects[i] for d in found for i in range(GROUP))
    assert all(len(r.segments) == len(r.response_ids) for g in groups for r in g.rollouts)
    again = [r.text for g in made_up(12, seed=3) for r in g.rollouts]
    assert again == [r.text for g in groups for r in g.rollouts]


@pytest.fixture(scope="module")
def templates() -> list[Group]:
    return made_up(8, seed=1)


@pytest.mark.parametrize("in_flight", ["keep", "abort", "wait"])
@pytest.mark.parametrize("order", ["problem", "completion"])
def test_the_real_pool_and_the_stream_keep_the_bound_in_real_time(
    templates: list[Group], in_flight: str, order: str
) -> None:
    driver = Driver(3, 1, order, [0.002, 0.03, 0.006], templates, in_flight)
    used, lags = [], set()
    for _ in range(8):
        version = driver.version
        driver.step(0.02)
        used += [group.group_id for group in driver.groups]
        lags |= {version - int(r.versions.min()) for g in driver.groups for r in g.rollouts}
    counts = driver.stream.metrics()
    driver.stop()
    assert len(used) == len(set(used)) == 8 * 3 * 8
    assert lags <= {0, 1} and counts["buffer/dropped"] == 0
    if order == "problem":
        steps = [int(name.split("/")[0].removeprefix("step-")) for name in used]
        assert steps == sorted(steps)


def test_memory_behind_tensors_is_counted_once_however_many_look_at_it() -> None:
    flat, other = torch.zeros(1000), torch.zeros(10, dtype=torch.bfloat16)
    held = {"a": [flat[:400], flat[400:].view(20, 30)], "b": {"c": (other, 3, "x")}}
    assert len(list(tensors_in(held))) == 3
    assert storage(tensors_in(held)) == 4 * 1000 + 2 * 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_what_the_dry_run_counts(dtype: torch.dtype) -> None:
    """In every shape, so that each of its terms counts: width, MLP, queries, keys."""
    exact = dtype == torch.float32
    for shape in ((256, 512, 256, 128), (256, 1024, 256, 128), (256, 512, 512, 256), (512,) * 4):
        size = PolicySize(0, shape[0], 1, 0, *shape[1:])
        told = dtype.itemsize * size.kept_by_a_layer(exact)
        assert kept_by_a_layer(size, dtype) == pytest.approx(told, rel=0.01)
        assert kept_by_a_layer(size, dtype, again=True) == dtype.itemsize * size.hidden


def test_known_policies_are_of_the_shapes_that_were_published() -> None:
    made = configs()
    assert made.keys() == KNOWN_POLICIES.keys()
    for name, size in KNOWN_POLICIES.items():
        text = made[name].text_config
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        assert size == PolicySize(
            parameters=parameters(made[name]),
            hidden=text.hidden_size,
            layers=text.num_hidden_layers,
            vocabulary=text.vocab_size,
            inner=text.intermediate_size,
            queries=text.num_attention_heads * head,
            keys=text.num_key_value_heads * head,
        ), name


def test_the_table_of_what_fits_is_of_todays_estimate() -> None:
    text = (Path(__file__).parents[1] / "docs" / "capacity.md").read_text("utf-8")
    with folders():
        assert row("Qwen/Qwen3-VL-2B-Instruct", 2) in text.splitlines()


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_a_policy_that_never_ends_gives_special_tokens_no_chance(size: str) -> None:
    chat, model = Chat(load_processor(str(SHIPPED))), sized_model(str(SHIPPED), size, seed=1)
    special = sorted(chat.tokenizer.added_tokens_decoder)
    assert {*chat.ends, *chat.placeholders} <= set(special)
    ordinary = np.setdiff1d(np.arange(len(chat.tokenizer)), special)
    ids = torch.tensor(np.random.default_rng(0).choice(ordinary, (4, 30)))
    ids[:, :9] = torch.tensor(chat.prompt(["Say what you see."])[:9])

    def chance() -> float:
        return float(model(input_ids=ids).logits[:, -20:].softmax(-1)[..., special].sum(-1).max())

    assert chance() > 1e-3
    never_end(model, special)
    assert chance() < 1e-20
    # And it is no policy that says one thing only.
    logprobs = model(input_ids=ids).logits[:, -1].log_softmax(-1)
    assert -(logprobs.exp() * logprobs).sum(-1).min() > 2


def test_no_two_turns_of_our_side_draw_the_same_step() -> None:
    turns = [turn for pair in schedule(variants=3, pairs=4, steps=7) for turn in pair]
    drawn = [turn.first + i for turn in turns for i in range(turn.steps + 2)]
    assert len(turns) == 1 + 3 * 4 and len(drawn) == len(set(drawn)) and min(drawn) == 1


def test_rows_replace_those_of_the_same_cell_and_each_table_has_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    for name in (
        "race",
        "same_learning",
        "sampling",
        "learner",
        "floor",
        "startup",
        "transfer",
        "driver",
        "real_size",
        "episodes",
    ):
        assert "| new |" in tables.between_marks(page, name, "| new |")
    monkeypatch.setattr(tables, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "kept")
    tables.PAGE.write_text(page, encoding="utf-8")

    def cell(size: str, ratio: str) -> tables.Row:
        return {"size": size, "ratio": ratio, "machine": "M", "command": "c"}

    tables.keep("race", ["size"], [cell("2M", "1.10"), cell("30M", "1.20")])
    tables.keep("race", ["size"], [cell("2M", "1.30")])
    found = tables.PAGE.read_text(encoding="utf-8")
    lines = [
        line
        for line in found.split("<!-- race: end")[0].splitlines()
        if line.startswith(("| 2M", "| 30M", "(1)"))
    ]
    assert lines == ["| 2M | 1.30 | (1) |", "| 30M | 1.20 | (1) |", "(1) M; `c`."]
    assert found.split("<!-- race: end")[1] == page.split("<!-- race: end")[1]
    with pytest.raises(ValueError, match="no place"):
        tables.between_marks(page, "unknown", "")


def test_what_a_process_and_its_children_took_is_their_own() -> None:
    before = machine.own_seconds([os.getpid()])
    code = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert machine.own_seconds([os.getpid()]) - before > 0.2
    assert machine.own_seconds([]) == 0 and 0 <= machine.Shared().foreign() <= 1


def test_the_page_on_scaling_is_what_its_command_writes_and_a_larger_run_asks_for_more() -> None:
    page = scaling.PAGE.read_text(encoding="utf-8")
    assert tables.between_marks(page, "scaling", scaling.table()) == page
    for model in scaling.MODELS:
        loads = [scaling.Load(model, gpus) for gpus in scaling.GPUS]
        for small, large in itertools.pairwise(loads):
            factor = large.gpus / small.gpus
            assert large.rollouts / small.rollouts == pytest.approx(factor)
            assert large.driver / small.driver == pytest.approx(factor)
            assert large.nccl == small.nccl, "a broadcast takes as long, however many hear it"
            assert large.host > small.host
        assert loads[0].host == 0, "nothing leaves a single node"


@pytest.mark.parametrize("thing", ["descriptors", "memory_mib"])
def test_a_soak_tells_a_leak_from_noise_and_from_what_a_run_takes_to_settle(thing: str) -> None:
    dice, steps = np.random.default_rng(0), np.arange(1, 301)

    def grew(values: np.ndarray) -> bool:
        pairs = zip(steps, values, strict=True)
        (row,) = soak.growth([{"step": s, "at": 0.0, "fault": "", thing: v} for s, v in pairs])
        return bool(row["grew"] == "yes")

    steady = 500 * dice.normal(1, 0.05, len(steps))
    assert not grew(steady)
    assert not grew(steady + np.where(steps <= soak.SETTLED, -450, 0))
    assert grew(steady + steps / 2)
    faults = np.isin(steps % 20, range(3))  # what lives on of an actor that was killed
    assert grew(steady + 12 * np.cumsum(faults) / 3)


def test_what_a_judge_says_of_true_and_false_lists_is_counted() -> None:
    """By a server that reads, and at the last problem chatters."""
    try:
        OPENMOJI.fetched()
    except DataError as error:
        pytest.skip(str(error))
    problems = judge_replies.asked_of(4, seed=0)
    assert all(true != false and true in p.prompt for p, true, false in problems)
    server = Server()

    def reply(number: int, body: dict[str, Any]) -> Reply:
        said = json.loads(body["messages"][-1]["content"].splitlines()[1])
        place = next(i for i, (_, *both) in enumerate(problems) if said in both)
        if place == 3:
            return Reply(200, says("Sure! The score is 9."))
        score = {0: (9, 2), 1: (5, 5), 2: (1, 8)}[place][said == problems[place][2]]
        return gives(score)

    server.reply = reply
    try:
        judge = Judge(base_url=server.url, model="m", structured=False, retries=0)
        found = asyncio.run(judge_replies.replies_of(judge, problems))
    finally:
        server.stop()
    assert sorted(found.pairs) == [(0.1, 0.8), (0.5, 0.5), (0.9, 0.2)]
    assert found.failures == {"malformed": 2} and found.asked == 8
    assert found.line.startswith("| 0.25 of 8 | malformed 2 | 0.50 of 3 |")
