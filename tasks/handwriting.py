"""Real handwritten digits: 1,797 images of 8x8 (UCI; Alpaydin and Kaynak 1998; CC BY 4.0).

`digits.csv.gz` is the file that scikit-learn ships: rows of 64 cells and a label.

The set has no writer ids. Its labels repeat one order of about 130 digits, the form that each
person filled in: 14 runs, each of one hand. Its documentation says 13 people, so one of them
filled in two forms; which two is not known. Whole runs are held out, so no image is on both sides
of a split, and no person, unless that one is: the pairs of runs whose digits look most alike are
kept on one side, which makes it less likely and does not rule it out.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from tasks.splits import Split

RUNS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667, 1797)
"""Where each run begins, and the end: where the order of labels begins again."""
TEST_RUNS = (7, 11, 12)
"""About a fifth: 375 images."""
FULL = 16
"""Ink of an 8x8 cell that is all black."""


def indices(split: Split, digit: int) -> np.ndarray:
    """int64 [N]: which images of a digit are on a side."""
    return _indices(split)[digit]


@lru_cache(maxsize=4096)
def glyph(index: int, size: int) -> np.ndarray:
    """float32 [h, w]: an image's ink coverage (0..255), `size` pixels square before it is cut."""
    cells = digits()[0][index]
    image = Image.fromarray(np.rint(cells * (255.0 / FULL)).astype(np.uint8))
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    rows, columns = (np.flatnonzero(pixels.max(axis) > FULL) for axis in (1, 0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@lru_cache(maxsize=1)
def digits() -> tuple[np.ndarray, np.ndarray]:
    """(images float64 [1797, 8, 8] in 0..16, labels int64 [1797])."""
    rows = np.loadtxt(Path(__file__).with_name("digits.csv.gz"), delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)


@lru_cache(maxsize=2)
def _indices(split: Split) -> list[np.ndarray]:
    labels = digits()[1]
    runs = np.searchsorted(RUNS, np.arange(len(labels)), side="right") - 1
    held_out = np.isin(runs, TEST_RUNS)
    side = held_out if split == "test" else ~held_out
    return [np.flatnonzero(side & (labels == digit)) for digit in range(10)]
