"""Placeholders: text and images in their order, nothing lost, mismatches named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core import DataError
from tasks.placeholders import as_shown, placed, text_alone

A, B, C = b"a", b"b", b"c"


@pytest.mark.parametrize(
    ("prompt", "images", "parts"),
    [
        ("Solve.", (), ["Solve."]),
        ("Solve.", (A,), [A, "Solve."]),
        ("Solve.", (A, B), [A, B, "Solve."]),
        ("", (A,), [A]),
        ("<image>\nSolve.", (A,), [A, "\nSolve."]),
        ("Is <image> in <image>?", (A, B), ["Is ", A, " in ", B, "?"]),
        ("<image_2><image_1> of <image_3>", (A, B, C), [B, A, " of ", C]),
        ("<image_1>", (A,), [A]),
        # A model's own token, or what is no placeholder of ours, is text.
        ("<|image_pad|><IMAGE><image_>", (A,), [A, "<|image_pad|><IMAGE><image_>"]),
        ("<image_12345>", (A,), [A, "<image_12345>"]),
    ],
)
def test_by_hand(prompt: str, images: tuple[bytes, ...], parts: list[str | bytes]) -> None:
    assert placed(prompt, images) == parts
    assert as_shown(prompt, images) == tuple(part for part in parts if isinstance(part, bytes))
    (text,) = text_alone(parts)
    assert text == "".join(part for part in parts if isinstance(part, str))


@pytest.mark.parametrize(
    ("prompt", "images", "says"),
    [
        ("<image>", (), "the placeholder <image> for 0 images"),
        ("<image>", (A, B), "the placeholder <image> for 2 images"),
        ("<image> <image>", (A,), "the placeholders <image>, <image> for 1 image;"),
        ("<image_1> <image_1>", (A, B), "<image_1>, <image_1> for 2 images"),
        ("<image_0>", (A,), "<image_0> for 1 image;"),
        ("<image_2>", (A,), "<image_2> for 1 image;"),
        ("<image_1> <image>", (A, B), "<image_1>, <image> for 2 images"),
        ("<image>" * 900, (A,), "<image>, <image>, ... for 1 image;"),
    ],
)
def test_a_mismatch_is_named(prompt: str, images: tuple[bytes, ...], says: str) -> None:
    with pytest.raises(DataError) as refusal:
        placed(prompt, images)
    assert says in str(refusal.value) and len(str(refusal.value)) < 300


@given(texts=st.lists(st.text(max_size=9), min_size=2, max_size=6), numbered=st.booleans())
def test_every_character_and_every_image_is_there_once(texts: list[str], numbered: bool) -> None:
    texts = [text.replace("<image", "") for text in texts]
    images = tuple(range(len(texts) - 1))
    names = [f"<image_{n + 1}>" if numbered else "<image>" for n in images]
    prompt = texts[0] + "".join(name + text for name, text in zip(names, texts[1:], strict=True))
    parts = placed(prompt, images)
    assert as_shown(prompt, images) == images
    assert text_alone(parts) == ["".join(texts)]
    assert "".join(p if isinstance(p, str) else names[p] for p in parts) == prompt
