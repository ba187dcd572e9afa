"""Looking again: calls are read strictly, crops are of the original, marks are where they say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.core import Problem
from tasks.drawing import to_png
from tasks.environments import DONE, load_environment
from tasks.images import check_image
from tasks.looking import SIDE, Call, read_call
from tests.support.samples import problem

RNG = np.random.default_rng(0)


def pictured(*sizes: tuple[int, int]) -> Problem:
    """A problem of pictures whose pixels say where they are: red across, green down."""
    pictures = []
    for width, height in sizes:
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        pixels = np.stack([x % 256, y % 256, 0 * x], axis=-1).astype(np.uint8)
        pictures.append(to_png(Image.fromarray(pixels)))
    prompt = "Look. " + "<image>" * len(sizes)
    return replace(problem(0), images=tuple(pictures), prompt=prompt)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("I see a cat.", None),
        ("a <look>0 10 1000 20</look>\n", Call(0, (0, 10, 1000, 20))),
        ("<look>\n 1 2\t3 4 </look>", Call(0, (1, 2, 3, 4))),
        ("<look>1 2 3 4", "unclosed_call"),
        ("1 2 3 4</look>", "unopened_call"),
        ("</look><look>1 2 3 4</look>", "unopened_call"),
        ("<look>1 2 3 4</look><look>1 2 3 4</look>", "several_calls"),
        ("<look><look>1 2 3 4</look>", "several_calls"),
        ("<look>1 2 3 4</look> so it is", "text_after_call"),
        ("<look>1, 2, 3, 4</look>", "bad_number"),
        ("<look>1 2 3 -4</look>", "bad_number"),
        ("<look>1 2 3 ٤</look>", "bad_number"),
        ("<look>1 2 3 4.5</look>", "bad_number"),
        ("<look></look>", "wrong_count"),
        ("<look>1 2 3</look>", "wrong_count"),
        ("<look>1 2 3 4 5</look>", "wrong_count"),
        ("<look>1 2 1001 4</look>", "out_of_range"),
        ("<look>5 2 5 4</look>", "empty_box"),
        ("<look>5 8 9 4</look>", "empty_box"),
    ],
)
def test_a_call_is_read_strictly(text: str, found: object) -> None:
    assert read_call(text, "look", 1, (4,)) == found
    zoom = load_environment("zoom")
    zoom.reset(pictured((90, 60)), RNG)
    told = zoom.step(text)
    if isinstance(found, str):
        assert told.defects == (found,) and not told.images and not told.done
        assert told.text.startswith("The call was not understood: ") and "\n" not in told.text
    else:
        assert (told is DONE) == (found is None) and bool(told.images) == (found is not None)


def test_of_several_pictures_a_call_says_which() -> None:
    assert read_call("<look>2 0 0 9 9</look>", "look", 2, (4,)) == Call(1, (0, 0, 9, 9))
    for number in (0, 3):
        assert read_call(f"<look>{number} 0 0 9 9</look>", "look", 2, (4,)) == "no_picture"
    assert read_call("<look>0 0 9 9</look>", "look", 2, (4,)) == "wrong_count"


@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    corners=st.tuples(*[st.integers(0, SIDE)] * 4),
    smallest=st.integers(1, 40),
    aspect=st.floats(1, 8),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_crop_is_of_the_original_and_holds_the_box(
    size: tuple[int, int], corners: tuple[int, int, int, int], smallest: int, aspect: float
) -> None:
    x0, x1 = sorted(corners[::2])
    y0, y1 = sorted(corners[1::2])
    if x0 == x1 or y0 == y1:
        return
    # So small a side that nothing is enlarged: the crop's own pixels say where they were.
    zoom = load_environment("zoom", {"smallest": smallest, "aspect": aspect, "side": smallest})
    zoom.reset(pictured(size), RNG)
    (image,) = zoom.step(f"<look>{x0} {y0} {x1} {y1}</look>").images
    crop = np.asarray(check_image(image, "crop"), int)
    height, width = crop.shape[:2]
    if min(size) >= smallest:
        (left, top, _), (right, bottom, _) = crop[0, 0], crop[-1, -1]
        assert ((right - left) % 256, (bottom - top) % 256) == (
            (width - 1) % 256,
            (height - 1) % 256,
        )
        for first, got, a, b, side in (
            (left, width, x0, x1, size[0]),
            (top, height, y0, y1, size[1]),
        ):
            if side <= 256:
                assert first >= 0 and first + got <= side
                assert first <= a * side / SIDE + 1 and first + got >= b * side / SIDE - 1
                assert got >= min(side, smallest)
    longest = max(width, height)
    assert min(width, height) >= min(*size, round(longest / aspect)) - 1


def test_a_crop_is_enlarged_and_a_mark_is_where_it_says() -> None:
    zoom = load_environment("zoom", {"side": 120})
    zoom.reset(pictured((90, 60)), RNG)
    (image,) = zoom.step("<look>0 0 500 500</look>").images
    assert check_image(image, "crop").size == (120, 80)
    mark = load_environment("mark", {"colour": "#0000ff", "width": 1})
    mark.reset(pictured((101, 51)), RNG)
    (image,) = mark.step("<mark>100 200 500 800</mark>").images
    blue = np.argwhere(np.asarray(check_image(image, "marked"))[..., 2] == 255)
    assert (blue.min(0).tolist(), blue.max(0).tolist()) == ([10, 10], [40, 50])
    (image,) = mark.step("<mark>500 500</mark>").images
    assert check_image(image, "marked").getpixel((50, 25)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("zom", {}, "no environment .zom.; the built-in ones are zoom, mark"),
        ("zoom", {"size": 3}, "args .*size"),
        ("zoom", {"smallest": 0}, "needs smallest >= 1"),
        ("mark", {"colour": "red"}, "needs a colour"),
        ("tasks.looking:Call", {"picture": 1, "numbers": ()}, "lacks reset or step"),
        ("tasks.looking:Nothing", {}, "has no .Nothing."),
    ],
)
def test_an_environment_that_cannot_be_made_is_named(
    name: str, args: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=f"environment.*{words}|{words}"):
        load_environment(name, args)
