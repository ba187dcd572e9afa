"""Batching: nothing lost, nothing doubled, images that fit their prompts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.collate import Collator
from tasks.core import DataError
from tests.support.samples import Loaded, mixed_batch, placeholder, problem, sequence


def test_a_micro_batch_predicts_every_response_token_from_the_one_before(loaded: Loaded) -> None:
    policy, processor = loaded
    batch = mixed_batch(processor)
    micro = Collator(policy, processor)(batch.sequences)
    at = 0
    for row, s in enumerate(batch.sequences):
        whole = np.concatenate([s.prompt_ids, s.response_ids])
        for offset, target in enumerate(s.response_ids):
            assert micro.rows[at] == row
            assert micro.columns[at] == len(s.prompt_ids) + offset - 1
            assert micro.tokens.ids[at] == target
            at += 1
        width = len(whole) - 1
        assert micro.inputs["input_ids"][row, :width].tolist() == whole[:-1].tolist()
        pad = processor.tokenizer.pad_token_id
        assert (micro.inputs["input_ids"][row, width:] == pad).all()
    assert at == len(micro.tokens.ids) == batch.response_tokens()
    assert micro.real_tokens == sum(len(s) - 1 for s in batch.sequences)


def test_an_image_of_a_whole_group_is_encoded_and_looked_at_once(loaded: Loaded) -> None:
    policy, processor = loaded
    one = sequence(processor, 0, (64, 64), 9)
    other = sequence(processor, 1, (64, 64), 9)
    collate = Collator(policy, processor)
    single = len(collate([one]).vision.inputs["pixel_values"])
    group = collate([one, other, one, one, other])
    assert len(group.vision.inputs["pixel_values"]) == 2 * single
    assert group.vision.images.tolist() == [0, 1, 0, 0, 1]


def test_images_encoded_together_are_those_encoded_alone(loaded: Loaded) -> None:
    policy, processor = loaded
    files = problem(0, *[(64, 64), (96, 64)] * 2).images
    together = Collator(policy, processor).encode_images(files)
    for file, found in zip(files, together, strict=True):
        (alone,) = Collator(policy, processor).encode_images([file])
        assert found.placeholders == alone.placeholders
        assert found.inputs.keys() == alone.inputs.keys()
        for name in alone.inputs:
            assert torch.equal(found.inputs[name], alone.inputs[name])


def test_an_image_that_does_not_fit_its_prompt_is_named(loaded: Loaded) -> None:
    policy, processor = loaded
    collate = Collator(policy, processor)
    good = sequence(processor, 0, (64, 64), 9)
    lost = replace(good, images=())
    with pytest.raises(ValueError, match=r"sequence 1: 16 image placeholders .* but 0 visual"):
        collate([good, lost])
    blind = replace(good, prompt_ids=good.prompt_ids[good.prompt_ids != placeholder(processor)])
    with pytest.raises(ValueError, match=r"sequence 0: 0 image placeholders .* but 16 visual"):
        collate([blind])
    middle = replace(good, response_ids=np.full(9, placeholder(processor), np.int32))
    with pytest.raises(ValueError, match=r"sequence 0: 24 image placeholders"):
        collate([middle])
    two = sequence(processor, 1, [(64, 64), (96, 64)], 9)
    swapped = replace(two, images=two.images[::-1])
    if len({encoded.placeholders for encoded in collate.encode_images(two.images)}) > 1:
        with pytest.raises(ValueError, match=r"sequence 0: .*or runs of them that end after"):
            collate([swapped])
    with pytest.raises(DataError, match="training image"):
        collate([replace(good, images=(b"not an image",))])


def test_a_response_of_no_tokens_is_no_trouble(loaded: Loaded) -> None:
    policy, processor = loaded
    good = sequence(processor, 0, (64, 64), 9)
    empty = sequence(processor, 1, (64, 64), 0)
    with torch.no_grad():
        alone, _ = policy.eval().run(Collator(policy, processor)([good]))
        both, _ = policy.eval().run(Collator(policy, processor)([empty, good]))
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-5)
