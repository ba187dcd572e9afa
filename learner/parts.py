"""Which parameters of a policy are trained, at what learning rate.

A recipe names a part (`vision`, `merger`, `language`, `head`; see `learner.families`) or a pattern
of parameter names as `fnmatch` reads it (`model.visual.blocks.0.*`). Names are those of the module
tree of transformers, the same for every checkpoint of a family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from learner.families.base import PARTS, Family
from learner.policy import Policy
from rollout.tokens import ModelError


def matching(pattern: str, names: Iterable[str], family: Family) -> list[str]:
    """The names, of parameters or modules, that a part or a pattern stands for."""
    if pattern in PARTS:
        return [name for name in names if family.part_of(f"{name}.") == pattern]
    return [name for name in names if fnmatchcase(name, pattern)]


def freeze(policy: Policy, patterns: Sequence[str]) -> None:
    """Have the parameters that match need no gradient.

    Raises ModelError for a pattern that matches nothing, or where nothing is left to train.
    """
    parameters = dict(policy.model.named_parameters())
    for pattern in patterns:
        fault = f"learner.freeze: {pattern!r} matches no parameter"
        for name in require_matches(pattern, list(parameters), policy.family, fault):
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise ModelError("learner.freeze: nothing is left to train; freeze less of the model")


def parameter_groups(
    policy: Policy, rates: Mapping[str, float], learning_rate: float
) -> list[dict[str, Any]]:
    """The trained parameters as an optimizer's groups, one for each rate.

    `rates` multiply the learning rate; where several match a parameter, the last one counts. The
    multiplier stays in the group under `multiplier`, for schedules. Raises ModelError for a
    pattern that matches no trained parameter.
    """
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    multipliers = dict.fromkeys(trained, 1.0)
    for pattern, multiplier in rates.items():
        fault = f"learner.rates: {pattern!r} matches no trained parameter"
        matched = require_matches(pattern, list(trained), policy.family, fault)
        multipliers |= dict.fromkeys(matched, multiplier)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        groups.setdefault(multipliers[name], []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * multiplier, "multiplier": multiplier}
        for multiplier, parameters in groups.items()
    ]


def require_matches(pattern: str, names: Sequence[str], family: Family, fault: str) -> list[str]:
    """`matching`; raises ModelError with `fault` and the nearest names where it is empty."""
    if matches := matching(pattern, names, family):
        return matches
    if pattern in PARTS:
        present = sorted({family.part_of(f"{name}.") for name in names})
        hint = f"its parts are {', '.join(present)}"
        if pattern == "head" and "language" in present:
            hint += " (an LM head tied to the embedding is part of language)"
    else:
        near = sorted([*PARTS, *names], key=lambda name: _distance(pattern, name))[:3]
        hint = f"the nearest names are {', '.join(near)}"
    raise ModelError(f"{fault} of this model; {hint}")


def _distance(pattern: str, name: str) -> float:
    """How far a pattern without its wildcards is from a name, or from an end of it."""
    plain, parts = pattern.replace("*", "").strip("."), name.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts)))
    return 1 - max(SequenceMatcher(None, plain, end).ratio() for end in ends)
