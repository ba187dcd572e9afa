"""Qwen2.5-VL: M-RoPE, images of any size, a tower that attends within windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learner.families.base import Tower
from learner.families.qwen3_vl import Qwen


class Qwen25VL(Qwen):
    """Qwen/Qwen2.5-VL-*B-Instruct."""

    model_type = "qwen2_5_vl"
    kind, video = "Qwen2_5_VL", "Qwen2VLVideoProcessor"

    def new_model(self, text: dict[str, Any], token: Mapping[str, int], tower: Tower) -> Any:
        # This family's config has no head_dim of its own: it is hidden_size over heads.
        text = {name: value for name, value in text.items() if name != "head_dim"}
        # Four windows in a 64x64 image; the last block sees across them.
        fields = {
            "window_size": 2 * tower.patch * tower.merge,
            "fullatt_block_indexes": [tower.layers - 1],
        }
        return self.new_of(text, token, tower, {"mrope_section": [4, 6, 6]}, fields)
