"""Pictures of Sudoku grids."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

from tasks import handwriting
from tasks.drawing import RANDOM, font, rgb, to_png
from tasks.splits import Split
from tasks.sudoku_knobs import SudokuSpec
from tasks.sudoku_puzzle import Grid


def render(puzzle: Grid, look: SudokuSpec, rng: np.random.Generator, split: Split) -> bytes:
    """A PNG of the puzzle, RGB, `look.side` pixels square; handwriting is of the split's people."""
    ink, paper = _colours(look, rng)
    coverage = _line_coverage(look.size, look.cell, look.border, look.lines).copy()
    for r, c in product(range(look.size), repeat=2):
        if not puzzle[r][c]:
            continue
        if look.glyphs == "handwritten":
            glyph = handwriting.glyph(
                int(rng.choice(handwriting.indices(split, puzzle[r][c]))), look.font_size
            )
        else:
            glyph = _glyph(puzzle[r][c], look.font_size)
        if look.rotation:
            glyph = _turned(glyph, float(rng.uniform(-look.rotation, look.rotation)))
        shift = rng.integers(-look.jitter, look.jitter + 1, size=2) if look.jitter else (0, 0)
        top = look.border + r * look.cell + (look.cell - glyph.shape[0] + 1) // 2
        left = look.border + c * look.cell + (look.cell - glyph.shape[1] + 1) // 2
        _draw(coverage, glyph, top + int(shift[0]), left + int(shift[1]))
    # [side, side, 1] * [3]
    pixels = paper + (look.contrast / 255.0) * coverage[:, :, None] * (ink - paper)
    if look.noise:
        pixels = pixels + look.noise * rng.standard_normal(pixels.shape, dtype=np.float32)
    # Noise does not compress; trying hard would take longer than all the rest.
    image = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    return to_png(image, compress_level=1 if look.noise else 6)


def _colours(look: SudokuSpec, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(ink, paper), float32 [3] in 0..255; random ones are far enough apart to be read."""

    def draw(colour: str) -> np.ndarray:
        if colour == RANDOM:
            return rng.integers(256, size=3).astype(np.float32)
        return np.array(rgb(colour), dtype=np.float32)

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
    left, top, right, bottom = (int(edge) for edge in font(font_size).getbbox(str(digit)))
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), str(digit), fill=255, font=font(font_size))
    return np.asarray(image, dtype=np.float32)


def _turned(glyph: np.ndarray, degrees: float) -> np.ndarray:
    image = Image.fromarray(glyph.astype(np.uint8))
    turned = image.rotate(degrees, resample=Image.Resampling.BICUBIC, expand=True)
    return np.asarray(turned, dtype=np.float32)


def _draw(coverage: np.ndarray, glyph: np.ndarray, top: int, left: int) -> None:
    """Lay a glyph over the coverage in place, cut at the image's edges."""
    first_row, first_column = max(-top, 0), max(-left, 0)
    target = coverage[max(top, 0) :, max(left, 0) :]
    inside = glyph[first_row:, first_column:][: target.shape[0], : target.shape[1]]
    target = target[: inside.shape[0], : inside.shape[1]]
    np.maximum(target, inside, out=target)
