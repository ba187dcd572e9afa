"""Pictures of scenes."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from tasks.drawing import to_png
from tasks.scenes_knobs import ScenesSpec
from tasks.scenes_puzzle import Scene
from tasks.scenes_things import drawn

PAPER = (255, 255, 255)
LINE = (214, 214, 214)


def render(scene: Scene, look: ScenesSpec, rng: np.random.Generator) -> bytes:
    """A PNG of the scene, RGB, `place_size` pixels a place."""
    side = look.place_size
    image = Image.new("RGB", (side * look.columns, side * look.rows), PAPER)
    if look.lines:
        pen = ImageDraw.Draw(image)
        for x in range(side, image.width, side):
            pen.line((x, 0, x, image.height), LINE)
        for y in range(side, image.height, side):
            pen.line((0, y, image.width, y), LINE)
    for r, row in enumerate(scene):
        for c, (n, kind) in enumerate(row):
            if n:
                _fill(image, kind, n, (c * side, r * side), look, rng)
    if look.contrast < 1:
        image = Image.blend(Image.new("RGB", image.size, PAPER), image, look.contrast)
    if not look.noise:
        return to_png(image)
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels + look.noise * rng.standard_normal(pixels.shape, dtype=np.float32)
    # Noise does not compress; trying hard would take longer than all the rest.
    return to_png(
        Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)), compress_level=1
    )


def _fill(
    image: Image.Image, kind: str, n: int, corner: tuple[int, int], look: ScenesSpec,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Draw n things of a kind in a place, each in a room of its own, in random rooms."""
    across = int(np.ceil(np.sqrt(n)))
    side, room = look.place_size, look.place_size / across
    pixels = max(4, int(room * look.thing_size))
    chosen = np.sort(rng.permutation(across * across)[:n])
    for index in chosen:
        # With overlap the rooms move towards the middle of the place.
        middle = [((at + 0.5) * room - side / 2) * (1 - look.overlap) + side / 2
                  for at in (index % across, index // across)]  # fmt: skip
        drawing = drawn(kind, pixels)
        if look.turn:
            degrees = float(rng.uniform(-look.turn, look.turn))
            drawing = drawing.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
            drawing.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
        # Without overlap there is a gap between any two.
        slack = max(0.0, (room - pixels) / 2 - 1) * (1 - look.overlap)
        left, top = (
            round(start + centre - length / 2 + rng.uniform(-slack, slack))
            for start, centre, length in zip(corner, middle, drawing.size, strict=True)
        )
        image.paste(drawing, (left, top), drawing)
