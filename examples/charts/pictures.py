"""The pictures of `make.py`: 64 pixels square, few colours, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

SIDE = 64
CELL = 16
CELLS = SIDE // CELL
COLOURS = {"red": "#d03030", "green": "#30a030", "blue": "#3050d0", "yellow": "#e0b020"}

Scene = dict[tuple[int, int], tuple[str, str]]
"""(row, column) of a cell -> (colour, "disc" or "square")."""


def painted(objects: Scene) -> bytes:
    """Discs and squares in their cells."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(image)
    for (r, c), (colour, shape) in objects.items():
        corners = (c * CELL + 2, r * CELL + 2, (c + 1) * CELL - 3, (r + 1) * CELL - 3)
        (pen.ellipse if shape == "disc" else pen.rectangle)(corners, fill=COLOURS[colour])
    return png(image)


def digits(cells: np.ndarray) -> bytes:
    """A table of digits, [CELLS, CELLS]."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(image)
    for n in range(1, CELLS):
        pen.line((n * CELL, 0, n * CELL, SIDE), fill="#909090")
        pen.line((0, n * CELL, SIDE, n * CELL), fill="#909090")
    for (r, c), digit in np.ndenumerate(cells):
        centre = ((c + 0.5) * CELL, (r + 0.5) * CELL)
        pen.text(centre, str(digit), fill="black", font=font(), anchor="mm")
    return png(image)


def sketched(a: int, b: int, triangle: bool, colour: str) -> bytes:
    """A figure `a` wide and `b` high, five pixels a unit, the numbers below and to the left."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen = ImageDraw.Draw(image)
    left, bottom = 15, SIDE - 16
    right, top = left + 5 * a, bottom - 5 * b
    corners = [(left, bottom), (right, bottom), (right, top), (left, top)]
    if triangle:
        del corners[2]
    pen.polygon(corners, outline="black", fill=COLOURS[colour])
    pen.text(((left + right) / 2, bottom + 8), str(a), fill="black", font=font(), anchor="mm")
    pen.text((left - 8, (top + bottom) / 2), str(b), fill="black", font=font(), anchor="mm")
    return png(image)


def plotted(add: Callable[..., object], width: tuple[float, float] | None) -> bytes:
    """A Matplotlib chart whose axes fill the picture; the height is 10 where it has axes."""
    figure = Figure(figsize=(SIDE / 100, SIDE / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.axis("off")  # drawing its ticks would take longer than all the rest
    add(axes)
    if width is not None:
        axes.hlines(range(2, 10, 2), *width, color="#c8c8c8", linewidth=0.5, zorder=0)
        axes.set(xlim=width, ylim=(0, 10))
    canvas.draw()
    return png(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]))


@cache
def font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own."""
    return ImageFont.load_default(size=12)


def png(image: Image.Image) -> bytes:
    """The file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
