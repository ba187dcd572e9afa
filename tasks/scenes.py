"""Scenes of drawn things: the perception is what is where, the answer a number or a word.

The words are English ones that a language model knows, so that all it has to learn is to see.
Canonical text has one row a line, places parted by a comma: `2 cats, nothing, 1 bicycle`. A number
may also be a word up to nine, or `a`; a thing may be in the singular or the plural.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import BaseModel

from tasks.core import DataError, Problem, Style
from tasks.figures import Cell, Figure, Grid, Words
from tasks.puzzle_task import PuzzleTask
from tasks.responses import Read, compose_response
from tasks.scenes_knobs import MOST, ScenesSpec
from tasks.scenes_puzzle import (
    EMPTY,
    MOVES,
    NOTHING,
    Place,
    Question,
    Scene,
    answer_of,
    draw_puzzle,
    is_scene,
    named,
    shape,
)
from tasks.scenes_render import render
from tasks.scenes_things import groups, singular
from tasks.scenes_words import place_text, prompt_text, question_text, reasons, scene_text

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NUMBER = {word: n for n, word in enumerate(NUMBERS)} | {"a": 1, "an": 1, "no": 0}
_SHORT = re.compile(r"-?[0-9]{1,4}")


class Scenes(PuzzleTask):
    """The task of scenes (see `tasks.core.Task`)."""

    name = "scenes"
    spec: type[BaseModel] = ScenesSpec
    kind = "scenes"
    id_separator = "\n"
    stream_count = 4

    def draw(
        self, rngs: list[np.random.Generator], spec: ScenesSpec
    ) -> tuple[str, Callable[[], Problem]]:
        """A scene and a question, then words for both, a phrasing and a picture."""
        puzzle_rng, names_rng, words_rng, picture_rng = rngs
        scene, question = draw_puzzle(puzzle_rng, spec)
        scene, question = named(scene, question, _kinds_drawn(names_rng, spec))
        return scene_text(scene), lambda: self._problem(
            prompt_text(question_text(question, words_rng, spec), spec),
            render(scene, spec, picture_rng),
            scene,
            question,
            spec.model_dump(),
        )

    def read_perception(self, text: str) -> Read:
        """A `Scene`; defects `empty_perception`, `bad_place` (no number of a known thing),
        `bad_shape` (rows of other lengths)."""
        rows = [line for line in text.lower().splitlines() if line.strip()]
        if not rows:
            return None, ("empty_perception",)
        scene = tuple(
            tuple(_read_place(part) for part in line.strip().removesuffix(",").split(","))
            for line in rows
        )
        if any(cell is None for row in scene for cell in row):
            return None, ("bad_place",)
        return (scene, ()) if is_scene(scene) else (None, ("bad_shape",))

    def read_answer(self, text: str) -> Read:
        """An int, a thing or `nothing`; defects `empty_answer`, `bad_answer`."""
        answer = text.strip().lower().removesuffix(".")
        if not answer:
            return None, ("empty_answer",)
        if _SHORT.fullmatch(answer):
            return int(answer), ()
        if answer in NUMBERS:
            return NUMBERS.index(answer), ()
        word = NOTHING if answer == NOTHING else singular().get(_bare(answer))
        return (word, ()) if word else (None, ("bad_answer",))

    def check(self, problem: Problem, answer: Any) -> bool:
        """Whether it is the answer that the true scene gives."""
        return bool(answer == answer_of(_scene(problem), problem.truth["question"]))

    def score_perception(self, problem: Problem, perception: Any) -> tuple[bool, float]:
        """(same scene, share of what is in its places): half for the thing, half for its number.

        Counted are the places where there is something or something was seen. (False, 0) for
        another shape.
        """
        truth = _scene(problem)
        if not is_scene(perception) or shape(perception) != shape(truth):
            return False, 0.0
        pairs = [
            pair
            for rows in zip(truth, perception, strict=True)
            for pair in zip(*rows, strict=True)
            if pair != (EMPTY, EMPTY)
        ]
        right = sum((true[1] == perceived[1]) + (true == perceived) for true, perceived in pairs)
        return perception == truth, right / (2 * len(pairs))

    def consistent(self, problem: Problem, perception: Any, answer: Any) -> bool:
        """Whether it is the answer that `perception` gives."""
        follows = self.solve(problem, perception)
        return follows is not None and bool(answer == follows)

    def solve(self, problem: Problem, perception: Any) -> int | str | None:
        """The answer of a perceived scene to the question of the prompt; None where it has none."""
        return answer_of(perception, problem.truth["question"]) if is_scene(perception) else None

    def demonstrate(self, problem: Problem, style: Style) -> str:
        """A whole correct response; `verbose` reasons in sentences and says where things are."""
        scene, question = _scene(problem), problem.truth["question"]
        answer = str(answer_of(scene, question))
        return compose_response(problem.perception, reasons(scene, question, style), answer)

    def vision_labels(self, problem: Problem) -> np.ndarray:
        """int64 [2 * rows * columns]: of each place in reading order the thing, 0 for nothing, and
        how many."""
        words = ["", *dict.fromkeys(singular().values())]
        cells = [cell for row in _scene(problem) for cell in row]
        labels = [(words.index(kind), n) for n, kind in cells]
        return np.array(labels, dtype=np.int64).reshape(-1)

    def perception_items(self, perception: Scene) -> frozenset[tuple[int, int, int, str]]:
        """(row, column, number, thing) of every place; nothing is a claim too."""
        return frozenset(
            (r, c, *cell) for r, row in enumerate(perception) for c, cell in enumerate(row)
        )

    def question_kind(self, problem: Problem) -> str:
        """`count`, `sum`, `compare`, `look up` or `walk`."""
        question = problem.truth["question"]
        if question["ask"] == "sum" and len(question["kinds"]) == 1:
            return "count"
        if question["ask"] == "walk" and not question["moves"]:
            return "look up"
        return str(question["ask"])

    def states_answer(self, problem: Problem, perception: Scene) -> bool:
        """Whether a perception of another shape than the picture's holds nothing but the answer.

        A reading of the right shape that is an honest one says what is where; that some place
        holds the answer then is how things are.
        """
        answer = answer_of(_scene(problem), problem.truth["question"])
        objects = {cell for row in perception for cell in row} - {EMPTY}
        if shape(perception) == shape(_scene(problem)) or len(objects) != 1:
            return False
        return answer in next(iter(objects))

    def draw_perception(self, problem: Problem, perception: Scene) -> Figure:
        """What was seen in each place, misread places marked."""
        truth = _scene(problem)
        same_shape = shape(truth) == shape(perception)
        rows, wrong = [], 0
        for r, row in enumerate(perception):
            cells = []
            for c, square in enumerate(row):
                bad = not same_shape or truth[r][c] != square
                wrong += bad
                true = place_text(*truth[r][c]) if bad and same_shape else ""
                cells.append(Cell(v=place_text(*square), bad=bad, true=true))
            rows.append(tuple(cells[:32]))
        text = f"{wrong} of {len(rows) * len(perception[0])} places misread"
        return Grid(text=text, box=max(1, *shape(perception)), cells=tuple(rows[:32]))

    def draw_answer(self, problem: Problem, perception: Scene | None, answer: Any) -> Figure:
        """The answer, and what follows from the own perception where that is another."""
        follows = None if perception is None else self.solve(problem, perception)
        answer_text = str(answer)
        if follows is None:
            return Words(rows=(("right", answer_text),), text="The perception gives no answer.")
        if answer == follows:
            return Words(rows=(("right", answer_text),), text="Follows from what was seen.")
        return Words(
            rows=(("missing", str(follows)), ("extra", answer_text)),
            text=f"What was seen gives {follows}.",
        )

    def held_out(self, spec: BaseModel) -> str:
        """What no training problem repeats."""
        return "scenes (what is where), and the things and phrasings of the knobs' held_out"

    def from_row(self, query: str, image: bytes, ground_truth: str) -> Problem:
        """A problem from a row whose ground truth is `{"scene": ..., "question": ...}`, as
        `to_ground_truth` writes it; raises DataError where it is not."""
        try:
            truth = json.loads(ground_truth)
            scene = tuple(tuple((n, kind) for n, kind in row) for row in truth["scene"])
            question = truth["question"]
            known = is_scene(scene) and _is_question(question)
            answer = answer_of(scene, question) if known else None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(f"ground_truth: {_EXPECTED}") from error
        if answer is None or any(k not in singular() for row in scene for n, k in row if n):
            raise DataError(f"ground_truth: {_EXPECTED}")
        rows, columns = shape(scene)
        return self._problem(query, image, scene, question, {"rows": rows, "columns": columns})

    def to_ground_truth(self, problem: Problem) -> str:
        """Scene and question as JSON."""
        return json.dumps({name: problem.truth[name] for name in ("scene", "question")})

    def _problem(
        self, prompt: str, image: bytes, scene: Scene, question: Question, knobs: dict[str, Any]
    ) -> Problem:
        truth = {"scene": [[list(cell) for cell in row] for row in scene], "question": question}
        text = scene_text(scene)
        return self.problem(prompt, image, text, truth, knobs, text)


_EXPECTED = (
    'not {"scene": rows of places [number, thing], "question": ...} with a question that the '
    "scene answers; `equipoise tasks generate scenes` writes such rows"
)


def _kinds_drawn(rng: np.random.Generator, spec: ScenesSpec) -> list[str]:
    """The words of a scene's kinds."""
    sorts = [sort[: spec.variety] for sort in groups(spec.things == "held_out")]
    pool = [word for sort in sorts for word in sort]
    if spec.look_alikes:
        pool = list(sorts[int(rng.integers(len(sorts)))])
    return [pool[index] for index in rng.permutation(len(pool))[: spec.kinds]]


