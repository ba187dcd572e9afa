"""An environment is tried, and held against the policy's context, before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.recipes import NARROW, SUDOKU, TINY_POLICY, recipe_file
from tests.support.terminal import Equipoise, with_set

pytestmark = pytest.mark.usefixtures("no_ray", "own_cache")

BAD = "tests.support.bad_environments:Counting"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (['environment.name="zom"'], 'environment.name: got "zom"; known: zoom, mark'),
        (["environment.turns=2"], "environment.name: "),
        (
            ['environment.name="zoom"', "environment.seconds=600"],
            "environment.seconds: got 600, and a sampler counts as hanging after ",
        ),
        (['environment.name="zoom"', "environment.args.side=0"], "environment: "),
        (['environment.name="no_such:Game"'], 'environment: environment "no_such:Game": no module'),
        (
            ['environment.name="tasks.looking:Call"'],
            'environment: environment "tasks.looking:Call"',
        ),
        (
            [f'environment.name="{BAD}"', 'environment.calls="json"'],
            '": says no tools, which calls = "json" needs',
        ),
        (
            ['environment.name="zoom"', 'environment.calls="json"', "model.max_model_len=300"],
            "with what it says first, and ",
        ),
        (
            [f'environment.name="{BAD}"', 'environment.args.first="raises"'],
            ": exception: KeyError: ",
        ),
        ([f'environment.name="{BAD}"', 'environment.args.first="dies"'], "(exit code 3)"),
        (['environment.name="zoom"', "model.max_model_len=180"], "with what it says first, and "),
        (
            [f'environment.name="{BAD}"', 'eval.passes=["returns_elsewhere"]'],
            'eval.passes: "returns_elsewhere" shows a wrong place, and calls of environment "',
        ),
        (
            ['reward.terms=[{name="outcome"}, {name="call_cost"}]'],
            'reward.terms[1]: "call_cost" is paid for calls, and there is no [environment]',
        ),
        (
            ['environment.name="zoom"', 'reward.terms=[{name="image_dependence"}]'],
            'reward.terms[0]: "image_dependence" cannot be had on responses of several turns',
        ),
    ],
)
def test_an_environment_is_tried_before_anything_is_started(
    overrides: list[str], said: str, tmp_path: Path, equipoise: Equipoise
) -> None:
    path = recipe_file(tmp_path, NARROW, model=TINY_POLICY, tasks=SUDOKU)
    code, printed, message = equipoise("train", path, "--dry-run", *with_set(*overrides))
    assert (code, printed) == (2, "") and said in message, message
    assert len(message.splitlines()) == 1


def test_an_environment_that_can_be_had_says_what_may_not_fit(
    tmp_path: Path, equipoise: Equipoise
) -> None:
    path = recipe_file(tmp_path, NARROW, model=TINY_POLICY, tasks=SUDOKU)
    wide, zoom = "model.max_model_len=600", 'environment.name="zoom"'
    code, printed, told = equipoise("train", path, "--dry-run", *with_set(wide, zoom))
    assert code == 0 and "ends by its context_budget" in printed + told, told
