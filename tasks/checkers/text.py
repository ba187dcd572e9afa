"""The checker `text`: the same words as a gold, or nearly so by ANLS.

With `threshold` (DocVQA's is 0.5) the average normalised Levenshtein similarity counts, 1 -
distance / length of the longer, and 0 below the threshold (Biten et al. 2019, "Scene Text Visual
Question Answering"). Then an answer is right from the threshold on.
"""

from __future__ import annotations

from rapidfuzz.distance import Levenshtein

from tasks.checkers.gold import Checker, Gold, number_option, option_fault
from tasks.checkers.reading import normal, plain, tidy


class Text(Checker):
    """See the module's docstring."""

    name = "text"

    def right(self, answer: str, gold: Gold) -> bool:
        """Whether the answer is a gold up to case, white space and punctuation around it.

        With `threshold`: whether it is as similar to one.
        """
        tidied, similarity = tidy(answer), 0.0
        for true in gold.answers:
            if tidied is None or not normal(answer):
                break
            for mine in (tidied, answer):  # a gold may begin with what `tidy` takes off
                one, other = normal(plain(mine)), normal(plain(true))
                if one and other:
                    similarity = max(similarity, Levenshtein.normalized_similarity(one, other))
        return 0 < similarity >= number_option(gold, "threshold", 1.0)

    def fault(self, gold: Gold) -> str | None:
        """No gold, or an empty one."""
        if not gold.answers or not all(map(normal, gold.answers)):
            return "answer: empty"
        return option_fault(gold, threshold=1.0)
