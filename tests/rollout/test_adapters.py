"""From low-rank updates to whole weights, on checkpoints written here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rollout.adapters import A, AdapterError, B, BaseWeights, is_adapter, layer_of, with_adapters


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Three layers and an embedding, in two files."""
    generator = torch.Generator().manual_seed(0)
    found = {"embed.weight": torch.randn(6, 4, generator=generator)}
    for layer in range(3):
        for name in ("q", "k"):
            found[f"layers.{layer}.{name}.weight"] = torch.randn(5, 4, generator=generator)
        found[f"layers.{layer}.q.bias"] = torch.randn(5, generator=generator)
    names = sorted(found)
    save_file({n: found[n] for n in names[::2]}, tmp_path / "model-1.safetensors")
    save_file({n: found[n] for n in names[1::2]}, tmp_path / "model-2.safetensors")
    return found


def update(name: str, rows: int = 5, columns: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(name))
    a, b = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
    return {name + A: a, name + B: b}


def test_a_layer_with_an_adapter_comes_whole_and_others_not(
    stored: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    adapters = update("layers.1.q") | update("layers.2.k") | update("layers.2.q")
    assert all(map(is_adapter, adapters)) and not any(map(is_adapter, stored))
    given = list(with_adapters(BaseWeights(str(tmp_path)), adapters, set()))
    found = dict(given)
    assert len(given) == len(found)
    assert found.keys() == {n for n in stored if layer_of(n) in ("layers.1", "layers.2")}
    for name, tensor in found.items():
        layer = name.removesuffix(".weight")
        expected = stored[name].double()
        if layer + A in adapters:
            expected = expected + adapters[layer + B].double() @ adapters[layer + A].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-5)


def test_the_sum_has_the_dtype_of_the_weight(tmp_path: Path) -> None:
    save_file({"x.weight": torch.full((5, 4), 256.0).bfloat16()}, tmp_path / "m.safetensors")
    adapters = {"x" + A: torch.ones(1, 4).bfloat16(), "x" + B: torch.ones(5, 1).bfloat16()}
    ((name, tensor),) = with_adapters(BaseWeights(str(tmp_path)), adapters, set())
    assert (name, tensor.dtype) == ("x.weight", torch.bfloat16)
    assert torch.equal(tensor, torch.full((5, 4), 257.0).bfloat16())


def test_what_does_not_fit_is_refused(stored: dict[str, torch.Tensor], tmp_path: Path) -> None:
    base = BaseWeights(str(tmp_path))
    with pytest.raises(AdapterError, match=r"layers\.7\.q\.weight, which .* does not hold"):
        list(with_adapters(base, update("layers.7.q"), set()))
    with pytest.raises(AdapterError, match=r"6 by 4 .* layers\.1\.q\.weight, which is 5 by 4"):
        list(with_adapters(base, update("layers.1.q", rows=6), set()))
    done: set[str] = set()
    list(with_adapters(base, update("layers.1.q"), done))
    with pytest.raises(AdapterError, match=r"layer layers\.1 came in two parts"):
        list(with_adapters(base, update("layers.1.k"), done))
