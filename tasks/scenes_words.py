"""What is said about scenes: p*, questions in several phrasings, reasoning in English."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tasks.core import Style
from tasks.scenes_knobs import ScenesSpec
from tasks.scenes_puzzle import NOTHING, Question, Scene, answer_of, count, spots, walked
from tasks.scenes_things import counted, plural

# Of each list the last phrasing is held out.
_COUNT = ("How many {things} are there?", "Count the {things}.", "Say the number of {things}.")
_SUM = (
    "Start with the number of {first}{rest}. What number do you get?",
    "Take how many {first} there are{rest}. What is the result?",
    "Begin from the count of {first}{rest}. Say where you end.",
)
_PLUS = (", add the number of {things}", ", then add the {things}", ", plus all {things}")
_MINUS = (
    ", take away the number of {things}", ", then subtract the {things}", ", minus all {things}",
)  # fmt: skip
_COMPARE = (
    "Which are there most of: {listed}?",
    "Of {listed}, which occur most often?",
    "Name the most common: {listed}.",
)
_LOOK = (
    "What is in row {row}, column {column}?", "Which things are at row {row}, column {column}?",
    "Say what stands in column {column} of row {row}.",
)  # fmt: skip
_WALK = (
    "Start at the place {start}. Go {moves}. What is there?",
    "From the place {start}, move {moves}. Which things do you find?",
    "Find the place {start}; walk {moves}; say what you reach.",
)
_ASIDE = (
    "Yesterday there were {counted} here.", "Another picture has {counted}.",
    "Somebody has asked for {counted}.",
)  # fmt: skip


def _phrase(rng: np.random.Generator, spec: ScenesSpec) -> int:
    return 2 if spec.phrasings == "held_out" else int(rng.integers(2))


def place_text(n: int, kind: str) -> str:
    """`2 cats`, or `nothing`."""
    return counted(n, kind) if n else NOTHING


def scene_text(scene: Scene) -> str:
    """The canonical text: a row a line, its places parted by a comma and a space."""
    return "\n".join(", ".join(place_text(*cell) for cell in row) for row in scene)


def question_text(question: Question, rng: np.random.Generator, spec: ScenesSpec) -> str:
    """The question in one of its phrasings, other sentences before it."""
    which = _phrase(rng, spec)
    kinds = question.get("kinds", ())
    words = [plural(kind) for kind in kinds]
    if question["ask"] == "sum":
        rest = "".join(
            (_PLUS if sign > 0 else _MINUS)[which].format(things=word)
            for sign, word in zip(question["signs"][1:], words[1:], strict=True)
        )
        form = _SUM if rest else _COUNT
        question_words = form[which].format(things=words[0], first=words[0], rest=rest)
    elif question["ask"] == "compare":
        question_words = _COMPARE[which].format(listed=_listed(words))
    else:
        question_words = _walk_text(question, which)
    asides = [_aside(question, rng, spec) for _ in range(spec.distractors)]
    return " ".join([*asides, question_words])


def _listed(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _walk_text(question: Question, which: int) -> str:
    start = question["start"]
    if isinstance(start, str):
        at = f"with {plural(start)}"
    else:
        row, column = start[0] + 1, start[1] + 1
        if not question["moves"]:
            return _LOOK[which].format(row=row, column=column)
        at = f"in row {row}, column {column}"
    return _WALK[which].format(
        start=at, moves=", then ".join(f"one {m}" for m in question["moves"])
    )


def _aside(question: Question, rng: np.random.Generator, spec: ScenesSpec) -> str:
    """A number of things that has nothing to do with the picture."""
    start = question.get("start")
    kinds = question.get("kinds") or ([start] if isinstance(start, str) else ["cat"])
    count_text = counted(int(rng.integers(2, 10)), str(rng.choice(kinds)))
    return _ASIDE[_phrase(rng, spec)].format(counted=count_text)


def prompt_text(question: str, spec: ScenesSpec) -> str:
    """What the policy is asked; it tells how many places there are, and not what is there."""
    if spec.prompt == "brief":
        return question
    return (
        f"The picture has {spec.rows} x {spec.columns} places (rows x columns), each with some "
        f"things of one kind, or nothing. {question}\n"
        "First write down what you see, one row a line, places separated by commas, such as: "
        "2 cats, nothing, 1 tree. Then reason. Then answer with one number or one word. Blank "
        "lines and extra spaces do no harm. Use exactly this layout and nothing outside it:\n"
        "<perception>\nwhat is there, row by row\n</perception>\n"
        "<reasoning>\nyour reasoning\n</reasoning>\n"
        "<answer>\na number or a word\n</answer>"
    )


def reasons(scene: Scene, question: Question, style: Style) -> str:
    """From a scene to the answer, step by step."""
    verbose = style == "verbose"
    if question["ask"] == "walk":
        return _walk_reasons(scene, question, verbose)
    lines = [_count_reason(scene, kind, verbose) for kind in question["kinds"]]
    if question["ask"] == "compare":
        best = str(answer_of(scene, question))
        n = count(scene, best)
        last = f"There are most {plural(best)}: {n}." if verbose else f"most: {plural(best)}"
        return "\n".join([*lines, last])
    total = count(scene, question["kinds"][0])
    for sign, kind in zip(question["signs"][1:], question["kinds"][1:], strict=True):
        n, before = count(scene, kind), total
        total += sign * n
        word, mark = ("plus", "+") if sign > 0 else ("minus", "-")
        sentence = (
            f"{before} {word} {n} is {total}." if verbose else f"{before} {mark} {n} = {total}"
        )
        lines.append(sentence)
    return "\n".join(lines)


def _count_reason(scene: Scene, kind: str, verbose: bool) -> str:
    counts = [scene[r][c][0] for r, c in spots(scene, kind)]
    total = sum(counts)
    added = " + ".join(map(str, counts))
    if not verbose:
        return f"{plural(kind)}: " + (f"{added} = {total}" if len(counts) > 1 else f"{total}")
    where = [f"{scene[r][c][0]} in row {r + 1}, column {c + 1}" for r, c in spots(scene, kind)]
    together = f", together {added} = {total}" if len(counts) > 1 else ""
    return f"I look for {plural(kind)}: {' and '.join(where) or 'none'}{together}."


def _walk_reasons(scene: Scene, question: Question, verbose: bool) -> str:
    path = walked(scene, question) or []
    steps = []
    for (r, c), move in zip(path, ["", *question["moves"]], strict=True):
        here, at = place_text(*scene[r][c]), f"row {r + 1}, column {c + 1}"
        if not verbose:
            steps.append(f"{move or 'start'}: {at}: {here}")
        else:
            lead = f"One {move} is" if move else "I start at"
            steps.append(
                f"{lead} {at}, where there {'is' if scene[r][c][0] < 2 else 'are'} {here}."
            )
    return "\n".join(steps)
