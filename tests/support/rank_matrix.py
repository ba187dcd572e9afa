"""Updates on real DeepSpeed ranks in every setting, started once, and a plain model's own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from safetensors import safe_open

from learner.batch import Layout, TrainBatch, TrainSequence
from learner.families import FAMILIES as FAMILY
from learner.loss_settings import EntropyWeights, LossConfig, PapoConfig
from learner.losses import BalancedLoss
from learner.policy import load_policy
from learner.policy_loss import PolicyLoss
from learner.tiny import FAMILIES
from rollout.tokens import load_processor
from tasks.images import mask_patches
from tests.support.plain import plain_logprobs
from tests.support.ranks import Job, Outcome, run_ranks, setup
from tests.support.samples import CliffLoss, mixed_batch
from tests.support.shaken import shaken

RATE = 1e-3
PART_OF = FAMILY["qwen3_vl"].part_of
CLIP = 0.5
LOSS = PolicyLoss(LossConfig(entropy_weight=0.01))
EVERY_TERM = PolicyLoss(
    LossConfig(
        loss="gspo",
        clip_low=0.05,
        clip_high=0.08,
        kl_weight=0.1,
        kl_estimator="k2",
        reference_kl_weight=0.2,
        entropy_weights=EntropyWeights(perception=0.5, reasoning=0.2),
        papo=PapoConfig(weight=0.5, entropy_weight=0.3, patch_size=8, share=0.6),
    )
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
OPTIONS = {
    1: ("0 frozen", "2 frozen by turns"),
    2: (
        "1 offload optimizer",
        "2 frozen offload optimizer",
        "3 offload all recompute",
        "3 frozen recompute",
        "2 by turns",
        "3 offload optimizer by turns",
    ),
}
"""Of the engine, which change where and what it computes."""
FREEZE = ("vision", "*.layers.1.*", "*.layers.2.self_attn.q_proj.weight")
RATES = {"merger": 0.25, "*.layers.3.*": 3.0}
BALANCED = {1: ("0 whole", "0 whole plain"), 2: ("2", "3")}
"""Measured before each update, but for `plain`."""
REFUSING = (0, 2, 3)
SAVED = ("2/qwen3_vl/3", "1/qwen3_vl/0", "2/internvl/3", "1/internvl/0 whole")


class Ranks:
    """Outcomes by `<ranks>/<family>/<stage and split>`, and what they started from."""

    def __init__(self, folder: Path, tiny_models: dict[str, Path]) -> None:
        self.folder, self.paths, self.bases = folder, {}, tiny_models
        self.batches: dict[str, tuple[TrainBatch, ...]] = {}
        for family in FAMILIES:
            self.paths[family] = shaken(tiny_models[family], folder / family, seed=7)
            mixed = mixed_batch(load_processor(str(self.paths[family])))
            # In the second update one rank sees an image while the other reads blind.
            self.batches[family] = (mixed, TrainBatch(mixed.sequences[1:3]))
        self.outcomes: dict[str, Outcome] = {}
        for ranks, chosen in ((2, TWO), (1, ONE)):
            groups = {**chosen, "options": OPTIONS[ranks], "balanced": BALANCED[ranks]}
            jobs = {
                f"{ranks}/{group}/{case}": self.job(f"{ranks}/{group}/{case}")
                for group, cases in groups.items()
                for case in cases
            }
            if ranks == 1:
                jobs |= {f"refused {stage}": self.refused(stage) for stage in REFUSING}
            out = folder / f"ranks-{ranks}"
            out.mkdir()
            self.outcomes |= run_ranks(ranks, jobs, out, seconds=900)

    def job(self, name: str) -> Job:
        _, group, case = name.split("/")
        family = group if group in FAMILIES else "qwen3_vl"
        frozen = "frozen" in case
        chosen = setup(
            str(self.bases[family]),
            zero_stage=int(case[0]),
            micro_batch_tokens=10_000 if "whole" in case else 600 if group == "options" else 1,
            max_grad_norm=CLIP,
            layout=next((x for x in get_args(Layout) if x in case), "padded"),
            # A few tokens a turn: their logits are made again in the backward pass.
            logits_mib=0.01 if "turns" in case else 256.0,
            freeze=FREEZE if frozen else (),
            rates=RATES if frozen else {},
            activation_checkpointing="recompute" in case,
            offload="optimizer" if "optimizer" in case else "all" if "all" in case else "none",
        )
        # Training starts elsewhere than at the reference.
        every_term = "every term" in case
        chosen = replace(chosen, folder=str(self.paths[family]), reference=every_term)
        batches = self.batches[family]
        if group == "balanced":
            updates = tuple((batch, BalancedLoss(0.3)) for batch in reversed(batches))
            return Job(chosen, updates, RATE, measure=() if "plain" in case else ("all", "head"))
        save = str(self.folder / name.replace("/", "-")) if name in SAVED else None
        loss = EVERY_TERM if every_term else LOSS
        updates = tuple((b, loss) for b in batches)
        return Job(chosen, updates, RATE, save, turns="by turns" in case)

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
        base, _ = load_policy(str(self.bases[family]))
        base.double()
        batch = self.batches[family][0]
        total = torch.zeros(())
        for s in batch.sequences:
            logprobs, entropies = plain_logprobs(policy, processor, s)
            if every_term:
                images = tuple(mask_patches(image, 8, 0.6) for image in s.images)
                masked = plain_logprobs(policy, processor, replace(s, images=images))
                with torch.no_grad():
                    known, _ = plain_logprobs(base, processor, s)
                total = total + every_term_reference(s, logprobs, entropies, *masked, known, batch)
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
    known: torch.Tensor,
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
        away = known[t] - logprobs[t]
        found = found + 0.2 * (away.exp() - away - 1)
    found = found / len(gap) / len(batch.sequences)
    for index, weight in ((0, 0.5), (1, 0.2)):
        count = sum(int((other.segments == index).sum()) for other in batch.sequences)
        own = torch.from_numpy(s.segments == index)
        found = found - weight * entropies[own].sum() / max(1, count)
    r = (masked - logprobs).exp()
    image_terms = 0.3 * (entropies + masked_entropies) - 0.5 * (r - 1 - r.log())
    return found + image_terms.sum() / batch.response_tokens()
