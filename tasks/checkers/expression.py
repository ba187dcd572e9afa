"""The checker `expression`: numbers, LaTeX, sets, equations, up to equivalence.

Equal text and plain numbers are decided here; the rest by math-verify in a process of its own
(`tasks.checkers.algebra`). An answer is read whole: nothing is searched for in prose.

- A unit or `%` may be missing, but not be another one (`5 m` is not `5 cm`).
- `x = 5` is right for `5`; in a chain as `10/2 = 5` every part must be right.
- `a, b` and `{a, b}` are sets; where one side has brackets `(a, b)` the order counts, and
  where both have, their kind.
- A gold that is a word is right as that word, one that is a capital letter as a choice is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tasks.checkers.algebra import TooLong, equivalent
from tasks.checkers.choice import Choice
from tasks.checkers.gold import Checker, Gold, option_fault
from tasks.checkers.quantity import KNOWN_UNITS, read_quantity
from tasks.checkers.reading import normal, plain, tidy
from tasks.checkers.stated import states

MAX_CHARS = 300
MAX_PARTS = 8
"""Of a list."""
MAX_CHAIN = 3
"""Of a chain of equations; each may take the process its whole time."""
MAX_LOST = 3
"""Statements of a text that take too long, after which none of it is judged."""
MAX_DIGITS = 40
"""In a row; a longer number is no one's answer, and costs."""

