"""What a run leaves to the next: only what the next would start alike."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.run.kept import Parts, keeping, leave, shape_of, take
from tests.support.recipes import made_recipe


class Ended:
    """A learner, or places: says when it is to end."""

    def __init__(self) -> None:
        self.ended = False

    def stop(self) -> None:
        self.ended = True

    release = stop


def parts_of(*settings: str) -> Parts:
    learner: Any = Ended()
    places: Any = Ended()
    return Parts(shape_of(made_recipe(*settings), "train"), places, learner)


@pytest.mark.parametrize(
    ("settings", "stays"),
    [
        ((), True),
        (("seed=7", "algorithm.steps=3", "reward.alpha=0.3", "eval.problems=5"), True),
        (("sampler.max_tokens=7",), False),
        (('learner.freeze=["vision"]',), False),
        (('model.path="other"',), False),
        (("transfer.bucket_mib=1",), False),
    ],
)
def test_a_run_begins_with_what_it_would_start_alike(
    settings: tuple[str, ...], stays: bool
) -> None:
    with keeping():
        left = parts_of()
        assert leave(left, [])
        taken = take(made_recipe(*settings), "train")
        assert (taken is left) == stays
        assert left.learner.ended != stays and left.places.ended != stays  # type: ignore[attr-defined]
        assert take(made_recipe(), "train") is None, "it is left once"


def test_nothing_stays_unless_it_is_asked_to_and_nothing_beyond_that() -> None:
    assert not leave(parts_of(), [])
    with keeping():
        left = parts_of()
        assert leave(left, [])
    assert left.learner.ended and left.places.ended  # type: ignore[attr-defined]
    with keeping():
        left = parts_of()
        assert leave(left, [])
        assert take(made_recipe(), "sft") is None and left.learner.ended  # type: ignore[attr-defined]
