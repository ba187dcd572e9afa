"""Placement: what does not fit is named by its fields; memory follows ZeRO's arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cluster.config import Recipe, load_recipe
from cluster.placement import (
    GIB,
    Gpu,
    Machine,
    PlacementError,
    PolicySize,
    describe,
    learner_memory,
    plan,
    policy_size,
)

ROOT = Path(__file__).resolve().parents[2]
TWO_CORES = Machine(cores=2, memory=24 * GIB)
EIGHT_GPUS = Machine(cores=64, memory=512 * GIB, gpus=(Gpu("test", 80 * GIB),) * 8)
SIZE = PolicySize(parameters=1_000_003, hidden=128, layers=4, vocabulary=500)


def tiny(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/tiny/sudoku.toml", overrides)


def gpu(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/gpu/qwen3_vl_4b_sudoku.toml", overrides)


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


def test_sft_places_the_learner_alone() -> None:
    recipe = load_recipe(ROOT / "recipes/tiny/cold_start.toml", ["learner.ranks=2"])
    placed = plan(recipe, TWO_CORES, "sft")
    placed.require()
    assert placed.cpus == 2
    too_many = load_recipe(ROOT / "recipes/tiny/cold_start.toml", ["learner.ranks=3"])
    with pytest.raises(PlacementError, match=r"^learner\.ranks × learner\.cpus = 3 cores"):
        plan(too_many, TWO_CORES, "sft").require()


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
    one = learner_memory(tiny(f"learner.zero_stage={stage}"), SIZE)
    four = learner_memory(tiny(f"learner.zero_stage={stage}", "learner.ranks=4"), SIZE)
    for part, total in one.items():
        whole = -(-total // 4) if part in shared else total
        assert four[part] == whole, part


def test_bfloat16_states_are_sixteen_bytes_a_parameter() -> None:
    parts = learner_memory(tiny("model.dtype=bfloat16"), SIZE)
    states = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert states == 16 * SIZE.parameters  # arXiv 1910.02054, section 3.1


def test_a_local_policy_is_counted_from_its_own_files(tmp_path: Path) -> None:
    tensors = {"a": np.zeros((3, 5), np.float32), "b": np.zeros(7, np.float16)}
    save_file(tensors, tmp_path / "model-1.safetensors", metadata={"format": "np"})
    save_file({"c": np.zeros((), np.float32)}, tmp_path / "model-2.safetensors")
    text = {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 500}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
    assert policy_size(str(tmp_path)) == PolicySize(3 * 5 + 7 + 1, 128, 4, 500)
    (tmp_path / "model-2.safetensors").write_bytes(b"\x08")
    with pytest.raises(PlacementError, match="is the checkpoint whole"):
        policy_size(str(tmp_path))


def test_an_unknown_policy_is_placed_without_an_estimate() -> None:
    placed = plan(tiny("model.path=nobody/nothing"), TWO_CORES)
    assert placed.shortages == ()
    assert any("nobody/nothing" in note for note in placed.notes)


def test_memory_that_will_not_suffice_is_a_note() -> None:
    small = Machine(cores=2, memory=GIB // 2)
    assert any("main memory may not suffice" in note for note in plan(tiny(), small).notes)
    crowded = plan(gpu("learner.micro_batch_tokens=65536"), EIGHT_GPUS)
    assert any("GPU memory may not suffice" in note for note in crowded.notes)


def test_this_machine_is_seen() -> None:
    machine = Machine.detect()
    assert machine.cores >= 1 and machine.memory > GIB // 4
