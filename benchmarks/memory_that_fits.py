"""What memory do real sizes take, and on how many GPUs do they fit?

    python -m benchmarks.memory_that_fits             # the tables of docs/capacity.md
    python -m benchmarks.memory_that_fits --counts    # parameters, counted on config classes

Every number is the product's own estimate (`cluster/recipe/memory.py`, as `--dry-run` prints it).
Policies are structures without weights, made of the shapes that their publishers gave.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.recipe.hardware import GIB, Gpu, Machine
from cluster.recipe.placement import Actor, Placement, plan
from cluster.recipe.recipe import Recipe

CARD = Gpu("80 GB", 81_559 * 2**20)
"""As `nvidia-smi` reports an H100 of 80 GB."""
MACHINES = {1: Machine(32, 256 * GIB), 2: Machine(64, 512 * GIB), 8: Machine(128, 2048 * GIB)}
"""GPUs -> the machine around them: main memory as such nodes are sold with, a choice of ours."""
PARTS: dict[int, dict[str, Any]] = {
    1: {"sampler.gpus": 0.5, "sampler.gpu_memory_utilization": 0.45, "learner.gpus": 0.5},
    2: {"sampler.gpus": 1, "learner.gpus": 1},
    8: {"sampler.gpus": 1, "sampler.count": 4, "learner.gpus": 1, "learner.ranks": 4},
}
"""GPUs -> who has them: half of one each, one each, four each."""
ROOM = 0.9
"""Of a learner's part of a GPU, what the estimate may take: CUDA's context, NCCL's buffers and what
the allocator leaves between tensors are not in it, nor is the vision tower's pass."""


@dataclass(frozen=True)
class Layout:
    """How a learner may hold a policy: a column of the table, and fields of [learner]."""

    name: str
    fields: Mapping[str, Any]


AGAIN = {"learner.activation_checkpointing": True}
LORA: dict[str, Any] = {"learner.lora": {}}
WAYS = (
    Layout("ZeRO 2", {"learner.zero_stage": 2}),
    Layout("ZeRO 2, recomputed", {"learner.zero_stage": 2, **AGAIN}),
    Layout("ZeRO 3, recomputed", {"learner.zero_stage": 3, **AGAIN}),
    Layout(
        "+ optimizer offloaded", {"learner.zero_stage": 3, "learner.offload": "optimizer", **AGAIN}
    ),
    Layout("+ weights offloaded", {"learner.zero_stage": 3, "learner.offload": "all", **AGAIN}),
    Layout("LoRA, ZeRO 2", {"learner.zero_stage": 2, **LORA}),
    Layout("LoRA, ZeRO 2, recomputed", {"learner.zero_stage": 2, **LORA, **AGAIN}),
    Layout("LoRA, ZeRO 3, recomputed", {"learner.zero_stage": 3, **LORA, **AGAIN}),
)


def qwen3_vl(hidden: int, inner: int, layers: int, heads: int, tied: bool, large: bool) -> Any:
    """Qwen3-VL's config; all of them have 8 key heads of 128, and one of two vision towers."""
    import transformers

    tower = (27, 1152, 4304, [8, 16, 24]) if large else (24, 1024, 4096, [5, 11, 17])
    depth, width, mlp, levels = tower
    return transformers.Qwen3VLConfig(
        text_config={
            **_text(hidden, inner, layers, heads, 8),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": depth,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_heads": 16,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": levels,
        },
        tie_word_embeddings=tied,
    )


def qwen2_5_vl() -> Any:
    """Qwen2.5-VL-3B's config."""
    import transformers

    text = _text(2048, 11_008, 36, 16, 2)
    rope = {"rope_type": "default", "rope_theta": 1_000_000, "mrope_section": [16, 24, 24]}
    return transformers.Qwen2_5_VLConfig(
        text_config={k: v for k, v in text.items() if k != "head_dim"} | {"rope_parameters": rope},
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "out_hidden_size": 2048,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=True,
    )


def internvl(hidden: int, inner: int, layers: int, heads: int) -> Any:
    """InternVL3.5's config: a Qwen3 with a head of its own, and the tower of 300 M."""
    import transformers

    return transformers.InternVLConfig(
        text_config={"model_type": "qwen3", **_text(hidden, inner, layers, heads, 8)},
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": [448, 448],
            "patch_size": [14, 14],
            "attention_bias": True,
        },
        image_seq_length=256,
        tie_word_embeddings=False,
    )


