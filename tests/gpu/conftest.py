"""Checks for a machine with a GPU, by `make test-gpu SET=cuda`; without one each is skipped.

`REHEARSE=1` runs on a CPU what can be run there: the code of these tests, and nothing of what they
ask of a card.
"""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    """Where a learner's policy goes; before anything is started, a reason why there is none."""
    if os.environ.get("REHEARSE"):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU here")
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("one process at a time has the cards: make test-gpu")
    print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def cards(device: torch.device) -> int:
    """How many there are; 0 in a rehearsal."""
    return torch.cuda.device_count() if device.type == "cuda" else 0
