"""The families of models, by the `model_type` of their checkpoints; one file says what differs."""

from __future__ import annotations

from typing import Any

from learner.families.base import Family, MRopeFamily
from learner.families.idefics3 import Idefics3, SmolVLM
from learner.families.internvl import InternVL
from learner.families.qwen2_5_vl import Qwen25VL
from learner.families.qwen3_vl import Qwen3VL
from rollout.tokens import ModelError

TINY = {family.model_type: family for family in (Qwen3VL(), Qwen25VL(), InternVL(), Idefics3())}
"""Those of which a tiny model can be made, which is what tests run."""

FAMILIES: dict[str, Family] = {**TINY, "smolvlm": SmolVLM()}


def family_of(model: Any) -> Family:
    """The family of a Hugging Face model.

    A `model_type` without a file of its own gets the defaults, with M-RoPE if the model has it.
    Raises ModelError naming what the model lacks.
    """
    model_type = model.config.model_type
    has_mrope = hasattr(getattr(model, "model", None), "get_rope_index")
    default = MRopeFamily() if has_mrope else Family()
    family = FAMILIES.get(model_type, default)
    if lacking := family.lacks(model):
        raise ModelError(
            f"a {type(model).__name__} (model_type {model_type!r}) cannot be trained: it lacks "
            f"{'; '.join(lacking)}. Families known to work: {', '.join(FAMILIES)}"
        )
    return family
