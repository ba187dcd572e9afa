"""Surrogates: by hand, against other implementations, guards, hostile text, no truth peeked at.

A toy tokenizer makes one token a character, its code point.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rewards.pool import _other_problem
from rewards.surrogates import (
    BlindPolicy,
    BlindSolver,
    GroupAgreement,
    ImageDependence,
    SelfConsistency,
)
from rollout.record import Group, Rollout, SampleRequest, ScoreRequest
from rollout.tokens import label_segments
from tasks.core import DataError, Parsed, Problem, Task
from tasks.graph_coloring import GraphColoring, GraphColoringSpec
from tasks.images import blank_like, mask_patches
from tasks.responses import compose_response
from tasks.sudoku import Sudoku, SudokuSpec, grid_text
from tasks.sudoku_puzzle import Grid
from tests.support.toys import TASK as DOUBLING
from tests.support.toys import group as doubling
from tests.support.toys import rollout as toy_rollout

SUDOKU, GRAPHS = Sudoku(), GraphColoring()
TINY = SudokuSpec(size=4, cell_size=16, font_size=12, margin=0, prompt="brief")
PUZZLES = [SUDOKU.generate(np.random.default_rng(seed), TINY) for seed in range(6)]
SMALL = GraphColoringSpec(vertices=5, canvas=64, prompt="brief")
DRAWINGS = [GRAPHS.generate(np.random.default_rng(seed), SMALL) for seed in range(6)]
TASK_OF: dict[str, Task] = {SUDOKU.name: SUDOKU, GRAPHS.name: GRAPHS}


def rollout_of(task: Task, text: str, index: int = 0, prefix: str = "") -> Rollout:
    parsed = task.parse(prefix + text)
    segments = label_segments(np.arange(len(text) + 1), parsed.spans, shift=len(prefix))
    ids = np.array([ord(c) for c in text], dtype=np.int32)
    return toy_rollout(f"g-{index}", text, parsed, ids, segments, prefix=prefix)


def group_of(problem: Problem, *texts: str) -> Group:
    task = TASK_OF[problem.task]
    return Group("g", problem, tuple(rollout_of(task, t, i) for i, t in enumerate(texts)))


def says(perception: str, answer: str = "x", reasoning: str = "so") -> str:
    return compose_response(perception, reasoning, answer)


def changed(grid: Sequence[Sequence[int]], *cells: tuple[int, int, int]) -> Grid:
    rows = [list(row) for row in grid]
    for r, c, value in cells:
        rows[r][c] = value
    return tuple(map(tuple, rows))


def perception_length(text: str) -> int:
    return text.index("</perception>") + len("</perception>")


# A puzzle, its solution, and the same puzzle with one blank filled in, one clue misread, one missed
PUZZLE = PUZZLES[0]
TRUE: Grid = changed(PUZZLE.truth["puzzle"])
SOLUTION: Grid = changed(PUZZLE.truth["solution"])
BLANKS = [(r, c) for r in range(4) for c in range(4) if not TRUE[r][c]]
CLUES = [(r, c) for r in range(4) for c in range(4) if TRUE[r][c]]
FILLED = changed(TRUE, (*BLANKS[0], SOLUTION[BLANKS[0][0]][BLANKS[0][1]]))
MISREAD = changed(TRUE, (*CLUES[0], TRUE[CLUES[0][0]][CLUES[0][1]] % 4 + 1))


# Group agreement


def test_plurality_by_hand() -> None:
    a, b, c = (says(grid_text(g)) for g in (TRUE, FILLED, MISREAD))
    term = GroupAgreement()
    assert term(SUDOKU, group_of(PUZZLE, a, a, b, c)) == [1, 1, 0, 0]
    assert term(SUDOKU, group_of(PUZZLE, b, a, b, a, c)) == [1, 1, 1, 1, 0]  # a tie
    assert term(SUDOKU, group_of(PUZZLE, a, b, c)) == [0, 0, 0]  # one alone is no group
    assert term(SUDOKU, group_of(PUZZLE, a)) == [0]
    assert term(SUDOKU, group_of(PUZZLE, "", "", "", b, b)) == [0, 0, 0, 1, 1]
    assert term(SUDOKU, group_of(PUZZLE, "", "")) == [0, 0]
    # The same grid in another notation is the same perception.
    assert term(SUDOKU, group_of(PUZZLE, a, says(json.dumps(TRUE)))) == [1, 1]


def test_soft_votes_by_hand() -> None:
    term = GroupAgreement("soft")
    drawing = DRAWINGS[0]
    found = term(GRAPHS, group_of(drawing, *map(says, ("0-1 1-2", "1-0", "2-1 3-4", "3-3"))))
    # Four rollouts, the last unreadable; votes: 01 twice, 12 twice, 34 once. In thirds:
    # first: w(01)=1, w(12)=1, w(34)=1: 2·2/(2·3 + 3); second: w(01)=1, w(12)=2, w(34)=1:
    # 2·1/(3 + 4); third: w(12)=1, w(34)=0, w(01)=2: 2·1/(2·3 + 3)
    np.testing.assert_allclose(found, [4 / 9, 2 / 7, 2 / 9, 0], rtol=1e-15)
    whole = says(drawing.perception)
    assert term(GRAPHS, group_of(drawing, whole, whole, whole)) == [1, 1, 1]
    assert term(GRAPHS, group_of(drawing, whole)) == [0]
    assert term(GRAPHS, group_of(drawing, whole, "")) == [0, 0]
    assert term(GRAPHS, group_of(drawing, "0-1", says("0-1"), says("2-3"))) == [0, 0, 0]


def test_filling_in_blanks_costs_soft_agreement_cell_by_cell() -> None:
    """What the leakage check lets pass, the honest rest of a group makes costly."""
    paid = []
    for k in range(len(BLANKS)):
        partial = changed(TRUE, *[(r, c, SOLUTION[r][c]) for r, c in BLANKS[:k]])
        group = group_of(PUZZLE, says(grid_text(partial)), *[says(grid_text(TRUE))] * 7)
        assert BlindSolver()(SUDOKU, group)[0] == 1
        paid.append(GroupAgreement("soft")(SUDOKU, group)[0])
    np.testing.assert_allclose(paid, [1 - k / 16 for k in range(len(BLANKS))])


def test_agreement_on_random_groups_equals_another_implementation() -> None:
    rng = np.random.default_rng(0)
    plurality, soft = GroupAgreement(), GroupAgreement("soft")
    for group in random_groups():
        task = TASK_OF[group.problem.task]
        seen = [r.parsed.perception for r in group.rollouts]
        assert plurality(task, group) == slow_plurality(seen)
        found = soft(task, group)
        np.testing.assert_allclose(found, slow_soft(task, seen), rtol=0, atol=1e-12)
        assert all(0 <= value <= 1 for value in found)
        order = rng.permutation(len(seen)).tolist()
        shuffled = replace(group, rollouts=tuple(group.rollouts[i] for i in order))
        for term, values in ((plurality, plurality(task, group)), (soft, found)):
            assert term(task, shuffled) == [values[i] for i in order]


def slow_plurality(seen: list[Any]) -> list[float]:
    readable = sorted(repr(sorted(p) if isinstance(p, frozenset) else p) for p in seen if p)
    runs = {key: len(list(run)) for key, run in itertools.groupby(readable)}
    best = max([2, *runs.values()])
    keys = [p and repr(sorted(p) if isinstance(p, frozenset) else p) for p in seen]
    return [float(runs.get(key, 0) == best) for key in keys]


def slow_soft(task: Task, seen: list[Any]) -> list[float]:
    """As a matrix of zeros and ones, one row a rollout, one column a possible item."""
    columns = (
        [(r, c, v) for r in range(4) for c in range(4) for v in range(5)]
        if task is SUDOKU
        else [(i, j) for j in range(5) for i in range(j)]
    )
    held = np.zeros((len(seen), len(columns)))
    for row, perception in zip(held, seen, strict=True):
        if perception is not None:
            row[:] = [
                perception[k[0]][k[1]] == k[2] if task is SUDOKU else k in perception
                for k in columns
            ]
    values = []
    for i, own in enumerate(held):
        rest = np.delete(held, i, axis=0)
        w = rest.mean(axis=0) if len(rest) else np.zeros(len(columns))
        below = own.sum() + w.sum()
        values.append(2 * float(own @ w) / below if below else 0.0)
    return values


def test_soft_votes_need_items() -> None:
    with pytest.raises(DataError, match=r"perception_items.*Doubling.*plurality"):
        GroupAgreement("soft")(DOUBLING, doubling(5, "5;10;"))
    assert GroupAgreement()(DOUBLING, doubling(5, "5;10;", "5;1;", "4;8;")) == [1, 1, 0]


# Self-consistency and the exact blind solver


def random_group(rng: np.random.Generator) -> Group:
    """One to eight rollouts that see right, a little wrong, nothing, or write the answer."""
    sudoku = bool(rng.integers(2))
    problem = (PUZZLES if sudoku else DRAWINGS)[rng.integers(6)]
    texts = []
    for _ in range(rng.integers(1, 9)):
        kind = rng.choice(["true", "true", "noisy", "noisy", "none", "leak"])
        if kind == "none":
            text = str(rng.choice(["", "no idea", "<perception>\n1 2\n</perception>", "[[["]))
        elif sudoku:
            grid = problem.truth["solution" if kind == "leak" else "puzzle"]
            if kind == "noisy":
                r, c, v = rng.integers(4), rng.integers(4), rng.integers(5)
                grid = changed(grid, (int(r), int(c), int(v)))
            text = says(grid_text(grid), grid_text(problem.truth["solution"]))
        else:
            edges = [tuple(e) for e in problem.truth["edges"]]
            if kind == "noisy":
                edges = [e for e in edges if rng.random() < 0.8] or edges[:1]
            answer = GRAPHS.solve(problem, frozenset(edges))
            assert answer is not None
            text = says(
                " ".join(f"{i}-{j}" for i, j in edges), " ".join(f"{v}:{a}" for v, a in answer)
            )
        texts.append(text)
    return group_of(problem, *texts)


@functools.cache
def random_groups() -> tuple[Group, ...]:
    rng = np.random.default_rng(1)
    return tuple(random_group(rng) for _ in range(1000))


def test_the_solver_and_self_consistency_by_hand() -> None:
    answer = grid_text(SOLUTION)
    texts = [
        says(grid_text(TRUE), answer),
        says(grid_text(TRUE), grid_text(TRUE)),  # an answer with blanks is none
        says(grid_text(FILLED), answer),
        says(grid_text(MISREAD), answer),
        says(grid_text(SOLUTION), answer),  # a leak
        says("-", answer),
        "",
    ]
    group = group_of(PUZZLE, *texts)
    assert BlindSolver()(SUDOKU, group) == [1, 1, 1, 0, 0, 0, 0]
    assert BlindSolver(leakage_check=False)(SUDOKU, group) == [1, 1, 1, 0, 1, 0, 0]
    assert SelfConsistency()(SUDOKU, group) == [1, 0, 1, 0, 1, 0, 0]
    # One blank is enough for an honest puzzle to state no answer.
    easy = SUDOKU.generate(np.random.default_rng(0), SudokuSpec(size=4, blanks=1, prompt="brief"))
    assert BlindSolver()(SUDOKU, group_of(easy, says(easy.perception))) == [1]


@pytest.mark.parametrize("problem", [*PUZZLES, *DRAWINGS], ids=lambda p: p.id)
def test_an_oracle_perception_earns_everything(problem: Problem) -> None:
    task = TASK_OF[problem.task]
    group = group_of(problem, *[task.demonstrate(problem, s) for s in ("terse", "verbose")])
    assert BlindSolver()(task, group) == [1, 1]
    assert SelfConsistency()(task, group) == [1, 1]
    assert GroupAgreement()(task, group) == GroupAgreement("soft")(task, group) == [1, 1]
    term = BlindPolicy()
    assert term.score(task, group, answered(term.ask(task, group, None), reason)) == [1, 1]


def test_solver_and_consistency_equal_other_implementations_on_random_groups() -> None:
    for group in random_groups():
        problem, task = group.problem, TASK_OF[group.problem.task]
        solver, consistent = [], []
        for rollout in group.rollouts:
            p, a = rollout.parsed.perception, rollout.parsed.answer
            answers = [] if p is None else brute_force(task, problem, p)
            leak = task is SUDOKU and p is not None and not any(0 in row for row in p)
            good = bool(answers) and not leak and (task is GRAPHS or len(answers) == 1)
            solver.append(float(good and task.check(problem, answers[0])))
            consistent.append(float(a in answers))
        assert BlindSolver()(task, group) == solver
        assert SelfConsistency()(task, group) == consistent


def brute_force(task: Task, problem: Problem, perception: Any) -> list[Any]:
    """All answers of a perception: 4x4 grids out of all 288, colourings out of all of them."""
    if task is SUDOKU:
        fits = (
            all(perception[r][c] in (0, full[r][c]) for r in range(4) for c in range(4))
            for full in ALL_GRIDS
        )
        return list(itertools.compress(ALL_GRIDS, fits))
    if perception not in COLORINGS:
        proper = [
            colors
            for colors in itertools.product("abcde", repeat=5)
            if all(colors[i] != colors[j] for i, j in perception)
        ]
        fewest = min(len(set(colors)) for colors in proper)
        COLORINGS[perception] = [
            tuple(enumerate(colors)) for colors in proper if len(set(colors)) == fewest
        ]
    return COLORINGS[perception]


COLORINGS: dict[Any, list[Any]] = {}
BOXES = [[(r + i, c + j) for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
ALL_GRIDS = [
    rows
    for rows in itertools.product(itertools.permutations(range(1, 5)), repeat=4)
    if all(len(set(column)) == 4 for column in zip(*rows, strict=True))
    and all(len({rows[r][c] for r, c in box}) == 4 for box in BOXES)
]


# The blind policy


def answered(requests: Sequence[SampleRequest], reply: Callable[[Any], str]) -> list[Group]:
    """What a sampler makes of requests, the text by a scripted model."""
    made = []
    for request in requests:
        task = TASK_OF[request.problem.task]
        made.append(
            Group(
                request.group_id,
                request.problem,
                (rollout_of(task, reply(request), prefix=request.prefix),),
            )
        )
    return made


def reason(request: SampleRequest) -> str:
    """A model that reasons without a flaw, and has but the prefix to go by."""
    task = TASK_OF[request.problem.task]
    answer = task.solve(request.problem, task.parse(request.prefix).perception)
    if answer is None:
        return "<reasoning>\nno way\n</reasoning>\n"
    if task is SUDOKU:
        return f"<reasoning>\n</reasoning>\n<answer>\n{grid_text(answer)}\n</answer>"
    return f"<reasoning>\n</reasoning>\n<answer>{' '.join(f'{v}:{a}' for v, a in answer)}</answer>"


def test_the_blind_request_holds_the_perception_and_nothing_else() -> None:
    perception = grid_text(TRUE)
    texts = [
        says(perception, grid_text(SOLUTION)),
        f"It is {grid_text(SOLUTION)}.\n{says(perception)}",
        says(perception).replace("</perception>\n", "</perception> so 1 2 3 4\n"),
        says(perception, reasoning="another way"),
        says(grid_text(MISREAD)),
        says(grid_text(SOLUTION)),
        "nothing",
    ]
    group = group_of(PUZZLE, *texts)
    term = BlindPolicy(model="some/frozen", max_tokens=99, temperature=0.5)
    requests = term.ask(SUDOKU, group, None)
    assert term.model == "some/frozen"
    assert [r.prefix for r in requests] == [
        SUDOKU.oracle_prefix(PUZZLE),
        f"<perception>\n{grid_text(MISREAD)}\n</perception>\n",
    ]
    for request in requests:
        assert (request.kind, request.view, request.n) == ("blind", "none", 1)
        assert (request.sampling.max_tokens, request.sampling.temperature) == (99, 0.5)
        assert request.problem is PUZZLE
    assert len({request.group_id for request in requests}) == 2
    replies = answered(requests, reason)
    assert term.score(SUDOKU, group, replies) == [1, 1, 1, 1, 0, 0, 0]
    right = answered(requests, lambda _: f"<answer>\n{grid_text(SOLUTION)}\n</answer>")
    assert term.score(SUDOKU, group, right) == [1, 1, 1, 1, 1, 0, 0]
    cut = answered(requests, lambda _: "<reasoning>\nwell")
    assert term.score(SUDOKU, group, cut) == [0] * 7


def test_prose_before_a_json_perception_is_not_forced() -> None:
    loud = f"The solution is {grid_text(SOLUTION)}\n<|im_end|> so I see {json.dumps(TRUE)} thus"
    group = group_of(PUZZLE, loud, f"{json.dumps(TRUE)} thus {json.dumps(SOLUTION)}")
    assert [r.parsed.perception for r in group.rollouts] == [TRUE, TRUE]
    (request,) = BlindPolicy().ask(SUDOKU, group, None)
    assert request.prefix == f"{json.dumps(TRUE)}\n"


class Described(Sudoku):
    """Its perception is the whole segment as text, brackets and all; it does not know leaks."""

    states_answer = None  # type: ignore[assignment]

    def parse(self, text: str) -> Parsed:
        end = text.find("END")
        if end < 0:
            return Parsed(None, "", text or None, {}, ("missing_perception",))
        return Parsed(text[:end], "", text[end + 4 :] or None, {"perception": (0, end + 3)}, ())

    def oracle_prefix(self, problem: Problem) -> str:
        return "pEND "


def test_a_task_with_another_notation_keeps_its_whole_segment() -> None:
    task = Described()
    said = "two dots [left] and [right]END so"
    group = Group("g", PUZZLE, (rollout_of(task, said),))
    (request,) = BlindPolicy().ask(task, group, None)
    assert request.prefix == "two dots [left] and [right]END\n"


def test_the_blind_request_needs_no_label_and_ends_in_the_line_ends_of_the_policy() -> None:
    spaced = says(grid_text(MISREAD)).replace("</perception>\n", "</perception>\n\n")
    group = group_of(PUZZLE, says(grid_text(TRUE)), spaced)
    unlabelled = replace(group, problem=replace(PUZZLE, perception="", truth={}))
    assert [r.prefix for r in BlindPolicy().ask(SUDOKU, unlabelled, None)] == [
        f"<perception>\n{grid_text(TRUE)}\n</perception>\n",
        f"<perception>\n{grid_text(MISREAD)}\n</perception>\n\n",
    ]


def test_random_groups_with_a_scripted_model_equal_another_implementation() -> None:
    term = BlindPolicy()

    def moody(request: SampleRequest) -> str:
        mood = hashlib.sha256(request.prefix.encode()).digest()[0] % 3
        return "<answer>?</answer>" if mood == 0 else reason(request)

    for group in random_groups():
        task = TASK_OF[group.problem.task]
        expected, asked = [], set()
        for rollout in group.rollouts:
            perception = rollout.parsed.perception
            leak = task is SUDOKU and perception and not any(0 in row for row in perception)
            if perception is None or leak:
                expected.append(0.0)
                continue
            prefix = rollout.text[: perception_length(rollout.text)] + "\n"
            asked.add(prefix)
            alone = BlindSolver(leakage_check=False)(task, replace(group, rollouts=(rollout,)))
            wrong = hashlib.sha256(prefix.encode()).digest()[0] % 3 == 0
            expected.append(0.0 if wrong else alone[0])
        requests = term.ask(task, group, None)
        assert {r.prefix for r in requests} == asked and len(requests) == len(asked)
        assert term.score(task, group, answered(requests, moody)) == expected


# Image dependence


def toy_logprobs(request: ScoreRequest) -> np.ndarray:
    """float32 [T], decided by the image and the tokens up to each one."""
    digest = hashlib.sha256(b"".join(request.images) or b"none")
    values = []
    for token in request.response_ids.tolist():
        digest.update(str(token).encode())
        values.append(-digest.digest()[0] / 64)
    return np.array(values, np.float32)


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


# All of them


def test_too_long_a_perception_earns_nothing_and_is_not_asked() -> None:
    text = says(grid_text(TRUE), grid_text(SOLUTION))
    n = perception_length(text)
    group = group_of(PUZZLE, text, text)
    for factory in (GroupAgreement, SelfConsistency, BlindSolver):
        assert factory(max_perception_tokens=n)(SUDOKU, group) == [1, 1]
        assert factory(max_perception_tokens=n - 1)(SUDOKU, group) == [0, 0]
    for asking in (BlindPolicy, ImageDependence):
        assert asking(max_perception_tokens=n).ask(SUDOKU, group, None)
        term = asking(max_perception_tokens=n - 1)
        assert term.ask(SUDOKU, group, None) == []
        assert term.score(SUDOKU, group, []) == [0, 0]


def test_a_task_that_does_not_know_leaks_is_checked_by_equality() -> None:
    group = doubling(0, "0;0;", "0;1;", "0;;")
    assert BlindSolver()(DOUBLING, group) == [0, 1, 1]
    assert BlindSolver(leakage_check=False)(DOUBLING, group) == [1, 1, 1]


def test_a_parser_without_spans_is_told_what_it_lacks() -> None:
    group = doubling(5, "5;10;")
    with pytest.raises(ValueError, match=r"Doubling.*spans\[.perception.\]"):
        replaced = replace(group, problem=replace(group.problem, perception="5;;"))
        BlindPolicy().ask(DOUBLING, replaced, None)


@pytest.mark.parametrize(
    ("term", "replies", "message"),
    [
        (BlindPolicy(), [], "1 requests and got 0"),
        (BlindPolicy(), [np.zeros(3)], "one rollout"),
        (BlindPolicy(), [Group("g", PUZZLE, ())], "one rollout"),
        (ImageDependence(), [np.zeros(3)], "2 requests and got 1"),
        (ImageDependence(), [np.zeros(3), np.zeros(3)], "log-probs"),
        (ImageDependence(), [Group("g", PUZZLE, ())] * 2, "log-probs"),
    ],
)
def test_replies_that_do_not_fit_are_refused(term: Any, replies: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        term.score(SUDOKU, group_of(PUZZLE, says(grid_text(TRUE))), replies)


HOSTILE = (
    "", "<perception>", "</perception>" * 500, "<perception>" * 500, "[" * 5000, "[[0]]" * 500,
    "<perception>\n1 2\n</perception>\n<answer>1 2</answer>", '{"edges": [[0, 1]], "c": 9}',
    "<perception>0-1 1-999</perception><answer>0:a</answer>", "<perception>\x00\ud83d</perception>",
    "<perception>999-998</perception>", "<perception>" + "9" * 9999 + "</perception>",
    "<perception>" + "\n".join("- - - -" for _ in range(4)) + "</perception>",
    "<perception>" + "\n".join("- " * 9 for _ in range(9)) + "</perception>",
    "<perception>" + "\n".join("1 1 1 -" for _ in range(4)) + "</perception>",
    '<perception>{"edges": [[0, 1]], "v": 99999, "c": 1}</perception><answer>{"0": "a"}</answer>',
)  # fmt: skip


@pytest.mark.parametrize("problem", [PUZZLE, DRAWINGS[0]], ids=["sudoku", "graph_coloring"])
def test_hostile_text_raises_nothing_and_earns_a_number(problem: Problem) -> None:
    task = TASK_OF[problem.task]
    group = group_of(problem, *HOSTILE)
    terms = [GroupAgreement(), GroupAgreement("soft"), SelfConsistency(), BlindSolver()]
    for term in terms:
        found = np.array(term(task, group))
        assert found.shape == (len(HOSTILE),) and ((found >= 0) & (found <= 1)).all()
    solver = BlindSolver()(task, group)
    assert not any(solver)
    for asking in (BlindPolicy(), ImageDependence()):
        requests = asking.ask(task, group, None)
        replies: Any = (
            answered(requests, reason)  # type: ignore[arg-type]
            if isinstance(asking, BlindPolicy)
            else [toy_logprobs(r) for r in requests]
        )
        found = np.array(asking.score(task, group, replies))
        assert found.shape == (len(HOSTILE),) and ((found >= 0) & (found <= 1)).all()


def test_no_surrogate_looks_at_perception_labels() -> None:
    """Another `p*` and other pictures of the truth, with the answers the same, change nothing."""
    for group in random_groups()[:50]:
        problem, task = group.problem, TASK_OF[group.problem.task]
        wrong = PUZZLES[0] if task is SUDOKU else DRAWINGS[0]
        blind = replace(group, problem=replace(problem, perception=wrong.perception))
        unlabelled = replace(blind, problem=replace(blind.problem, truth={"v": 5}))
        for term in (GroupAgreement(), GroupAgreement("soft"), SelfConsistency()):
            assert term(task, unlabelled) == term(task, group)
        assert BlindSolver()(task, blind) == BlindSolver()(task, group)
        prefixes = [[r.prefix for r in BlindPolicy().ask(task, g, None)] for g in (blind, group)]
        assert prefixes[0] == prefixes[1]
