"""The checker `number`: one number, exact or within a relative `tolerance`.

As ChartQA is judged with `tolerance = 0.05`: a gold that is no number is right as the same text. A
tolerance is relative whatever the number says, so it takes 2010 for 2015; ask for years by `text`.
"""

from __future__ import annotations

from fractions import Fraction

from tasks.checkers.gold import Checker, Gold, option_fault
from tasks.checkers.quantity import Quantity, read_quantity
from tasks.checkers.reading import normal, plain, tidy


class Number(Checker):
    """See the module's docstring, and `tasks.checkers.quantity` for what is read as a number."""

    name = "number"

    def right(self, answer: str, gold: Gold) -> bool:
        """Whether the answer is one number, and near enough to a gold."""
        tidied = tidy(answer)
        if tidied is None:
            return False
        tolerance = Fraction(str(gold.options.get("tolerance", 0)))
        quantity = _quantity_of(tidied)
        for true in gold.answers:
            gold_quantity = _quantity_of(tidy(true) or "")
            if gold_quantity is None:
                if normal(plain(tidied)) == normal(plain(tidy(true) or "")):
                    return True
            elif quantity is not None and quantity.equals(gold_quantity, tolerance):
                return True
        return False

    def fault(self, gold: Gold) -> str | None:
        """No gold."""
        if not gold.answers or any(tidy(true) is None for true in gold.answers):
            return "answer: empty, or holds several that differ"
        return option_fault(gold, tolerance=1.0)


def _quantity_of(text: str) -> Quantity | None:
    """`x = 5` and `(5)` too."""
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1]
    name, equals, value = text.partition("=")
    if equals and len(name.strip()) <= 2 and name.strip().isalpha():
        text = value
    return read_quantity(text, any_unit=True)
