"""The policies that benchmarks take: the shipped one, and its kind in other sizes, untrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    set_seed,
)

from rollout.tokens import load_processor

SHIPPED = Path(__file__).resolve().parents[1] / "models" / "tiny-qwen3-vl"
LARGER = {
    "text": {
        "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 64,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    },
    "vision": {"depth": 4, "hidden_size": 256, "intermediate_size": 768, "out_hidden_size": 512},
}  # fmt: skip
MIDDLE = {
    "text": LARGER["text"] | {
        "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "vision": LARGER["vision"] | {"out_hidden_size": 256},
}  # fmt: skip
SIZES: dict[str, dict[str, dict[str, int]]] = {"2M": {}, "10M": MIDDLE, "30M": LARGER}
"""About so many parameters; `2M` is of the shipped policy's size."""
HEIGHT = 4.0
"""Of what all embeddings have in common: many times what tells them apart."""
QUIET = 0.05
"""What layers add to the residual stream is scaled by it, or in wide models it is most of it."""


def larger_model(like: str, seed: int = 0) -> Any:
    """A model of the family and vocabulary of a tiny Qwen3-VL's folder, with random weights."""
    return sized_model(like, "30M", seed)


def sized_model(like: str, size: str, seed: int = 0) -> Any:
    """The same in one of `SIZES`."""
    config: Any = AutoConfig.from_pretrained(like)
    for part, sizes in SIZES[size].items():
        for name, value in sizes.items():
            setattr(getattr(config, f"{part}_config"), name, value)
    text = config.text_config
    if SIZES[size]:
        text.layer_types = ["full_attention"] * text.num_hidden_layers
        text.rope_parameters = dict(text.rope_parameters) | {"mrope_section": [12, 10, 10]}
    set_seed(seed)
    return AutoModelForImageTextToText.from_config(config)


def write_unending(
    size: str, folder: Path, like: Path = SHIPPED, mean_turn: int | None = None
) -> int:
    """A policy in one of `SIZES` whose responses end where they are cut; its parameters.

    Whoever samples from it does the same work as everybody else, token by token. With `mean_turn`
    a turn ends by chance, after so many tokens in the mean: one in so many tokens ends it.
    """
    processor: Any = load_processor(str(like))
    model = sized_model(str(like), size)
    if mean_turn is not None:
        special = processor.tokenizer.added_tokens_decoder
        usual = [i for i in range(len(processor.tokenizer)) if i not in special]
        model.generation_config = GenerationConfig(eos_token_id=usual[::mean_turn])
    never_end(model, sorted(processor.tokenizer.added_tokens_decoder))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def never_end(model: Any, special: list[int]) -> None:
    """Make special tokens all but impossible, by the tied embeddings of a random model.

    All tokens' embeddings get a part in common, which the residual stream carries to the head:
    there it adds to the logits of the tokens that have it and takes from those that have its
    opposite, nearly 2 * HEIGHT * sqrt(hidden size) nats apart.
    """
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight *= QUIET
    embeddings = model.get_input_embeddings().weight
    common = torch.nn.functional.normalize(torch.randn(embeddings.shape[1]), dim=0)
    sign = torch.ones(len(embeddings), 1)
    sign[special] = -1
    embeddings += HEIGHT * sign * common
