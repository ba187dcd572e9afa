"""The policy that benchmarks take beside the shipped one: its kind at about 30 M parameters."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, set_seed

TEXT = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 64}
TEXT |= {"num_attention_heads": 8, "num_key_value_heads": 4}
VISION = {"depth": 4, "hidden_size": 256, "intermediate_size": 768, "out_hidden_size": 512}


def larger_model(like: str, seed: int = 0) -> Any:
    """A model of the family and vocabulary of a tiny Qwen3-VL's folder, with random weights."""
    config: Any = AutoConfig.from_pretrained(like)
    for part, sizes in ((config.text_config, TEXT), (config.vision_config, VISION)):
        for name, value in sizes.items():
            setattr(part, name, value)
    text = config.text_config
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    text.rope_parameters = dict(text.rope_parameters) | {"mrope_section": [12, 10, 10]}
    set_seed(seed)
    return AutoModelForImageTextToText.from_config(config)
