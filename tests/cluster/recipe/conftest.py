"""What tests of recipes share."""

from pathlib import Path

import pytest

from tests.support.recipes import TINY_POLICY, recipe_file, write_problems


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A file of a small recipe."""
    return recipe_file(tmp_path, model=TINY_POLICY)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set of eight problems to train on and six held out."""
    return write_problems(tmp_path / "data", 8, 6)
