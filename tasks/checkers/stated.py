"""Whether prose states an answer: what `Checker.states` is made of.

To state is to give something *as the answer*; to mention it is not. A perception that lists the
numbers of a chart mentions the answer of most questions on it, and an honest one must. Stated is

- a text that is an answer and nothing else, or whose last line is;
- what follows "(the) answer is", "answer:", "result is", "solution:", to the end of the sentence;
- the contents of `\\boxed{}` and of `<answer>`;
- how a conclusion ends: in a sentence after "therefore", "thus", "hence" or "so", what follows its
  last "is", "are", "equals", "=" or "gives".

So "The final answer is 3.75." states 3.75, 15/4 and, where that is option B, B. What cannot be
told: a bare mention that gives the answer away ("The bar of 2015, the tallest, is at 40"), a
conclusion in other words ("which brings us to 40") and languages other than English. And a text
read off the image that says "the answer is 4" itself counts as stating it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from tasks.checkers.reading import boxes

MAX_CHARS = 20_000
MAX_CANDIDATES = 64
"""Of a text, the last ones."""

_ANSWER = re.compile(
    r"\b(?:answer|result|solution)s?\b[^.\n:=]{0,40}?(?:\bis\b|\bare\b|\bequals\b|:|=)\s*:?\s*",
    re.I,
)
_CONCLUSION = re.compile(r"(?:\b(?:therefore|thus|hence|so)\b|∴)[,:]?\s+", re.I)
_VERB = re.compile(r"(?:\b(?:is|are|equals|gives)\b|=|≈)\s*", re.I)
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$)|\n|$")
_TAG = re.compile(r"<answer>([^<]{0,2000})</answer>")


def states(text: str, right: Callable[[str], bool]) -> bool:
    """Whether any statement in the text is right."""
    if not text.strip() or len(text) > MAX_CHARS:
        text = text[-MAX_CHARS:]
    candidates = list(dict.fromkeys(c for c in _candidates(text) if c))
    return any(right(candidate) for candidate in candidates[-MAX_CANDIDATES:])


def _candidates(text: str) -> Iterator[str]:
    yield from (contents for _, _, contents in boxes(text) if contents)
    yield from (tag[1].strip() for tag in _TAG.finditer(text))
    for marker in _ANSWER.finditer(text):
        yield from _readings(_sentence(text, marker.end()))
    for marker in _CONCLUSION.finditer(text):
        sentence = _sentence(text, marker.end())
        verbs = list(_VERB.finditer(sentence))
        if verbs:
            yield from _readings(sentence[verbs[-1].end() :])
    lines = text.strip().splitlines()
    yield from (text.strip(), lines[-1].strip()) if lines else ()


def _sentence(text: str, start: int) -> str:
    end = _SENTENCE_END.search(text, start)
    assert end is not None  # the end of the text is one
    return text[start : end.start()]


def _readings(clause: str) -> Iterator[str]:
    """A clause, and it up to where a reason or an aside begins."""
    clause = clause.strip()
    yield clause
    if (aside := re.search(r",\s|\s(?:because|since|as|which|where)\s|\s\(", clause)) is not None:
        yield clause[: aside.start()].strip()
