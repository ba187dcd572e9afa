"""What an engine is told, as vLLM itself understands it; what it says when it does not start."""

from __future__ import annotations

import glob
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from rollout.engine import Engine
from rollout.settings import ModelConfig, SamplerConfig
from rollout.starting import EngineNotStarted, engine_args, own_errors, own_words, plain_path
from rollout.tokens import Chat
from tests.support.habits import with_habits
from tests.support.recipes import TINY_POLICY
from tests.support.samples import problem


@pytest.mark.parametrize(
    ("fields", "frozen", "head"),
    [
        ({"dtype": "bfloat16"}, False, torch.float32),
        ({"dtype": "bfloat16", "lm_head_float32": False}, False, torch.bfloat16),
        ({"dtype": "bfloat16"}, True, torch.bfloat16),
        ({"dtype": "mixed"}, False, torch.float32),
        ({}, False, torch.float32),
    ],
)
def test_the_head_is_of_the_learners_type(
    tiny_models: dict[str, Path], fields: dict[str, object], frozen: bool, head: torch.dtype
) -> None:
    model = ModelConfig.model_validate({"path": str(tiny_models["qwen3_vl"]), **fields})
    args, _ = engine_args(model, SamplerConfig(), "host", frozen, 0)
    made = args.create_model_config()
    assert made.head_dtype == head
    assert made.dtype == (torch.bfloat16 if "dtype" in fields else torch.float32)
    assert made.max_model_len == model.max_model_len and made.enforce_eager
    assert (args.weight_transfer_config is None) == frozen


LARGEST = {
    "qwen3_vl": ({"size": {"shortest_edge": 256, "longest_edge": 16_384 * 256}}, 16_384),
    "qwen2_5_vl": ({"size": {"shortest_edge": 256, "longest_edge": 16_384 * 256}}, 16_384),
    "internvl": ({"crop_to_patches": True, "min_patches": 1, "max_patches": 12}, 13 * 16),
    "idefics3": ({"size": {"longest_edge": 4 * 64}}, 17 * 16),
}
"""family -> its processor's limit as published checkpoints have it, in pixels of the tiny one, and
how many tokens the largest image is by it: a token is 16 pixels square, a tile has 16 of them."""


@pytest.mark.parametrize("family", LARGEST)
def test_vllm_sets_memory_aside_for_no_larger_image_than_fits_the_context(
    tiny_models: dict[str, Path], family: str, tmp_path: Path
) -> None:
    """By vLLM's own arithmetic, and an image of any size is read as the processor reads it."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    fields, largest = LARGEST[family]

    def published(folder: Path) -> None:
        processor = AutoProcessor.from_pretrained(folder)
        images = processor.image_processor
        for name, value in fields.items():
            setattr(images, name, type(images.size)(**value) if name == "size" else value)
        processor.save_pretrained(folder)

    path = str(with_habits(tiny_models[family], tmp_path / family, published))
    args, processor = engine_args(
        ModelConfig(path=path, max_model_len=512), SamplerConfig(), "host", False, 0
    )

    def profiled() -> tuple[int, int]:
        """Tokens of the largest image, and those that the vision tower is run for at a time."""
        budget = MultiModalBudget(args.create_engine_config(), MULTIMODAL_REGISTRY)
        images = budget.get_dummy_encoder_profile_inputs()
        tokens = budget.mm_max_toks_per_item["image"]
        assert len(images) == max(1, budget.get_encoder_budget() // tokens)
        return tokens, budget.get_encoder_budget()

    scales = family.startswith("qwen")
    assert profiled() == ((512, 2048) if scales else (largest, 2048))
    read = MULTIMODAL_REGISTRY.create_processor(args.create_model_config())
    engine = Engine(None, processor, "sampler-0")  # type: ignore[arg-type]
    expected, found, by_the_engine_alone = [], [], []
    for size in ((64, 64), (512, 256), (528, 256), (4096, 32), (1024, 1024)):
        shown = problem(0, size)
        asked, _ = engine._prompts.of(shown, shown.images)

        def counted(given: Any, asked: Any = asked) -> int:
            made = read(
                asked["prompt_token_ids"],
                read.info.parse_mm_data(asked["multi_modal_data"]),
                hf_processor_mm_kwargs=given,
            )
            return made["prompt_token_ids"].count(Chat(processor).image_token)

        expected.append(Chat(processor).image_block(size).count(engine._chat.image_token))
        found.append(counted(asked.get("mm_processor_kwargs")))
        by_the_engine_alone.append(counted(None))
    assert found == expected
    assert (found != by_the_engine_alone) == scales  # or nothing was asked of the requests here
    args.mm_processor_kwargs = None
    assert profiled() == ((16_384, 16_384) if scales else (largest, 2048))  # what it would be


def test_on_a_cpu_the_cache_is_as_large_as_asked(tiny_models: dict[str, Path]) -> None:
    model, sampler = ModelConfig(path=str(tiny_models["qwen3_vl"])), SamplerConfig(kv_cache_gib=0.2)
    args, _ = engine_args(model, sampler, "host", False, 0)
    assert args.kv_cache_memory_bytes == pytest.approx(0.2 * 2**30, abs=1)


def test_an_engine_that_is_to_sleep_is_told_so_where_vllm_can(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.platforms import current_platform

    model = ModelConfig(path=str(tiny_models["qwen3_vl"]))

    def told(sleeps: bool) -> bool:
        args, _ = engine_args(model, SamplerConfig(), "host", False, 0, sleeps)
        return bool(args.enable_sleep_mode)

    assert not told(True), "a CPU engine would refuse it"
    args, _ = engine_args(model, SamplerConfig(), "host", False, 0)
    args.enable_sleep_mode = True
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        args.create_model_config()
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    assert told(True) and not told(False)


def test_a_path_of_any_name_reaches_an_engine_as_a_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "a [1] *?\n'\" é:#"
    (odd / "policy").mkdir(parents=True)
    (odd / "policy" / "model.safetensors").touch()
    for place in (tmp_path / "plain", odd):
        place.mkdir(exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        for _ in range(2):
            path = plain_path(str(odd / "policy"))
            assert glob.glob(os.path.join(path, "*.safetensors"))
            assert len(list((tmp_path / "plain").iterdir())) == 1
    for same in (str(TINY_POLICY), "Qwen/Qwen3-VL-4B-Instruct", "no [folder]"):
        assert plain_path(same) == same


def test_an_engine_that_does_not_start_says_its_own_last_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    core = (
        "import sys; print('(EngineCore pid=7) ERROR 11-26 22:05:01 [core.py:1104] Traceback:');"
        "print('(EngineCore pid=7) ERROR 11-26 22:05:01 [core.py:1104] '"
        "'torch.OutOfMemoryError: tried to allocate 3 GiB');"
        "print('(EngineCore pid=7) bye', file=sys.stderr)"
    )
    with pytest.raises(EngineNotStarted) as refused, own_errors("a/policy"):
        os.system(f'{sys.executable} -c "{core}"')
        raise RuntimeError("Engine core initialization failed. See root cause above. Failed: {}")
    assert str(refused.value) == (
        "model a/policy: the engine does not start: torch.OutOfMemoryError: tried to allocate 3 GiB"
    )
    told = f"ActorDiedError: in its creation task\n  File x\na.EngineNotStarted: {refused.value}\n"
    assert own_words(told) == str(refused.value)
    assert own_words("ActorDiedError: killed\nby hand") == "ActorDiedError: killed\nby hand"
    with pytest.raises(EngineNotStarted, match="start: ValueError: too long"), own_errors("x"):
        raise ValueError("too long")
