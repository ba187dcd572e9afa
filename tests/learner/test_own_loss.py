"""A loss of a user's own: the same numbers as the built-in one that it spells out, or one line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.recipe.algorithm import AlgorithmConfig
from learner.loss_settings import LossConfig
from learner.own_loss import try_loss
from learner.policy_loss import PolicyLoss
from tests.support.equations import AGGREGATIONS, CLIP, draw, loss_of, total

FILE = """
import torch

def clip(logprobs, old_logprobs, advantages, tokens, low, high):
    ratio = torch.exp(logprobs - old_logprobs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)

def scalar(logprobs, *rest):
    return logprobs.sum()

def number(*rest):
    return 0.0

def no_gradient(logprobs, *rest):
    return logprobs.detach()

def infinite(logprobs, old_logprobs, advantages, tokens):
    return logprobs / advantages

def steep(logprobs, *rest):
    return torch.sqrt(logprobs - logprobs.detach())

def raises(logprobs, *rest):
    raise ValueError("no such token")

def few(logprobs, advantages):
    return logprobs
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(FILE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("correction", ["none", "token_tis"])
def test_it_is_aggregated_corrected_and_followed_as_the_built_in_ones(
    aggregation: str, correction: str
) -> None:
    low, high = CLIP["clip"]
    rest = {"aggregation": aggregation, "correction": {"kind": correction}, "kl_weight": 0.1}
    own = {"loss": "mine.py:clip", "loss_args": {"low": low, "high": high}}
    drawn = draw(3)
    found = []
    for loss in (
        loss_of("clip", **rest),
        PolicyLoss(LossConfig.model_validate(own | rest), loss_of("clip").max_tokens),
    ):
        x = torch.from_numpy(drawn.logprobs).requires_grad_()
        value = total(loss, x, torch.from_numpy(drawn.entropy), drawn)
        value.backward()
        seen = (x.detach(), torch.from_numpy(drawn.entropy))
        found.append((float(value.detach()), x.grad, set(loss.metrics(seen, drawn.tokens))))
    (built_in, gradient, names), (value, mine, told) = found
    assert value == pytest.approx(built_in, rel=1e-12)
    assert gradient is not None and mine is not None and gradient.any()
    torch.testing.assert_close(mine, gradient, rtol=1e-12, atol=0)
    assert names - told == {"clip_fraction"}


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("mine.py:scalar", {}, "gave shape (), expected a tensor of shape (7,)"),
        ("mine.py:number", {}, "gave float, expected"),
        ("mine.py:no_gradient", {}, "do not depend on `logprobs`"),
        ("mine.py:infinite", {}, "must be finite"),
        ("mine.py:steep", {}, "must be finite"),
        ("mine.py:raises", {}, "ValueError: no such token"),
        ("mine.py:few", {}, "TypeError: few() takes 2 positional arguments but 4 were given"),
        ("mine.py:clip", {"low": 0.2}, "missing 1 required positional argument: 'high'"),
        ("mine.py:clop", {}, 'no "clop"; did you mean "clip"'),
        ("their.py:clip", {}, 'no file "their.py"'),
    ],
)
def test_what_is_no_loss_is_refused_in_one_line(name: str, args: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as error:
        try_loss(LossConfig.model_validate({"loss": name, "loss_args": args}))
    said = str(error.value)
    assert said.startswith("algorithm.loss: ") and says in said and "\n" not in said
    assert said.count("algorithm.loss") == 1


def test_the_example_of_the_page_is_taken(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "your_algorithm.md").read_text(encoding="utf-8")
    code, toml = (page.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "toml"))
    (tmp_path / "my_algorithm.py").write_text(code, encoding="utf-8")
    algorithm = AlgorithmConfig.model_validate(tomllib.loads(toml)["algorithm"])
    try_loss(algorithm)
    assert algorithm.loss_args == {"width": 0.1} and algorithm.aggregation == "token_mean"
