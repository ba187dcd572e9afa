"""What tests of the commands and their rooms share."""

from pathlib import Path

import pytest

from cluster.report import document


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are empty drawings, for tests of the rest of a page: drawing takes the longest."""
    monkeypatch.setattr(document, "to_svg", lambda chart: '<svg aria-hidden="true"></svg>')


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would start while input is asked that is refused then: nothing comes to need it."""
    monkeypatch.setattr("cluster.run.session._attach", lambda address: None)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is fetched or converted is kept for the test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"
