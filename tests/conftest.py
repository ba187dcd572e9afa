"""Tiny policies of both families, made once for all tests that need real weights."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family -> folder of a tiny random policy (see `learner.tiny`)."""
    from learner.tiny import FAMILIES, make_tiny

    folders: dict[str, Path] = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp("models") / family
        make_tiny(family, folders[family], seed=0)
    return folders
