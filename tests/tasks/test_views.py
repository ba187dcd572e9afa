"""Another view of an image: the same picture, moved nowhere, no larger, decided by its seed."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tasks.core import DataError
from tasks.drawing import to_png
from tasks.images import check_image
from tasks.views import COLOUR, MARGIN, SCALE, another_view

ALL = ("margin", "scale", "colour", "encode")


def picture(width: int = 120, height: int = 80) -> bytes:
    """A dark square in the upper left of a light ground, a mark in the lower right."""
    pixels = np.full((height, width, 3), 200, np.uint8)
    pixels[height // 8 : height // 2, width // 8 : width // 3] = (40, 60, 150)
    pixels[-height // 4 :, -width // 6 :] = (180, 40, 40)
    return to_png(Image.fromarray(pixels))


def pixels_of(data: bytes, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(check_image(data, "view").resize(size), np.float64)


@pytest.mark.parametrize("changes", [*((c,) for c in ALL), ALL])
def test_a_view_shows_the_same_in_the_same_place(changes: tuple) -> None:
    data = picture()
    before = pixels_of(data, (120, 80))
    for seed in range(20):
        view = another_view(data, seed, changes)
        assert view == another_view(data, seed, changes)
        assert view != data
        after = pixels_of(view, (120, 80))
        # Near the original, and much nearer than to anything mirrored or turned.
        far = [np.abs(after - other).mean() for other in (before[:, ::-1], before[::-1])]
        assert np.abs(after - before).mean() < 30 < 1.5 * min(far)
    assert len({another_view(data, seed, changes) for seed in range(20)}) > 10


def test_sizes_and_files() -> None:
    data = picture()
    for seed in range(50):
        width, height = check_image(another_view(data, seed, ("scale",)), "view").size
        assert SCALE[0] * 120 - 1 <= width <= SCALE[1] * 120 + 1
        assert width / height == pytest.approx(1.5, abs=0.05)
        width, height = check_image(another_view(data, seed, ("margin",)), "view").size
        assert (1 - 2 * MARGIN) * 120 <= width <= 120 and (1 - 2 * MARGIN) * 80 <= height <= 80
        # Each factor by itself leaves a light ground light.
        bright = pixels_of(another_view(data, seed, ("colour",)), (120, 80)).max()
        assert 200 * COLOUR[0] ** 2 - 2 <= bright <= 255
    formats = {c: Image.open(io.BytesIO(another_view(data, 0, (c,)))).format for c in ALL}
    assert formats == dict.fromkeys(ALL[:3], "PNG") | {"encode": "JPEG"}


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_images_of_a_pixel_or_two_have_views(size: tuple[int, int]) -> None:
    for seed in range(10):
        assert min(check_image(another_view(picture(*size), seed, ALL), "view").size) >= 1


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(DataError, match="image to view again"):
        another_view(b"nothing", 0, ALL)
