"""DeepSpeed behind a small face: update on a batch, offer the weights, save the model.

The only file that imports deepspeed. Every rank is handed the whole batch and takes its own
share by `learner.micro_batches`, so all ranks agree on denominators without a collective.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from learner.balance import NormOf, SegmentGradients, segment_gradients
from learner.batch import MicroBatch, TrainBatch
from learner.builds import watch_builds
from learner.checkpoint import STATE, TRAINING, Writer, prune, seal, write_json
from learner.collate import Collator
from learner.lora import ADAPTER, Adapters, AdapterWeights
from learner.losses import Loss, View
from learner.metrics import Metric, Total, combined, layout_metrics, values
from learner.micro_batches import count_costs, deal_micro_batches, describe
from learner.parts import freeze, parameter_groups
from learner.policy import Policy, keep_no_activations, load_policy
from learner.reference import Reference
from learner.settings import LearnerConfig
from learner.state import (
    OptimizerState,
    forget_first_step,
    random_state,
    read_random_states,
    seed_all,
    set_random_state,
)
from learner.trainer import LearnerSetup, NonFiniteLoss, Trainer, WorldPlace
from learner.weights import GatheredWeights, OfferedWeights, layer_groups
from learner.zero import HostStates, gradient_dtype, zero_optimization
from rollout.tokens import ModelError
from tasks.files import replacing


@dataclass(frozen=True)
class HostWeights:
    """A model's weights by module name, and its adapters' as PEFT names them, in host memory."""

    model: dict[str, torch.Tensor]
    adapters: dict[str, torch.Tensor]


class DeepSpeedLearner(Trainer):
    """One rank of the learner: a `Trainer` on DeepSpeed's ZeRO 0 to 3."""

    def __init__(self, setup: LearnerSetup, world: WorldPlace) -> None:
        os.environ.update(
            RANK=str(world.rank),
            LOCAL_RANK="0",  # Ray shows a rank its own GPU and no other
            WORLD_SIZE=str(world.size),
            MASTER_ADDR=world.master.rsplit(":", 1)[0],
            MASTER_PORT=world.master.rsplit(":", 1)[1],
        )
        on_gpu = setup.learner.gpus > 0
        if on_gpu and not torch.cuda.is_available():
            raise ModelError(
                f"learner.gpus is {setup.learner.gpus:g}, and torch {torch.__version__} sees no GPU"
            )
        if not on_gpu:
            # Ray leaves GPUs in sight of actors that asked for none.
            os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
        watch_builds()
        learner, model = setup.learner, setup.model
        torch.set_num_threads(learner.intra_op_threads)
        torch.manual_seed(setup.seed)
        # What adapters are of stays as it was; a checkpoint's weights have them merged in.
        start = model.path if learner.lora and setup.resume else setup.start
        policy, self.processor = load_policy(
            start,
            model.dtype,
            model.attention,
            setup.temperature,
            model.lm_head_float32,
            learner.logits_mib,
            model,
        )
        self._adapters = Adapters(policy, learner.lora, start) if learner.lora else None
        if self._adapters and setup.resume:
            self._adapters.load(Path(setup.start) / ADAPTER)
        freeze(policy, learner.freeze)
        if learner.activation_checkpointing:
            keep_no_activations(policy)
        self._setup, self._world, self._writer = setup, world, Writer()
        self._dtype: torch.dtype = getattr(torch, model.learner_dtype)
        self._start(policy, learner)
        device = self._engine.device
        self._reference = Reference(setup, self._adapters, device) if setup.reference else None
        copies = [self._reference.copy] if self._reference and self._reference.copy else []
        self._states = HostStates(self._engine, learner, copies)
        if setup.resume:
            self._resume(Path(setup.start) / TRAINING)

    def _start(self, policy: Policy, learner: LearnerConfig) -> None:
        import deepspeed

        if not torch.distributed.is_initialized():
            # Of inference alone, and compiled for minutes at the first start on a machine.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            deepspeed.init_distributed("nccl" if learner.gpus else "gloo", verbose=0)
        policy.train()
        self._collate = Collator(policy, self.processor, learner.layout)
        self._costs = count_costs(policy, self._collate.blank)
        self._deepspeed = deepspeed
        # Gradient accumulation is ours (the boundary is set by hand): micro-batches are already
        # sums over global denominators, so DeepSpeed must not average them.
        engine, *_ = deepspeed.initialize(
            model=policy,
            model_parameters=parameter_groups(policy, learner.rates, learner.learning_rate),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": learner.max_grad_norm,
                "zero_optimization": zero_optimization(learner),
                "bf16": {"enabled": self._dtype == torch.bfloat16},
                "data_types": {"grad_accum_dtype": gradient_dtype(learner, self._dtype)},
                "optimizer": {
                    "type": "AdamW",
                    "params": {
                        "lr": learner.learning_rate,
                        "betas": list(learner.betas),
                        "weight_decay": learner.weight_decay,
                        "torch_adam": True,
                        **({"fused": True} if learner.offload != "none" else {}),
                    },
                },
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**31,
            },
        )
        self._engine: Any = engine
        forget_first_step(engine.optimizer)

    def update(
        self, batch: TrainBatch, loss: Loss, learning_rate: float | None = None
    ) -> dict[str, float]:
        start = time.perf_counter()
        if learning_rate is not None:
            for group in self._engine.optimizer.param_groups:
                group["lr"] = learning_rate * group["multiplier"]
        denominators, view = loss.denominators(batch), loss.second_view()
        metric_parts: list[dict[str, Metric]] = []
        # Two views of a sequence go through one forward pass, in half the budget each.
        share = self._share(batch, 2 if view else 1)
        for index, indices in enumerate(share):
            self._engine.set_gradient_accumulation_boundary(index == len(share) - 1)
            micro = self._micro_batch(batch, indices, view)
            tokens, second = micro.tokens, None
            if self._reference and loss.uses_reference:
                plain = self._micro_batch(batch, indices) if view else micro
                reference_logprobs = self._reference.logprobs(self._engine.module, plain)
                tokens = replace(tokens, reference_logprobs=reference_logprobs)
            outputs: View = self._engine(micro, entropy_gradient=loss.uses_entropy)
            if view:
                outputs, second = zip(*(both.chunk(2) for both in outputs), strict=True)
                tokens = tokens.first(len(outputs[0]))
            total = outputs[0].new_zeros(())
            for name, value in loss.sums(outputs, tokens, second).items():
                part = value / denominators[name] * micro.weight
                total = total + part
                metric_parts.append({f"loss/{name}": Total(float(part.detach()))})
            if not torch.isfinite(total):
                raise NonFiniteLoss(
                    f"the loss of micro-batch {index} is {float(total)}; the update was not applied"
                )
            # DeepSpeed averages over ranks; ours are shares of one sum.
            self._engine.backward(total * self._world.size)
            if micro.weight:
                with torch.no_grad():
                    metric_parts.append(loss.metrics(outputs, tokens) | layout_metrics(micro))
        norm = self._step()
        self._collate.forget()
        metrics = values(combined(_from_ranks(combined(metric_parts), self._world.size)))
        metrics["loss"] = sum(v for name, v in metrics.items() if name.startswith("loss/"))
        metrics["grad_norm"] = norm
        metrics["seconds"] = time.perf_counter() - start
        return metrics

    def _step(self) -> float:
        """Take the optimizer step and return the global gradient norm before clipping.

        Raises NonFiniteLoss, with nothing applied, when that norm is not finite.
        """
        norm: float | None = None
        if not self._engine.zero_optimization():
            # Without ZeRO every rank holds the whole reduced gradient, and DeepSpeed clips by its
            # norm without telling it or looking whether it is finite.
            norm = _norm(self._engine.module.parameters())
        if norm is None or math.isfinite(norm):
            self._engine.step()
            # ZeRO computes the norm within the step, and skips the step if it is not finite.
            norm = float(self._engine.get_global_grad_norm()) if norm is None else norm
        if not math.isfinite(norm):
            raise NonFiniteLoss(f"the gradient norm is {norm}; the update was not applied")
        return norm

    def segment_gradients(self, batch: TrainBatch, of: NormOf = "all") -> SegmentGradients:
        # Around DeepSpeed's backward, whose hooks would reduce and add each gradient to the
        # optimizer's.
        micros = (self._micro_batch(batch, indices) for indices in self._share(batch))
        keep_graph = self._setup.learner.zero_stage < 3
        norms = segment_gradients(self._engine.module, micros, batch, of, keep_graph)
        if not math.isfinite(norms.perception + norms.reasoning):
            raise NonFiniteLoss(
                f"the gradient norms are {norms.perception} (perception) and {norms.reasoning} "
                "(reasoning); no update was applied"
            )
        return norms

    @torch.no_grad()
    def logprobs(self, batch: TrainBatch) -> list[np.ndarray]:
        was_training = self._engine.module.training
        self._engine.module.eval()
        by_index: dict[int, np.ndarray] = {}
        for indices in self._share(batch):
            flat, _ = self._engine.module.run(self._micro_batch(batch, indices))
            ends = np.cumsum([batch.sequences[i].targets.sum() for i in indices], dtype=int)
            # A filler, which has no indices, is there for the other ranks' collectives only.
            by_index |= zip(indices, np.split(flat.float().cpu().numpy(), ends), strict=False)
        self._engine.module.train(was_training)
        self._collate.forget()
        shares = _from_ranks(by_index, self._world.size)
        return [share[i] for i in range(len(batch.sequences)) for share in shares if i in share]

    def weights(self) -> OfferedWeights:
        if self._adapters:
            return AdapterWeights(self._adapters, self._gather, self._dtype)
        bucket = int(self._setup.transfer.bucket_mib * 2**20)
        sent: torch.dtype = getattr(torch, self._setup.model.sampler_dtype)
        return GatheredWeights(self._engine.module.model, self._gather, sent, bucket)

    def _gather(self, parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        """A context in which parameters are whole; under ZeRO-3 all ranks must enter it."""
        sharded = self._setup.learner.zero_stage == 3
        gathered: AbstractContextManager[Any] = self._deepspeed.zero.GatheredParameters(
            parameters, enabled=sharded
        )
        return gathered

    def save(self, folder: Path) -> None:
        self.finish_saving()
        weights = self._host_weights()
        if self._world.rank == 0:
            with replacing(folder) as fresh:
                self._write_model(fresh, weights)

    def save_training(self, folder: Path, state: dict[str, Any]) -> None:
        # The optimizer state is gathered and written by layer group: the extra memory is one.
        self.finish_saving()
        randoms = _from_ranks(random_state(), self._world.size)
        weights, optimizer = self._host_weights(), self._optimizer_groups()
        if self._world.rank:
            for _ in optimizer:
                pass
        elif not self._setup.checkpoint.background:
            self._write_training(folder, weights, optimizer, randoms, state)
        else:
            # Without ZeRO these are the optimizer's own tensors, which the next step changes.
            copied = [{name: t.clone() for name, t in group.items()} for group in optimizer]
            now = json.loads(json.dumps(state))
            self._writer.start(partial(self._write_training, folder, weights, copied, randoms, now))

    def finish_saving(self) -> None:
        self._writer.wait()

    def offload(self, weights: bool = True) -> None:
        if self._setup.learner.gpus:
            self._states.offload(weights)

    def reload(self) -> None:
        if self._setup.learner.gpus:
            self._states.reload()

    def close(self) -> None:
        self.finish_saving()
        self._engine.destroy()

    def _resume(self, folder: Path) -> None:
        """Take over the optimizer state and the random streams, whatever ranks they came from."""
        files = sorted(folder.glob("optimizer-*.safetensors"))
        steps = self._optimizer_state().load(files)
        randoms = read_random_states(folder / "random.json")
        if len(randoms) == self._world.size:
            set_random_state(randoms[self._world.rank])
        else:
            seed_all(self._setup.seed, steps, self._world.rank)

    def _optimizer_state(self) -> OptimizerState:
        return OptimizerState(self._engine, self._deepspeed, self._setup.learner.zero_stage)

    def _optimizer_groups(self) -> Iterator[dict[str, torch.Tensor]]:
        """The optimizer state by layer group, gathered; every rank must go through all of it."""
        optimizer = self._optimizer_state()
        names = [name for name, _ in self._engine.module.model.named_parameters()]
        for group in layer_groups(names):
            yield optimizer.tensors(group)

    def _host_weights(self) -> HostWeights:
        """All weights in host memory on rank 0; nothing on others, which help to gather them."""
        model, host = self._engine.module.model, HostWeights({}, {})
        source = GatheredWeights(model, self._gather, self._dtype)
        for names, tensors in source.parameter_groups():
            if self._world.rank:
                continue
            copies = [t.detach().cpu().clone() for t in tensors]
            if self._adapters:
                host.adapters.update(self._adapters.adapter_tensors(names, copies))
                host.model.update(self._adapters.merged(names, copies))
            else:
                host.model.update(zip(names, copies, strict=True))
        if self._world.rank == 0:
            buffers = dict(model.named_buffers())
            saved_buffers = [name for name in model.state_dict() if name in buffers]
            host.model.update(
                (name, buffers[name].detach().cpu().clone()) for name in saved_buffers
            )
        return host

    def _write_training(
        self,
        folder: Path,
        weights: HostWeights,
        optimizer: Iterable[dict[str, torch.Tensor]],
        randoms: list[dict[str, Any]],
        state: dict[str, Any],
    ) -> None:
        with replacing(folder) as fresh:
            self._write_model(fresh, weights)
            (fresh / TRAINING).mkdir()
            for group, tensors in enumerate(optimizer):
                if tensors:
                    save_file(tensors, fresh / TRAINING / f"optimizer-{group:04d}.safetensors")
            write_json(fresh / TRAINING / "random.json", randoms)
            write_json(fresh / STATE, state)
            seal(fresh)
        prune(folder, self._setup.checkpoint.keep)

    def _write_model(self, folder: Path, weights: HostWeights) -> None:
        """Write weights, configuration, processor and chat template, and adapters beside them."""
        self._engine.module.model.save_pretrained(folder, state_dict=weights.model)
        self.processor.save_pretrained(folder)
        if self._adapters:
            (folder / ADAPTER).mkdir()
            self._adapters.write(folder / ADAPTER, weights.adapters)

    def _share(self, batch: TrainBatch, views: int = 1) -> list[list[int]]:
        """This rank's micro-batches, where every sequence comes in `views` views."""
        learner = self._setup.learner
        items = [describe(s, self._collate.image_token_id) for s in batch.sequences]
        budget, ranks = learner.micro_batch_tokens // views, self._world.size
        dealt = deal_micro_batches(items, ranks, budget, learner.layout, self._costs)
        return dealt[self._world.rank]

    def _micro_batch(
        self,
        batch: TrainBatch,
        indices: list[int],
        view: Callable[[bytes], bytes] | None = None,
    ) -> MicroBatch:
        """The sequences at `indices`, or a filler where there is none.

        With a second view they come twice: as they are, then in the same order under it.
        """
        chosen = [batch.sequences[i] for i in indices] or [min(batch.sequences, key=len)]
        if view:
            chosen += [replace(s, images=tuple(map(view, s.images))) for s in chosen]
        return self._collate(chosen, weight=1.0 if indices else 0.0).to(self._engine.device)


def _norm(parameters: Iterable[torch.nn.Parameter]) -> float:
    """Euclidean norm of all gradients together, in float32."""
    norms = [p.grad.float().norm() for p in parameters if p.grad is not None]
    return float(torch.stack(norms).norm())


def _from_ranks(value: Any, ranks: int) -> list[Any]:
    """Every rank's `value`, by rank; all must call it."""
    gathered: list[Any] = [value] * ranks
    if ranks > 1:
        torch.distributed.all_gather_object(gathered, value)
    return gathered
