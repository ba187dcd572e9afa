"""Parts of a policy by name, and which of its parameters are trained at what learning rate.

A recipe names a part (`vision`, `merger`, `language`, `head`) or a pattern of parameter names
as `fnmatch` reads it (`model.visual.blocks.0.*`). Names are those of the module tree of
transformers, the same for every checkpoint of a family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from rollout.tokens import ModelError

PARTS: dict[str, tuple[str, ...]] = {
    "merger": (
        "model.visual.merger.",
        "model.visual.deepstack_merger_list.",
        "model.multi_modal_projector.",
        "model.connector.",
    ),
    "vision": ("model.visual.", "model.vision_tower.", "model.vision_model."),
    "language": ("model.language_model.", "model.text_model."),
    "head": ("lm_head.",),
}
"""Where each part's parameters start, over all families; of two parts the first has the name."""


def part_of(name: str) -> str | None:
    """The part that a parameter belongs to; None where no family has such a name."""
    return next((part for part, starts in PARTS.items() if name.startswith(starts)), None)


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a part or a pattern stands for."""
    if pattern in PARTS:
        return [name for name in names if part_of(name) == pattern]
    return [name for name in names if fnmatchcase(name, pattern)]


def freeze(model: nn.Module, patterns: Sequence[str], field: str = "learner.freeze") -> None:
    """Have the parameters that match need no gradient.

    Raises ModelError for a pattern that matches nothing, or where nothing is left to train.
    """
    named = dict(model.named_parameters())
    for pattern in patterns:
        for name in _found(pattern, list(named), f"{field}: {pattern!r} matches no parameter"):
            named[name].requires_grad_(False)
    if not any(p.requires_grad for p in named.values()):
        raise ModelError(f"{field}: nothing is left to train; freeze less of the model")


def parameter_groups(
    model: nn.Module, rates: Mapping[str, float], learning_rate: float, field: str = "learner.rates"
) -> list[dict[str, Any]]:
    """The trained parameters as an optimizer's groups, one for each rate.

    `rates` multiply the learning rate; where several match a parameter, the last one counts. The
    multiplier stays in the group under `multiplier`, for schedules. Raises ModelError for a
    pattern that matches no trained parameter.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    multipliers = dict.fromkeys(trained, 1.0)
    for pattern, multiplier in rates.items():
        found = _found(pattern, list(trained), f"{field}: {pattern!r} matches no trained parameter")
        multipliers |= dict.fromkeys(found, multiplier)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        groups.setdefault(multipliers[name], []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * multiplier, "multiplier": multiplier}
        for multiplier, parameters in groups.items()
    ]


def _found(pattern: str, names: Sequence[str], fault: str) -> list[str]:
    """`matching`; raises ModelError where it is empty, with the names that come nearest."""
    if found := matching(pattern, names):
        return found
    if pattern in PARTS:
        present = sorted({part for part in map(part_of, names) if part})
        hint = f"its parts are {', '.join(present)}"
        if pattern == "head" and "language" in present:
            hint += " (an LM head tied to the embedding is part of language)"
    else:
        near = get_close_matches(pattern, [*PARTS, *names], n=3, cutoff=0.3) or names[:3]
        hint = f"the nearest names are {', '.join(near)}"
    raise ModelError(f"{fault} of this model; {hint}")
