"""Qwen2.5-VL: M-RoPE, images of any size, a tower that attends within windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learner.families.base import TINY_MERGE, TINY_PATCH
from learner.families.qwen3_vl import Qwen


class Qwen25VL(Qwen):
    """Qwen/Qwen2.5-VL-*B-Instruct."""

    model_type = "qwen2_5_vl"
    tiny_kind, tiny_video = "Qwen2_5_VL", "Qwen2VLVideoProcessor"

    def tiny_model(self, text: dict[str, Any], token: Mapping[str, int]) -> Any:
        # This family's config has no head_dim of its own: it is hidden_size over heads.
        text = {name: value for name, value in text.items() if name != "head_dim"}
        # Four windows in a 64x64 image; the last block sees across them.
        tower = {"window_size": 2 * TINY_PATCH * TINY_MERGE, "fullatt_block_indexes": [1]}
        return self.tiny_of(text, token, {"mrope_section": [4, 6, 6]}, tower)
