"""Pictures of Sudoku grids."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Lines = Literal["solid", "dashed", "boxes"]

RANDOM = "random"
"""The colour that is drawn anew for every picture."""


@dataclass(frozen=True)
class Look:
    """How a picture is drawn, all sizes in pixels.

    Attributes:
        cell_size: side of a cell.
        font_size: of the digits.
        margin: around the grid.
        jitter: a digit is shifted by up to this much, each way.
        rotation: a digit is turned by up to so many degrees, either way.
        noise: standard deviation of Gaussian noise, in grey levels of 0 to 255.
        contrast: 1 as drawn, towards 0 faded into the paper.
        ink, paper: `#rrggbb` or `RANDOM`.
        lines: all, all dashed, or those around boxes only.
    """

    cell_size: int
    font_size: int
    margin: int
    jitter: int
    rotation: float
    noise: float
    contrast: float
    ink: str
    paper: str
    lines: Lines

    def side(self, size: int) -> int:
        """Width and height of the picture of a grid of that size."""
        return size * self.cell_size + 2 * self.margin


def render(puzzle: Sequence[Sequence[int]], look: Look, rng: np.random.Generator) -> bytes:
    """A PNG of the puzzle, RGB, `look.side(len(puzzle))` pixels square."""
    ink, paper = _colours(look, rng)
    size = len(puzzle)
    side = look.side(size)
    coverage = _line_coverage(size, look.cell_size, look.margin, look.lines).copy()
    for r, c in product(range(size), repeat=2):
        if not puzzle[r][c]:
            continue
        glyph = _glyph(puzzle[r][c], look.font_size)
        if look.rotation:
            angle = float(rng.uniform(-look.rotation, look.rotation))
            glyph = _turned(glyph, angle)
        shift = rng.integers(-look.jitter, look.jitter + 1, size=2) if look.jitter else (0, 0)
        top = look.margin + r * look.cell_size + (look.cell_size - glyph.shape[0] + 1) // 2
        left = look.margin + c * look.cell_size + (look.cell_size - glyph.shape[1] + 1) // 2
        _draw(coverage, glyph, top + int(shift[0]), left + int(shift[1]))
    # [side, side, 1] * [3]
    pixels = paper + (look.contrast / 255.0) * coverage[:, :, None] * (ink - paper)
    if look.noise:
        pixels = pixels + look.noise * rng.standard_normal((side, side, 3), dtype=np.float32)
    rgb = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    # Noise does not compress; trying hard would take longer than all the rest.
    Image.fromarray(rgb).save(file, format="PNG", compress_level=1 if look.noise else 6)
    return file.getvalue()


def _colours(look: Look, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(ink, paper), float32 [3] in 0..255; random ones are far enough apart to be read."""

    def draw(colour: str) -> np.ndarray:
        if colour == RANDOM:
            return rng.integers(256, size=3).astype(np.float32)
        return np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)], dtype=np.float32)

    brightness = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    for _ in range(64):
        ink, paper = draw(look.ink), draw(look.paper)
        if RANDOM not in (look.ink, look.paper) or abs(brightness @ (ink - paper)) >= 96:
            return ink, paper
    # One colour is fixed near middle grey: black or white is the farthest from it.
    fixed = paper if look.ink == RANDOM else ink
    other = np.full(3, 0.0 if brightness @ fixed > 127 else 255.0, dtype=np.float32)
    return (other, paper) if look.ink == RANDOM else (ink, other)


@lru_cache(maxsize=16)
def _line_coverage(size: int, cell_size: int, margin: int, lines: str) -> np.ndarray:
    """float32 [side, side]: how much ink (0..255) the grid's lines leave on each pixel."""
    width = size * cell_size
    step = {4: 2, 9: 3}[size]
    thin, thick = max(1, cell_size // 40), max(1, cell_size // 16)
    grid = np.zeros((width, width), dtype=np.float32)
    along = np.ones(width, dtype=np.float32)
    if lines == "dashed":
        along = (np.arange(width) // max(2, cell_size // 8) % 2 == 0).astype(np.float32)
    for k in range(size + 1):
        is_box = k % step == 0
        if lines == "boxes" and not is_box:
            continue
        line, ink = (thick, 255.0) if is_box else (thin, 110.0)
        start = min(max(k * cell_size - line // 2, 0), width - line)
        for view in (grid, grid.T):
            band = view[start : start + line]
            np.maximum(band, ink * along, out=band)
    return np.pad(grid, margin)


@lru_cache(maxsize=512)
def _glyph(digit: int, font_size: int) -> np.ndarray:
    """float32 [h, w]: a digit's ink coverage (0..255), cut to its bounds."""
    font = _font(font_size)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(str(digit)))
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), str(digit), fill=255, font=font)
    return np.asarray(image, dtype=np.float32)


@lru_cache(maxsize=64)
def _font(font_size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=font_size)


def _turned(glyph: np.ndarray, degrees: float) -> np.ndarray:
    image = Image.fromarray(glyph.astype(np.uint8))
    turned = image.rotate(degrees, resample=Image.Resampling.BICUBIC, expand=True)
    return np.asarray(turned, dtype=np.float32)


def _draw(coverage: np.ndarray, glyph: np.ndarray, top: int, left: int) -> None:
    """Lay a glyph over the coverage in place, cut at the image's edges."""
    height, width = coverage.shape
    top_in, left_in = max(top, 0), max(left, 0)
    bottom_in = min(top + glyph.shape[0], height)
    right_in = min(left + glyph.shape[1], width)
    target = coverage[top_in:bottom_in, left_in:right_in]
    inside = glyph[top_in - top : bottom_in - top, left_in - left : right_in - left]
    np.maximum(target, inside, out=target)
