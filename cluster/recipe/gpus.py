"""Who may share GPUs with whom: samplers and learner, all the time or by turns."""

from __future__ import annotations

from cluster.recipe.sections import PlacementConfig
from learner.settings import LearnerConfig
from rollout.settings import SamplerConfig, TransferConfig
from tasks.fields import refuse


def paired(sampler: SamplerConfig, transfer: TransferConfig, placement: PlacementConfig) -> bool:
    """Whether each sampler shares a GPU with the learner rank of its number."""
    return transfer.transport == "ipc" or (placement.by_turns and sampler.gpus > 0)


def refuse_gpus(
    sampler: SamplerConfig,
    learner: LearnerConfig,
    transfer: TransferConfig,
    placement: PlacementConfig,
    max_staleness: int,
) -> None:
    """Refuse, at its field, what cannot share GPUs so."""
    turns, pairs = placement.by_turns, paired(sampler, transfer, placement)
    refuse(
        transfer.transport != "host" and not (sampler.gpus and learner.gpus),
        "transfer.transport",
        f'"{transfer.transport}" moves weights between GPUs, and sampler.gpus or '
        'learner.gpus is 0; use "host"',
    )
    refuse(
        turns and max_staleness,
        "algorithm.max_staleness",
        f'got {max_staleness} with placement.mode = "colocated", where samplers sleep '
        'while the learner learns; write 0, or mode = "disaggregated"',
    )
    refuse(
        turns and (sampler.gpus > 0) != (learner.gpus > 0),
        "placement.mode",
        f'"colocated" takes turns on the same GPUs, and sampler.gpus is {sampler.gpus:g}, '
        f"learner.gpus {learner.gpus:g}; give both a part of one GPU, or 0 to both",
    )
    refuse(
        turns and transfer.transport == "nccl",
        "transfer.transport",
        '"nccl" takes no two processes on one GPU, and under placement.mode = "colocated" '
        'sampler and rank share one; use "ipc" or "host"',
    )
    by_pairs = 'transport "ipc"' if transfer.transport == "ipc" else 'mode "colocated"'
    refuse(
        pairs and not (sampler.gpus < 1 and learner.gpus < 1 and sampler.count == learner.ranks),
        "placement.mode" if transfer.transport == "host" else "transfer.transport",
        f"under {by_pairs} each sampler shares the GPU of a learner rank: write as many "
        "samplers (sampler.count) as ranks (learner.ranks), and parts of a GPU for both "
        '(sampler.gpus + learner.gpus at most 1); between GPUs use "disaggregated" and "nccl"',
    )
    refuse(
        pairs and placement.samplers != placement.learner,
        "placement.samplers",
        f"differs from placement.learner, and under {by_pairs} a sampler shares the GPU of "
        "a learner rank; write the same labels",
    )
    refuse(
        pairs and sampler.gpus + learner.gpus > 1,
        "sampler.gpus",
        f"got {sampler.gpus:g} beside learner.gpus = {learner.gpus:g}, and a sampler shares a "
        "GPU with a rank; together they are at most 1",
    )
    share = sampler.gpu_memory_utilization
    refuse(
        0 < sampler.gpus < 1 and share > sampler.gpus and not turns,
        "sampler.gpu_memory_utilization",
        f"got {share:g} with gpus = {sampler.gpus:g}: the rest of that GPU belongs to another "
        f'actor; write {sampler.gpus:g} or less, or placement.mode = "colocated"',
    )
    stage, at_rest = learner.zero_stage, learner.offload != "none"
    refuse(
        turns and learner.gpus and (stage == 0 or (stage == 3 and not at_rest)),
        "learner.zero_stage",
        f"got {stage}, whose states DeepSpeed does not move from a GPU and back, as "
        'placement.mode = "colocated" needs; write 1 or 2, or 3 with learner.offload',
    )
