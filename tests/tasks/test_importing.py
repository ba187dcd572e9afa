"""What is hidden while a library is imported is hidden then only."""

from __future__ import annotations

import importlib
import sys

import pytest

from tasks.importing import hidden


def test_a_module_is_hidden_within_and_there_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    loaded = sys.modules["json"]
    with hidden("colorsys", "json"):
        with pytest.raises(ImportError):
            importlib.import_module("colorsys")
        assert importlib.import_module("json") is loaded, "what is there already stays"
    assert importlib.import_module("colorsys").rgb_to_hsv(0, 0, 0) == (0, 0, 0)
    assert sys.modules["json"] is loaded
