"""How much seeing weighs against thinking in SFT: gradient norms of both, and λ from them.

Everywhere here L_p is the mean cross-entropy over an update's perception tokens and L_r that over
all its other response tokens, as in `BalancedLoss`, so L = λ·L_p + (1-λ)·L_r. `reasoning` names
the second part, answer and tags included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from learner.batch import MicroBatch, TrainBatch
from learner.losses import PERCEPTION, BalancedLoss, Loss, TokenMeanLoss
from learner.policy import Policy
from learner.settings import SftConfig

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
    policy: Policy,
    micro_batches: Iterable[MicroBatch],
    batch: TrainBatch,
    of: NormOf = "all",
    keep_graph: bool = True,
) -> SegmentGradients:
    """Norms of g_p and g_r over the whole `batch`; parameters and their `.grad` stay as they are.

    `micro_batches` are this rank's share; with `torch.distributed` initialised every rank must
    call it. Gradients, which are linear, are summed in float32 over micro-batches and ranks before
    the norm is taken, so the split does not matter.

    `of="all"` is exact: of all trained parameters, by two backward passes through one graph, or
    through two where `keep_graph` is false (ZeRO-3 drops parameters after a backward pass). It
    holds two whole float32 gradients on every rank, also under ZeRO. `of="head"` is a proxy: of
    the LM head's weight alone, with a forward pass that keeps no activations; a tied embedding's
    use as the input is not counted.
    """
    start = time.perf_counter()
    counts = BalancedLoss().denominators(batch)
    head: Any = policy.model.lm_head
    watched = [head.weight] if of == "head" else list(policy.parameters())
    watched = [p for p in watched if p.requires_grad]
    if not watched:
        raise ValueError('the LM head is frozen, so norm_of = "head" has no gradient to measure')
    float32: Any = {"dtype": torch.float32, "device": watched[0].device}
    # ZeRO-3 keeps a parameter's whole shape in `ds_shape`.
    shapes = [getattr(p, "ds_shape", p.shape) for p in watched]
    sums = {part: [torch.zeros(shape, **float32) for shape in shapes] for part in counts}

    def forward(micro: MicroBatch) -> torch.Tensor:
        with _graph_from_the_head_on(head) if of == "head" else torch.enable_grad():
            return policy.run(micro)[0]

    with torch.random.fork_rng():  # dropout in here must not change the update's
        for micro in micro_batches:
            is_perception = micro.tokens.segments == PERCEPTION
            logprobs = forward(micro)
            for part, chosen in (("perception", is_perception), ("reasoning", ~is_perception)):
                first = part == "perception"
                if not (first or keep_graph):
                    logprobs = forward(micro)
                loss = -torch.where(chosen, logprobs, 0.0).sum() / counts[part] * micro.weight
                gradients = torch.autograd.grad(
                    loss, watched, retain_graph=first and keep_graph, allow_unused=True
                )
                for total, gradient in zip(sums[part], gradients, strict=True):
                    if gradient is not None:
                        total += gradient
    if torch.distributed.is_initialized():
        for totals in sums.values():
            for total in totals:
                torch.distributed.all_reduce(total)
    pp = rr = pr = 0.0
    for p, r in zip(sums["perception"], sums["reasoning"], strict=True):
        p, r = p.flatten().double(), r.flatten().double()
        pp, rr, pr = pp + float(p @ p), rr + float(r @ r), pr + float(p @ r)
    cosine = pr / math.sqrt(pp * rr) if pp and rr else 0.0
    return SegmentGradients(math.sqrt(pp), math.sqrt(rr), cosine, time.perf_counter() - start)


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

    The rule of arXiv 2605.29496, whose project page says that λ is adjusted on the fly to equalize
    perception and reasoning gradients; how, it does not say.
    """
    return reasoning / (perception + reasoning)


def balanced_pull(perception: float, reasoning: float) -> float:
    """λ‖g_p‖ = (1-λ)‖g_r‖ at the λ of `ngdiff_weight`: the norm with which each part then pulls.

    It vanishes with either norm. NGDiff's own step (arXiv 2410.22086) is the sum of unit vectors:
    there g_R/‖g_R‖ - g_F/‖g_F‖, to keep one loss low and raise another; here, where both are to
    fall, g_p/‖g_p‖ + g_r/‖g_r‖. That is the gradient of the balanced loss divided by this pull. Its
    automatic learning rate is left out.
    """
    return perception * reasoning / (perception + reasoning)


@dataclass
class Balance:
    """Chooses λ for each update of a run, as [sft] says; updates count from 1.

    `ngdiff` and `ngdiff_sum` average λ and the pull over measurements, by `norm_smoothing`, and
    not the norms: neither exceeds the smaller norm or 1, so one odd batch cannot rule the average.
    """

    sft: SftConfig
    _ngdiff: float = 0.5
    _pull: float = 1.0
    _measured: bool = False

    @property
    def first_steps(self) -> int:
        """Updates before the rule sets in."""
        staged = self.sft.curriculum == "perception_first"
        return round(self.sft.curriculum_share * self.sft.steps) if staged else 0

    def state(self) -> dict[str, float]:
        """What was measured so far, for a run that goes on; empty if nothing was."""
        return {"ngdiff": self._ngdiff, "pull": self._pull} if self._measured else {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take over what `state` gave."""
        if state:
            self._ngdiff, self._pull, self._measured = state["ngdiff"], state["pull"], True

    def measures(self, step: int) -> bool:
        """Whether the gradients are to be measured before this update.

        Counted so that the first update after the curriculum is one of them.
        """
        every = self.sft.norm_every
        return every > 0 and (step - 1 - self.first_steps) % every == 0

    def observe(self, step: int, gradients: SegmentGradients) -> None:
        """Take a measurement into account. One with a part missing, or at rest, says nothing."""
        if step <= self.first_steps or not (gradients.perception and gradients.reasoning):
            return
        weight = ngdiff_weight(gradients.perception, gradients.reasoning)
        pull = balanced_pull(gradients.perception, gradients.reasoning)
        if self._measured:
            decay = self.sft.norm_smoothing
            weight = decay * self._ngdiff + (1 - decay) * weight
            pull = decay * self._pull + (1 - decay) * pull
        self._ngdiff, self._pull, self._measured = weight, pull, True

    def weight_at(self, step: int, batch: TrainBatch) -> float:
        """λ of this update; 0.5 for `ngdiff` and `ngdiff_sum` before anything was measured."""
        if step <= self.first_steps:
            return self.sft.curriculum_weight
        if self.sft.balance == "token_mean":
            return batch.segment_tokens().get(PERCEPTION, 0) / max(1, batch.response_tokens())
        return self.sft.perception_weight if self.sft.balance == "fixed" else self._ngdiff

    def loss(self, step: int, batch: TrainBatch) -> Loss:
        """The loss of this update."""
        rule = self.sft.balance if step > self.first_steps else "fixed"
        if rule == "token_mean":
            return TokenMeanLoss()
        scale = 1 / self._pull if rule == "ngdiff_sum" else 1.0
        return BalancedLoss(self.weight_at(step, batch), scale)
