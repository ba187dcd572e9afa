"""Placement: what does not fit is named by its fields; memory follows ZeRO's arithmetic."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from typer.testing import CliRunner

from cluster.cli import app
from cluster.recipe.hardware import GIB, Gpu, Machine, gib
from cluster.recipe.memory import PolicySize, learner_memory, policy_size, sampler_memory
from cluster.recipe.placement import PlacementError, describe, frozen_models, plan, require_cluster
from cluster.recipe.recipe import Recipe, RecipeError, UserError, load_recipe
from learner.outline import Trained
from learner.policy import load_policy
from tests.learner.test_policy import peak_bytes

ROOT = Path(__file__).resolve().parents[3]
TWO_CORES = Machine(cores=2, memory=24 * GIB)
EIGHT_GPUS = Machine(cores=64, memory=512 * GIB, gpus=(Gpu("test", 80 * GIB),) * 8)
SIZE = PolicySize(1_000_003, 128, layers=4, vocabulary=500, inner=384, queries=128, keys=64)


def tiny(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/tiny/sudoku.toml", overrides)


def gpu(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/gpu/qwen3_vl_4b_sudoku.toml", overrides)


def memory_of(recipe: Recipe, size: PolicySize, trained: Trained | None = None) -> dict[str, int]:
    return learner_memory(recipe.model, recipe.learner, size, trained)


def test_the_tiny_recipe_fills_two_cores_and_no_more() -> None:
    placed = plan(tiny("reward.workers=3"), TWO_CORES)
    placed.require()
    assert (placed.cpus, placed.gpus) == (2, 0)
    assert [actor.role for actor in placed.actors].count("reward worker") == 3


def test_too_many_cores_name_the_fields_and_the_sum() -> None:
    placed = plan(tiny("sampler.count=2", "learner.ranks=4"), TWO_CORES)
    with pytest.raises(PlacementError) as caught:
        placed.require()
    assert str(caught.value).startswith(
        "sampler.count × sampler.cpus + learner.ranks × learner.cpus = 6 cores, "
        "but this machine has 2; lower"
    )
    assert "--address" in str(caught.value)
    plan(tiny("sampler.count=2", "learner.ranks=4"), Machine(6, GIB)).require()


def test_too_many_gpus_name_the_fields_and_dry_run_only() -> None:
    placed = plan(gpu(), TWO_CORES)
    assert "needs 8 GPUs, this machine has 0: dry run only" in describe(placed)
    with pytest.raises(PlacementError, match=r"sampler\.gpus \+ learner\.ranks .* = 8 GPUs"):
        placed.require()
    plan(gpu(), EIGHT_GPUS).require()
    assert "dry run only" not in describe(plan(gpu(), EIGHT_GPUS))


def test_a_reference_is_a_second_whole_model_on_each_rank_but_not_with_adapters() -> None:
    weight, sharded = "algorithm.reference_kl_weight=0.01", ("learner.ranks=2",)
    without, kept = (plan(tiny(*sharded, *more), TWO_CORES) for more in ((), (weight,)))
    policy = policy_size(tiny().model.path)
    assert policy is not None
    for before, after in zip(without.actors, kept.actors, strict=True):
        extra = {"reference": 4 * policy.parameters} if before.role == "learner" else {}
        assert after.memory == before.memory | extra
    for recipe, command in ((tiny(weight, "learner.lora={}"), "train"), (tiny(weight), "sft")):
        placed = plan(recipe, TWO_CORES, command)  # type: ignore[arg-type]
        assert not any("reference" in actor.memory for actor in placed.actors)


def test_sft_places_the_learner_alone() -> None:
    recipe = load_recipe(ROOT / "recipes/tiny/cold_start.toml", ["learner.ranks=2"])
    placed = plan(recipe, TWO_CORES, "sft")
    placed.require()
    assert placed.cpus == 2
    too_many = load_recipe(ROOT / "recipes/tiny/cold_start.toml", ["learner.ranks=3"])
    with pytest.raises(PlacementError, match=r"^learner\.ranks × learner\.cpus = 3 cores"):
        plan(too_many, TWO_CORES, "sft").require()


def test_a_reader_has_an_engine_and_shares_it_with_a_term_that_asks_the_same() -> None:
    head = {"name": "x", "model": {"path": "m"}, "tasks": [{"name": "sudoku"}]}
    term = {"name": "blind_policy", "args": {"model": "r"}}

    def asking(reader: str) -> Recipe:
        more = {"reward": {"terms": [term]}, "eval": {"reader": reader}}
        return Recipe.model_validate(head | more)

    for command, models in (
        ("train", ["r"]), ("sft", ["r"]), ("eval", ["r"]), ("sample", []), ("replay", []),
    ):  # fmt: skip
        assert frozen_models(tiny('eval.reader="r"'), command) == models  # type: ignore[arg-type]
    assert frozen_models(asking("r"), "train") == ["r"]
    assert frozen_models(asking("s"), "train") == ["r", "s"]
    roles = [a.role for a in plan(tiny('eval.reader="r"'), TWO_CORES, "train").actors]
    assert roles.count("frozen model") == 1
    with pytest.raises(PlacementError, match=r"1 frozen model\(s\) × sampler\.cpus"):
        plan(tiny('eval.reader="r"'), TWO_CORES, "train").require()


@pytest.mark.parametrize(
    ("stage", "shared"),
    [
        (0, set()),
        (1, {"optimizer"}),
        (2, {"optimizer", "gradients"}),
        (3, {"optimizer", "gradients", "weights"}),
    ],
)
def test_each_zero_stage_divides_one_more_part(stage: int, shared: set[str]) -> None:
    one = memory_of(tiny(f"learner.zero_stage={stage}"), SIZE)
    four = memory_of(tiny(f"learner.zero_stage={stage}", "learner.ranks=4"), SIZE)
    for part, total in one.items():
        whole = -(-total // 4) if part in shared else total
        assert four[part] == whole, part


@pytest.mark.parametrize(("stage", "bytes_each"), [(1, 16), (2, 18)])
def test_bfloat16_states_are_sixteen_bytes_a_parameter(stage: int, bytes_each: int) -> None:
    parts = memory_of(tiny("model.dtype=bfloat16", f"learner.zero_stage={stage}"), SIZE)
    states = parts["weights"] + parts["gradients"] + parts["optimizer"]
    # arXiv 1910.02054, section 3.1, and two bytes more where gradients add up in float32
    assert states == bytes_each * SIZE.parameters


def test_what_shares_a_gpu_is_held_against_its_part_of_the_memory() -> None:
    half = ("sampler.gpus=0.5", "sampler.gpu_memory_utilization=0.5", "learner.gpus=0.5")
    machine = Machine(8, 64 * GIB, (Gpu("card", 8 * GIB),))
    fits, over = (
        plan(tiny(*half, f"learner.micro_batch_tokens={tokens}"), machine).notes
        for tokens in (1024, 2**21)
    )
    assert not any("GPU memory may not suffice" in note for note in fits)
    assert any("GPU memory may not suffice" in note for note in over)


def test_mixed_states_are_those_of_float32_and_samplers_hold_half_of_that() -> None:
    whole, half = (memory_of(tiny(f"model.dtype={d}"), SIZE) for d in ("float32", "bfloat16"))
    mixed = memory_of(tiny("model.dtype=mixed"), SIZE)
    assert mixed == whole | {"weights in bfloat16": half["weights"]}
    weights = [
        sampler_memory(tiny(f"model.dtype={d}").model, tiny().sampler, SIZE, TWO_CORES)["weights"]
        for d in ("float32", "mixed", "bfloat16")
    ]
    assert weights[0] == 2 * weights[1] and weights[1] == weights[2]


def test_whether_the_processor_multiplies_bfloat16_is_what_torch_says_of_it() -> None:
    says = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert Machine.detect().bfloat16 == says


def test_a_float32_head_of_bfloat16_weights_takes_what_is_told(
    policy: tuple[str, dict[str, torch.Tensor]],
) -> None:
    model, _ = load_policy(policy[0], dtype="bfloat16")
    head: Any = model.model.lm_head
    vocabulary, width = head.weight.shape
    hidden = torch.randn(4000, width).bfloat16().requires_grad_()
    ids = torch.randint(vocabulary, (len(hidden),))
    table = 4 * 50 * vocabulary
    model.logits_mib = table / 2**20
    head.weight.grad, hidden.grad = torch.zeros_like(head.weight), torch.zeros_like(hidden)
    found = peak_bytes(lambda: head(hidden, ids)[0].sum().backward())
    size = PolicySize(0, width, 1, vocabulary, 1, 1, 1)
    parts = memory_of(tiny("model.dtype=bfloat16"), size)
    told = parts["head in float32"]
    assert told < found < told + 8 * table + 2 * 2 * hidden.numel()
    frozen = memory_of(tiny("model.dtype=bfloat16", 'learner.freeze=["head"]'), size)
    assert frozen["head in float32"] == told // 3
    for exact in ("model.dtype=float32", "model.lm_head_float32=false"):
        assert "head in float32" not in memory_of(tiny(exact), size)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("adapters", [False, True])
def test_model_states_are_what_was_measured(stage: int, adapters: bool) -> None:
    """Against the tables that `benchmarks.learner_memory` printed (docs/results/learner.md)."""
    text = (ROOT / "docs/results/learner.md").read_text("utf-8").split("## Memory of a rank")[1]
    every, added = (int(n.replace(",", "")) for n in re.findall(r"([\d,]{7,}) parameters", text))
    rows = re.findall(rf"^\| {stage} \| (\d+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    measured = [float(value) for value in rows[adapters]]
    recipe = tiny(f"learner.zero_stage={stage}", "learner.ranks=2")
    trained = Trained(added, added) if adapters else None
    parts = memory_of(recipe, PolicySize(every, 1, 1, 1, 1, 1, 1), trained)
    states = [parts[name] / 2**20 for name in ("weights", "gradients", "optimizer")]
    assert states == pytest.approx(measured, abs=0.6)


@pytest.fixture(scope="module")
def policy(tiny_models: dict[str, Path]) -> tuple[str, dict[str, torch.Tensor]]:
    """A folder, and what is in its file."""
    folder = tiny_models["qwen3_vl"]
    return str(folder), load_file(folder / "model.safetensors")


def test_what_is_frozen_has_weights_only(policy: tuple[str, dict[str, torch.Tensor]]) -> None:
    path, tensors = policy
    seeing = sum(t.numel() for n, t in tensors.items() if n.startswith("model.visual."))
    every = sum(t.numel() for t in tensors.values())
    assert 0 < seeing < every
    recipe = tiny(
        f"model.path={path}", 'learner.freeze=["vision", "merger"]', "learner.zero_stage=1"
    )
    parts = plan(recipe, TWO_CORES).actors[-2].memory
    assert parts["weights"] == 4 * every
    assert parts["gradients"] == 4 * (every - seeing)
    assert parts["optimizer"] == 12 * (every - seeing)


def test_adapters_alone_have_gradients(policy: tuple[str, dict[str, torch.Tensor]]) -> None:
    path, tensors = policy
    layers = [
        t.shape
        for n, t in tensors.items()
        if n.startswith("model.language_model.layers.") and t.ndim == 2
    ]
    # A [rank, in] and B [out, rank].
    added = sum(3 * (out + into) for out, into in layers)
    every = sum(t.numel() for t in tensors.values())
    lora = ("learner.lora.rank=3", "learner.zero_stage=3", "learner.ranks=2")
    memory = plan(tiny(f"model.path={path}", *lora), TWO_CORES).actors[-2].memory
    assert memory["weights"] == -(-4 * (every + added) // 2)
    assert memory["gradients"] == -(-4 * added // 2)
    assert memory["optimizer"] == -(-12 * added // 2)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('learner.freeze=["visoin.*"]', "learner.freeze: 'visoin.*' matches no parameter of this"),
        ('learner.freeze=["*"]', "learner.freeze: nothing is left to train"),
        ('learner.rates={"model.visual.patch_embd.*" = 0.1}', "nearest names are model.visual.pat"),
        ('learner.lora.targets=["*.q_porj"]', "learner.lora.targets: '*.q_porj' matches no linear"),
        ('learner.rates={"head" = 2.0}', "an LM head tied to the embedding is part of language"),
    ],
)
def test_a_name_that_matches_nothing_is_refused_by_the_dry_run(
    policy: tuple[str, dict[str, torch.Tensor]], override: str, said: str
) -> None:
    source = ROOT / "recipes/tiny/sudoku.toml"
    arguments = ["train", str(source), "--dry-run", "--set", f"model.path={policy[0]}"]
    result = CliRunner().invoke(app, [*arguments, "--set", override])
    assert isinstance(result.exception, RecipeError) and result.stdout == ""
    assert str(result.exception).startswith(f"{source}: learner.") and said in str(result.exception)


def test_every_policy_that_a_recipe_names_by_hub_is_of_known_size() -> None:
    recipes = [load_recipe(path) for path in (ROOT / "recipes/gpu").glob("*.toml")]
    assert len(recipes) > 2 and all(policy_size(r.model.path) for r in recipes)


def test_of_a_hub_name_it_is_said_that_all_is_counted_as_trained() -> None:
    told = [
        any("as if all of it were trained" in note for note in plan(gpu(*more), EIGHT_GPUS).notes)
        for more in (
            (),
            ('learner.freeze=["vision"]',),
            ("learner.lora.rank=8", 'transfer.transport="host"'),
        )
    ]
    assert told == [False, True, True]


def test_the_dry_run_tells_how_many_tokens_an_engines_cache_has_room_for() -> None:
    card = EIGHT_GPUS.gpus[0].memory
    weights, token = 2 * 4_437_815_808, 2 * 36 * 1024 * 2  # a key and a value of each layer
    for shape, ranks in (((), 1), (("sampler.tensor_parallel=2", "sampler.gpus=2"), 2)):
        tokens = int((int(0.85 * card) - weights // ranks) / (token / ranks))
        (said,) = (n for n in plan(gpu(*shape), EIGHT_GPUS).notes if "KV cache has" in n)
        assert f"room for {tokens:,} tokens at most: {tokens // 6144} responses" in said
    (said,) = (n for n in plan(tiny("sampler.kv_cache_gib=1"), TWO_CORES).notes if "KV" in n)
    assert f"{GIB // (2 * 4 * 64 * 4):,} tokens: 256 responses" in said  # max_num_seqs
    small = Machine(8, 64 * GIB, (Gpu("card", 10 * GIB),))
    (said,) = (n for n in plan(gpu(), small).notes if "KV cache has" in n)
    assert "will not start" in said and "gpu_memory_utilization" in said
    assert not any("KV cache has" in n for n in plan(gpu(), TWO_CORES).notes)  # no GPU to fill


VARIANTS = ("Colocated, by turns (docs/step.md)", "Engines of two GPUs")
"""What the head of each GPU recipe says how to set."""


def written_in(path: Path) -> dict[str, list[str]]:
    """Title -> overrides, of the comments at the head of a recipe."""
    head = path.read_text("utf-8").split("\nname = ")[0].replace("\n#   ", " ")
    lines = [line for line in head.splitlines() if "--set" in line]
    return {
        line.removeprefix("# ").split(":")[0]: re.findall(r"--set (\S+)", line) for line in lines
    }


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes/gpu").glob("*.toml")), ids=lambda p: p.stem
)
def test_each_gpu_recipe_fits_eight_gpus_apart_by_turns_and_with_larger_engines(
    path: Path,
) -> None:
    variants = written_in(path)
    assert tuple(variants) == VARIANTS
    for overrides in ([], ["algorithm.max_staleness=0"], *variants.values()):
        recipe = load_recipe(path, overrides)
        placed = plan(recipe, EIGHT_GPUS)
        placed.require()
        assert placed.gpus == 8 and not recipe.sampler.eager
        assert not any("may not suffice" in note for note in placed.notes), placed.notes
        (cache,) = (note for note in placed.notes if "KV cache has room for" in note)
        assert "will not start" not in cache
    apart, turns = load_recipe(path), load_recipe(path, variants[VARIANTS[0]])
    assert turns.placement.by_turns and turns.learner.ranks == turns.sampler.count == 8
    assert not apart.placement.by_turns and apart.learner.ranks + apart.sampler.count == 8
    assert load_recipe(path, variants[VARIANTS[1]]).sampler.tensor_parallel == 2


def by_turns(*more: str) -> Recipe:
    path = ROOT / "recipes/gpu/qwen3_vl_4b_sudoku.toml"
    return load_recipe(path, [*written_in(path)[VARIANTS[0]], *more])


def test_by_turns_each_phase_is_added_up_and_what_rests_is_in_main_memory() -> None:
    weights, card = 2 * 4_437_815_808, EIGHT_GPUS.gpus[0].memory
    placed = plan(by_turns(), EIGHT_GPUS)
    engine, rank = (next(a for a in placed.actors if a.role == r) for r in ("sampler", "learner"))
    assert engine.offloaded == {"weights while it sleeps": weights}
    assert rank.offloaded == {"states at rest": weights + rank.memory["optimizer"]}
    learning = sum(rank.memory.values())
    phases = {"sampling": int(0.85 * card), "learning": learning, "sending": 2 * weights}
    left = {"sampling": GIB, "learning": GIB, "sending": 2 * GIB}
    (said,) = (note for note in placed.notes if note.startswith("by turns"))
    for phase, used in phases.items():
        assert f"{phase} {gib(used + left[phase])}" in said, said
    host = plan(by_turns("transfer.transport=host"), EIGHT_GPUS).notes
    assert not any("sending" in note for note in host)
    # Held against the whole card, not against halves of it, and phase by phase.
    for more, fits in (
        (("sampler.gpu_memory_utilization=0.98",), True),
        (("sampler.gpu_memory_utilization=1.0",), False),
        (("learner.micro_batch_tokens=262144",), False),
    ):
        notes = plan(by_turns(*more), EIGHT_GPUS).notes
        assert any("GPU memory may not suffice" in note for note in notes) != fits, more
    main = Machine(64, 32 * GIB, EIGHT_GPUS.gpus)
    assert any("main memory may not suffice" in note for note in plan(by_turns(), main).notes)


def test_by_turns_there_is_no_gpu_for_a_frozen_model() -> None:
    asking, said = by_turns('eval.reader="r"'), "no GPU for the engine of r, which"
    for command in ("train", "eval"):
        with pytest.raises(PlacementError, match=said):
            plan(asking, EIGHT_GPUS, command).require()  # type: ignore[arg-type]
        with pytest.raises(PlacementError, match=said):
            require_cluster(asking, {"CPU": 64, "GPU": 16}, command)  # type: ignore[arg-type]
    plan(asking, EIGHT_GPUS, "replay").require()
    cpus = tiny('eval.reader="r"', "placement.mode=colocated")
    plan(cpus, Machine(3, 24 * GIB)).require()


def test_what_is_offloaded_is_in_main_memory() -> None:
    whole, away = (plan(gpu(*more), EIGHT_GPUS) for more in ((), ('learner.offload="optimizer"',)))
    for one, other in zip(whole.actors, away.actors, strict=True):
        assert one.memory == other.memory | other.offloaded
        assert list(other.offloaded) == (["optimizer"] if other.role == "learner" else [])
    assert "in main memory optimizer" in describe(away)
    # Its own host cannot hold the states of eight such ranks.
    small = Machine(64, 16 * GIB, EIGHT_GPUS.gpus)
    assert not any("main memory" in note for note in plan(gpu(), small).notes)
    assert any(
        "main memory may" in n for n in plan(gpu('learner.offload="optimizer"'), small).notes
    )


def test_what_samplers_fetch_is_in_main_memory_beside_the_first_rank() -> None:
    host = plan(gpu("transfer.transport=host"), EIGHT_GPUS)
    first, *others = (a for a in host.actors if a.role == "learner")
    assert first.offloaded == {"two versions to fetch": 2 * 2 * 4_437_815_808} and others
    assert not any(other.offloaded for other in others)


def test_a_local_policy_is_counted_from_its_own_files(tmp_path: Path) -> None:
    tensors = {"a": np.zeros((3, 5), np.float32), "b": np.zeros(7, np.float16)}
    save_file(tensors, tmp_path / "model-1.safetensors", metadata={"format": "np"})
    save_file({"c": np.zeros((), np.float32)}, tmp_path / "model-2.safetensors")
    text = {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 500}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    for more, shape in (({}, (512, 128, 128)), ({"intermediate_size": 9} | heads, (9, 256, 128))):
        (tmp_path / "config.json").write_text(json.dumps({"text_config": text | more}))
        assert policy_size(str(tmp_path)) == PolicySize(3 * 5 + 7 + 1, 128, 4, 500, *shape)
    (tmp_path / "model-2.safetensors").write_bytes(b"\x08")
    with pytest.raises(UserError, match="is the checkpoint whole"):
        policy_size(str(tmp_path))


def test_an_unknown_policy_is_placed_without_an_estimate() -> None:
    placed = plan(tiny("model.path=nobody/nothing"), TWO_CORES)
    assert placed.shortages == ()
    assert any("nobody/nothing" in note for note in placed.notes)


def test_memory_that_will_not_suffice_is_a_note() -> None:
    small = Machine(cores=2, memory=GIB // 2)
    assert any("main memory may not suffice" in note for note in plan(tiny(), small).notes)
    crowded = plan(gpu("learner.micro_batch_tokens=262144"), EIGHT_GPUS)
    assert any("GPU memory may not suffice" in note for note in crowded.notes)


def test_this_machine_is_seen() -> None:
    machine = Machine.detect()
    assert machine.cores >= 1 and machine.memory > GIB // 4
