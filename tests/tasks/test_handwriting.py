"""Sudoku in handwriting: real digits, exact `p*`, no image and no run of one hand on both sides."""

from __future__ import annotations

import io
from itertools import combinations, pairwise

import numpy as np
import pytest
from PIL import Image

from tasks import handwriting, sudoku_render
from tasks.handwriting import RUNS, TEST_RUNS, digits, indices
from tasks.load import load_task
from tasks.splits import SPLITS, Split, draw_problem, split_of

TASK = load_task("sudoku")
KNOBS = {"size": 4, "blanks": 8, "cell_size": 16, "font_size": 14, "margin": 0}
IMAGES, LABELS = digits()


def test_every_image_is_on_one_side_and_every_digit_on_both() -> None:
    sides = {split: [indices(split, digit) for digit in range(10)] for split in SPLITS}
    both = [set(np.concatenate(sides[split]).tolist()) for split in SPLITS]
    assert not both[0] & both[1] and both[0] | both[1] == set(range(len(LABELS)))
    for digit in range(10):
        assert len(sides["train"][digit]) > 100 and len(sides["test"][digit]) > 30
        assert {LABELS[i] for split in SPLITS for i in sides[split][digit]} == {digit}


def test_a_run_is_the_same_form_filled_in_once_and_never_split() -> None:
    form = LABELS[: RUNS[1]].tolist()
    for start, end in pairwise(RUNS):
        run = LABELS[start:end].tolist()
        assert len(form) - 8 <= len(run) <= len(form)
        held = [i for i in range(start, end) if i in {*indices("test", LABELS[i]).tolist()}]
        assert held in ([], list(range(start, end)))
        rest = iter(form)  # a few images are missing, none is out of order
        assert sum(digit not in rest for digit in run) <= 1


def test_runs_that_look_most_alike_are_on_one_side() -> None:
    pairs = list(pairwise(RUNS))
    means = np.array(
        [[IMAGES[a:b][LABELS[a:b] == digit].mean(0) for digit in range(10)] for a, b in pairs]
    )
    apart = {
        (i, j): np.linalg.norm(means[i] - means[j], axis=(1, 2)).mean()
        for i, j in combinations(range(len(pairs)), 2)
    }
    closest = sorted(apart, key=apart.__getitem__)[:5]
    assert all((i in TEST_RUNS) == (j in TEST_RUNS) for i, j in closest)


@pytest.mark.parametrize("split", SPLITS)
def test_a_problem_is_drawn_in_the_hands_of_its_own_split(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []

    def glyph(index: int, size: int) -> np.ndarray:
        shown.append(index)
        return drawn(index, size)

    drawn = handwriting.glyph
    monkeypatch.setattr(sudoku_render.handwriting, "glyph", glyph)
    spec = TASK.spec(**KNOBS, glyphs="handwritten")
    for index in range(12):
        shown.clear()
        problem = draw_problem(TASK, spec, split, 3, index)
        assert split_of(problem) == split
        clues = [cell for row in problem.truth["puzzle"] for cell in row if cell]
        assert [LABELS[i] for i in shown] == clues
        assert all(i in indices(split, digit) for i, digit in zip(shown, clues, strict=True))


def test_the_knob_changes_the_picture_and_not_the_puzzle() -> None:
    printed, written, again = (
        draw_problem(TASK, TASK.spec(**KNOBS, glyphs=glyphs), "train", 5, 0)
        for glyphs in ("font", "handwritten", "handwritten")
    )
    assert written.perception == printed.perception and written.images != printed.images
    assert written.images == again.images
    assert TASK.score_perception(written, TASK.parse(TASK.oracle_prefix(written)).perception) == (
        True,
        1.0,
    )


def test_a_glyph_is_the_image_that_it_was_made_from() -> None:
    for index in range(0, 1797, 97):
        glyph = handwriting.glyph(index, 32)
        small = Image.fromarray(glyph.astype(np.uint8))
        own = IMAGES[index]
        rows, columns = (np.flatnonzero(own.max(axis) > 0) for axis in (1, 0))
        cut = own[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        back = np.asarray(small.resize(cut.shape[::-1], Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(back.ravel(), cut.ravel())[0, 1] > 0.9, index


def test_the_picture_has_the_size_of_the_printed_one() -> None:
    problem = draw_problem(TASK, TASK.spec(**KNOBS, glyphs="handwritten"), "train", 5, 1)
    assert Image.open(io.BytesIO(problem.images[0])).size == (64, 64)
