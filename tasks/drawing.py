"""What pictures of both built-in tasks are made of: colours, fonts, random streams, PNG files."""

from __future__ import annotations

import io
import re
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
from PIL import Image, ImageFont
from pydantic import BeforeValidator

RGB = tuple[int, int, int]

RANDOM = "random"
"""The colour that is drawn anew for every picture."""


def _as_hex(value: Any) -> Any:
    if isinstance(value, list | tuple):
        if len(value) != 3 or not all(type(c) is int and 0 <= c <= 255 for c in value):
            raise ValueError("a colour needs three whole numbers from 0 to 255")
        return "#" + "".join(f"{c:02x}" for c in value)
    if isinstance(value, str) and value != RANDOM:
        value = value.lower()
        if re.fullmatch(r"#[0-9a-f]{6}", value) is None:
            raise ValueError('a colour is "#rrggbb", three numbers from 0 to 255, or "random"')
    return value


Colour = Annotated[str, BeforeValidator(_as_hex)]
"""`#rrggbb`, three ints, or `RANDOM`."""


def rgb(colour: str) -> RGB:
    """Of `#rrggbb`."""
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue


def contrast_ratio(one: RGB, other: RGB) -> float:
    """From 1 (the same) to 21 (black on white); WCAG 2.1, relative luminance."""
    brighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def _luminance(colour: RGB) -> float:
    linear = [
        c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4
        for c in colour
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def streams(rng: np.random.Generator, count: int) -> list[np.random.Generator]:
    """Generators that do not depend on how much is drawn from one another."""
    return [np.random.default_rng(int(seed)) for seed in rng.integers(2**63, size=count)]


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size=size)


def to_png(image: Image.Image, **options: Any) -> bytes:
    """The image as a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG", **options)
    return file.getvalue()
