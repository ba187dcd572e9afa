"""`detail`: the whole picture, made smaller, is too coarse to read; looks show what is there."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from tasks.core import Problem
from tasks.environments import load_environment
from tasks.graph_knobs import GraphColoringSpec
from tasks.images import check_image
from tasks.looking import read_call
from tasks.sudoku_knobs import SudokuSpec
from tasks.sudoku_render import render
from tests.support.puzzles import GRAPHS, draw
from tests.support.puzzles import SUDOKU as TASK

LOOK: dict[str, Any] = {"size": 4, "blanks": 8, "cell_size": 8, "font_size": 7, "margin": 0}
"""Without `detail` the picture is 32 pixels wide: what a policy of max_pixels = 1024 reads."""
BASE = 32


def looked_at(problem: Problem, side: int = BASE) -> list[np.ndarray]:
    """float [h, w, 3] of what the teacher's calls show, in order."""
    zoom = load_environment("zoom", {"side": side})
    zoom.reset(problem, np.random.default_rng(0))
    shown = [zoom.step(call).images for call in TASK.calls(problem)]
    return [np.asarray(check_image(image, "crop"), float) for (image,) in shown]


def reduced(image: bytes, side: int = BASE) -> np.ndarray:
    """float [side, side, 3]: the whole picture as the policy reads it."""
    picture = check_image(image, "picture").resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(picture, float)


def cells(picture: np.ndarray, count: int) -> np.ndarray:
    """float [count * count, n]: a square picture cut into cells in reading order."""
    size = len(picture) // count
    parts = picture.reshape(count, size, count, size, 3).swapaxes(1, 2)
    return parts.reshape(count * count, -1)


def joined(boxes: list[np.ndarray]) -> np.ndarray:
    """Four boxes as the picture they were cut from."""
    one, two, three, four = boxes
    return np.vstack([np.hstack([one, two]), np.hstack([three, four])])


def drawn_by_digit(knobs: dict[str, Any]) -> list[bytes]:
    """Pictures whose cells all hold the same digit; the first is blank."""
    spec, rng = SudokuSpec(**knobs), np.random.default_rng(0)
    return [render(((digit,) * 4,) * 4, spec, rng, "train") for digit in range(5)]


def test_looks_show_the_picture_pixel_by_pixel_and_nothing_twice() -> None:
    for seed, noise in product(range(3), (0.0, 60.0)):
        problem = draw(TASK, seed, **LOOK, detail=2, noise=noise)
        whole = np.asarray(check_image(problem.images[0], "picture"), float)
        assert (joined(looked_at(problem)) == whole).all() and whole.shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("size", "detail", "margin"), [(4, 1, 0), (4, 2, 3), (4, 3, 0), (4, 4, 5), (9, 2, 6), (9, 3, 0)]
)
def test_every_cell_is_in_one_look_of_a_share_of_the_side(
    size: int, detail: int, margin: int
) -> None:
    knobs = {"size": size, "detail": detail, "margin": margin, "cell_size": 20, "font_size": 12}
    problem = draw(TASK, 1, **knobs)
    spec, calls = SudokuSpec(**knobs), TASK.calls(problem)
    boxes = [read_call(call, "look", 1, (4,)) for call in calls]
    assert bool(boxes) == (detail > 1) and len(set(calls)) == len(calls)
    found = np.zeros((size, size), int)
    for box in boxes:
        assert not isinstance(box, str) and box is not None
        x0, y0, x1, y1 = (n * spec.side / 1000 for n in box.numbers)
        # To a thousandth of the side, no more than what is shown whole without being made smaller.
        assert max(x1 - x0, y1 - y0) <= spec.side / detail + spec.side / 1000
        edge = np.arange(size) * spec.cell + spec.border
        inside = [
            (edge >= start - 1.5) & (edge + spec.cell <= end + 1.5)
            for start, end in ((y0, y1), (x0, x1))
        ]
        found += np.outer(*inside)
    assert (found == (1 if detail > 1 else 0)).all()


