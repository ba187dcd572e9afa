"""A policy loss of a user's own, by name: docs/your_algorithm.md says what it gets and gives."""

from __future__ import annotations

import torch

from learner.batch import Tokens
from learner.loss_settings import LossConfig
from tasks.load import import_named


def own_loss(
    config: LossConfig, logprobs: torch.Tensor, old_logprobs: torch.Tensor, tokens: Tokens
) -> torch.Tensor:
    """The loss [N] of each response token of a micro-batch, to be minimised.

    `old_logprobs` [N] are those that a ratio is against: the sampler's, or under a correction those
    of the policy that the step begins with. Raises ValueError for what is no loss a token.
    """
    where = f'algorithm.loss: "{config.loss}"'
    function = import_named("algorithm.loss", config.loss)
    losses = function(logprobs, old_logprobs, tokens.advantages, tokens, **config.loss_args)
    if not isinstance(losses, torch.Tensor) or losses.shape != logprobs.shape:
        gave = f"shape {tuple(losses.shape)}" if hasattr(losses, "shape") else type(losses).__name__
        raise ValueError(
            f"{where}: gave {gave}, expected a tensor of shape {tuple(logprobs.shape)}: the loss "
            "of each token, which algorithm.aggregation makes one number of"
        )
    return losses


def try_loss(config: LossConfig) -> None:
    """Call it on a few made-up tokens: five of one sequence, two of another.

    Raises ValueError, in one line, for one that cannot be loaded or called, or whose values or
    gradient are not finite.
    """
    where = f'algorithm.loss: "{config.loss}"'
    logprobs = torch.tensor([-0.1, -2.0, -0.7, -0.3, -1.2, -0.5, -3.0], requires_grad=True)
    old = torch.tensor([-0.2, -1.0, -0.7, -0.9, -1.1, -0.5, -2.0])
    tokens = Tokens(
        ids=torch.arange(7),
        segments=torch.tensor([0, 0, 1, 2, -1, 1, 2]),
        sampler_logprobs=old,
        advantages=torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, -1.5, -1.5]),
        sequences=torch.tensor([0, 0, 0, 0, 0, 1, 1]),
    )
    try:
        losses = own_loss(config, logprobs, old, tokens)
    except Exception as error:  # a user's own function may raise anything
        ours = str(error).startswith("algorithm.loss: ")
        message = str(error) if ours else f"{where}: {type(error).__name__}: {error}"
        raise ValueError(message) from error
    if not losses.requires_grad:
        raise ValueError(f"{where}: its values do not depend on `logprobs`, so nothing is learnt")
    losses.sum().backward()
    gradient = logprobs.grad
    if not losses.isfinite().all() or gradient is None or not gradient.isfinite().all():
        raise ValueError(
            f"{where}: on made-up tokens its values are {losses.tolist()}, its gradient "
            f"{None if gradient is None else gradient.tolist()}; both must be finite"
        )
