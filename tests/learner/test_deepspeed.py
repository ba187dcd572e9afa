"""The update, on real DeepSpeed ranks: the same whatever the split, the stage and the ranks."""

from __future__ import annotations

import itertools
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors import safe_open

from learner.batch import Layout, TrainBatch, TrainSequence
from learner.engine import (
    BUILD_SECONDS,
    LearnerSettings,
    clear_abandoned_builds,
)
from learner.policy import load_policy, make_collator
from learner.policy_loss import Papo, PolicyLoss
from learner.tiny import FAMILIES
from learner.weights import in_buckets, layer_groups
from tasks.files import replacing
from tasks.images import mask_patches
from tests.learner.test_policy import plain_logprobs
from tests.support.ranks import Job, Outcome, run_ranks
from tests.support.samples import CliffLoss, mixed_batch

RATE = 1e-3
CLIP = 0.5
LOSS = PolicyLoss(entropy_weight=0.01)
EVERY_TERM = PolicyLoss(
    0.05,
    0.08,
    objective="gspo",
    aggregation="sequence_mean",
    kl_weight=0.1,
    kl_estimator="k2",
    entropy_weights={"perception": 0.5, "reasoning": 0.2},
    papo=Papo(0.5, 0.3, patch_size=8, share=0.6),
)
# One family with M-RoPE and one without go through every setting, the others through both ends.
TWO = {
    "qwen3_vl": (
        "0",
        "1",
        "2",
        "3",
        "2 whole",
        "3 every term in turns",
        "2 whole every term",
        "3 whole packed",
        "3 whole shared_prefix every term",
    ),
    "internvl": ("0", "3", "3 packed"),
    "qwen2_5_vl": ("3", "3 whole every term"),
    "idefics3": ("3", "3 whole every term"),
}
ONE = {
    "qwen3_vl": ("0", "0 whole", "0 every term", "0 whole shared_prefix"),
    "internvl": ("0 whole", "0 every term"),
    "qwen2_5_vl": ("0 whole", "0 every term"),
    "idefics3": ("0 whole", "0 every term"),
}
REFUSING = (0, 2, 3)
SAVED = ("2/qwen3_vl/3", "1/qwen3_vl/0", "2/internvl/3", "1/internvl/0 whole")
NAMES = {
    "internvl": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    "qwen2_5_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
}


def checkpoint_name(family: str, name: str) -> str:
    """A module's parameter as the family's published checkpoints name it; most are the same."""
    for old, new in NAMES.get(family, {}).items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


