"""A vision tower grafted onto a language model of others: it thinks, and has to learn to see.

The language model's weights stay as they are, bit for bit, and so do its tokens and its chat
template. New are a connector, the tower unless a folder holds it, and rows of the embedding and the
head for the placeholders of images. Such a row is the mean of the old ones, so by Jensen's
inequality N new tokens take at most N / (V + N) of the probability that the V old ones had.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    set_seed,
)

from learner.families import TINY
from learner.families.base import TINY_TOWER, NewFamily, Tower
from rollout.tokens import (
    NOT_ITS_CODE,
    ModelError,
    first_line,
    load_processor,
    load_reader,
    require_model,
    tokenizer_of,
)
from tasks.files import put_text, replacing

TOWERS: Mapping[str, Tower] = {
    "tiny": TINY_TOWER,
    "small": Tower(hidden=192, inner=768, layers=6, heads=3, image=256, patch=16, merge=4),
    "base": Tower(hidden=768, inner=3072, layers=12, heads=12, image=512, patch=16, merge=4),
}

_FLATTEN = """{% set flat = namespace(messages=[]) %}\
{% for message in messages %}\
{% if message.content is not defined or message.content is string
    or message.content is not iterable %}\
{% set flat.messages = flat.messages + [message] %}\
{% else %}\
{% set said = namespace(text='') %}\
{% for part in message.content %}\
{% set said.text = said.text + ('PLACEHOLDER' if part.type == 'image' else part.text) %}\
{% endfor %}\
{% set flat.messages = flat.messages + [dict(message, content=said.text)] %}\
{% endif %}\
{% endfor %}\
{% set messages = flat.messages %}
"""
"""Before a template of text: lists of text and images become the text that it takes. (The newline
at its end is not written: transformers cuts the one after a block.)"""


def graft(language: str, tower: str, out: Path, seed: int = 0) -> dict[str, int]:
    """Write a VLM of a text checkpoint and a vision tower to the folder `out`; returns its sizes.

    Args:
        language: folder or hub name of a checkpoint with a chat template, of a `model_type` that
            some family grafts onto (`NewFamily.languages`).
        tower: one of `TOWERS`, a new one; or folder or hub name of a checkpoint that holds a
            vision tower of the family's kind, alone or within a VLM.
        seed: of the new weights.

    Returns `{"parameters": n, "language": n, "vision": n, "merger": n, "new_tokens": n,
    "image_tokens": n}`, the last of one image. Raises ModelError naming the folder.
    """
    family = _serving(language)
    reader = load_reader(language, "--language")
    sizes, seeing = _tower(tower)
    if sizes.fault:
        raise ModelError(f"--tower: {tower}: {sizes.fault}")
    text = _opened(AutoModelForCausalLM, language, "--language", dtype="auto")
    tokenizer, added = _with_placeholders(tokenizer_of(reader), family)
    _lengthen(text, len(tokenizer))
    set_seed(seed)
    token = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in family.image_tokens}
    model = family.new_model(text.config.to_dict(), token, sizes).to(text.dtype)
    for holder in ("text_model", "language_model"):
        if hasattr(model.model, holder):
            setattr(model.model, holder, text.base_model)
    model.lm_head = text.lm_head
    model.tie_weights()
    if seeing is not None:
        _take_over(model, seeing, f"--tower: {tower}", family)
    model.generation_config = text.generation_config
    template = _FLATTEN.replace("PLACEHOLDER", family.placeholder.replace("\n", "\\n"))
    processor = family.new_processor(tokenizer, template + tokenizer.chat_template, sizes)
    count = {part: 0 for part in ("language", "vision", "merger", "head")}
    for name, parameter in model.named_parameters():
        count[family.part_of(name)] += parameter.numel()
    counts = {
        "parameters": sum(count.values()),
        "language": count["language"] + count["head"],
        "vision": count["vision"],
        "merger": count["merger"],
        "new_tokens": len(added),
        "image_tokens": sizes.tokens,
    }
    with replacing(out) as fresh:
        model.save_pretrained(fresh)
        processor.save_pretrained(fresh)
        put_text(fresh / "README.md", _card(language, tower, family, counts, added, sizes.image))
        load_processor(str(fresh), "--out")
    return counts


def _serving(language: str) -> Any:
    """The family that is grafted onto a language model."""
    require_model(language, "--language")
    config = _opened(AutoConfig, language, "--language")
    known = {name: family for family in TINY.values() for name in family.languages}
    if hasattr(config, "vision_config"):
        raise ModelError(f"--language: {language}: sees already ({config.model_type})")
    if config.model_type not in known:
        raise ModelError(
            f"--language: {language}: no family of VLMs here has a language model of model_type "
            f"{config.model_type!r}; take one of {', '.join(known)}"
        )
    return known[config.model_type]


def _tower(tower_name: str) -> tuple[Tower, Any]:
    """Sizes of a vision tower, and the model of others that holds it where it is not a new one."""
    if tower_name in TOWERS:
        return TOWERS[tower_name], None
    if not Path(tower_name).exists() and "/" not in tower_name:
        raise ModelError(
            f"--tower: {tower_name}: neither one of {', '.join(TOWERS)} nor a folder or hub name"
        )
    field = f"--tower: {tower_name}"
    full_config = _opened(AutoConfig, tower_name, "--tower")
    config = getattr(full_config, "vision_config", full_config)
    fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sides = [fields.get("image_size"), fields.get("patch_size")]
    image, patch = (side[0] if isinstance(side, (list, tuple)) else side for side in sides)
    if lacking := [name for name in names if name not in fields]:
        raise ModelError(f"{field}: its config names no vision tower (no {lacking[0]})")
    if not image or not patch:
        raise ModelError(f"{field}: its config gives no size of images or of patches")
    ratio = getattr(full_config, "downsample_ratio", None)
    merge = getattr(full_config, "scale_factor", None) or (round(1 / ratio) if ratio else None)
    divides = [size for size in (4, 3, 2) if image // patch % size == 0]
    merge = merge or (divides or [1])[0]
    hidden, inner, layers, heads = (fields[name] for name in names)
    sizes = Tower(hidden, inner, layers, heads, image, patch, merge, fields)
    return sizes, _opened(AutoModel, tower_name, "--tower")


def _opened(loader: Any, path: str, field: str, **options: Any) -> Any:
    """What a class of transformers makes of a checkpoint."""
    try:
        return loader.from_pretrained(path, **NOT_ITS_CODE, **options)
    except Exception as error:  # of files, of weights and of configs, each its own kinds
        raise ModelError(f"{field}: {path}: could not be loaded ({first_line(error)})") from error


def _with_placeholders(tokenizer: Any, family: NewFamily) -> tuple[Any, list[str]]:
    """The tokenizer that knows the family's image tokens too, and those it did not know before."""
    known = tokenizer.get_vocab()
    added = [name for name in family.image_tokens if name not in known]
    tokenizer.add_tokens(
        [AddedToken(name, special=True, normalized=False) for name in family.image_tokens]
    )
    if not family.named_tokens:
        return tokenizer, added
    with tempfile.TemporaryDirectory() as folder:  # names of tokens are read, never set
        tokenizer.save_pretrained(folder)
        named = AutoTokenizer.from_pretrained(folder, extra_special_tokens={**family.named_tokens})
        return named, added


