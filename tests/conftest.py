"""What tests of several rooms share: their order, tiny policies, samplers without engines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.support.ray_heads import TOKEN

if TYPE_CHECKING:
    from tests.support.pretend import Samplers
    from tests.support.terminal import Equipoise

# Tiny matrices on a shared machine: threads that wait for each other only cost time. Before torch
# and NumPy are imported; what tests start inherits it, and what has threads of its own sets them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `cluster.__main__` has it

# The same examples each time, however long a busy machine takes over one.
settings.register_profile("here", deadline=None, derandomize=True)
settings.load_profile("here")

LONGEST = (
    "tests/cluster/run/test_end_to_end.py",
    "tests/rollout/test_engine.py",
    "tests/learner/test_deepspeed.py",
    "tests/cluster/run/test_faults.py",
    "tests/learner/test_resume.py",
    "tests/learner/test_smollm2.py",
    "tests/cluster/run/test_sft.py",
    "tests/cluster/run/test_two_nodes.py",
    "tests/cluster/run/test_far_sampler.py",
    "tests/cluster/ablation/test_launch.py",
    "tests/rewards/test_judge_vllm.py",
    "tests/rollout/test_sampler.py",
    "tests/cluster/run/test_nodes.py",
    "tests/rewards/test_pool.py",
    "tests/cluster/run/test_places.py",
    "tests/cluster/run/test_supervise.py",
)
"""Files that start processes and take long, in the order in which they are begun; all others come
after them. The two whole runs with the most processes are not begun side by side: each takes some
5 GB."""


# Of all Rays that this process meets: what it has once read, Ray goes by to its end.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker of several has a whole run left alone at the end."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family -> folder of a tiny random policy (see `learner.tiny`)."""
    from learner.tiny import FAMILIES, make_tiny

    folders: dict[str, Path] = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp("models") / family
        make_tiny(family, folders[family], seed=0)
    return folders


@pytest.fixture
def equipoise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Equipoise:
    """Runs the command, as a user types it, in this process."""
    from tests.support.terminal import typed

    return partial(typed, monkeypatch, capsys)


@pytest.fixture
def samplers() -> Iterator[Samplers]:
    """Samplers without engines, whose pools and threads end with the test."""
    from tests.support.pretend import Samplers

    made = Samplers()
    yield made
    made.close()


@pytest.fixture(scope="session")
def tiny_text_model(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Qwen3 that reads no images, for frozen models."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "qwen3"
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["qwen3_vl"])
    # Like most text-only models', this template can do nothing but join strings.
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
        "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=1024,
            **ends,
        )
    )
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
