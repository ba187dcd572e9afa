"""Episodes as tokens: the two lists of ids and the list of images never drift, whatever is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rollout.episode import Budgets, Episode, drift
from rollout.tokens import Chat, load_processor
from tasks.core import ENVIRONMENT
from tasks.drawing import to_png
from tasks.environments import DONE, Observation

_CHATS: dict[str, Chat] = {}


@pytest.fixture(scope="module", params=["qwen3_vl", "internvl", "qwen2_5_vl", "idefics3"])
def chat(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Chat:
    return Chat(load_processor(str(tiny_models[request.param])))


SIZES = st.tuples(st.integers(1, 1500), st.integers(1, 40)) | st.tuples(
    st.integers(20, 120), st.integers(20, 120)
)
TEXTS = st.lists(
    st.sampled_from(
        [
            "a",
            "<look>",
            "</look>",
            "<|im_end|>",
            "<image>",
            "<|image_pad|>",
            "\n",
            "é",
            "<IMG_CONTEXT>",
        ]
    ),
    max_size=5,
).map("".join)
TURNS = st.lists(
    st.tuples(st.lists(st.integers(300, 600), max_size=6), TEXTS, st.lists(SIZES, max_size=2)),
    min_size=1,
    max_size=5,
)
BUDGETS = st.builds(
    Budgets,
    turns=st.integers(1, 4),
    tokens=st.integers(1, 24),
    images=st.integers(0, 4),
    image_tokens=st.sampled_from([0, 16, 40, 200, 10_000]),
    context=st.sampled_from([40, 80, 150, 300, 10_000]),
    seconds=st.just(1e9),
)


def png(size: tuple[int, int]) -> bytes:
    return to_png(Image.new("RGB", size, (9, 9, 9)))


@given(turns=TURNS, budgets=BUDGETS, first=st.lists(SIZES, max_size=2))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_tokens_and_images_never_drift(
    chat: Chat,
    turns: list[tuple[list[int], str, list[tuple[int, int]]]],
    budgets: Budgets,
    first: list[tuple[int, int]],
) -> None:
    try:
        images = [png(size) for size in first]
        asked = chat.prompt([*images, "What?"])
        prompt = chat.expanded(asked, first)
    except ValueError:  # of the processor: an image too long for its width
        return
    episode = Episode(chat, budgets, asked, len(prompt), images)
    sizes, wrote = list(first), list[int]()
    for said, text, shown in turns:
        ids = [*said, chat.end][: episode.room]
        if not ids:
            break
        before = (list(episode.ids), list(episode.images), list(episode.asked))
        words = episode.said(ids, [-1.0] * len(ids), [3] * len(ids))
        wrote += ids
        assert words == chat.decoder.decode([i for i in ids if i not in chat.ends])[0]
        if episode.end:
            assert episode.end == "length" and ids[-1] != chat.end
            break
        try:
            episode.told(Observation(text, tuple(map(png, shown))))
        except ValueError:
            break
        if episode.end:  # nothing of what did not fit was added
            assert episode.ids == before[0] + ids and episode.images == before[1]
            assert episode.asked == before[2] + ids
            break
        sizes += shown
        assert episode.room >= 1
    # One list of images, the tokens of each as its size asks; both lists of ids say the same.
    assert drift(chat, prompt, [*episode.ids, chat.end], sizes) == ""
    assert len(episode.images) == len(sizes)
    assert chat.expanded(episode.asked, sizes) == [*prompt, *episode.ids]
    assert len(prompt) + len(episode.ids) <= max(budgets.context, len(prompt))
    assert len(wrote) <= budgets.tokens and len(episode.turns) <= budgets.turns
    assert len(sizes) - len(first) <= budgets.images
    visual = sum(i == chat.image_token for i in episode.ids)
    assert visual <= budgets.image_tokens
    assert len(sizes) - len(first) == sum(turn.images for turn in episode.turns)
    # What the policy wrote is there as it was sampled, and nothing else is of the policy.
    segments = episode.segments(np.zeros(len(wrote), np.int8))
    assert np.asarray(episode.ids, int)[segments != ENVIRONMENT].tolist() == wrote
    text, offsets, places = episode.read()
    assert text == "".join(
        chat.decoder.decode([i for i in turn if i != chat.end])[0] for turn in _turns(wrote, chat)
    )
    assert len(offsets) == len(places) + 1 == len(wrote) + 1 and offsets[-1] == len(text)
    assert (np.diff(offsets) >= 0).all()


def _turns(ids: list[int], chat: Chat) -> list[list[int]]:
    turns: list[list[int]] = [[]]
    for token in ids:
        turns[-1].append(token)
        if token == chat.end:
            turns.append([])
    return turns


def test_each_budget_has_its_name(chat: Chat) -> None:
    plain = {
        "turns": 3, "tokens": 50, "images": 2, "image_tokens": 500, "context": 2000, "seconds": 5.0
    }  # fmt: skip
    picture = Observation("look", (png((64, 64)),))

    def end_of(observation: Observation = picture, seconds: float = 0.0, **changed: int) -> object:
        asked = chat.prompt(["What?"])
        episode = Episode(chat, Budgets(**(plain | changed)), asked, len(asked), [])
        for _ in range(2):
            episode.said([300, chat.end], [-1.0] * 2, [0] * 2)
            episode.seconds += seconds
            episode.told(observation)
            if episode.end:
                break
        return episode.end

    assert end_of() is None
    assert end_of(DONE) == "stop"
    assert end_of(turns=2) == "turn_budget"
    assert end_of(images=1) == "image_budget"
    assert end_of(image_tokens=30) == "image_token_budget"
    assert end_of(tokens=4) == "length"
    assert end_of(context=60) == "context_budget"
    assert end_of(seconds=3.0) == "time_budget"


def test_a_drift_is_told(chat: Chat) -> None:
    ids = chat.expanded(chat.prompt([None, "a", None]), [(64, 64), (96, 96)])
    assert drift(chat, ids, [5], [(64, 64), (96, 96)]) == ""
    assert "of its" in drift(chat, ids, [5], [(64, 64), (96, 96), (64, 64)])
    assert "of no image" in drift(chat, ids, [5], [(64, 64)])