def _lengthen(text: Any, rows: int) -> None:
    """Give embedding and head at least this many rows; a new one is the mean of the old ones."""
    old = text.config.vocab_size
    if rows <= old:
        return
    text.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (text.get_input_embeddings(), text.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].float().mean(0).to(layer.weight.dtype)
            if getattr(layer, "bias", None) is not None:
                layer.bias[old:] = layer.bias[:old].mean()


def _take_over(model: Any, seeing: Any, field: str, family: Any) -> None:
    """Copy the weights of a vision tower of others; it is found by the names of its parameters."""
    tower = next(
        getattr(model.model, name)
        for name in ("vision_model", "vision_tower")
        if hasattr(model.model, name)
    )
    expected, source = tower.state_dict(), seeing.state_dict()
    first = next(iter(expected))
    for prefix in [name.removesuffix(first) for name in source if name.endswith(first)]:
        weights = {name: source[prefix + name] for name in expected if prefix + name in source}
        if all(
            name in weights and weights[name].shape == expected[name].shape for name in expected
        ):
            tower.load_state_dict(weights)
            return
    raise ModelError(
        f"{field}: holds no vision tower as {family.model_type} has it, whose parameters are "
        f"{first} and {len(expected) - 1} more"
    )


def _card(
    language: str,
    tower: str,
    family: Any,
    counts: Mapping[str, int],
    added: list[str],
    image: int,
) -> str:
    model_card = Path(language) / "README.md"
    below = model_card.read_text(encoding="utf-8") if model_card.is_file() else ""
    head, below = below.split("---\n", 2)[1:] if below.startswith("---\n") else ("", below)
    front = f"---\n{head}---\n\n" if head else ""
    new = "new, untrained" if tower in TOWERS else f"taken from {tower}"
    return (
        f"{front}# {Path(language).name} that is to see\n\n"
        f"Made by `equipoise models graft`, as {family.model_type}.\n\n"
        f"- Language model: {language}, {counts['language']:,} parameters, unchanged but for "
        f"{counts['new_tokens']} new tokens, whose rows are the mean of the others: "
        f"{', '.join(f'`{name}`' for name in added) or 'none'}.\n"
        f"- Vision tower: {tower}, {new}: {counts['vision']:,} parameters. An image is scaled to "
        f"{image} by {image} pixels and becomes {counts['image_tokens']} tokens.\n"
        f"- Connector: new, untrained: {counts['merger']:,} parameters.\n"
        "- Chat template: the language model's own; images in a message are written as "
        f"`{family.placeholder.strip()}`.\n"
        + (f"\nThe language model's card:\n\n{below.strip()}\n" if below else "")
    )
