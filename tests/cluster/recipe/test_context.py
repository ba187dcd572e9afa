"""What a prompt and stored rows take of a policy's context: as the processor makes them, once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from cluster.recipe.context import Context
from cluster.recipe.rows import row_takes
from rollout.tokens import load_processor
from tasks.rows import Rows
from tasks.vqa.opening import open_stored
from tests.support.recipes import TINY_POLICY, change

SIZES = [(64, 64), (100, 300), (1, 1), (640, 480), (1500, 300), (31, 33), (17, 90), (512, 64)]


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "internvl", "idefics3"])
def test_a_prompt_takes_what_the_processor_makes_of_it(
    tiny_models: dict[str, Path], family: str
) -> None:
    processor = load_processor(str(tiny_models[family]))
    groups = [*((size,) for size in SIZES), tuple(SIZES[:3]), (SIZES[3], SIZES[3]), ()]
    asked = [(f"What is here? {n}", sizes) for n, sizes in enumerate(groups)]
    found = Context(processor, 256, 128).token_counts(asked)
    for (prompt, sizes), counts in zip(asked, found, strict=True):
        said = [*[{"type": "image"}] * len(sizes), {"type": "text", "text": prompt}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": said}], add_generation_prompt=True
        )
        images = [Image.new("RGB", size) for size in sizes]
        made = processor(images=[images] if images else None, text=[text])
        assert counts.fault is None
        assert counts.prompt == len(made["input_ids"][0])
        assert (counts.image > 0) == bool(sizes) and counts.image < counts.prompt


def test_rows_are_measured_once_and_again_when_data_or_processor_change(
    data: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = load_processor(str(TINY_POLICY))

    def rows() -> Rows:
        return open_stored(str(data), "sudoku").rows["train"]

    found = row_takes(rows(), Context(processor, 256, 128))
    (kept,) = own_cache.rglob("rows/*.json")
    # What is kept is believed, so a mark in it shows who reads it.
    takes = json.loads(kept.read_text())
    takes[0][0] += 1000
    kept.write_text(json.dumps(takes))
    assert row_takes(rows(), Context(processor, 999, 9))[0].prompt == found[0].prompt + 1000
    kept.write_text("[[")
    assert row_takes(rows(), Context(processor, 256, 128)) == found
    takes[0][0] += 1000
    kept.write_text(json.dumps(takes))
    other = load_processor(str(TINY_POLICY))
    other.chat_template += "{# another #}"
    assert row_takes(rows(), Context(other, 256, 128))[0].prompt < 1000
    change(data, "train", 1, image=(640, 480))
    assert row_takes(rows(), Context(processor, 256, 128))[1].image > 900
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert len(row_takes(rows(), Context(processor, 256, 128))) == 8
