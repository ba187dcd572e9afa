"""Placement: what does not fit is named by its fields; memory follows ZeRO's arithmetic."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from cluster.recipe.hardware import GIB, Gpu, Machine, gib
from cluster.recipe.memory import policy_size
from cluster.recipe.placement import PlacementError, describe, frozen_models, plan, require_cluster
from cluster.recipe.recipe import Recipe, load_recipe
from tests.support.machines import EIGHT_GPUS, TWO_CORES, gpu, tiny

ROOT = Path(__file__).resolve().parents[3]


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


def test_what_shares_a_gpu_is_held_against_its_part_of_the_memory() -> None:
    half = ("sampler.gpus=0.5", "sampler.gpu_memory_utilization=0.5", "learner.gpus=0.5")
    machine = Machine(8, 64 * GIB, (Gpu("card", 8 * GIB),))
    fits, over = (
        plan(tiny(*half, f"learner.micro_batch_tokens={tokens}"), machine).notes
        for tokens in (1024, 2**21)
    )
    assert not any("GPU memory may not suffice" in note for note in fits)
    assert any("GPU memory may not suffice" in note for note in over)


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


def test_whether_the_processor_multiplies_bfloat16_is_what_torch_says_of_it() -> None:
    says = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert Machine.detect().bfloat16 == says