def _text(hidden: int, inner: int, layers: int, heads: int, keys: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 262_144,
    }


def configs() -> dict[str, Any]:
    """Hub name -> config, of every policy of `KNOWN_POLICIES`."""
    return {
        "Qwen/Qwen3-VL-2B-Instruct": qwen3_vl(2048, 6144, 28, 16, True, False),
        "Qwen/Qwen3-VL-4B-Instruct": qwen3_vl(2560, 9728, 36, 32, True, False),
        "Qwen/Qwen3-VL-8B-Instruct": qwen3_vl(4096, 12_288, 36, 32, False, True),
        "Qwen/Qwen3-VL-32B-Instruct": qwen3_vl(5120, 25_600, 64, 64, False, True),
        "OpenGVLab/InternVL3_5-8B-HF": internvl(4096, 12_288, 36, 32),
        "OpenGVLab/InternVL3_5-4B-HF": internvl(2560, 9728, 36, 32),
        "Qwen/Qwen2.5-VL-3B-Instruct": qwen2_5_vl(),
    }


TABLE = tuple(name for name in configs() if "VL-3B" not in name and "5-4B" not in name)


def parameters(config: Any) -> int:
    """Of a policy of this config, a tied head counted once; no weight is made."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    return sum(p.numel() for p in model.parameters())


@contextlib.contextmanager
def folders() -> Iterator[None]:
    """Within, each hub name is a folder too that holds a config: adapters are counted on it."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        for name, config in configs().items():
            config.save_pretrained(name)
        yield


def placed(policy: str, gpus: int, layout: Layout, **machine_fields: Any) -> Placement:
    """The placement of an RL run of this policy, with the fields of recipes/gpu."""
    fields: dict[str, Any] = {
        "model.path": policy,
        "model.dtype": "bfloat16",
        "model.max_model_len": 6144,
        "sampler.max_tokens": 4096,
        "learner.micro_batch_tokens": 8192,
        **PARTS[gpus],
        **layout.fields,
        **machine_fields,
    }
    sections: dict[str, Any] = {"name": "fits", "tasks": [{"name": "sudoku"}]}
    for field, value in fields.items():
        section, _, name = field.partition(".")
        sections.setdefault(section, {})[name] = value
    alone = MACHINES[gpus]
    return plan(Recipe.model_validate(sections), Machine(alone.cores, alone.memory, (CARD,) * gpus))


def fits(actor: Actor) -> bool:
    """Whether a learner rank's estimate leaves room in its part of the card."""
    return sum(actor.memory.values()) <= ROOM * min(actor.gpus, 1) * CARD.memory


def cell(policy: str, gpus: int, layout: Layout) -> str:
    """GiB on each learner's GPU; in brackets where that or the node's main memory is too small."""
    placement = placed(policy, gpus, layout)
    ranks = [a for a in placement.actors if a.role == "learner"]
    away = sum(sum(a.offloaded.values()) for a in placement.actors)
    inside = fits(ranks[0]) and away <= ROOM * placement.machine.memory
    gib_text = f"{sum(ranks[0].memory.values()) / GIB:,.0f}"
    return gib_text if inside else f"({gib_text})"


def sampler_cell(policy: str, gpus: int) -> str:
    """GiB that an engine has for its KV cache and what it computes with, beside the weights."""
    placement = placed(policy, gpus, WAYS[0])
    engine = next(a for a in placement.actors if a.role == "sampler")
    gib_left = engine.memory["KV cache and buffers"] / GIB
    return f"{gib_left:,.0f}" if gib_left >= 1 else "(0)"


def row(policy: str, gpus: int) -> str:
    """A line of the table; `folders` must be there."""
    cells = [sampler_cell(policy, gpus), *(cell(policy, gpus, layout) for layout in WAYS)]
    return f"| {policy.split('/')[1]} | {gpus} | " + " | ".join(cells) + " |"


def table() -> list[str]:
    """Its lines."""
    heads = ["policy", "GPUs", "engine: left", *(layout.name for layout in WAYS)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    with folders():
        lines += [row(policy, gpus) for policy in TABLE for gpus in MACHINES]
    return lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", action="store_true", help="count parameters and stop")
    if parser.parse_args().counts:
        for name, config in configs().items():
            print(f"{name}: {parameters(config):,}")
        return
    print("\n".join(table()))


if __name__ == "__main__":
    main()
