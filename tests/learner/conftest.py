"""Tiny policies of all families, loaded once a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from learner.policy import Policy, load_policy
from learner.tiny import FAMILIES
from tests.support.shaken import shaken


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices on a shared machine: threads that wait for each other only cost time."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each model family in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def model_path(family: str, tiny_models: dict[str, Path], tmp_path_factory: Any) -> str:
    """A tiny policy whose weights are all in play."""
    return str(shaken(tiny_models[family], tmp_path_factory.mktemp("shaken") / family, seed=7))


@pytest.fixture(scope="session")
def loaded(model_path: str) -> tuple[Policy, Any]:
    """(policy, processor) of `model_path`; a test that changes it loads its own."""
    return load_policy(model_path)
