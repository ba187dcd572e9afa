"""DeepSpeed behind a small face: update on a batch, offer the weights, save the model.

The only file that imports deepspeed. Every rank is handed the whole batch and takes its own
share by `learner.plan`, so all ranks agree on denominators without a collective.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from learner.balance import NormOf, SegmentGradients, segment_gradients
from learner.batch import MicroBatch, TrainBatch
from learner.checkpoint import STATE, TRAINING, Writer, prune, seal, write_json
from learner.correction import mismatch_summary
from learner.lora import ADAPTER, Adapters, AdapterWeights
from learner.losses import Loss, token_statistics
from learner.parts import freeze, parameter_groups
from learner.plan import count_costs, describe, plan_micro_batches
from learner.policy import Policy, keep_no_activations, load_policy, make_collator
from learner.policy_loss import PolicyLoss
from learner.state import (
    OptimizerState,
    forget_first_step,
    random_state,
    read_random_states,
    seed_all,
    set_random_state,
)
from learner.trainer import LearnerSettings, NonFiniteLoss, WorldPlace
from learner.weights import GatheredWeights, layer_groups
from rollout.tokens import ModelError
from tasks.core import SEGMENTS
from tasks.files import replacing
from tasks.images import mask_patches

BUILD_SECONDS = 900.0
"""Longer than an extension takes to compile on the slowest machine."""


@dataclass(frozen=True)
class HostWeights:
    """A model's weights by module name, and its adapters' as PEFT names them, in host memory."""

    model: dict[str, torch.Tensor]
    adapters: dict[str, torch.Tensor]


class DeepSpeedLearner:
    """One rank of the learner: a `learner.trainer.Trainer` on DeepSpeed's ZeRO 0 to 3."""

    def __init__(self, settings: LearnerSettings, place: WorldPlace) -> None:
        os.environ.update(
            RANK=str(place.rank),
            LOCAL_RANK="0",  # Ray shows a rank its own GPU and no other
            WORLD_SIZE=str(place.size),
            MASTER_ADDR=place.master.rsplit(":", 1)[0],
            MASTER_PORT=place.master.rsplit(":", 1)[1],
        )
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        clear_abandoned_builds()
        if settings.threads:
            torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        lora = settings.lora
        # What adapters are of stays as it was; a checkpoint's weights have them merged in.
        start = settings.base if lora and settings.resume else settings.model
        policy, self.processor = load_policy(
            start,
            settings.dtype,
            settings.attention,
            settings.temperature,
            settings.head_float32,
            settings.logits_mib,
        )
        self._adapters = Adapters(policy, lora, start) if lora else None
        if self._adapters and settings.resume:
            self._adapters.load(Path(settings.model) / ADAPTER)
        freeze(policy, settings.freeze)
        if settings.activation_checkpointing:
            keep_no_activations(policy)
        self._start(policy, settings, place)
        if settings.resume:
            self._resume(Path(settings.model) / TRAINING)

    def _start(self, policy: Policy, settings: LearnerSettings, place: WorldPlace) -> None:
        import deepspeed

        if not torch.distributed.is_initialized():
            # Of inference alone, and compiled for minutes at the first start on a machine.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=0)
        policy.train()
        self._settings, self._place, self._writer = settings, place, Writer()
        self._collate = make_collator(policy, self.processor, settings.layout)
        self._costs = count_costs(policy, self._collate.blank)
        self._deepspeed = deepspeed
        # Gradient accumulation is ours (the boundary is set by hand): micro-batches are already
        # sums over global denominators, so DeepSpeed must not average them.
        engine, *_ = deepspeed.initialize(
            model=policy,
            model_parameters=parameter_groups(policy, settings.rates, settings.learning_rate),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": settings.max_grad_norm,
                "zero_optimization": zero_optimization(settings),
                "bf16": {"enabled": settings.dtype == "bfloat16"},
                "optimizer": {
                    "type": "AdamW",
                    "params": {
                        "lr": settings.learning_rate,
                        "betas": list(settings.betas),
                        "weight_decay": settings.weight_decay,
                        "torch_adam": True,
                        **({"fused": True} if settings.offload != "none" else {}),
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
        """One optimizer step on a batch; returns metrics over the whole batch, all ranks.

        Metrics: `loss` and `loss/<term>`, `grad_norm` (before clipping), `nll/<segment>` and
        `entropy/<segment>` (nats a token), `tokens/<segment>` (counts), `padding_share`,
        `shared_share`, `seconds`, and for a policy loss `kl`, `clip_fraction`, `ratio_mean`,
        `ratio_gap` (max |ρ-1|), `logprob_gap` (max, nats) and those of `learner.correction`.
        Raises NonFiniteLoss, before any step is taken; the run cannot go on from there (other
        ranks may wait in a collective).
        """
        start = time.perf_counter()
        if learning_rate is not None:
            for group in self._engine.optimizer.param_groups:
                group["lr"] = learning_rate * group["multiplier"]
        denominators = loss.denominators(batch)
        found: dict[str, float] = {f"sum/loss/{name}": 0.0 for name in denominators}
        mask = _mask(loss)
        # Two views of a sequence go through one forward pass, in half the budget each.
        share = self._plan(batch, self._place.size, 2 if mask else 1)[self._place.rank]
        for index, indices in enumerate(share):
            self._engine.set_gradient_accumulation_boundary(index == len(share) - 1)
            micro = self._micro_batch(batch, indices, mask)
            logprobs, entropy = self._engine(micro, entropy_gradient=loss.uses_entropy)
            tokens, masked = micro.tokens, {}
            if mask and isinstance(loss, PolicyLoss):
                logprobs, masked_logprobs = logprobs.chunk(2)
                entropy, masked_entropy = entropy.chunk(2)
                tokens = tokens.first(len(logprobs))
                masked = loss.masked_sums(logprobs, entropy, masked_logprobs, masked_entropy)
            terms = loss.sums(logprobs, entropy, tokens) | masked
            total = logprobs.new_zeros(())
            for name, value in terms.items():
                part = value / denominators[name] * micro.weight
                total = total + part
                _accumulate(found, {f"sum/loss/{name}": float(part.detach())})
            if not torch.isfinite(total):
                raise NonFiniteLoss(
                    f"the loss of micro-batch {index} is {float(total)}; the update was not applied"
                )
            # DeepSpeed averages over ranks; ours are shares of one sum.
            self._engine.backward(total * self._place.size)
            if micro.weight:
                with torch.no_grad():
                    statistics = token_statistics(logprobs, entropy, tokens, loss)
                statistics["sum/padded"] = float(micro.inputs["input_ids"].numel())
                statistics["sum/kept"] = float(micro.real_tokens)
                statistics["sum/shared"] = float(micro.shared_tokens)
                _accumulate(found, statistics)
        norm = self._step()
        self._collate.forget()
        metrics = _summary(_over_ranks(found, self._place.size))
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
        """Gradient norms of the perception and the reasoning loss of a batch (`learner.balance`).

        A pass of its own, before `update`: the norms are of the very batch and weights that the
        update will use, and `update` and the optimizer know nothing of it. It goes around
        DeepSpeed's backward, whose hooks would reduce and add each gradient to the optimizer's.
        Every rank must call it. Raises NonFiniteLoss when a norm is not finite.
        """
        share = self._plan(batch, self._place.size)[self._place.rank]
        micros = (self._micro_batch(batch, indices, None) for indices in share)
        keep_graph = self._settings.zero_stage < 3
        found = segment_gradients(self._engine.module, micros, batch, of, keep_graph)
        if not math.isfinite(found.perception + found.reasoning):
            raise NonFiniteLoss(
                f"the gradient norms are {found.perception} (perception) and {found.reasoning} "
                "(reasoning); no update was applied"
            )
        return found

    @torch.no_grad()
    def logprobs(self, batch: TrainBatch) -> list[np.ndarray]:
        """float32 [T] log-probs of every sequence's response under the current weights.

        Every rank must call it; each computes its share, and all get all of them.
        """
        was_training = self._engine.module.training
        self._engine.module.eval()
        found: dict[int, np.ndarray] = {}
        for indices in self._plan(batch, self._place.size)[self._place.rank]:
            flat, _ = self._engine.module.run(self._micro_batch(batch, indices, None))
            ends = np.cumsum([len(batch.sequences[i].response_ids) for i in indices], dtype=int)
            # A filler, which has no indices, is there for the other ranks' collectives only.
            found |= zip(indices, np.split(flat.float().cpu().numpy(), ends), strict=False)
        self._engine.module.train(was_training)
        self._collate.forget()
        shares = _from_ranks(found, self._place.size)
        return [share[i] for i in range(len(batch.sequences)) for share in shares if i in share]

    def weights(self) -> GatheredWeights | AdapterWeights:
        """What is trained, as a weight source (see `rollout.transfer.WeightSource`)."""
        dtype = getattr(torch, self._settings.dtype)
        if self._adapters:
            return self._adapters.weights(self._gather, dtype)
        bucket = int(self._settings.bucket_mib * 2**20)
        return GatheredWeights(self._engine.module.model, self._gather, dtype, bucket)

    def _gather(self, parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        """A context in which parameters are whole; under ZeRO-3 all ranks must enter it."""
        sharded = self._settings.zero_stage == 3
        gathered: AbstractContextManager[Any] = self._deepspeed.zero.GatheredParameters(
            parameters, enabled=sharded
        )
        return gathered

    def save(self, folder: Path) -> None:
        """Write a plain Hugging Face folder (weights, processor, chat template), atomically.

        Every rank must call it; rank 0 writes. An existing folder is replaced.
        """
        self.finish_saving()
        weights = self._host_weights()
        if self._place.rank == 0:
            with replacing(folder) as fresh:
                self._write_model(fresh, weights)

    def save_training(self, folder: Path, state: dict[str, Any], keep: int) -> None:
        """Write a training checkpoint (see `learner.checkpoint`) and keep the last `keep`.

        `state` is the driver's own part of it, JSON-able. Every rank must call it; rank 0 writes.
        The optimizer state is gathered and written by layer group, so the extra memory is one.
        With `background_saving` all of it is copied to host memory, and a thread writes it while
        training goes on. What that thread raises comes up in the next save or `finish_saving`.
        """
        self.finish_saving()
        randoms = _from_ranks(random_state(), self._place.size)
        weights, optimizer = self._host_weights(), self._optimizer_groups()
        if self._place.rank:
            for _ in optimizer:
                pass
            return
        if not self._settings.background_saving:
            self._write_training(folder, weights, optimizer, randoms, state, keep)
            return
        # Without ZeRO these are the optimizer's own tensors, which the next step changes.
        copied = [{name: t.clone() for name, t in group.items()} for group in optimizer]
        now = json.loads(json.dumps(state))
        self._writer.start(
            partial(self._write_training, folder, weights, copied, randoms, now, keep)
        )

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written, if any; raises what its writer raised."""
        self._writer.wait()

    def close(self) -> None:
        """Finish saving, take DeepSpeed's hooks off the model and let its buffers go."""
        self.finish_saving()
        self._engine.destroy()

    def _resume(self, folder: Path) -> None:
        """Take over the optimizer state and the random streams, whatever ranks they came from."""
        files = sorted(folder.glob("optimizer-*.safetensors"))
        steps = self._optimizer_state().load(files)
        randoms = read_random_states(folder / "random.json")
        if len(randoms) == self._place.size:
            set_random_state(randoms[self._place.rank])
        else:
            seed_all(self._settings.seed, steps, self._place.rank)

    def _optimizer_state(self) -> OptimizerState:
        return OptimizerState(self._engine, self._deepspeed, self._settings.zero_stage)

    def _optimizer_groups(self) -> Iterator[dict[str, torch.Tensor]]:
        """The optimizer state by layer group, gathered; every rank must go through all of it."""
        optimizer = self._optimizer_state()
        names = [name for name, _ in self._engine.module.model.named_parameters()]
        for group in layer_groups(names):
            yield optimizer.tensors(group)

    def _host_weights(self) -> HostWeights:
        """All weights in host memory on rank 0; nothing on others, which help to gather them."""
        model, found = self._engine.module.model, HostWeights({}, {})
        dtype = getattr(torch, self._settings.dtype)
        for names, tensors in GatheredWeights(model, self._gather, dtype).parameter_groups():
            if self._place.rank:
                continue
            copies = [t.detach().cpu().clone() for t in tensors]
            if self._adapters:
                found.adapters.update(self._adapters.adapter_tensors(names, copies))
                found.model.update(self._adapters.merged(names, copies))
            else:
                found.model.update(zip(names, copies, strict=True))
        if self._place.rank == 0:
            buffers = dict(model.named_buffers())
            kept = [name for name in model.state_dict() if name in buffers]
            found.model.update((name, buffers[name].detach().cpu().clone()) for name in kept)
        return found

    def _write_training(
        self,
        folder: Path,
        weights: HostWeights,
        optimizer: Iterable[dict[str, torch.Tensor]],
        randoms: list[dict[str, Any]],
        state: dict[str, Any],
        keep: int,
    ) -> None:
        with replacing(folder) as fresh:
            self._write_model(fresh, weights)
            (fresh / TRAINING).mkdir()
            for place, tensors in enumerate(optimizer):
                if tensors:
                    save_file(tensors, fresh / TRAINING / f"optimizer-{place:04d}.safetensors")
            write_json(fresh / TRAINING / "random.json", randoms)
            write_json(fresh / STATE, state)
            seal(fresh)
        prune(folder, keep)

    def _write_model(self, folder: Path, weights: HostWeights) -> None:
        """Write weights, configuration, processor and chat template, and adapters beside them."""
        self._engine.module.model.save_pretrained(folder, state_dict=weights.model)
        self.processor.save_pretrained(folder)
        if self._adapters:
            (folder / ADAPTER).mkdir()
            self._adapters.write(folder / ADAPTER, weights.adapters)

    def _plan(self, batch: TrainBatch, ranks: int, views: int = 1) -> list[list[list[int]]]:
        """Micro-batches of each rank, where every sequence comes in `views` views."""
        items = [describe(s, self._collate.image_token_id) for s in batch.sequences]
        budget, layout = self._settings.micro_batch_tokens // views, self._settings.layout
        return plan_micro_batches(items, ranks, budget, layout, self._costs)

    def _micro_batch(
        self, batch: TrainBatch, indices: list[int], mask: Callable[[bytes], bytes] | None
    ) -> MicroBatch:
        """The sequences at `indices`, or a filler where there is none.

        With a mask they come twice: as they are, then in the same order with masked images.
        """
        chosen = [batch.sequences[i] for i in indices] or [min(batch.sequences, key=len)]
        if mask:
            chosen += [s if s.image is None else replace(s, image=mask(s.image)) for s in chosen]
        return self._collate(chosen, weight=1.0 if indices else 0.0).to(self._engine.device)


def zero_optimization(settings: LearnerSettings) -> dict[str, Any]:
    """DeepSpeed's section `zero_optimization`.

    With offload the optimizer is torch's fused AdamW on the host's cores. `DeepSpeedCPUAdam` gave
    the same numbers (2e-7 after 5 steps) in the same time (25 against 27 ms for 20 M parameters on
    one core), but took two minutes to compile.
    Raises ModelError where DeepSpeed would pass an offload over in silence.
    """
    found: dict[str, Any] = {"stage": settings.zero_stage}
    needed = {"none": 0, "optimizer": 1, "all": 3}[settings.offload]
    if settings.zero_stage < needed:
        raise ModelError(
            f'learner.offload: "{settings.offload}" needs learner.zero_stage {needed} or higher, '
            f"got {settings.zero_stage}"
        )
    on_host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if settings.offload != "none":
        found["offload_optimizer"] = on_host
    if settings.offload == "all":
        found["offload_param"] = on_host
    return found


def clear_abandoned_builds() -> None:
    """Remove the locks of extension builds whose process died; the next start would wait for ever.

    DeepSpeed compiles its CPU communication once a machine, which takes a minute or two, and torch
    guards the build by a lock file that only its maker removes.
    """
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(chosen) if chosen else Path.home() / ".cache" / "torch_extensions"
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        if time.time() - lock.stat().st_mtime > BUILD_SECONDS:
            lock.unlink(missing_ok=True)


def _mask(loss: Loss) -> Callable[[bytes], bytes] | None:
    """What masks an image for the second view of a loss that looks at two; each image once."""
    papo = loss.papo if isinstance(loss, PolicyLoss) else None
    if papo is None:
        return None
    return cache(lambda image: mask_patches(image, papo.patch_size, papo.share))


def _norm(parameters: Iterable[torch.nn.Parameter]) -> float:
    """Euclidean norm of all gradients together, in float32."""
    norms = [p.grad.float().norm() for p in parameters if p.grad is not None]
    return float(torch.stack(norms).norm())


def _accumulate(found: dict[str, float], more: dict[str, float]) -> None:
    for name, value in more.items():
        if name.startswith("max/"):
            found[name] = max(found.get(name, 0.0), value)
        else:
            found[name] = found.get(name, 0.0) + value


def _over_ranks(found: dict[str, float], ranks: int) -> dict[str, float]:
    if ranks == 1:
        return found
    total: dict[str, float] = {}
    for share in _from_ranks(found, ranks):
        _accumulate(total, share)
    return total


def _from_ranks(value: Any, ranks: int) -> list[Any]:
    """Every rank's `value`, by rank; all must call it."""
    found: list[Any] = [value] * ranks
    if ranks > 1:
        torch.distributed.all_gather_object(found, value)
    return found


def _summary(found: dict[str, float]) -> dict[str, float]:
    metrics = {
        name.removeprefix("sum/"): value
        for name, value in found.items()
        if name.startswith("sum/loss/")
    }
    metrics["loss"] = sum(metrics.values())
    tokens = 0.0
    for segment in (*SEGMENTS, "other"):
        count = found.get(f"sum/tokens/{segment}", 0.0)
        tokens += count
        metrics[f"tokens/{segment}"] = count
        if count:
            metrics[f"nll/{segment}"] = found[f"sum/nll/{segment}"] / count
            metrics[f"entropy/{segment}"] = found[f"sum/entropy/{segment}"] / count
    if found.get("sum/padded"):
        metrics["padding_share"] = 1 - found["sum/kept"] / found["sum/padded"]
        metrics["shared_share"] = found["sum/shared"] / (found["sum/kept"] + found["sum/shared"])
    if "sum/kl" in found and tokens:
        metrics["kl"] = found["sum/kl"] / tokens
        metrics["clip_fraction"] = found["sum/clipped"] / tokens
        metrics["ratio_mean"] = found["sum/ratio"] / tokens
        metrics["ratio_gap"] = found["max/ratio_gap"]
        metrics["logprob_gap"] = found["max/logprob_gap"]
        metrics |= mismatch_summary(found, tokens, SEGMENTS)
    return metrics
