"""What holds of every checker: hostile text, alternatives, faults, statements in prose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.checkers import CHECKERS, Gold
from tasks.checkers.algebra import Algebra
from tasks.checkers.boxes import iou, matched
from tasks.checkers.quantity import read_quantity
from tasks.checkers.reading import boxes, tidy

GOLDS = {
    "expression": Gold(("1.5",)),
    "choice": Gold(("B",), ("30", "45")),
    "number": Gold(("12",), options={"tolerance": 0.05}),
    "text": Gold(("Paris",), options={"threshold": 0.5}),
    "box": Gold(("[10, 20, 30, 40]",)),
    "point": Gold(("[10, 20, 30, 40]",)),
}
HOSTILE = {
    "tower": "9**9**9",
    "latex tower": "9^{9^{9^{9^9}}}",
    "long number": "9" * 100_000,
    "product": "*".join(["(x+1)"] * 40),
    "factorials": "99999!!!!",
    "nested fractions": r"\frac{1}{" * 2000 + "1" + "}" * 2000,
    "nested boxes": r"\boxed{" * 5000 + "1.5" + "}" * 5000,
    "unclosed": r"\boxed{" * 100_000,
    "NUL": "1.5\0",
    "a megabyte": "1.5 " * 250_000,
    "a megabyte of brackets": "[" * 1_000_000,
    "a megabyte of dollars": "$" * 1_000_000,
    "surrogate": "\ud800",
    "code": "().__class__.__bases__[0].__subclasses__()",
    "every letter": "A or B or C or D",
    "nothing": "",
    "white": " \n\t ",
    "huge exponent": "1e999",
    "commas": "," * 1000,
    "sums": "+".join("9" * 30 for _ in range(9)),
    "integral": r"\int_0^1 \int_0^1 \sin(x^{99} e^{x}) \log(\tan(x)) dx dx",
}


@pytest.fixture(scope="module", autouse=True)
def short_deadline() -> Iterator[None]:
    """What never ends is told from what does in less than the two seconds of real use."""
    with pytest.MonkeyPatch.context() as patch:
        made = Algebra(cpu_seconds=0.5)
        patch.setattr("tasks.checkers.algebra._ALGEBRA", made)
        yield
        made.close()


@pytest.mark.parametrize("name", CHECKERS)
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_judged_and_never_right(name: str, text: str) -> None:
    checker, gold = CHECKERS[name], GOLDS[name]
    assert checker.right(text, gold) is False
    assert checker.states(text, gold) is False


@pytest.mark.parametrize("name", CHECKERS)
@given(text=st.text(max_size=60))
@settings(max_examples=60)
def test_any_text_is_judged_without_raising(name: str, text: str) -> None:
    checker, gold = CHECKERS[name], GOLDS[name]
    if name == "expression" and re.search(r"[^\W\d_]", text):
        text = re.sub(r"[^\W\d_]", "", text)  # few go to the process, whose tests are elsewhere
    assert checker.right(text, gold) in (True, False)
    assert checker.fault(Gold((text,))) is None or "\n" not in str(checker.fault(Gold((text,))))


@pytest.mark.parametrize("name", CHECKERS)
def test_any_of_several_golds_is_right_and_none_is_a_fault(name: str) -> None:
    checker, gold = CHECKERS[name], GOLDS[name]
    said = "(20, 30)" if name == "point" else gold.answers[0]
    other = {"box": "[0, 0, 1, 1]", "point": "[0, 0, 1, 1]", "choice": "A"}.get(name, "77")
    several = Gold((other, *gold.answers), gold.choices, gold.options)
    assert checker.right(said, gold) and checker.right(said, several)
    assert not checker.right(said, Gold((other,), gold.choices, gold.options))
    assert checker.fault(gold) is None and checker.fault(several) is None
    assert checker.fault(Gold(())) is not None


@pytest.mark.parametrize(
    ("name", "gold", "said"),
    [
        ("expression", Gold(("",)), "empty"),
        ("expression", Gold((r"\boxed{1} \boxed{2}",)), "several"),
        ("expression", Gold(("The bar on the left is a little higher than the others",)), "prose"),
        ("choice", Gold(("E",), ("1", "2")), "none of the 2 choices"),
        ("choice", Gold(("dog",)), "no letter"),
        ("choice", Gold(("A",), ("1", "1")), "twice"),
        ("number", Gold(("1",), options={"tolerance": 5}), "from 0 to 1"),
        ("number", Gold(("1",), options={"tolerances": 0.1}), "'tolerances'"),
        ("number", Gold(("1",), options={"tolerance": "5%"}), "must be a number"),
        ("text", Gold(("Paris", " ")), "empty"),
        ("box", Gold(("[3, 4, 1, 2]",)), "x1 < x2"),
        ("point", Gold(("(1, 2)",)), "x1 < x2"),
    ],
)
def test_faults_of_golds_are_named(name: str, gold: Gold, said: str) -> None:
    assert said in (CHECKERS[name].fault(gold) or "")


@pytest.mark.parametrize(
    ("name", "answer", "choices", "text", "stated"),
    [
        ("number", "3.75", (), "The final answer is 3.75.", True),
        ("expression", "15/4", (), "The final answer is 3.75.", True),
        ("expression", "3.75", (), "So the area is 15/4.", True),
        ("expression", "3.75", (), "Thus x = \\frac{15}{4}", True),
        ("number", "3.75", (), "The bars are at 1, 3.75 and 8.", False),
        ("number", "3.75", (), "2015: 3.75\n2016: 8", False),
        ("number", "3.75", (), "3.75", True),
        ("number", "3.75", (), "A chart with two bars.\n3.75", True),
        ("number", "3.75", (), "The answer is not 3.75.", False),
        ("number", "3.75", (), "The answer is 8.", False),
        ("number", "3.75", (), "It says \\boxed{3.75} there", True),
        ("number", "12", (), "Answer: 12, because there are 3 rows of 4.", True),
        ("number", "12", (), "The result of both is twelve.", True),
        ("choice", "B", ("30", "45"), "The answer is (B).", True),
        ("choice", "B", ("30", "45"), "The correct answer is 45 degrees.", True),
        ("choice", "B", ("30", "45"), "Angles of 30 and 45 degrees at B.", False),
        ("choice", "B", ("30", "45"), "Options: (A) 30 (B) 45", False),
        ("choice", "B", ("a red car", "a dog"), "Hence it is a dog", True),
        ("choice", "B", ("a red car", "a dog"), "In front of a house stands a dog.", False),
        ("text", "Paris", (), "The map shows Paris and Rome.", False),
        ("text", "Paris", (), "The answer is Paris", True),
        ("box", "[10, 20, 30, 40]", (), "The answer is [10, 20, 30, 40].", True),
        ("box", "[10, 20, 30, 40]", (), "A dog at [10, 20, 30, 40], a cat at [1, 2, 3, 4].", False),
        ("point", "[10, 20, 30, 40]", (), "The answer: (20, 30)", True),
    ],
)
def test_what_states_an_answer_and_what_mentions_it(
    name: str, answer: str, choices: tuple[str, ...], text: str, stated: bool
) -> None:
    assert CHECKERS[name].states(text, Gold((answer,), choices)) is stated


def test_a_statement_is_found_among_decoys_and_hostile_ones_cost_little() -> None:
    checker, gold = CHECKERS["expression"], Gold((r"\frac{\sqrt{3}}{2}",))
    endless = [f"The answer is 9^{{9^{{9^{n}}}}}." for n in range(90, 110)]
    decoys = [f"The answer is {n}." for n in range(40)]
    assert checker.states(" ".join(["The answer is sqrt(3)/2.", *decoys]), gold)
    assert not checker.states(" ".join([*endless, *decoys]), gold)


def test_iou_and_matching_agree_with_a_raster_and_with_trying_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        corners = rng.integers(0, 20, size=(2, 2, 2))
        one, other = (
            (int(c[0].min()), int(c[1].min()), int(c[0].max()) + 1, int(c[1].max()) + 1)
            for c in corners
        )
        masks = np.zeros((2, 24, 24), bool)
        for mask, (left, top, right, bottom) in zip(masks, (one, other), strict=True):
            mask[top:bottom, left:right] = True
        raster = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
        assert iou(one, other) == pytest.approx(raster)
    three = [(0.0, 0.0, 10.0, 10.0), (5.0, 0.0, 15.0, 10.0), (20.0, 0.0, 30.0, 10.0)]
    two = [(4.0, 0.0, 14.0, 10.0), (0.0, 0.0, 10.0, 10.0)]
    best = max(
        iou(two[0], three[a]) + iou(two[1], three[b]) for a in range(3) for b in range(3) if a != b
    )
    assert matched(two, three).sum() == pytest.approx(best)


@given(st.fractions(max_denominator=999), st.integers(-3, 3))
@example(Fraction(0), 0)
def test_numbers_are_read_back_however_they_are_written(value: Fraction, power: int) -> None:
    scaled = value * Fraction(10) ** power
    assert read_quantity(f"{value.numerator}/{value.denominator}").value == value  # type: ignore[union-attr]
    whole = value.numerator
    for text in (f"{whole:,}", f"{whole}.0", f"{whole}e0", f" {whole} ", f"{whole} cm"):
        assert read_quantity(text).value == whole  # type: ignore[union-attr]
    shifted = read_quantity(f"{whole}e{power}")
    assert shifted is not None and shifted.value == whole * Fraction(10) ** power
    assert scaled == value * Fraction(10) ** power


LISTS = st.tuples(
    st.lists(st.integers(-3, 5), min_size=2, max_size=4),
    st.sampled_from(["", "{}", "()", "[]", "(]"]),
)


@given(LISTS, LISTS, st.booleans())
def test_lists_are_sets_or_tuples_by_their_brackets(
    said: tuple[list[int], str], true: tuple[list[int], str], same: bool
) -> None:
    (mine, kind), (own, own_kind) = said, true
    mine = sorted(own) if same else mine
    texts = [
        f"{brackets[:1]}{', '.join(map(str, numbers))}{brackets[1:]}"
        for numbers, brackets in ((mine, kind), (own, own_kind))
    ]
    if kind and own_kind and kind != own_kind:
        expected = False
    elif {kind, own_kind} <= {"", "{}"}:
        expected = sorted(mine) == sorted(own)
    else:
        expected = mine == own
    assert CHECKERS["expression"].right(texts[0], Gold((texts[1],))) is expected


@given(st.text(alphabet="a{}\\b ", max_size=30))
def test_a_box_holds_what_was_put_in_it(inside: str) -> None:
    balanced = list(boxes(f"\\boxed{{{inside}}}"))
    depth = 0
    for mark in re.findall(r"\\.|[{}]", inside, re.S):
        depth += {"{": 1, "}": -1}.get(mark, 0)
        if depth < 0:
            return
    ends_open = re.sub(r"\\.", "", inside, flags=re.S).endswith("\\")
    if depth == 0 and not ends_open:
        assert balanced == [(0, len(inside) + 8, inside.strip())]
        assert tidy(f"so \\boxed{{{inside}}}.") == tidy(f"\\boxed{{{inside}}}")
    elif depth > 0 and not ends_open:
        assert balanced[0][2] is None
