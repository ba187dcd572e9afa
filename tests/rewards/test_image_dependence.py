"""Image dependence: which images are shown in place of the true ones, and what the gap is worth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rewards.pool import _other_problem
from rewards.surrogates import (
    ImageDependence,
)
from rollout.record import Group, ScoreRequest
from tasks.core import Problem
from tasks.images import blank_like, mask_patches
from tasks.sudoku import grid_text
from tests.support.surrogate_groups import (
    DRAWINGS,
    PUZZLE,
    PUZZLES,
    SUDOKU,
    TASK_OF,
    TRUE,
    group_of,
    perception_length,
    random_groups,
    says,
    toy_logprobs,
)


def test_image_dependence_by_hand() -> None:
    prose = "Look! "
    text = prose + says(grid_text(TRUE))
    end = perception_length(text)
    group = group_of(PUZZLE, text, "nothing", says("1 2"), text)
    term = ImageDependence(cap=0.5)
    shown, altered = term.ask(SUDOKU, group, None)
    assert shown.images == PUZZLE.images
    assert altered.images == (mask_patches(PUZZLE.images[0], 14, 0.6),)
    for request in (shown, altered):
        assert request.problem is PUZZLE
        assert request.response_ids.dtype == np.int32
        assert request.response_ids.tolist() == [ord(c) for c in text[:end]]
    assert shown.request_id != altered.request_id
    low, high = np.full(end, -3.0, np.float32), np.full(end, -2.875, np.float32)
    high[: len(prose)] = 99  # not perception
    assert term.score(SUDOKU, group, [high, low]) == [0.25, 0, 0, 0.25]
    assert term.score(SUDOKU, group, [low, high]) == [0, 0, 0, 0]
    assert term.score(SUDOKU, group, [high + 1, low]) == [1, 0, 0, 1]
    # A reply of NaN becomes no reward.
    assert np.isnan(term.score(SUDOKU, group, [low * np.nan, low])[0])
    assert ImageDependence().ask(SUDOKU, group_of(PUZZLE, "nothing"), None) == []
    assert ImageDependence().score(SUDOKU, group_of(PUZZLE, "nothing"), []) == [0]


def test_the_views() -> None:
    group = group_of(PUZZLE, says(grid_text(TRUE)))
    other = PUZZLES[1]

    def altered(term: ImageDependence, other: Problem | None = None) -> tuple[bytes, ...]:
        return term.ask(SUDOKU, group, other)[1].images

    assert altered(ImageDependence("blank")) == (blank_like(PUZZLE.images[0]),)
    assert altered(ImageDependence("swapped"), other) == other.images
    mine = altered(ImageDependence("masked", patch_size=4, share=0.25))
    assert mine == (mask_patches(PUZZLE.images[0], 4, 0.25),)
    with pytest.raises(ValueError, match=r"swapped.*another problem"):
        ImageDependence("swapped").ask(SUDOKU, group, None)
    assert ImageDependence("swapped").ask(SUDOKU, group_of(PUZZLE, ""), None) == []


def test_all_of_several_images_are_altered_and_without_one_nothing_is_asked() -> None:
    pair = replace(PUZZLE, images=(PUZZLES[1].images[0], PUZZLES[2].images[0]))
    other = replace(PUZZLES[3], images=(PUZZLES[4].images[0], PUZZLES[5].images[0]))
    group = group_of(pair, says(grid_text(TRUE)))
    for view, images in {
        "masked": tuple(mask_patches(image, 14, 0.6) for image in pair.images),
        "blank": tuple(map(blank_like, pair.images)),
        "swapped": other.images,
    }.items():
        shown, altered = ImageDependence(view).ask(SUDOKU, group, other)
        assert (shown.images, altered.images) == (pair.images, images)
    none = group_of(replace(PUZZLE, images=()), says(grid_text(TRUE)))
    assert ImageDependence("swapped").ask(SUDOKU, none, None) == []
    assert ImageDependence().score(SUDOKU, none, []) == [0.0]


def test_the_other_problem_has_as_many_images() -> None:
    def shows(*pictures: int) -> Group:
        images = tuple(PUZZLES[n].images[0] for n in pictures)
        return group_of(replace(PUZZLE, images=images), "")

    groups = [shows(1), shows(1), shows(2, 3), shows(4), shows(), shows(3, 2), shows(3, 2)]
    others = [_other_problem(groups, index) for index in range(len(groups))]
    expected = [3, 3, 5, 0, None, 2, 2]
    assert others == [None if n is None else groups[n].problem for n in expected]


@pytest.mark.parametrize("view", ["masked", "blank", "swapped"])
def test_image_dependence_equals_another_implementation_on_random_groups(view: str) -> None:
    term = ImageDependence(view, cap=0.4)
    views = {
        "masked": {p.id: mask_patches(p.images[0], 14, 0.6) for p in (*PUZZLES, *DRAWINGS)},
        "blank": {p.id: blank_like(p.images[0]) for p in (*PUZZLES, *DRAWINGS)},
        "swapped": {p.id: PUZZLES[5].images[0] for p in (*PUZZLES, *DRAWINGS)},
    }[view]
    for group in random_groups()[: 1000 if view == "swapped" else 100]:
        problem, task = group.problem, TASK_OF[group.problem.task]
        expected = []
        for rollout in group.rollouts:
            if rollout.parsed.perception is None:
                expected.append(0.0)
                continue
            shown, hidden = (
                toy_logprobs(ScoreRequest("", problem, rollout.response_ids, (image,)))
                for image in (problem.images[0], views[problem.id])
            )
            begin, end = rollout.parsed.spans["perception"]
            gains = [float(shown[t]) - float(hidden[t]) for t in range(begin, end)]
            expected.append(min(max(sum(gains) / len(gains), 0.0), 0.4) / 0.4)
        replies = [toy_logprobs(r) for r in term.ask(task, group, PUZZLES[5])]
        found = term.score(task, group, replies)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
        assert term.score(task, group, replies) == found
