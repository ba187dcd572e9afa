"""Other pictures than an environment returns: of the size, the place and the problem they say."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.core import Problem
from tasks.drawing import to_png
from tasks.environments import DONE, LooksElsewhere, Observation, load_environment
from tasks.images import blank_like, check_image
from tasks.looking import SIDE
from tasks.returns import Replaced, Returns, Shows
from tests.tasks.test_looking import pictured

CALL = "I look. <look>100 200 300 350</look>"


def replaced(kind: Shows, shown: Problem, other: Problem | None = None, **args: Any) -> Replaced:
    name = args.pop("name", "zoom")
    made = Replaced(partial(load_environment, name, args), Returns(kind, other))
    made.reset(shown, np.random.default_rng(3))
    return made


def true(shown: Problem, text: str, name: str = "zoom", **args: Any) -> Observation:
    made = load_environment(name, args)
    made.reset(shown, np.random.default_rng(3))
    return made.step(text)


def test_a_blank_has_the_size_and_another_problems_picture_the_same_box() -> None:
    one, other = pictured((200, 100)), pictured((120, 240))
    (picture,) = true(one, CALL).images
    assert replaced("blank", one).step(CALL).images == (blank_like(picture),)
    assert replaced("other", one, other).step(CALL).images == true(other, CALL).images
    # A wrong call is answered as ever, and what ends a response ends it.
    for kind in ("blank", "other", "elsewhere"):
        made = replaced(kind, one, other if kind == "other" else None)  # type: ignore[arg-type]
        assert made.step("<look>1 2</look>") == true(one, "<look>1 2</look>")
        assert made.step("So it is 4.") == DONE


@settings(deadline=None)
@given(st.data())
def test_a_wrong_place_has_the_size_and_none_of_the_pixels(data: st.DataObject) -> None:
    """Where the picture has room for two such boxes side by side at any place."""
    width, height = (data.draw(st.integers(64, 250)) for _ in range(2))
    wide, high = (data.draw(st.integers(1, SIDE // 3 - 1)) for _ in range(2))
    x, y = data.draw(st.integers(0, SIDE - wide)), data.draw(st.integers(0, SIDE - high))
    text = f"<look>{x} {y} {x + wide} {y + high}</look>"
    # Enlarging nothing leaves the pixels, which say where they are.
    args = {"smallest": 8, "side": 8, "aspect": 4.0}
    shown = pictured((width, height))
    (right,) = true(shown, text, **args).images
    (wrong,) = replaced("elsewhere", shown, **args).step(text).images
    one, two = (np.asarray(check_image(image, "crop")) for image in (right, wrong))
    for side in range(2):
        assert abs(one.shape[side] - two.shape[side]) <= 1
    pixels = [{tuple(pixel) for row in crop.tolist() for pixel in row} for crop in (one, two)]
    # The grown box is rounded to whole pixels: a row of them may be shared.
    assert len(pixels[0] & pixels[1]) <= 2 * max(one.shape[:2])


def test_a_whole_picture_has_no_wrong_place_and_a_large_box_the_farthest() -> None:
    shown = pictured((100, 100))
    whole, large = "<look>0 0 1000 1000</look>", "<look>0 150 800 950</look>"
    assert replaced("elsewhere", shown).step(whole) == true(shown, whole)
    (moved,) = replaced("elsewhere", shown, side=16).step(large).images
    corner = np.asarray(check_image(moved, "crop"))[0, 0]
    assert corner.tolist()[:2] == [20, 0]


def test_a_mark_is_drawn_elsewhere() -> None:
    shown = pictured((100, 100))
    for call in ("<mark>100 100 300 300</mark>", "<mark>500 500</mark>"):
        (right,) = true(shown, call, "mark").images
        (wrong,) = replaced("elsewhere", shown, name="mark").step(call).images
        plain = np.asarray(check_image(shown.images[0], "picture"))
        one, two = (
            (np.asarray(check_image(image, "marked")) != plain).any(axis=-1)
            for image in (right, wrong)
        )
        assert one.any() and two.any() and not (one & two).any()


class Rooms:
    """Moves from room to room, and says where it is; a picture but in the last room."""

    def reset(self, problem: Problem, rng: np.random.Generator) -> Observation | None:
        self.room, self.shade = 0, int(problem.truth["shade"])
        return Observation(f"shade {self.shade}")

    def step(self, text: str) -> Observation:
        self.room += text == "go"
        if self.room > self.shade:
            return Observation("the last room", reward=1.0)
        colour = (self.shade, self.room, 0)
        return Observation(f"{text} {self.room}", (to_png(Image.new("RGB", (9, 9), colour)),), 0.5)


def test_another_problem_is_played_from_its_own_start() -> None:
    near, far = (replace(pictured((9, 9)), truth={"shade": shade}) for shade in (2, 5))
    made = Replaced(Rooms, Returns("other", far))
    assert made.reset(near, np.random.default_rng(0)) == Observation("shade 2")
    for room, text in enumerate(("stay", "go", "go")):
        answer = made.step(text)
        assert (answer.text, answer.reward) == (f"{text} {room}", 0.5)
        assert check_image(answer.images[0], "room").getpixel((0, 0)) == (5, room, 0)
    assert made.step("go") == Observation("the last room", reward=1.0)
    # Where the other has no picture to show, a blank; where none is known, all are blank.
    made = Replaced(Rooms, Returns("other", near))
    made.reset(far, np.random.default_rng(0))
    answers = [made.step("go") for _ in range(3)]
    assert answers[2].images == (blank_like(answers[1].images[0]),)
    assert not isinstance(Rooms(), LooksElsewhere)


@pytest.mark.parametrize("kind", ["blank", "elsewhere"])
def test_what_is_no_observation_is_left_to_be_refused(kind: Shows) -> None:
    class Broken(Rooms):
        def step(self, text: str) -> Any:
            return "no observation"

    made = Replaced(Broken, Returns(kind))
    made.reset(replace(pictured((9, 9)), truth={"shade": 1}), np.random.default_rng(0))
    assert made.step("go") == "no observation"
