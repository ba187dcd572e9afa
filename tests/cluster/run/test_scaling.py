"""`equipoise scale`: what is asked of a run, who may ask, and what cannot be had."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.recipe.machine import claimed
from cluster.recipe.nodes import Node
from cluster.recipe.recipe import UserError, load_recipe
from cluster.run import scaling
from cluster.run.scaling import WISH, ask, requested, scale_as_asked
from rollout.settings import SamplerConfig
from tests.support.pretend import Samplers, request
from tests.support.recipes import recipe_text
from tests.support.terminal import Equipoise


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.toml").write_text(recipe_text())
    return folder


def test_a_wish_is_heard_once_and_the_last_one_counts(run: Path) -> None:
    with claimed(run):
        assert requested(run) is None
        ask(run, 3)
        ask(run, 5)
        assert requested(run) == 5 and requested(run) is None
    assert sorted(p.name for p in run.iterdir()) == [".lock", "recipe.toml"]


def test_only_a_run_that_goes_on_can_be_asked(
    run: Path, tmp_path: Path, equipoise: Equipoise
) -> None:
    with pytest.raises(UserError, match=r"not a run folder \(it has no recipe.toml\)"):
        ask(tmp_path, 2)
    for _ in range(2):  # never run, and run by a process that ended
        with pytest.raises(UserError, match=r"--resume .*run --set sampler.count=2"):
            ask(run, 2)
        with claimed(run):
            pass
    code, _, error = equipoise("scale", run, "--samplers", 2)
    assert code == 2 and "no process is running it" in error


@pytest.mark.parametrize("text", ["", "[]", '{"samplers": 0}', '{"samplers": true}', '{"a": 1}'])
def test_a_wish_that_cannot_be_read_is_said_and_left(run: Path, text: str) -> None:
    (run / WISH).write_text(text)
    with pytest.raises(UserError, match=r'scale.json: expected \{"samplers": N\}'):
        requested(run)
    assert requested(run) is None


def test_the_pool_grows_and_shrinks_and_keeps_within_the_cluster(
    run: Path, samplers: Samplers, monkeypatch: Any
) -> None:
    recipe = load_recipe(run / "recipe.toml", ["sampler.count=1", "learner.cpus=1.0"])
    monkeypatch.setattr(scaling, "live_nodes", lambda: [Node("a", 3.0)])
    pool = samplers.pool(1, SamplerConfig())
    pool.wait_ready(60)
    live: Any = SimpleNamespace(recipe=recipe, samplers=pool)
    said: list[str] = []
    progress: Any = SimpleNamespace(say=said.append)
    with claimed(run):
        for wish, size in ((2, 2), (3, 2), (2, 2), (1, 1)):
            ask(run, wish)
            scale_as_asked(live, run, progress)
            scale_as_asked(live, run, progress)
            assert pool.size() == pool.counts()["asked"] == size
            assert len(pool.sample([request(f"g-{i}") for i in range(4)])) == 4
        (run / WISH).write_text("more!")
        scale_as_asked(live, run, progress)
    assert said[0] == "samplers: 1 -> 2" and said[2] == "samplers: 2 -> 1"
    assert said[1].startswith("warning: not scaled: sampler.count × sampler.cpus + ")
    assert "4 cores, but the cluster has 3" in said[1]
    assert said[3].startswith("warning: not scaled: ") and len(said) == 4