def test_digits_that_a_look_tells_apart_are_alike_in_the_whole_picture() -> None:
    """How far apart two digits are, in units of what noise of one grey level a channel does."""
    fine = drawn_by_digit(LOOK | {"detail": 2})
    plain = drawn_by_digit(LOOK | {"cell_size": 16})
    near = [cells(np.asarray(check_image(i, "picture"), float), 4)[5] for i in fine]
    # The digits of a look are those of a plain picture with cells of the same pixels.
    same = [cells(np.asarray(check_image(i, "picture"), float), 4)[5] for i in plain]
    assert all((one == other).all() for one, other in zip(near, same, strict=True))
    noise = np.random.default_rng(0).normal(128, 20, (256, 256, 3)).clip(0, 255).astype(np.uint8)
    smaller = Image.fromarray(noise).resize((128, 128), Image.Resampling.BICUBIC)
    left = np.asarray(smaller, float).std() / noise.std()
    far = [cells(reduced(i), 4)[5] / left for i in fine]
    for one, other in ((a, b) for a in range(1, 5) for b in range(1, a)):
        apart = np.linalg.norm(far[one] - far[other]) / np.linalg.norm(near[one] - near[other])
        assert apart < 0.65
    closest = min(
        np.linalg.norm(far[a] - far[b]) / np.linalg.norm(near[a] - near[b])
        for a in range(1, 5)
        for b in range(1, a)
    )
    assert closest < 0.4


def test_who_knows_every_digit_reads_the_noisy_grid_by_looks_alone() -> None:
    """The reader of the guide's table: the digit nearest to a cell, as noise leaves it on average.

    No reader of noisy pictures does better, so what it misses is not to be seen there.
    """
    knobs = LOOK | {"detail": 2, "noise": 80.0}
    noise = 80 * np.random.default_rng(1).standard_normal(4000)
    mean = np.array([np.clip(np.rint(v + noise), 0, 255).mean() for v in range(256)])
    known: dict[str, list[np.ndarray]] = {"whole": [], "looks": []}
    for image in drawn_by_digit(LOOK | {"detail": 2}):
        clean = np.asarray(check_image(image, "picture"))
        faint = Image.fromarray(np.rint(mean[clean]).astype(np.uint8))
        smaller = faint.resize((BASE, BASE), Image.Resampling.BICUBIC)
        known["looks"].append(cells(np.asarray(faint, float), 4))
        known["whole"].append(cells(np.asarray(smaller, float), 4))
    right = {"whole": 0, "looks": 0}
    for seed in range(60):
        problem = draw(TASK, seed, **knobs)
        truth = np.ravel(problem.truth["puzzle"])
        views = {"whole": reduced(problem.images[0]), "looks": joined(looked_at(problem))}
        for name, view in views.items():
            apart = [((cells(view, 4) - digit) ** 2).sum(1) for digit in known[name]]
            right[name] += bool((np.argmin(apart, axis=0) == truth).all())
    assert right["looks"] >= 55 and right["whole"] <= 25


PLAIN: dict[str, Any] = {"vertices": 5, "canvas": 96}


@pytest.mark.parametrize("layout", ["circle", "spring", "random"])
@pytest.mark.parametrize("detail", [2, 3])
def test_a_graph_is_spread_and_its_vertices_and_labels_are_not(layout: str, detail: int) -> None:
    knobs = PLAIN | {"layout": layout}
    plain, fine = (draw(GRAPHS, 3, **knobs, detail=d) for d in (1, detail))
    assert plain.truth == fine.truth and plain.perception == fine.perception
    small, large = (check_image(one.images[0], "picture") for one in (plain, fine))
    assert small.size == (96, 96) and large.size == (96 * detail, 96 * detail)
    # As many pixels of the vertices' own colour, which labels and outlines leave.
    filled = [
        (np.abs(np.asarray(one, int) - (255, 227, 154)).max(axis=-1) < 3).sum()
        for one in (small, large)
    ]
    assert filled[0] > 100 and abs(filled[1] - filled[0]) < 0.25 * filled[0]
    assert GRAPHS.calls(plain) == ()  # type: ignore[attr-defined]


@pytest.mark.parametrize("detail", [2, 4])
def test_a_graphs_looks_show_every_pixel_once(detail: int) -> None:
    problem = draw(GRAPHS, 1, **PLAIN, detail=detail)
    zoom = load_environment("zoom", {"side": 96})
    zoom.reset(problem, np.random.default_rng(0))
    calls = GRAPHS.calls(problem)  # type: ignore[attr-defined]
    answers = [zoom.step(call).images for call in calls]
    parts = [np.asarray(check_image(image, "crop"), int) for (image,) in answers]
    rows = [np.hstack(parts[k : k + detail]) for k in range(0, len(parts), detail)]
    whole = np.asarray(check_image(problem.images[0], "picture"), int)
    assert len(parts) == detail**2 and (np.vstack(rows) == whole).all()


def test_a_graph_that_detail_makes_too_large_is_refused() -> None:
    with pytest.raises(ValidationError, match="detail: the image would be 2688 px wide"):
        GraphColoringSpec(detail=6)
