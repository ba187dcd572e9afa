"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(holds: Callable[[], object], seconds: float = 600.0, what: str = "") -> None:
    """Return once it holds; fails after `seconds`, which no machine that works takes."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, what or f"not within {seconds:g} s"
        time.sleep(0.02)
