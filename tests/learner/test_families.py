"""Families: positions, parts and image features are the model's own; strangers are refused."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from cluster.cli import make
from learner.batch import TrainSequence
from learner.families import FAMILIES, TINY
from learner.families.base import PARTS
from learner.policy import Policy, make_collator
from learner.tiny import FAMILIES as FAMILY_NAMES
from rollout.tokens import ModelError
from tests.learner.samples import mixed_batch, placeholder


def alone(policy: Policy, processor: Any, s: TrainSequence) -> tuple[torch.Tensor, dict[str, Any]]:
    """(input ids [1, L], the image tensors that place tokens) of one sequence, unpadded."""
    inputs = make_collator(policy, processor)([s]).inputs
    skip = ("input_ids", "mm_token_type_ids")
    return inputs["input_ids"], {n: v for n, v in inputs.items() if n not in skip}


def by_hand(ids: list[int], image_token: int, grid: list[int] | None, merge: int) -> np.ndarray:
    """int [3, L] M-RoPE positions of one sequence: the definition, a token at a time."""
    found, start, seen = [], 0, 0
    for token in ids:
        if token != image_token or grid is None:
            found.append((start, start, start))
            start += 1
            continue
        _, height, width = (grid[0], grid[1] // merge, grid[2] // merge)
        found.append((start, start + seen // width, start + seen % width))
        seen += 1
        if seen == height * width:
            start += max(height, width)
    return np.array(found).T


def test_positions_are_those_the_model_would_count_itself(loaded: tuple[Policy, Any]) -> None:
    policy, processor = loaded
    model: Any = policy.eval().model
    collate = make_collator(policy, processor)
    for s in mixed_batch(processor).sequences:
        ids, images = alone(policy, processor, s)
        planes = policy.family.positions(model, ids, images)
        assert planes.shape == (policy.family.planes, ids.shape[1])
        assert planes.dtype == torch.int64
        micro = collate([s])
        inputs = dict(micro.inputs)
        if s.image is not None:
            features = policy.family.image_features(model, micro.vision.inputs)
            inputs["mm_encoder_outputs"] = {"image": features}

        def hidden(inputs: dict[str, Any] = inputs, **more: Any) -> torch.Tensor:
            with torch.no_grad():
                found: torch.Tensor = model.model(**inputs, **more).last_hidden_state
            return found

        own = hidden()
        given = hidden(position_ids=policy.family.position_ids(planes[:, None]))
        torch.testing.assert_close(given, own, rtol=0, atol=1e-6)
        # The comparison can fail: a token of the response at another place is another token.
        moved = planes.clone()
        moved[:, -5:] += 3
        other = hidden(position_ids=policy.family.position_ids(moved[:, None]))
        assert (other - own).abs().max() > 1e-3


def test_m_rope_is_the_definition_a_token_at_a_time(loaded: tuple[Policy, Any]) -> None:
    policy, processor = loaded
    model: Any = policy.model
    for s in mixed_batch(processor).sequences:
        ids, images = alone(policy, processor, s)
        found = policy.family.positions(model, ids, images).numpy()
        if policy.family.planes == 1:
            assert found.tolist() == [list(range(ids.shape[1]))]
            continue
        grid = images["image_grid_thw"][0].tolist() if images else None
        merge = model.config.vision_config.spatial_merge_size
        expected = by_hand(ids[0].tolist(), placeholder(processor), grid, merge)
        assert found.tolist() == expected.tolist()


def test_every_parameter_is_of_one_part_and_the_tower_is_what_features_hang_on(
    loaded: tuple[Policy, Any],
) -> None:
    policy, processor = loaded
    model: Any = policy.model
    family = policy.family
    names = dict(model.named_parameters())
    parts = {part: [n for n in names if family.part_of(n) == part] for part in PARTS}
    assert sorted(n for of in parts.values() for n in of) == sorted(names)
    # The head is tied to the embedding, which is the language model's.
    assert [part for part, of in parts.items() if not of] == ["head"]
    assert family.part_of("lm_head.weight") == "head"
    micro = make_collator(policy, processor)(mixed_batch(processor).sequences[:1])
    policy.zero_grad()
    family.total(family.image_features(model, micro.vision.inputs)).backward()
    reached = [n for n, p in names.items() if p.grad is not None]
    policy.zero_grad()
    assert set(reached) <= {*parts["vision"], *parts["merger"]}
    assert set(parts["merger"]) <= set(reached)
    assert len(reached) > 20
    with pytest.raises(ModelError, match=r"parameter model\.audio\.weight: belongs to no known"):
        family.part_of("model.audio.weight")


def test_a_checkpoints_family_is_found_by_its_model_type(
    family: str, loaded: tuple[Policy, Any]
) -> None:
    assert loaded[0].family is FAMILIES[family] is TINY[family]
    assert loaded[0].model.config.model_type == family  # type: ignore[union-attr]


def test_the_command_offers_every_family_that_can_be_made() -> None:
    offered = get_type_hints(make, include_extras=True)["family"]
    assert get_args(get_args(offered)[0]) == FAMILY_NAMES == tuple(TINY)