class Ranks:
    """Outcomes by `<ranks>/<family>/<stage and split>`, and what they started from."""

    def __init__(self, folder: Path, tiny_models: dict[str, Path]) -> None:
        self.folder, self.paths = folder, {}
        self.batches: dict[str, tuple[TrainBatch, ...]] = {}
        for family in FAMILIES:
            policy, processor = load_policy(str(tiny_models[family]))
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
            self.paths[family] = folder / family
            policy.model.save_pretrained(self.paths[family])  # type: ignore[operator]
            processor.save_pretrained(self.paths[family])
            mixed = mixed_batch(processor)
            # In the second update one rank sees an image while the other reads blind.
            self.batches[family] = (mixed, TrainBatch(mixed.sequences[1:3]))
        self.outcomes: dict[str, Outcome] = {}
        for ranks, chosen in ((2, TWO), (1, ONE)):
            jobs = {
                f"{ranks}/{family}/{case}": self.job(f"{ranks}/{family}/{case}")
                for family, cases in chosen.items()
                for case in cases
            }
            if ranks == 1:
                jobs |= {f"refused {stage}": self.refused(stage) for stage in REFUSING}
            out = folder / f"ranks-{ranks}"
            out.mkdir()
            self.outcomes |= run_ranks(ranks, jobs, out, seconds=600)

    def job(self, name: str) -> Job:
        _, family, case = name.split("/")
        settings = LearnerSettings(
            model=str(self.paths[family]),
            zero_stage=int(case[0]),
            micro_batch_tokens=10_000 if "whole" in case else 1,
            max_grad_norm=CLIP,
            layout=next((x for x in get_args(Layout) if x in case), "padded"),
            # A few tokens a turn: their logits are made again in the backward pass.
            logits_mib=0.01 if "turns" in case else 256.0,
        )
        save = str(self.folder / name.replace("/", "-")) if name in SAVED else None
        loss = EVERY_TERM if "every term" in case else LOSS
        return Job(settings, tuple((b, loss) for b in self.batches[family]), RATE, save)

    def refused(self, stage: int) -> Job:
        """Two updates to refuse: one for its gradient, one for its loss."""
        clean = self.job(f"1/qwen3_vl/{stage}")
        batch, _ = clean.updates[0]
        updates = ((batch, CliffLoss()), (batch, CliffLoss(math.nan)))
        return replace(clean, updates=updates, save=None)

    def stored(self, folder: Path) -> dict[str, torch.Tensor]:
        with safe_open(str(folder / "model.safetensors"), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def reference(self, family: str, every_term: bool) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss and float64 gradients of the first update: plain model, a sequence at a time."""
        policy, processor = load_policy(str(self.paths[family]))
        policy.double()
        batch = self.batches[family][0]
        total = torch.zeros(())
        for s in batch.sequences:
            logprobs, entropies = plain_logprobs(policy, processor, s)
            if every_term:
                image = None if s.image is None else mask_patches(s.image, 8, 0.6)
                masked = plain_logprobs(policy, processor, replace(s, image=image))
                total = total + every_term_reference(s, logprobs, entropies, *masked, batch)
                continue
            ratio = (logprobs - torch.from_numpy(s.sampler_logprobs)).exp()
            gain = torch.minimum(
                ratio * torch.from_numpy(s.advantages),
                ratio.clamp(0.8, 1.28) * torch.from_numpy(s.advantages),
            )
            total = total - (gain + 0.01 * entropies).sum() / batch.response_tokens()
        total.backward()
        gradients = {
            n: torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in policy.model.named_parameters()
        }
        return float(total.detach()), gradients


def every_term_reference(
    s: TrainSequence,
    logprobs: torch.Tensor,
    entropies: torch.Tensor,
    masked: torch.Tensor,
    masked_entropies: torch.Tensor,
    batch: TrainBatch,
) -> torch.Tensor:
    """A sequence's share of `EVERY_TERM`."""
    gap = logprobs - torch.from_numpy(s.sampler_logprobs)
    advantages, found = torch.from_numpy(s.advantages), torch.zeros((), dtype=torch.float64)
    ratio = float(gap.detach().mean().exp())
    for t in range(len(gap)):
        a = float(advantages[t])
        if not (ratio > 1.08 and a > 0) and not (ratio < 0.95 and a < 0):
            # The token form of GSPO: the sequence's ratio, a gradient for each token of its own.
            found = found - ratio * a * (1 + logprobs[t] - logprobs[t].detach())
        else:
            found = found - min(max(ratio, 0.95), 1.08) * a
        found = found + 0.1 * gap[t] ** 2 / 2
    found = found / len(gap) / len(batch.sequences)
    for index, weight in ((0, 0.5), (1, 0.2)):
        count = sum(int((other.segments == index).sum()) for other in batch.sequences)
        own = torch.from_numpy(s.segments == index)
        found = found - weight * entropies[own].sum() / max(1, count)
    r = (masked - logprobs).exp()
    image_terms = 0.3 * (entropies + masked_entropies) - 0.5 * (r - 1 - r.log())
    return found + image_terms.sum() / batch.response_tokens()


@pytest.fixture(scope="module")
def ranks(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("ranks"), tiny_models)


def outcomes(ranks: Ranks, family: str, every_term: bool = False) -> dict[str, Outcome]:
    return {
        name: outcome
        for name, outcome in ranks.outcomes.items()
        if f"/{family}/" in name and every_term == ("every term" in name)
    }


@pytest.mark.parametrize("every_term", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_plain_model_however_split(
    ranks: Ranks, family: str, every_term: bool
) -> None:
    loss, gradients = ranks.reference(family, every_term)
    norm = float(torch.stack([g.norm() for g in gradients.values()]).norm())
    assert norm > 2 * CLIP
    found = outcomes(ranks, family, every_term)
    assert found
    for name, outcome in found.items():
        assert outcome.metrics[0]["loss"] == pytest.approx(loss, abs=2e-6), name
        assert outcome.gradients.keys() == gradients.keys()
        for parameter, expected in gradients.items():
            gap = (outcome.gradients[parameter].double() - expected).norm()
            assert gap < 2e-5 * norm, (name, parameter)


@pytest.mark.parametrize("every_term", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_metrics_do_not_depend_on_the_split(ranks: Ranks, family: str, every_term: bool) -> None:
    first, *others = outcomes(ranks, family, every_term).values()
    skip = ("seconds", "padding_share", "shared_share")
    for other in others:
        for update in range(2):
            a, b = first.metrics[update], other.metrics[update]
            assert a.keys() == b.keys()
            for name in a.keys() - set(skip):
                # The second update follows a sign-like first step of AdamW: rounding shows more.
                assert b[name] == pytest.approx(a[name], rel=2e-5 * 20**update, abs=2e-5), name
    tokens = {n: v for n, v in first.metrics[0].items() if n.startswith("tokens/")}
    assert sum(tokens.values()) == ranks.batches[family][0].response_tokens()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_norm_is_that_of_this_update_before_clipping(
    ranks: Ranks, family: str
) -> None:
    for name, outcome in outcomes(ranks, family).items():
        told = [m["grad_norm"] for m in outcome.metrics]
        assert told == pytest.approx(outcome.norms, rel=1e-4), name
        assert abs(told[0] - told[1]) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_is_adamw_on_the_clipped_gradient(ranks: Ranks, family: str) -> None:
    start = ranks.stored(ranks.paths[family])
    for name, outcome in outcomes(ranks, family).items():
        assert outcome.after_first.keys() == start.keys()
        scale = CLIP / outcome.norms[0]
        for parameter, gradient in outcome.gradients.items():
            moment = outcome.moments[parameter] / (1 - 0.9)
            assert (moment - gradient * scale).norm() < 1e-4 * CLIP, (name, parameter)
            at = checkpoint_name(family, parameter)
            expected = start[at] - RATE * moment / (moment.abs() + 1e-8)
            gap = (outcome.after_first[at] - expected).abs().max()
            assert gap < 2e-3 * RATE, (name, parameter)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_go_by_their_checkpoint_names_and_metadata_says_so_before(
    ranks: Ranks, family: str
) -> None:
    stored = ranks.stored(ranks.paths[family])
    for outcome in outcomes(ranks, family).values():
        assert outcome.weights.keys() == stored.keys()
        assert outcome.metadata == [
            (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in outcome.weights.items()
        ]
        assert all(outcome.weights[name].shape == stored[name].shape for name in stored)


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_folder_is_the_learner_that_wrote_it(ranks: Ranks, name: str) -> None:
    family = name.split("/")[1]
    folder, outcome = ranks.folder / name.replace("/", "-"), ranks.outcomes[name]
    stored = ranks.stored(folder)
    assert stored.keys() == ranks.stored(ranks.paths[family]).keys()
    assert all(torch.equal(stored[n], outcome.weights[n]) for n in stored)
    changed = [n for n in stored if not torch.equal(stored[n], outcome.after_first[n])]
    assert len(changed) > len(stored) / 2
    policy, processor = load_policy(str(folder))
    assert processor.chat_template == load_policy(str(ranks.paths[family]))[1].chat_template
    assert (folder / "chat_template.jinja").exists()
    with torch.no_grad():
        found, _ = policy.eval().run(
            make_collator(policy, processor)(ranks.batches[family][0].sequences)
        )
    told = np.concatenate(outcome.logprobs)
    np.testing.assert_allclose(found.numpy(), told, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_computes_its_share_of_log_probs_and_all_come_back(
    ranks: Ranks, family: str
) -> None:
    sequences = ranks.batches[family][0].sequences
    tokens = sum(len(s.response_ids) for s in sequences)
    for name, outcome in outcomes(ranks, family).items():
        assert [len(found) for found in outcome.logprobs] == [
            len(s.response_ids) for s in sequences
        ]
        alone = name.startswith("1/")
        assert outcome.computed == tokens if alone else 0 < outcome.computed < tokens, name


@pytest.mark.parametrize("stage", REFUSING)
def test_an_update_that_is_not_finite_is_refused_whole(ranks: Ranks, stage: int) -> None:
    outcome = ranks.outcomes[f"refused {stage}"]
    gradient, loss = outcome.errors
    assert "gradient norm" in gradient and "not applied" in gradient
    assert "loss of micro-batch 0 is nan" in loss and "not applied" in loss
    stored = ranks.stored(ranks.paths["qwen3_vl"])
    assert all(torch.equal(stored[name], outcome.weights[name]) for name in stored)


def test_an_interrupted_save_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    for text in ("one", "two"):
        with replacing(folder) as fresh:
            assert not list(fresh.iterdir())
            (fresh / "file").write_text(text)
        assert (folder / "file").read_text() == text
    with pytest.raises(OSError, match="disk"), replacing(folder) as fresh:
        (fresh / "other").write_text("half")
        raise OSError("disk full")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    assert (folder / "file").read_text() == "two"


def test_layer_groups_hold_every_name_once_and_a_layer_together() -> None:
    names = ["a.w", "m.layers.0.q", "m.layers.0.mlp.1.k", "m.layers.10.q", "v.blocks.0.q", "b"]
    groups = layer_groups(names)
    assert sorted(n for group in groups for n in group) == sorted(names)
    assert ["m.layers.0.q", "m.layers.0.mlp.1.k"] in groups
    assert ["m.layers.10.q"] in groups


def test_buckets_join_neighbours_within_their_size_and_lose_none() -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        sizes = rng.integers(1, 40, rng.integers(0, 30)).tolist()
        groups = [[f"{place}.a", f"{place}.b"] for place in range(len(sizes))]
        limit = int(rng.integers(0, 80))

        def size(names: list[str], sizes: list[int] = sizes) -> int:
            return sum(sizes[int(place)] for place in {name.split(".")[0] for name in names})

        buckets = in_buckets(groups, size, limit)
        assert [name for bucket in buckets for name in bucket] == [n for g in groups for n in g]
        for bucket, following in itertools.zip_longest(buckets, buckets[1:]):
            assert size(bucket) <= limit or len(bucket) == 2
            # Full: what comes next had no room. A layer is never split.
            if following:
                assert size(bucket) + size(following[:2]) > limit
                assert following[0].split(".")[0] != bucket[-1].split(".")[0]


def test_the_lock_of_a_build_that_died_long_ago_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("old", "at-work"):
        (tmp_path / "py311_cpu" / name).mkdir(parents=True)
        (tmp_path / "py311_cpu" / name / "lock").touch()
    long_ago = time.time() - 2 * BUILD_SECONDS
    os.utime(tmp_path / "py311_cpu" / "old" / "lock", (long_ago, long_ago))
    clear_abandoned_builds()
    assert [lock.parent.name for lock in tmp_path.rglob("lock")] == ["at-work"]
