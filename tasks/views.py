"""Another view of an image: changed so that whoever reads it well reads the same.

Nothing here moves, mirrors or turns what is shown: a mirrored text or chart says something else.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance

from tasks.drawing import to_png
from tasks.images import check_image

Change = Literal["margin", "scale", "colour", "encode"]

MARGIN = 0.03
"""At most that share of a side is cut off at each end of it."""
SCALE = (0.8, 0.95)
COLOUR = (0.85, 1.15)
"""Factors of brightness and of contrast, each drawn by itself."""
QUALITY = (75, 95)
"""Of JPEG."""


def another_view(data: bytes, seed: int, changes: Sequence[Change]) -> bytes:
    """The image file, changed; what is drawn follows from `seed` alone.

    Args:
        data: the whole encoded file.
        seed: not negative.
        changes: made in the order of `Change`, each once. `margin`: up to `MARGIN` of each side is
            cut off, which takes what stands at the edge. `scale`: the sides times one factor of
            `SCALE`, so that no image takes more tokens than it did. `colour`: brightness and
            contrast times factors of `COLOUR`. `encode`: as JPEG of a quality in `QUALITY`.

    Returns:
        A JPEG file where `encode` is among the changes, else a PNG file.

    Raises:
        DataError: as `check_image`.
    """
    image = check_image(data, "image to view again")
    rng = np.random.default_rng(seed)
    width, height = image.size
    if "margin" in changes:
        left, right, top, bottom = rng.uniform(0, MARGIN, 4)
        image = image.crop(
            (
                int(left * width),
                int(top * height),
                width - int(right * width),
                height - int(bottom * height),
            )
        )
    if "scale" in changes:
        factor = rng.uniform(*SCALE)
        size = (max(1, round(factor * image.width)), max(1, round(factor * image.height)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    if "colour" in changes:
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(*COLOUR))
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(*COLOUR))
    if "encode" not in changes:
        return to_png(image)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(QUALITY[0], QUALITY[1] + 1)))
    return file.getvalue()
