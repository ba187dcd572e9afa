"""Tiny policies: the same from the same seed, with tags that stay text."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.tiny import make_tiny
from rollout.decoding import Decoder, encode, special_tokens
from rollout.tokens import Chat, label_segments
from tasks.core import NO_SEGMENT, READ
from tests.support.samples import TASK, Loaded, problem

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def test_a_tiny_policy_is_the_same_from_the_same_seed(
    family: Any, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    sizes = make_tiny(family, tmp_path / "again", seed=0)
    assert digests(tmp_path / "again") == digests(tiny_models[family])
    assert 3e5 < sizes["parameters"] < 3e6
    assert 0 < sizes["vision_parameters"] < sizes["parameters"]


def test_another_seed_is_another_policy(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    make_tiny("internvl", tmp_path / "other", seed=1)
    weights = "model.safetensors"
    assert digests(tmp_path / "other")[weights] != digests(tiny_models["internvl"])[weights]


def test_an_unknown_family_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no family 'llama'; choose one of qwen3_vl, "):
        make_tiny("llama", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_tags_are_plain_text(loaded: Loaded) -> None:
    tokenizer, chat = loaded[1].tokenizer, Chat(loaded[1])
    response = TASK.demonstrate(problem(0), "verbose")
    ids = encode(tokenizer, response)
    assert tokenizer.decode(ids, skip_special_tokens=True) == response
    assert not set(ids) & set(special_tokens(tokenizer))
    assert chat.ends == {tokenizer.eos_token_id} and chat.end not in chat.placeholders
    assert chat.image_token in chat.placeholders


@given(text=TEXT)
@settings(max_examples=150)
def test_any_text_survives_the_way_to_tokens_and_back(loaded: Loaded, text: str) -> None:
    tokenizer = loaded[1].tokenizer
    ids = encode(tokenizer, text)
    found, offsets = Decoder(tokenizer).decode(ids)
    assert found == text
    assert offsets[0] == 0 and offsets[-1] == len(text)
    assert (np.diff(offsets) >= 0).all()


@given(
    text=TEXT, cuts=st.lists(st.integers(0, 60), min_size=6, max_size=6), shift=st.integers(0, 9)
)
def test_a_tokens_segment_is_that_of_its_first_character(
    loaded: Loaded, text: str, cuts: list[int], shift: int
) -> None:
    tokenizer = loaded[1].tokenizer
    cuts = sorted(cuts)
    spans = {s: (cuts[2 * i], cuts[2 * i + 1]) for i, s in enumerate(READ)}
    of_character = np.full(len(text) + shift + 61, NO_SEGMENT)
    for index, segment in enumerate(READ):
        of_character[spans[segment][0] : spans[segment][1]] = index
    _, offsets = Decoder(tokenizer).decode(encode(tokenizer, text))
    found = label_segments(offsets, spans, shift)
    assert found.tolist() == [of_character[start + shift] for start in offsets[:-1]]
