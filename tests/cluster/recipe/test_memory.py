"""Memory that a recipe takes: ZeRO's arithmetic, what is measured, what files say."""

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
from cluster.recipe.hardware import GIB, Gpu, Machine
from cluster.recipe.memory import PolicySize, learner_memory, policy_size, sampler_memory
from cluster.recipe.placement import plan
from cluster.recipe.recipe import Recipe, RecipeError, UserError, load_recipe
from learner.outline import Trained
from learner.policy import load_policy
from tests.learner.test_policy import peak_bytes
from tests.support.machines import EIGHT_GPUS, TWO_CORES, gpu, tiny
from tests.support.recipes import ROOT

SIZE = PolicySize(1_000_003, 128, layers=4, vocabulary=500, inner=384, queries=128, keys=64)


def memory_of(recipe: Recipe, size: PolicySize, trained: Trained | None = None) -> dict[str, int]:
    return learner_memory(recipe.model, recipe.learner, size, trained)


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


def test_mixed_states_are_those_of_float32_and_samplers_hold_half_of_that() -> None:
    whole, half = (memory_of(tiny(f"model.dtype={d}"), SIZE) for d in ("float32", "bfloat16"))
    mixed = memory_of(tiny("model.dtype=mixed"), SIZE)
    assert mixed == whole | {"weights in bfloat16": half["weights"]}
    weights = [
        sampler_memory(tiny(f"model.dtype={d}").model, tiny().sampler, SIZE, TWO_CORES)["weights"]
        for d in ("float32", "mixed", "bfloat16")
    ]
    assert weights[0] == 2 * weights[1] and weights[1] == weights[2]


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
