"""Python's garbage collector, kept from walking libraries while they are imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Within, what is made is taken to stay; the collector leaves it alone, then and later.

    Torch, transformers and vLLM are a million objects of modules and classes: to look at all of
    them again and again takes a quarter of the time that it takes to import them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
