"""What it takes to import the large libraries, kept down."""

from __future__ import annotations

import gc
import sys
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


@contextmanager
def hidden(*modules: str) -> Iterator[None]:
    """Within, an import of these raises ImportError, for who does without them and they are slow.

    One that is imported already stays.
    """
    hiding = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hiding))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hiding:
            del sys.modules[name]
