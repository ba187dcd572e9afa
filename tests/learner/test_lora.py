"""LoRA: adapters train as they should; what is sent and saved is the policy that was trained."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from learner.batch import TrainBatch
from learner.checkpoint import check, checkpoint_folder
from learner.lora import ADAPTER, Adapters, LoraSettings
from learner.policy import Policy, load_policy, make_collator
from learner.policy_loss import PolicyLoss
from learner.trainer import LearnerSettings
from rollout.tokens import ModelError
from tests.support.ranks import Job, Outcome, run_ranks
from tests.support.samples import mixed_batch

LOSS = PolicyLoss(entropy_weight=0.01)
LORA = LoraSettings(rank=4, alpha=6.0, targets=("*.q_proj", "*.down_proj", "vision", "merger"))
SAVED_AFTER = 2
JOBS = {2: ("3",), 1: ("0", "0 bf16")}
RESUMED = {"2/3": (2, 3), "1/0": (1, 0), "2/3 > 1/0": (1, 0)}


def adapted(model_path: str, seed: int = 3) -> tuple[Policy, Any, Adapters]:
    """A policy with adapters that do something (fresh ones have B = 0)."""
    policy, processor = load_policy(model_path)
    adapters = Adapters(policy, LORA, model_path)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapters.layers:
            for matrix in adapters.matrices(layer):
                matrix.copy_(0.2 * torch.randn(matrix.shape, generator=generator))
    return policy, processor, adapters


def test_adapters_are_all_that_trains_and_begin_as_nothing(
    model_path: str, loaded: tuple[Policy, Any]
) -> None:
    policy, processor = load_policy(model_path)
    adapters = Adapters(policy, LORA, model_path)
    trained = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert len(trained) == 2 * len(adapters.layers)
    assert {policy.family.part_of(name) for name in adapters.layers} == {
        "language",
        "vision",
        "merger",
    }
    for layer, shape in adapters.layers.items():
        a, b = adapters.matrices(layer)
        assert (b.shape[0], a.shape[1]) == tuple(shape) and a.shape[0] == b.shape[1] == 4
    batch = make_collator(policy, processor)(mixed_batch(processor).sequences)
    with torch.no_grad():
        found, expected = policy.eval().run(batch)[0], loaded[0].eval().run(batch)[0]
    assert torch.equal(found, expected)


def test_the_layer_computes_what_the_paper_says_and_so_does_the_merged_one(
    model_path: str,
) -> None:
    """Against float64 matrices made here: W + (alpha/r) B A."""
    policy, processor, adapters = adapted(model_path)
    named = dict(policy.model.named_parameters())
    merged = adapters.merged(named, (p.data for p in named.values()))
    plain = load_policy(model_path)[0]
    start = dict(plain.model.named_parameters())
    assert merged.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in start.items():
            layer = name.removesuffix(".weight")
            expected = parameter.double()
            if layer in adapters.layers:
                a, b = (m.double() for m in adapters.matrices(layer))
                expected = expected + 6.0 / 4 * b @ a
                assert (merged[name] - parameter).abs().max() > 0.1
            torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=1e-5)
            parameter.copy_(merged[name])
        batch = make_collator(policy, processor)(mixed_batch(processor).sequences)
        found, expected = policy.eval().run(batch)[0], plain.eval().run(batch)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_only_a_and_b_travel_under_the_names_of_the_checkpoint(model_path: str) -> None:
    _, _, adapters = adapted(model_path)
    source = adapters.weights(lambda _: nullcontext(), torch.float32)
    stored = load_file(Path(model_path) / "model.safetensors")
    sent = dict(source)
    assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sent.items()
    ]
    assert sum(t.numel() for t in sent.values()) == sum(
        4 * sum(shape) for shape in adapters.layers.values()
    )
    weights = {name.rsplit(".lora_", 1)[0] for name in sent}
    assert len(weights) == len(adapters.layers)
    for weight in weights:
        a, b = sent[f"{weight}.lora_A.weight"], sent[f"{weight}.lora_B.weight"]
        assert (b @ a).shape == stored[f"{weight}.weight"].shape


@pytest.mark.parametrize(
    ("target", "said"),
    (
        ("*.q_prj", r"'\*\.q_prj' matches no linear layer but the LM head's.*q_proj"),
        ("head", "'head' matches no linear layer"),
        ("lm_head", "'lm_head' matches no linear layer"),
        ("*.input_layernorm", "matches no linear layer"),
    ),
)
def test_targets_that_cannot_be_adapted_are_refused(
    model_path: str, target: str, said: str
) -> None:
    policy, _ = load_policy(model_path)
    with pytest.raises(ModelError, match=r"learner\.lora\.targets: .*" + said):
        Adapters(policy, replace(LORA, targets=("*.q_proj", target)), model_path)


class Lives:
    """Learners with adapters, by `<ranks>/<stage>`, and those that went on from them."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder, model
        mixed = mixed_batch(load_policy(model)[1])
        self.batches = (mixed, TrainBatch(mixed.sequences[1:3]), mixed, mixed)
        self.found: dict[str, Outcome] = {}
        for ranks, cases in JOBS.items():
            jobs = {f"{ranks}/{case}": self.job(f"{ranks}/{case}") for case in cases}
            for name, (on, stage) in RESUMED.items():
                if on == ranks:
                    jobs[f"resumed {name}"] = self.resume(name.split(" ")[0], stage)
            out = folder / f"ranks-{ranks}"
            out.mkdir()
            self.found |= run_ranks(ranks, jobs, out, seconds=600)

    def checkpoint(self, name: str) -> Path:
        return checkpoint_folder(self.folder / name.replace("/", "-").replace(" ", "-"), 2)

    def saved(self, name: str) -> Path:
        return self.folder / f"saved-{name.replace('/', '-').replace(' ', '-')}"

    def job(self, name: str) -> Job:
        settings = LearnerSettings(
            model=self.model,
            dtype="bfloat16" if "bf16" in name else "float32",
            zero_stage=int(name[2]),
            micro_batch_tokens=600,
            lora=LORA,
            rates={"vision": 0.5},
        )
        updates = tuple((batch, LOSS) for batch in self.batches)
        at = (SAVED_AFTER, str(self.checkpoint(name)))
        return Job(settings, updates, 1e-2, str(self.saved(name)), checkpoint=at)

    def resume(self, start: str, stage: int) -> Job:
        job = self.job(start)
        left = str(self.checkpoint(start))
        settings = replace(job.settings, zero_stage=stage, model=left, base=self.model, resume=True)
        return Job(settings, job.updates[SAVED_AFTER:], job.learning_rate)


