"""How much seeing weighs against thinking in SFT: gradient norms of both, and λ from them.

Everywhere here L_p is the mean cross-entropy over an update's perception tokens and L_r that over
all its other response tokens, as in `BalancedLoss`, so L = λ·L_p + (1-λ)·L_r. `reasoning` names
the second part, answer and tags included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from learner.batch import MicroBatch, TrainBatch
from learner.losses import PERCEPTION, BalancedLoss, Loss, TokenMeanLoss
from learner.policy import Policy

Rule = Literal["token_mean", "fixed", "ngdiff"]
NormOf = Literal["all", "head"]


@dataclass(frozen=True)
class SegmentGradients:
    """The gradients of L_p and L_r over one whole update, all ranks.

    Attributes:
        perception, reasoning: Euclidean norms of g_p and g_r; 0 for a part without tokens.
        cosine: of the angle between them; below 0, what helps one part hurts the other. 0 where
            a norm is 0.
        seconds: wall time of the measurement.
    """

    perception: float
    reasoning: float
    cosine: float
    seconds: float = 0.0


def segment_gradients(
    policy: Policy, micro_batches: Iterable[MicroBatch], batch: TrainBatch, of: NormOf = "all"
) -> SegmentGradients:
    """Norms of g_p and g_r over the whole `batch`; parameters and their `.grad` stay as they are.

    `micro_batches` are this rank's share; with `torch.distributed` initialised every rank must
    call it, holding whole (not sharded) parameters. Gradients, which are linear, are summed in
    float32 over micro-batches and ranks before the norm is taken, so the split does not matter.

    `of="all"` is exact: of all trained parameters, one forward and two backward passes, two more
    gradients in memory. `of="head"` is a proxy: of the LM head's weight alone, a forward pass that
    keeps no activations (a tied embedding's use as the input is not counted).
    """
    start = time.perf_counter()
    counts = BalancedLoss().denominators(batch)
    head: Any = policy.model.lm_head
    watched = [head.weight] if of == "head" else list(policy.parameters())
    watched = [p for p in watched if p.requires_grad]
    sums = {part: [torch.zeros_like(p, dtype=torch.float32) for p in watched] for part in counts}
    with torch.random.fork_rng():
        for micro in micro_batches:
            with _graph_from_the_head_on(head) if of == "head" else torch.enable_grad():
                logprobs, _ = policy.run(micro)
            seen = micro.tokens.segments == PERCEPTION
            zero = logprobs.new_zeros(())
            losses = {
                "perception": -torch.where(seen, logprobs, zero).sum(),
                "reasoning": -torch.where(seen, zero, logprobs).sum(),
            }
            for part, loss in losses.items():
                share = loss / counts[part] * micro.weight
                again = part == "perception"
                found = torch.autograd.grad(share, watched, retain_graph=again, allow_unused=True)
                for total, gradient in zip(sums[part], found, strict=True):
                    if gradient is not None:
                        total += gradient
    if torch.distributed.is_initialized():
        for totals in sums.values():
            for total in totals:
                torch.distributed.all_reduce(total)
    squares = {"p": 0.0, "r": 0.0, "pr": 0.0}
    for p, r in zip(sums["perception"], sums["reasoning"], strict=True):
        p, r = p.flatten().double(), r.flatten().double()
        squares["p"] += float(p @ p)
        squares["r"] += float(r @ r)
        squares["pr"] += float(p @ r)
    norms = math.sqrt(squares["p"]), math.sqrt(squares["r"])
    both = norms[0] * norms[1]
    cosine = squares["pr"] / both if both else 0.0
    return SegmentGradients(*norms, cosine, time.perf_counter() - start)


@contextmanager
def _graph_from_the_head_on(head: torch.nn.Module) -> Iterator[None]:
    """Within, one forward pass records a graph for the LM head and what follows, none before."""

    def record(*_: Any) -> None:
        torch.set_grad_enabled(True)

    handle = head.register_forward_pre_hook(record)
    try:
        with torch.no_grad():
            yield
    finally:
        handle.remove()


def ngdiff_weight(perception: float, reasoning: float) -> float:
    """λ = ‖g_r‖ / (‖g_p‖ + ‖g_r‖): both parts then pull with equal norm, λ‖g_p‖ = (1-λ)‖g_r‖.

    NGDiff (arXiv 2410.22086) steps along g_R/‖g_R‖ - g_F/‖g_F‖, to keep one loss low and raise
    another. Here both are to fall, so the direction is g_p/‖g_p‖ + g_r/‖g_r‖, which is this λ up
    to scale. The adaptation is ours: arXiv 2605.29496 names NGDiff, and we read only its project
    page. The other paper's automatic learning rate is left out.
    """
    return reasoning / (perception + reasoning)


@dataclass
class Balance:
    """Chooses λ for each update of a run; updates count from 1.

    Attributes:
        rule: `token_mean` (λ is perception's token share), `fixed` or `ngdiff`.
        weight: λ of `fixed`.
        norm_every: updates between measurements of the gradients, 0 for none.
        smoothing: `ngdiff` uses s·(last λ) + (1-s)·(λ of this measurement). λ is averaged, not
            the norms: it is bounded, so one odd batch cannot rule the average.
        first_steps, first_weight: perception-first curriculum: λ of the first updates, before
            the rule sets in.
    """

    rule: Rule
    weight: float = 0.5
    norm_every: int = 0
    smoothing: float = 0.0
    first_steps: int = 0
    first_weight: float = 1.0
    _ngdiff: float = 0.5
    _measured: bool = False

    def measures(self, step: int) -> bool:
        """Whether the gradients are to be measured before this update.

        Counted so that the first update after the curriculum is one of them.
        """
        return self.norm_every > 0 and (step - 1 - self.first_steps) % self.norm_every == 0

    def observe(self, step: int, gradients: SegmentGradients) -> None:
        """Take a measurement into account. One with a part missing, or at rest, says nothing."""
        if step <= self.first_steps or not (gradients.perception and gradients.reasoning):
            return
        found = ngdiff_weight(gradients.perception, gradients.reasoning)
        if self._measured:
            found = self.smoothing * self._ngdiff + (1 - self.smoothing) * found
        self._ngdiff, self._measured = found, True

    def weight_at(self, step: int, batch: TrainBatch) -> float:
        """λ of this update; 0.5 for `ngdiff` before anything was measured."""
        if step <= self.first_steps:
            return self.first_weight
        if self.rule == "token_mean":
            return batch.segment_tokens().get(PERCEPTION, 0) / max(1, batch.response_tokens())
        return self.weight if self.rule == "fixed" else self._ngdiff

    def loss(self, step: int, batch: TrainBatch) -> Loss:
        """The loss of this update."""
        if self.rule == "token_mean" and step > self.first_steps:
            return TokenMeanLoss()
        return BalancedLoss(self.weight_at(step, batch))