_ALTERNATIVES = re.compile(
    r"(?<![A-Za-z])(?:or|either|maybe|versus|vs)(?![A-Za-z])|\\lor|\\vee|[?;]|.≈"
)
_NAME = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'?(?:\s*\([a-z]\))?|(?:\\angle|∠|m\\angle)\s*\w+")
_WORDS = re.compile(r"[^\W\d_]{3,}(?:[\s-]+[^\W\d_]+)*")
_WORD = re.compile(r"(?<![\\a-z])[a-z]{3,}")
_LATEX_NAMES = ("sin", "cos", "tan", "cot", "log", "ln", "exp", "min", "max", "gcd")
_FUNCTIONS = frozenset((*_LATEX_NAMES, "sqrt", "lcm", "mod"))
_UNIT_BEHIND = re.compile(r"(?<=[\w)}\]°])\s+([^\W\d_]+(?:\s*/\s*[^\W\d_]+)?(?:\^?\{?[23]\}?)?)$")
_SAME = (
    (re.compile(r"[²]"), "^2"),
    (re.compile(r"[³]"), "^3"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])|π"), r"\\pi "),
    (re.compile(r"√\s*(\d+|\w)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(rf"(?<![\\A-Za-z])({'|'.join(_LATEX_NAMES)})(?![A-Za-z])"), r"\\\1 "),
    (re.compile(r"×"), r"\\times "),
    (re.compile(r"∞"), r"\\infty "),
    (re.compile(r"≤|<="), r"\\le "),
    (re.compile(r"≥|>="), r"\\ge "),
)
_INEQUALITY = re.compile(r"[<>≤≥]|\\[lg](?:eq?|t)(?![A-Za-z])")
_RELATION = re.compile(r"[<>≤≥=∪∈]|\\(?:leq?|geq?|lt|gt|cup|in)(?![A-Za-z])")
_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
_LETTER = re.compile(r"\(?[A-J]\)?\.?")


class Expression(Checker):
    """See the module's docstring."""

    name = "expression"

    def right(self, answer: str, gold: Gold) -> bool:
        """Whether the answer is equivalent to a gold."""
        try:
            return self._right(answer, gold)
        except TooLong:
            return False

    def fault(self, gold: Gold) -> str | None:
        """No gold, one that is too long, or prose."""
        for true in gold.answers:
            tidied = tidy(true)
            if tidied is None:
                return f"answer {true[:40]!r}: empty, or holds several that differ"
            if len(tidied) > MAX_CHARS:
                return f"answer: longer than {MAX_CHARS} characters; is the checker text?"
            if len(plain(tidied).split()) > 8 and _WORDS.match(plain(tidied)):
                return f"answer {true[:40]!r}: prose; the checker is text"
        return option_fault(gold) if gold.answers else "answer: none"

    def states(self, text: str, gold: Gold) -> bool:
        """Whether prose gives it, or what is equivalent to it, as the answer."""
        lost = 0

        def right(candidate: str) -> bool:
            nonlocal lost
            try:
                return lost < MAX_LOST and self._right(candidate, gold)
            except TooLong:
                lost += 1
                return False

        return states(text, right)

    def _right(self, answer: str, gold: Gold) -> bool:
        tidied = tidy(answer)
        return tidied is not None and any(
            _right(tidied, answer, true, gold.choices) for true in gold.answers
        )


def _right(tidied: str, answer: str, gold: str, choices: tuple[str, ...]) -> bool:
    true = tidy(gold)
    if true is None:
        return False
    if _LETTER.fullmatch(true):
        return Choice().right(answer, Gold((true,), choices))
    one, other = tidy(plain(tidied)) or "", tidy(plain(true)) or ""
    if one == other:
        return bool(one)
    if _WORDS.fullmatch(other) or _WORDS.fullmatch(one):
        number, gold_quantity = read_quantity(one), read_quantity(other)
        if number is None or gold_quantity is None:
            return normal(one) == normal(other)
    if len(one) > MAX_CHARS or re.search(rf"\d{{{MAX_DIGITS},}}", one):
        return False
    if _ALTERNATIVES.search(one) and not _ALTERNATIVES.search(other):
        return False
    if len(_split(one, "=")) > 1 and "=" not in other and not _INEQUALITY.search(one):
        return _chain(one, other)
    return _same(one, other)


def _chain(answer: str, gold: str) -> bool:
    """`x = 10/2 = 5` for `5`: a name may come first, and all that follows is right."""
    _, items = _parts(answer)
    named = [item.partition("=") for item in items]
    if len(items) > 1 and len({name.strip() for name, _, _ in named}) == 1:
        return _same(", ".join(value for _, _, value in named), gold)  # x = 1, x = 2
    first, *rest = _split(answer, "=")
    parts = rest if _NAME.fullmatch(first) else [first, *rest]
    return len(parts) <= MAX_CHAIN and all(part and _same(part, gold) for part in parts)


def _same(answer: str, gold: str) -> bool:
    """Of two answers that are no chain."""
    if (verdict := _as_numbers(answer, gold)) is not None:
        return verdict
    answer, unit = _without_unit(answer)
    gold, own_unit = _without_unit(gold)
    if unit and own_unit and unit != own_unit:
        return False
    (said_kind, parts), (kind, gold_parts) = _parts(answer), _parts(gold)
    if len(gold_parts) == len(parts) == 1 or _RELATION.search(answer) or _RELATION.search(gold):
        return all(_alike([(gold, answer)]))
    if (
        len(parts) != len(gold_parts)
        or len(gold_parts) > MAX_PARTS
        or (said_kind != kind and said_kind and kind)
    ):
        return False
    if {kind, said_kind} <= {"", "{}"}:
        verdicts = _alike([(true, part) for true in gold_parts for part in parts])
        return _paired(
            [verdicts[n : n + len(gold_parts)] for n in range(0, len(verdicts), len(gold_parts))]
        )
    return all(_alike(list(zip(gold_parts, parts, strict=True))))


def _as_numbers(answer: str, gold: str) -> bool | None:
    """The verdict of two plain numbers, or of two tuples of them; None where they are not."""
    mine, gold_quantity = read_quantity(answer), read_quantity(gold)
    if mine is not None and gold_quantity is not None:
        return mine.equals(gold_quantity)
    if answer[:1] != "(" or gold[:1] != "(":
        return None
    (kind, parts), (own_kind, own_parts) = _parts(answer), _parts(gold)
    verdicts = [_as_numbers(part, true) for part, true in zip(parts, own_parts, strict=False)]
    if not kind or None in verdicts:
        return None
    return kind == own_kind and len(parts) == len(own_parts) and all(verdicts)


def _at_once(answer: str, gold: str) -> bool | None:
    """The verdict where it needs no process. Words are no products of their letters."""
    if gold == answer and gold:
        return True
    if _spelled_out(answer) != _spelled_out(gold):
        return False
    return _as_numbers(answer, gold)


def _spelled_out(text: str) -> list[str]:
    return sorted(word for word in _WORD.findall(normal(text)) if word not in _FUNCTIONS)


def _alike(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """A verdict a pair, (gold, said), of expressions that are no lists."""
    known = [_at_once(answer, gold) for gold, answer in pairs]
    undecided = [pair for pair, verdict in zip(pairs, known, strict=True) if verdict is None]
    verdicts = iter(
        equivalent(tuple((_for_process(gold), _for_process(answer)) for gold, answer in undecided))
        if undecided
        else ()
    )
    return [next(verdicts) if verdict is None else verdict for verdict in known]


def _paired(table: list[Sequence[bool]]) -> bool:
    """Whether rows and columns pair up; any free one will do, since equivalence is transitive."""
    free = set(range(len(table)))
    for row in table:
        column = next((c for c in sorted(free) if row[c]), None)
        if column is None:
            return False
        free.remove(column)
    return True


def _without_unit(text: str) -> tuple[str, str]:
    """`24\\pi cm^2` as `24\\pi` and `cm^2`; a variable is no unit unless it is one's name."""
    if (unit_match := _UNIT_BEHIND.search(text)) is None:
        return text, ""
    quantity = read_quantity(f"1 {unit_match[1]}")
    base = re.split(r"[\^/{23]", unit_match[1].lower())[0]
    known = {base, base.removesuffix("s")} & KNOWN_UNITS if len(base) > 1 else base in "mgsh"
    if quantity is None or not known:
        return text, ""
    return text[: unit_match.start()].strip(), quantity.unit


def _parts(text: str) -> tuple[str, list[str]]:
    """The brackets around a list (none, `()`, `[]`, `(]`, `[)`, `{}`) and what commas part."""
    text = text.strip()
    if text.startswith(r"\{") and text.endswith(r"\}"):
        text = "{" + text[2:-2] + "}"
    if text[:1] in _OPENING and text[-1:] in _CLOSING and len(inside := _split(text[1:-1])) > 1:
        return text[0] + text[-1], inside
    return "", _split(text) or [text]


def _split(text: str, mark: str = ",") -> list[str]:
    """What a mark outside brackets parts; [] where a bracket is closed that was never opened."""
    depth, parts, start = 0, list[str](), 0
    for at, char in enumerate(text):
        depth += (char in _OPENING) - (char in _CLOSING)
        if depth < 0:
            return []
        if char == mark and not depth:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]


def _for_process(text: str) -> str:
    for pattern, instead in _SAME:
        text = pattern.sub(instead, text)
    return text
