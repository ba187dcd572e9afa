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

Rule = Literal["token_mean", "fixed", "ngdiff", "ngdiff_sum"]
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

    Measured on 4x4 Sudoku with verbose demonstrations, 16 an update (1.8 M parameters): exact 1.55
    times the CPU time of an update, the proxy 0.36 times. The proxy does not see the vision tower,
    where much of g_p is, and ‖g_r‖/‖g_p‖ came out 2.6 to 6 times too large: an exact λ of 0.92,
    0.62 and 0.20 was 0.97, 0.87 and 0.60. Compare them on a model of your own before use.
    """
    start = time.perf_counter()
    counts = BalancedLoss().denominators(batch)
    head: Any = policy.model.lm_head
    watched = [head.weight] if of == "head" else list(policy.parameters())
    watched = [p for p in watched if p.requires_grad]
    if not watched:
        raise ValueError('the LM head is frozen, so norm_of = "head" has no gradient to measure')
    sums = {part: [_zeros(p) for p in watched] for part in counts}

    def forward(micro: MicroBatch) -> torch.Tensor:
        with _graph_from_the_head_on(head) if of == "head" else torch.enable_grad():
            return policy.run(micro)[0]

    with torch.random.fork_rng():  # dropout in here must not change the update's
        for micro in micro_batches:
            seen = micro.tokens.segments == PERCEPTION
            logprobs = forward(micro)
            for part, chosen in (("perception", seen), ("reasoning", ~seen)):
                first = part == "perception"
                if not (first or keep_graph):
                    logprobs = forward(micro)
                loss = -torch.where(chosen, logprobs, 0.0).sum() / counts[part] * micro.weight
                found = torch.autograd.grad(
                    loss, watched, retain_graph=first and keep_graph, allow_unused=True
                )
                for total, gradient in zip(sums[part], found, strict=True):
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


def _zeros(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Float32 zeros of a parameter's whole shape, which ZeRO-3 keeps in `ds_shape`."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return torch.zeros(shape, dtype=torch.float32, device=parameter.device)


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
    """Chooses λ for each update of a run; updates count from 1.

    Attributes:
        rule: `token_mean` (λ is perception's token share), `fixed`, `ngdiff` (λ equalizes both
            gradients) or `ngdiff_sum` (and the loss is divided by their pull, so that the part
            which is not solved goes on when the other is).
        weight: λ of `fixed`.
        norm_every: updates between measurements of the gradients, 0 for none.
        smoothing: s·(last λ) + (1-s)·(λ of this measurement), and so for the pull. These are
            averaged, not the norms: neither exceeds the smaller norm or 1, so one odd batch
            cannot rule the average.
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
    _pull: float = 1.0
    _measured: bool = False

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
        return self.norm_every > 0 and (step - 1 - self.first_steps) % self.norm_every == 0

    def observe(self, step: int, gradients: SegmentGradients) -> None:
        """Take a measurement into account. One with a part missing, or at rest, says nothing."""
        if step <= self.first_steps or not (gradients.perception and gradients.reasoning):
            return
        weight = ngdiff_weight(gradients.perception, gradients.reasoning)
        pull = balanced_pull(gradients.perception, gradients.reasoning)
        if self._measured:
            weight = self.smoothing * self._ngdiff + (1 - self.smoothing) * weight
            pull = self.smoothing * self._pull + (1 - self.smoothing) * pull
        self._ngdiff, self._pull, self._measured = weight, pull, True

    def weight_at(self, step: int, batch: TrainBatch) -> float:
        """λ of this update; 0.5 for `ngdiff` and `ngdiff_sum` before anything was measured."""
        if step <= self.first_steps:
            return self.first_weight
        if self.rule == "token_mean":
            return batch.segment_tokens().get(PERCEPTION, 0) / max(1, batch.response_tokens())
        return self.weight if self.rule == "fixed" else self._ngdiff

    def loss(self, step: int, batch: TrainBatch) -> Loss:
        """The loss of this update."""
        if self.rule == "token_mean" and step > self.first_steps:
            return TokenMeanLoss()
        divided = self.rule == "ngdiff_sum" and step > self.first_steps
        return BalancedLoss(self.weight_at(step, batch), 1 / self._pull if divided else 1.0)
