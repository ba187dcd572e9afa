"""A recipe that names things by URI is, once pinned, the recipe that names them by path."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cluster.ablate_cli import ablate_to_the_end
from cluster.ablation.grid import load_ablation
from cluster.cli import main
from cluster.recipe.fetching import model_uris, pinned_recipe
from cluster.recipe.preflight import preflight
from cluster.recipe.recipe import Recipe, check_recipe, load_recipe, resolved_toml
from cluster.record.mirror import fetch, mirrored
from cluster.run.checkpoints import resume
from cluster.start import loaded, ready
from rollout.models import ModelError
from rollout.tokens import load_processor
from tasks.core import DataError
from tasks.fetched import PIN, local
from tests.cluster.run.test_resume import make_run
from tests.support.recipes import TINY_POLICY, made_recipe, recipe_file, stored, write_problems

MODEL, ROWS = "memory://bucket/tiny-qwen3-vl", "memory://bucket/problems"

pytestmark = pytest.mark.usefixtures("no_ray", "own_cache")


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path) -> Iterator[MemoryFileSystem]:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    memory = fsspec.filesystem("memory")
    memory.put(str(TINY_POLICY), "/bucket/tiny-qwen3-vl", recursive=True)
    memory.put(str(write_problems(tmp_path / "problems", 8, 6)), "/bucket/problems", recursive=True)
    yield memory
    MemoryFileSystem.store.clear()


def quiet(_: str) -> None:
    pass


def by_uri(*settings: str) -> Recipe:
    return made_recipe("eval.problems=4", *settings, model=MODEL, tasks=stored(ROWS))


def test_what_is_asked_of_a_recipe_by_uri_is_what_is_asked_by_path(tmp_path: Path) -> None:
    paths = made_recipe("eval.problems=4", model=TINY_POLICY, tasks=stored(tmp_path / "problems"))
    told: list[str] = []
    pinned = pinned_recipe(by_uri(), told.append)
    found, expected = (preflight(r, "train", quiet) for r in (pinned, paths))
    for split in ("train", "test"):
        of_uri, of_path = (ready.sources[0].rows(split) for ready in (found, expected))
        assert [r.problem for r in of_uri] == [r.problem for r in of_path] and len(of_uri)
    assert found.processor.chat_template == expected.processor.chat_template
    assert [line.partition(":")[0] for line in told] == ["memory", "memory"]


def test_a_pinned_recipe_is_one_again_and_is_pinned_to_the_same(tmp_path: Path) -> None:
    recipe = by_uri(f'eval.reader="{MODEL}"', 'reward.terms=[{name="outcome"}]')
    pinned = pinned_recipe(recipe, quiet)
    again = check_recipe(tomllib.loads(resolved_toml(pinned)), (), "x.toml")
    assert again == pinned == pinned_recipe(again, quiet)
    assert pinned.eval.reader == pinned.model.path != MODEL
    pin = PIN.fullmatch(pinned.model.path)
    assert pin and pin[1] == MODEL
    assert model_uris(pinned) == [pinned.model.path]
    assert pinned_recipe(made_recipe(), quiet) == made_recipe()


def test_models_of_terms_are_pinned_and_what_a_judge_is_asked_at_is_not() -> None:
    terms = [
        {"name": "outcome"},
        {"name": "blind_questions", "args": {"model": MODEL, "place": "prompt"}},
        {"name": "judge", "args": {"model": "m", "url": "http://127.0.0.1:9/v1", "prompt": "x"}},
    ]
    base = by_uri()
    configs = [base.reward.model_validate({"terms": [term]}).terms[0] for term in terms[:2]]
    judged = configs[0].model_copy(update={"name": "judge", "args": terms[2]["args"]})
    reward = base.reward.model_copy(update={"terms": (*configs, judged)})
    pinned = pinned_recipe(base.model_copy(update={"reward": reward}), quiet)
    _, asking, judge = pinned.reward.terms
    assert asking.args == {"model": pinned.model.path, "place": "prompt"}
    assert judge.args == terms[2]["args"]


@pytest.mark.parametrize(
    ("field", "setting"),
    [
        ("model.path", 'model.path="memory://bucket/none"'),
        ("eval.reader", 'eval.reader="memory://bucket/none"'),
        ("tasks[0].data", 'tasks[0].data="memory://bucket/none"'),
    ],
)
def test_what_is_not_there_is_one_line_that_names_the_field(
    field: str, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = recipe_file(tmp_path, model=MODEL, tasks=stored(ROWS))
    monkeypatch.setattr("sys.argv", ["equipoise", "train", str(file), "--set", setting])
    with pytest.raises(SystemExit) as ended:
        main()
    *_, last = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert last == (
        f"{field}: memory://bucket/none: nothing is there; is the address right, the network up, "
        "and are its keys in the environment?"
    )
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_fetches_data_and_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert ready(by_uri(), "train", None, True, "x.toml", None) is None
    printed = capsys.readouterr().out
    assert check_recipe(tomllib.loads(printed), (), "x.toml").model.path == MODEL
    assert f"model.path = {MODEL} is not on this machine" in printed
    pinned = pinned_recipe(by_uri(), quiet)
    assert ready(by_uri(), "train", None, True, "x.toml", None) is None
    printed = capsys.readouterr().out
    assert check_recipe(tomllib.loads(printed), (), "x.toml") == pinned
    assert "not on this machine" not in printed


def test_a_model_that_nobody_pinned_is_refused_where_it_is_read() -> None:
    with pytest.raises(ModelError, match=f"model.path: {MODEL}: was not fetched"):
        load_processor(MODEL)


def test_a_run_by_uri_goes_on_from_a_uri_with_the_content_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: MemoryFileSystem
) -> None:
    run = make_run(tmp_path / "run", 3)
    pinned = pinned_recipe(load_recipe(run / "recipe.toml", [f"model.path={MODEL}"]), quiet)
    (run / "recipe.toml").write_text(resolved_toml(pinned))
    with mirrored("memory://bucket/runs", run, quiet):
        pass
    # On another machine.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    assert local(pinned.model.path) == pinned.model.path
    recipe, resumed = loaded("train", None, None, tmp_path / "gone-on", "memory://bucket/runs/run")
    assert resumed and resumed.position.step == 3
    assert pinned_recipe(recipe, quiet) == pinned == recipe
    files = {file.name: file.read_bytes() for file in Path(local(recipe.model.path)).iterdir()}
    assert files["model.safetensors"] == (TINY_POLICY / "model.safetensors").read_bytes()
    # And on a third, when other weights lie there by then.
    bucket.pipe_file("/bucket/tiny-qwen3-vl/config.json", b"{}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    fetch("memory://bucket/runs/run", tmp_path / "third", quiet)
    recipe, _ = resume(tmp_path / "third")
    with pytest.raises(DataError, match=r"model.path: .* other content lies there"):
        pinned_recipe(recipe, quiet)


def test_cells_of_an_ablation_are_pinned_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_file(tmp_path, "eval.problems = 4", model=MODEL, tasks=stored(ROWS))
    (tmp_path / "two.toml").write_text(
        'base = "x.toml"\nquestion = "?"\nseeds = [1, 2]\nbudget = { kind = "updates", amount = 4 }'
        '\narms = [{ name = "a" }, { name = "b", set = { "reward.alpha" = 0.5 } }]\n'
    )
    asked: list[Recipe] = []
    monkeypatch.setattr(
        "cluster.ablate_cli.preflight", lambda recipe, *_, **__: asked.append(recipe)
    )
    monkeypatch.setattr("cluster.ablate_cli.run_ablation", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ablate_to_the_end(load_ablation(tmp_path / "two.toml"), tmp_path / "out")
    assert len(asked) > 1 and {len(model_uris(recipe)) for recipe in asked} == {1}
    assert len({recipe.model.path for recipe in asked}) == 1 and PIN.fullmatch(asked[0].model.path)
    assert capsys.readouterr().out.count("fetching") == 2
