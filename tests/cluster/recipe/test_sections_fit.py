"""What settings make of each other: defaults that follow, and what cannot work names its field."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.recipe.algorithm import AlgorithmConfig
from cluster.recipe.recipe import (
    load_recipe,
)
from learner.loss_settings import CORRECTION_BOUNDS, CorrectionConfig
from learner.settings import LoraConfig
from tests.support.recipes import error

SHARED = ["sampler.gpus=0.5", "sampler.gpu_memory_utilization=0.4", "learner.gpus=0.5"]
"""A sampler and a learner rank on one GPU."""


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ('transfer.transport="nccl"', "transfer.transport"),
        ('learner={zero_stage=0, offload="optimizer"}', "learner.offload"),
        ('learner.offload="all"', "learner.offload"),
        ('learner={freeze=["vision"], lora={rank=8}}', "learner.freeze"),
        ("learner.lora={rank=0}", "learner.lora.rank"),
        ("learner.rates={vision=0.0}", "learner.rates.vision"),
        ('model.attention="flash"', "model.attention"),
        ("sampler.gpus=0.5", "sampler.gpu_memory_utilization"),
        ("sampler.max_tokens=1024", "sampler.max_tokens"),
        ("sampler.gpus=2", "sampler.gpus"),
        ("algorithm.updates_per_step=17", "algorithm.updates_per_step"),
        ("algorithm.max_staleness=-1", "algorithm.max_staleness"),
        ("algorithm={max_staleness=1, updates_per_step=2}", "algorithm.max_staleness"),
        ('transfer.in_flight="pause"', "transfer.in_flight"),
        ("transfer.overlap=true", "transfer.overlap"),
        ("transfer.bucket_mib=-1", "transfer.bucket_mib"),
        ("reward.terms=[{name='outcome', weight=0}]", "reward.terms"),
        ("algorithm.kl_weight=0.1", "algorithm.kl_weight"),
        ("reward.alpha=1.5", "reward.alpha"),
        ("learner.learning_rate=inf", "learner.learning_rate"),
        ("tasks=[]", "tasks"),
        ('tasks[0].data="x.parquet"', "tasks[0].knobs"),
        ('name="../x"', "name"),
    ],
)
def test_settings_that_cannot_work_name_their_field(
    recipe: Path, override: str, field: str
) -> None:
    assert error(recipe, override).startswith(f"{recipe}: {field}: ")


def test_only_the_host_transport_sends_beside_an_update(recipe: Path) -> None:
    ahead = ["algorithm.max_staleness=1", "transfer.overlap=true"]
    assert load_recipe(recipe, ahead).transfer.overlap
    gpus = ["sampler.gpus=1", "learner.gpus=1", 'transfer.transport="nccl"']
    line = error(recipe, *ahead, *gpus)
    assert line.startswith(f'{recipe}: transfer.overlap: got true with transport "nccl"')


def test_ipc_needs_a_sampler_and_a_rank_on_each_gpu(recipe: Path) -> None:
    ipc = 'transfer.transport="ipc"'
    for gpus in (["sampler.gpus=1", "learner.gpus=1"], [*SHARED, "sampler.count=2"]):
        assert error(recipe, ipc, *gpus).startswith(f"{recipe}: transfer.transport: ")
    line = error(recipe, ipc, *SHARED, "learner.gpus=0.6")
    assert line.startswith(f"{recipe}: sampler.gpus: got 0.5 beside learner.gpus = 0.6")
    assert load_recipe(recipe, [ipc, *SHARED]).sampler.gpus == 0.5


TURNS = ["placement.mode=colocated", *SHARED, "sampler.gpu_memory_utilization=0.9"]
"""The same by turns, each with nearly all of it."""


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm.max_staleness=1"], "algorithm.max_staleness: got 1 with placement.mode"),
        (["learner.gpus=0"], 'placement.mode: "colocated" takes turns on the same GPUs'),
        (["sampler.gpus=0"], 'placement.mode: "colocated" takes turns on the same GPUs'),
        (["sampler.count=2"], 'placement.mode: under mode "colocated" each sampler shares'),
        (["sampler.gpus=1", "learner.gpus=1"], "placement.mode: under mode"),
        (["sampler.gpus=2", "sampler.tensor_parallel=2"], "placement.mode: under mode"),
        (["learner.gpus=0.6"], "sampler.gpus: got 0.5 beside learner.gpus = 0.6"),
        (["transfer.transport=nccl"], 'transfer.transport: "nccl" takes no two processes'),
        (["learner.zero_stage=0"], "learner.zero_stage: got 0, whose states DeepSpeed does not"),
        (["learner.zero_stage=3"], "learner.zero_stage: got 3, whose states DeepSpeed does not"),
        (['placement.learner={role="learner"}'], "placement.samplers: differs from"),
        (["placement.mode=disaggregated"], "sampler.gpu_memory_utilization: got 0.9 with gpus"),
    ],
)
def test_turns_are_refused_where_they_cannot_be_taken(
    recipe: Path, overrides: list[str], said: str
) -> None:
    assert load_recipe(recipe, TURNS).paired
    line = error(recipe, *TURNS, *overrides)
    assert line.startswith(f"{recipe}: {said}") and "\n" not in line.strip()


def test_turns_are_taken_by_either_transport_and_on_cpus(recipe: Path) -> None:
    for more in ("transfer.transport=ipc", "learner.lora={rank=4}"):
        assert load_recipe(recipe, [*TURNS, more]).paired
    all_there = ["learner.zero_stage=3", 'learner.offload="all"']
    assert load_recipe(recipe, [*TURNS, *all_there]).placement.by_turns
    cpus = load_recipe(recipe, ["placement.mode=colocated", "sampler.count=2"])
    assert cpus.placement.by_turns and not cpus.paired


def test_flash_attention_needs_a_gpu_and_bfloat16(recipe: Path) -> None:
    gpu, half = "learner.gpus=1", "model.dtype=bfloat16"
    for alone in (gpu, half):
        line = error(recipe, 'model.attention="flash"', alone)
        assert line.startswith(f'{recipe}: model.attention: "flash" needs a GPU and bfloat16')
    load_recipe(recipe, ['model.attention="flash"', gpu, half])


def test_graphs_are_on_where_there_is_a_gpu(recipe: Path) -> None:
    assert load_recipe(recipe).sampler.eager
    assert not load_recipe(recipe, ["sampler.gpus=1"]).sampler.eager
    assert load_recipe(recipe, ["sampler.gpus=1", "sampler.enforce_eager=true"]).sampler.eager


def test_eager_attention_takes_no_packed_rows(recipe: Path) -> None:
    line = error(recipe, 'model.attention="eager"', 'learner.layout="packed"')
    assert line.startswith(f'{recipe}: learner.layout: got "packed", which "eager" attention')
    assert load_recipe(recipe).learner.layout == "shared_prefix"
    assert load_recipe(recipe, ['model.attention="eager"']).learner.layout == "padded"


def test_a_loss_brings_its_own_clip_and_aggregation(recipe: Path) -> None:
    for loss, expected in {
        "gspo": ("sequence_mean", 3e-4, 4e-4),
        "cispo": ("token_mean", 1.0, 4.0),
    }.items():
        loaded = load_recipe(recipe, [f"algorithm.loss={loss}"]).algorithm
        assert (loaded.aggregation, loaded.clip_low, loaded.clip_high) == expected
        own = load_recipe(recipe, [f"algorithm.loss={loss}", "algorithm.clip_low=0.5"]).algorithm
        assert (own.clip_low, own.clip_high) == (0.5, expected[2])
    assert "algorithm.loss: " in error(recipe, "algorithm.loss=ppo")
    assert "algorithm.loss: " in error(recipe, "algorithm.loss=[]")


def test_epochs_are_of_one_data_set_and_an_evaluation_fits_what_was_measured(recipe: Path) -> None:
    assert "algorithm.epochs: got 2, and epochs are those of one data set" in error(
        recipe, "algorithm.epochs=2"
    )
    entry = '{name="sudoku", data="somewhere"}'
    assert load_recipe(recipe, [f"tasks=[{entry}]", "algorithm.epochs=2"]).algorithm.epochs == 2
    assert "algorithm.epochs: " in error(recipe, f"tasks=[{entry}, {entry}]", "algorithm.epochs=2")
    longest = load_recipe(recipe).sampler.max_tokens
    load_recipe(recipe, [f"eval.sampling.max_tokens={longest}"])
    line = error(recipe, f"eval.sampling.max_tokens={longest + 1}")
    assert f"eval.sampling.max_tokens: got {longest + 1}, above sampler.max_tokens" in line


def test_a_correction_brings_its_own_bounds_and_refuses_those_it_has_not(recipe: Path) -> None:
    assert load_recipe(recipe).algorithm.correction.kind == "none"
    for kind, bounds in CORRECTION_BOUNDS.items():
        chosen = load_recipe(recipe, [f"algorithm.correction.kind={kind}"]).algorithm.correction
        assert (chosen.low, chosen.high) == (bounds.get("low", 0.0), bounds["high"])
        assert chosen.low <= 1 <= chosen.high
    own = ["algorithm.correction.kind=icepop", "algorithm.correction.high=3"]
    chosen = load_recipe(recipe, own).algorithm.correction
    assert (chosen.low, chosen.high) == (0.5, 3.0)
    for override, field in (
        ("{kind='token_tis', low=0.5}", "low"),
        ("{kind='none', high=2.0}", "high"),
        ("{kind='icepop', high=0.9}", "high"),
        ("{kind='icepop', low=1.1}", "low"),
        ("{kind='tis'}", "kind"),
    ):
        said = error(recipe, f"algorithm.correction={override}")
        assert said.startswith(f"{recipe}: algorithm.correction.{field}: ")


def test_stale_tokens_are_corrected_unless_the_recipe_says_otherwise() -> None:
    assert AlgorithmConfig(max_staleness=2).correction.kind == "token_tis"
    own = AlgorithmConfig(max_staleness=2, correction=CorrectionConfig(kind="icepop"))
    assert own.correction.kind == "icepop"
    none = AlgorithmConfig(max_staleness=2, correction=CorrectionConfig())
    assert none.correction.kind == AlgorithmConfig().correction.kind == "none"


def test_a_kl_term_without_a_gradient_is_refused(recipe: Path) -> None:
    said = error(recipe, "algorithm.kl_weight=0.1")
    assert "algorithm.kl_weight: got 0.1" in said and "updates_per_step" in said
    load_recipe(recipe, ["algorithm.kl_weight=0.1", "algorithm.updates_per_step=2"])
    load_recipe(recipe, ["algorithm.kl_weight=0.1", "algorithm.max_staleness=1"])


def test_alpha_and_terms_are_two_ways_to_say_one_thing(recipe: Path) -> None:
    short = load_recipe(recipe, ["reward.alpha=0.25"]).reward.effective_terms()
    assert {term.name: term.weight for term in short} == {"outcome": 0.75, "perception": 0.25}
    terms = 'reward.terms=[{ name = "outcome" }]'
    assert ": reward.alpha: " in error(recipe, "reward.alpha=0.25", terms)
    twice = 'reward.terms=[{ name = "outcome" }, { name = "outcome" }]'
    assert ": reward.terms[1].name: " in error(recipe, twice)


def test_adapters_are_not_sent_by_what_cannot_merge_them(recipe: Path) -> None:
    gpus = ("sampler.gpus=1", "learner.gpus=1.0", 'transfer.transport="nccl"')
    assert load_recipe(recipe, gpus).transfer.transport == "nccl"
    line = error(recipe, *gpus, "learner.lora={rank=8}")
    assert line.startswith(f"{recipe}: transfer.transport: ") and 'use "host"' in line
    warmed = "sft={steps=3, vision_warmup_steps=2}"
    assert "sft.vision_warmup_steps: " in error(recipe, warmed, "learner.lora={rank=8}")
    chosen = load_recipe(recipe, ["learner.lora={rank=8, targets=['vision']}"]).learner
    assert chosen.lora == LoraConfig(rank=8, targets=("vision",))
