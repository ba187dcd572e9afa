"""From the text of an answer segment to the one answer in it; linear time, never raising."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

MAX_CHARS = 2000
"""A longer answer is not right, whatever it says."""
_MAX_WRAPPERS = 8

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_INVISIBLE = re.compile(r"[\u200b-\u200d\u2060\ufeff]")
_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.S)
_LEAD = re.compile(
    r"(?:(?:so|thus|therefore|hence),?\s+)?(?:(?:the|my)\s+)?(?:(?:final|correct|right|best)\s+)?"
    r"(?:answer|result|solution|option|choice)\s*(?:\bis\b\s*:?|:|=)\s*",
    re.I,
)
_WRAPPERS = (
    ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"),
    ('"', '"'), ("“", "”"), ("<answer>", "</answer>"),
)  # fmt: skip
_UNWRAP = re.compile(r"\\(?:text|mathrm|textbf|textrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_PLAIN = (
    (re.compile(r"\\(?:left|right|big|Big|displaystyle)(?![A-Za-z])"), ""),
    (re.compile(r"\\[,;:! ]|~|\\q?quad(?![A-Za-z])"), " "),
    (re.compile(r"\\([%$#&_])"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?|\\degrees?(?![A-Za-z])"), "°"),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "×"),
    (re.compile(r"\\approx(?![A-Za-z])"), "≈"),
    (re.compile(r"[−–]"), "-"),
)


def boxes(text: str) -> Iterator[tuple[int, int, str | None]]:
    r"""(start, end, contents) of each outermost `\boxed{...}`; None where it is never closed."""
    at = 0
    while (box := _BOX.search(text, at)) is not None:
        depth, at = 1, len(text)
        for brace in _BRACE.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if not depth:
                at = brace.end()
                break
        yield box.start(), at, None if depth else text[box.end() : at - 1].strip()


def tidy(answer: str) -> str | None:
    """The answer without what people write around one; None where there is none, or several.

    A box, `$`, bold, quotes, "The answer is" and a full stop are taken off. Boxes that differ
    contradict one another.
    """
    if len(answer) > MAX_CHARS or _CONTROL.search(answer):
        return None
    text = _INVISIBLE.sub("", answer).strip()
    for _ in range(_MAX_WRAPPERS):
        before, contents = text, [inner for _, _, inner in boxes(text)]
        closed = {" ".join(inner.split()) for inner in contents if inner is not None}
        if len(closed) > 1 or None in contents:
            return None
        text = next(iter(closed), text)
        text = text if (lead := _LEAD.match(text)) is None else text[lead.end() :]
        for opening, closing in _WRAPPERS:
            inner = text[len(opening) : len(text) - len(closing)].strip()
            if text.startswith(opening) and text.endswith(closing) and opening not in inner:
                text = inner if len(text) >= len(opening) + len(closing) else ""
        text = text.strip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        if text == before:
            break
    return text or None


def plain(text: str) -> str:
    """LaTeX of layout and text taken off: what is left says the same."""
    for pattern, instead in _PLAIN:
        text = pattern.sub(instead, text)
    return " ".join(_UNWRAP.sub(r" \1 ", text).split())


def normal(text: str) -> str:
    """A text up to case, white space, compatible characters and the punctuation around it."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip(" .,;:!?\"'“”‘’") or folded
