"""What the policy was before training: log-probs for a KL to it."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from learner.batch import MicroBatch
from learner.lora import Adapters
from learner.packing import attend_within_stretches
from learner.policy import Policy, load_policy
from learner.trainer import LearnerSetup


class Reference:
    """The policy of `model.path`, also where training starts, or goes on, from another folder.

    A frozen copy, whole on every rank; with LoRA the policy itself without its adapters.
    """

    def __init__(
        self, setup: LearnerSetup, adapters: Adapters | None, device: torch.device
    ) -> None:
        self._adapters = adapters
        self.copy: Policy | None = None
        if adapters is None:
            model = setup.model
            self.copy, _ = load_policy(
                model.path,
                model.dtype,
                model.attention,
                setup.temperature,
                model.lm_head_float32,
                setup.learner.logits_mib,
            )
            self.copy.requires_grad_(False).eval().to(device)
            if setup.learner.layout != "padded":
                attend_within_stretches(self.copy.model)

    @torch.no_grad()
    def logprobs(self, policy: Policy, micro: MicroBatch) -> torch.Tensor:
        """[N], in nats, of a micro-batch's response tokens. Under ZeRO-3 all ranks must call it."""
        if self.copy is not None:
            return self.copy.run(micro)[0]
        assert self._adapters is not None
        training = policy.training
        with ExitStack() as after:
            after.callback(policy.train, training)
            policy.eval()
            after.enter_context(self._adapters.silent())
            return policy.run(micro)[0]
