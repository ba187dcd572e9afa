"""The checker `choice`: a letter, with or without the option's text, or that text alone.

`B`, `b`, `(B)`, `B.`, `Option B`, `B. 45` and, where the options are known, `45`. A letter beside
the text of another option, a second letter, "not B" and "A or B" are wrong. A lone letter is a
letter, also where some option's text is a letter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tasks.checkers.gold import Checker, Gold, option_fault
from tasks.checkers.quantity import read_quantity
from tasks.checkers.reading import normal, plain, tidy

LETTERS = "ABCDEFGHIJ"

_ALONE = re.compile(r"(?:(?:option|choice|answer)\s*)?[(\[]?([A-Ja-j])[)\]]?[.:,)]?", re.I)
_MARKED = re.compile(
    r"(?:(?:option|choice)\s+)?(?:\(([A-J])\)|\[([A-J])\]|([A-J])\s*[.:),]|([A-J])\s+[-–—])\s*(.+)",
    re.I | re.S,
)
_LETTER_AND_TEXT = re.compile(r"([A-J])\s+(.+)", re.S)
_OTHER_LETTER = re.compile(
    r"[(\[][A-Ja-j][)\]]|(?<![\w'])[B-HJ][.):,]|\b(?:or|and|not|nor|option|choice)\s+[A-J]\b"
    r"|^[A-J]\b[.)]?\s*(?:$|[,/&])"
)
_TEXT_AND_LETTER = re.compile(r"(.+?)\s*\(([A-J])\)", re.S)
_REASON = re.compile(r"(?:because|since)\b", re.I)
_DENIAL = re.compile(r"(?:no|not|none|neither|wrong|incorrect|false|maybe)\b", re.I)


class Choice(Checker):
    """See the module's docstring."""

    name = "choice"

    def right(self, answer: str, gold: Gold) -> bool:
        """Whether the answer names the gold's option, and no other."""
        tidied = tidy(answer)
        if tidied is None:
            return False
        texts = _texts(gold.choices)
        if (index := _option_index(tidied, texts)) is None:
            return False
        return any(index == _option_index(tidy(true) or "", texts) for true in gold.answers)

    def fault(self, gold: Gold) -> str | None:
        """A gold that is no option, options that are the same, several letters."""
        if not gold.answers:
            return "answer: none"
        texts = _texts(gold.choices)
        if len(texts) > len(LETTERS):
            return f"choices: {len(texts)}; at most {len(LETTERS)} have a letter"
        for true in gold.answers:
            index = _option_index(tidy(true) or "", texts)
            if index is None or (texts and index >= len(texts)):
                among = f"none of the {len(texts)} choices" if texts else "no letter"
                return f"answer {true[:40]!r}: {among}"
            if texts and sum(_alike(texts[index], text) for text in texts) > 1:
                return f"choices: {texts[index][:40]!r} is there twice"
        return option_fault(gold)


def _option_index(answer: str, texts: Sequence[str]) -> int | None:
    """The number of the one option that is named, from 0; None where that is not one."""
    answer = tidy(plain(answer)) or ""
    if (alone := _ALONE.fullmatch(answer)) is not None:
        index = LETTERS.index(alone[1].upper())
        return index if not texts or index < len(texts) else None
    named = [index for index, text in enumerate(texts) if _alike(answer, text)]
    if named:
        return named[0] if len(named) == 1 else None
    if (marked := _MARKED.fullmatch(answer)) is not None:
        index, rest = LETTERS.index(next(filter(None, marked.groups())).upper()), marked[5]
    elif texts and (bare := _LETTER_AND_TEXT.fullmatch(answer)) is not None:
        index, rest = LETTERS.index(bare[1]), bare[2]
        if index >= len(texts) or not _alike(rest, texts[index]):
            return None  # "A dog" is no letter
    elif texts and (behind := _TEXT_AND_LETTER.fullmatch(answer)) is not None:
        index, rest = LETTERS.index(behind[2]), behind[1]
    else:
        return None
    if not texts:
        return None if _OTHER_LETTER.search(rest) or _DENIAL.match(rest) else index
    if index >= len(texts):
        return None
    if _alike(rest, texts[index]):
        return index
    # What follows the letter is the option's text and more, or a reason, and names no other.
    option = normal(plain(texts[index]))
    others = [text for other, text in enumerate(texts) if other != index]
    if not (normal(rest).startswith(f"{option} ") or normal(rest).startswith(f"{option},")):
        others = others if _REASON.match(rest) else [rest]
    if _OTHER_LETTER.search(rest) or any(_holds(rest, text) for text in others):
        return None
    return index


def _texts(choices: Sequence[str]) -> list[str]:
    """The options without the letters that some data sets write before each."""
    marks = [re.match(r"\s*\(?([A-J])\s*[.):]\s*", choice) for choice in choices]
    if all(m is not None and m[1] == LETTERS[n] for n, m in enumerate(marks[: len(LETTERS)])):
        return [text[m.end() :] for text, m in zip(choices, marks, strict=True) if m is not None]
    return list(choices)


def _alike(answer: str, text: str) -> bool:
    """Whether a text is that of an option, or the same number."""
    one, other = plain(answer), plain(tidy(text) or text)
    if not one or not other:
        return False
    if normal(one) == normal(other):
        return True
    mine, gold_quantity = read_quantity(one), read_quantity(other)
    return mine is not None and gold_quantity is not None and mine.equals(gold_quantity)


def _holds(text: str, part: str) -> bool:
    """Whether a text has another as whole words in it."""
    return re.search(rf"(?<!\w){re.escape(normal(part))}(?!\w)", normal(text)) is not None