def _scene(problem: Problem) -> Scene:
    return tuple(tuple((n, kind) for n, kind in row) for row in problem.truth["scene"])


def _bare(answer: str) -> str:
    """Without an article."""
    return re.sub(r"^(the|a|an) ", "", answer)


def _read_place(text: str) -> Place | None:
    words = text.split()
    if words == [NOTHING]:
        return EMPTY
    if len(words) != 2 or (kind := singular().get(words[1])) is None:
        return None
    n = int(words[0]) if _SHORT.fullmatch(words[0]) else _NUMBER.get(words[0], -1)
    if n == 0:
        return EMPTY
    return (n, kind) if 0 < n <= MOST else None


def _is_question(question: Any) -> bool:
    """Whether JSON of a row is a question as `tasks.scenes_puzzle` has it."""
    if question["ask"] == "walk":
        start = question["start"]
        known = start in singular() if isinstance(start, str) else _is_spot(start)
        return known and all(move in MOVES for move in question["moves"])
    kinds = question["kinds"]
    if not isinstance(kinds, list) or not all(kind in singular() for kind in kinds):
        return False
    signs = question.get("signs", [])
    return bool(kinds) and (
        question["ask"] == "compare"
        or (question["ask"] == "sum" and len(signs) == len(kinds) and set(signs) <= {1, -1})
    )


def _is_spot(start: Any) -> bool:
    return isinstance(start, list) and len(start) == 2 and all(type(at) is int for at in start)