@pytest.fixture(scope="module")
def lives(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Lives:
    return Lives(tmp_path_factory.mktemp("lora"), str(tiny_models["qwen3_vl"]))


def assert_alike(found: Outcome, expected: Outcome, first: int, loose: float) -> None:
    for new, old in zip(found.metrics, expected.metrics[first:], strict=True):
        for name in ("loss", "grad_norm", "entropy/perception"):
            assert new[name] == pytest.approx(old[name], rel=loose, abs=1e-5), name
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        assert (found.weights[name] - tensor).abs().max() < loose, name


def test_the_stage_and_the_ranks_change_nothing(lives: Lives) -> None:
    one = lives.found["1/0"]
    assert one.metrics[0]["loss"] != pytest.approx(one.metrics[2]["loss"], rel=1e-2)
    two = lives.found["2/3"]
    assert_alike(two, one, 0, 2e-3)
    for parameter, gradient in one.gradients.items():
        assert (two.gradients[parameter] - gradient).norm() < 1e-4 * one.norms[0], parameter


def test_optimizer_state_and_gradients_are_of_adapters_only(lives: Lives) -> None:
    policy, _ = load_policy(lives.model)
    layers = Adapters(policy, LORA, lives.model).layers
    elements = sum(LORA.rank * sum(shape) for shape in layers.values())
    for name, outcome in lives.found.items():
        ranks = 2 if name.endswith("2/3") else 1
        assert all(".lora_" in parameter for parameter in outcome.gradients)
        assert elements / ranks <= outcome.state_elements < 1.1 * elements / ranks + 1000, name


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_learner_goes_on_with_its_adapters(lives: Lives, name: str) -> None:
    same = ">" not in name
    found, whole = lives.found[f"resumed {name}"], lives.found[name.split(" ")[0]]
    assert_alike(found, whole, SAVED_AFTER, 1e-6 if same else 2e-3)


@pytest.mark.parametrize("name", ("2/3", "1/0", "1/0 bf16"))
def test_what_is_saved_is_a_plain_folder_of_the_policy_and_its_adapters(
    lives: Lives, name: str
) -> None:
    folder, outcome = lives.saved(name), lives.found[name]
    check(lives.checkpoint(name))
    loose = 0.1 if "bf16" in name else 1e-4  # bfloat16 rounds the sum of W and the update
    told = np.concatenate(outcome.logprobs)
    policy, processor = load_policy(str(folder), "bfloat16" if "bf16" in name else "float32")
    batch = make_collator(policy, processor)(lives.batches[0].sequences)
    start = load_policy(lives.model)[0]
    with torch.no_grad():
        found = policy.eval().run(batch)[0].float().numpy()
        before = start.eval().run(batch)[0].numpy()
    np.testing.assert_allclose(found, told, rtol=0, atol=loose)
    assert np.abs(before - told).max() > 3 * loose
    stored = load_file(Path(lives.model) / "model.safetensors")
    assert load_file(folder / "model.safetensors").keys() == stored.keys()
    # PEFT itself reads the adapters, onto the model they were trained on.
    base = AutoModelForImageTextToText.from_pretrained(lives.model, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, folder / ADAPTER).merge_and_unload()
    with torch.no_grad():
        again = Policy(peft).eval().run(batch)[0].numpy()
    np.testing.assert_allclose(again, told, rtol=0, atol=loose)


def test_adapters_of_other_layers_are_not_taken_over(lives: Lives) -> None:
    policy, _ = load_policy(lives.model)
    adapters = Adapters(policy, replace(LORA, rank=8), lives.model)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: holds other adapters"):
        adapters.load(lives.saved("1/0") / ADAPTER)
