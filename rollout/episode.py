"""An episode as tokens: what the policy and an environment wrote so far, and what still fits.

Nothing here imports an engine. Two lists of ids grow together: the one that an engine is asked
with, where an image is one placeholder, and the response as the learner reads it, expanded. Both
are made of the same pieces and one list of images, and nothing is ever taken away from either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rollout.record import Turn, acts
from rollout.settings import EnvironmentConfig
from rollout.tokens import Chat, label_segments
from tasks.core import ACT, ENVIRONMENT, NO_SEGMENT, Parsed
from tasks.environments import DONE, Observation
from tasks.images import check_image

End = Literal[
    "stop",
    "length",
    "turn_budget",
    "image_budget",
    "image_token_budget",
    "context_budget",
    "time_budget",
    "environment",
]
"""Why an episode is over: the environment is done; its tokens are used up, or a token ended a turn
that is none of the chat's ends; what the environment said did not fit whole and was not added; it
took too long in all; it failed."""


@dataclass(frozen=True)
class Budgets:
    """What an episode may take, its first turn included.

    Attributes:
        turns: of the policy.
        tokens: that the policy writes.
        images, image_tokens: that the environment shows; the prompt's own do not count.
        context: tokens of the whole sequence.
        seconds: that the environment takes.
    """

    turns: int
    tokens: int
    images: int
    image_tokens: int
    context: int
    seconds: float

    @classmethod
    def of(cls, config: EnvironmentConfig, tokens: int, context: int) -> Budgets:
        """Those of a recipe's [environment], for a policy that writes so many tokens in all."""
        chosen = config.model_dump(include={"turns", "images", "image_tokens", "seconds"})
        return cls(tokens=tokens, context=context, **chosen)


class Episode:
    """One response on its way."""

    def __init__(
        self,
        chat: Chat,
        budgets: Budgets,
        asked: Sequence[int],
        prompt_length: int,
        images: Sequence[bytes],
    ) -> None:
        """`asked`: the prompt with a placeholder an image, of `prompt_length` tokens expanded."""
        self._chat, self._budgets = chat, budgets
        self._prompt_length, self._own_images = prompt_length, len(images)
        self._image_tokens = 0
        self.asked, self.images = [*asked], [*images]
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.written: list[bool] = []
        self.turns: list[Turn] = []
        self.seconds = 0.0
        """That the environment took so far, as the caller knows."""
        self.end: End | None = None

    @property
    def room(self) -> int:
        """How many tokens the policy may write now."""
        return max(0, min(self._budgets.tokens - sum(self.written), self._context_left))

    @property
    def _context_left(self) -> int:
        """How many tokens of whatever kind the sequence may still grow by."""
        return self._budgets.context - self._prompt_length - len(self.ids)

    def said(self, ids: Sequence[int], logprobs: Sequence[float], versions: Sequence[int]) -> str:
        """Add a turn of the policy, as it was sampled; its text, for the environment."""
        self.asked += ids
        self.ids += ids
        self.logprobs += logprobs
        self.versions += versions
        self.written += [True] * len(ids)
        ended = bool(ids) and ids[-1] in self._chat.ends
        if not ended:
            self.end = "length"
        text: str = self._chat.decoder.decode(ids[:-1] if ended else ids)[0]
        self.turns.append(Turn(text))
        return text

    def told(self, observation: Observation) -> None:
        """Add what the environment says to the last turn, whole, or end the episode.

        Raises DataError for an image that cannot be used, or a text that cannot be read.
        """
        self.turns[-1] = replace(
            self.turns[-1],
            called=observation != DONE,
            reward=observation.reward,
            defects=observation.defects,
        )
        pictures = [check_image(image, "image of the environment") for image in observation.images]
        sizes = [picture.size for picture in pictures]
        placeholder = self._chat.image_token
        visual = sum(i == placeholder for size in sizes for i in self._chat.image_block(size))
        parts = [*observation.images, *([observation.text] if observation.text else [])]
        between = self._chat.turn(parts, self.ids[-1], observation.role)
        expanded = self._chat.expanded(between, sizes)
        limits: tuple[tuple[End, float, float], ...] = (
            ("stop", observation.done, 0),
            ("turn_budget", len(self.turns) + 1, self._budgets.turns),
            ("time_budget", self.seconds, self._budgets.seconds),
            (
                "image_budget",
                len(self.images) - self._own_images + len(sizes),
                self._budgets.images,
            ),
            ("image_token_budget", self._image_tokens + visual, self._budgets.image_tokens),
            ("length", sum(self.written) + 1, self._budgets.tokens),
            ("context_budget", len(expanded) + 1, self._context_left),
        )
        self.end = next((end for end, needed, most in limits if needed > most), None)
        if self.end:
            return
        self.turns[-1] = replace(self.turns[-1], said=observation.text, images=len(sizes))
        self._image_tokens += visual
        self.images += observation.images
        self.asked += between
        self.ids += expanded
        self.logprobs += [0.0] * len(expanded)
        self.versions += [self.versions[-1]] * len(expanded)
        self.written += [False] * len(expanded)

    def read(self) -> tuple[str, np.ndarray, np.ndarray]:
        """(text, int32 [n+1] offsets, int64 [n] places): all that the policy wrote, end to end.

        The ends of its turns make no text. `places` are those of its tokens in `ids`.
        """
        places = np.flatnonzero(self.written)
        ids = np.asarray(self.ids, np.int32)[places]
        parts, offsets, length = [], [0], 0
        start = 0
        stops = [i + 1 for i, token in enumerate(ids.tolist()) if token in self._chat.ends]
        for stop in [*stops, *([len(ids)] if not stops or stops[-1] < len(ids) else [])]:
            turn = ids[start:stop]
            ended = len(turn) > 0 and int(turn[-1]) in self._chat.ends
            text, of_turn = self._chat.decoder.decode(turn[:-1] if ended else turn)
            parts.append(text)
            offsets += (of_turn[1:] + length).tolist()
            length += len(text)
            offsets += [length] * ended
            start = stop
        return "".join(parts), np.asarray(offsets, np.int32), places

    def labelled(self, parsed: Parsed, offsets: np.ndarray, shift: int = 0) -> np.ndarray:
        """int8 [T] of the response: the segments that its text was parsed to.

        What a later turn says again is of its segment in the earlier turns too, and a call is
        `act` wherever it stands. `offsets`: of `read`; `shift`: how many characters of what was
        parsed come before that text.
        """
        own = label_segments(offsets, parsed.spans, shift)
        for said in parsed.earlier:
            before = label_segments(offsets, said.spans, shift)
            own = np.where(own == NO_SEGMENT, before, own)
        for span in acts(self.turns):
            own = np.where(label_segments(offsets, {"act": span}) == ACT, ACT, own)
        return self.segments(own)

    def segments(self, of_written: np.ndarray) -> np.ndarray:
        """int8 [T] of the response: those of the policy's tokens, and `ENVIRONMENT`.

        The end of a turn is of no segment, though the next turn's may begin at its character.
        """
        found = np.full(len(self.ids), ENVIRONMENT, np.int8)
        found[np.flatnonzero(self.written)] = of_written
        ends = np.isin(self.ids, [*self._chat.ends])
        found[ends & np.asarray(self.written, bool)] = NO_SEGMENT
        return found


def drift(
    chat: Chat, prompt: Sequence[int], response: Sequence[int], sizes: Sequence[tuple[int, int]]
) -> str:
    """How the image tokens of a sequence are not those of its images, in words; "" where they are.

    The last token is only ever a target.
    """
    known = [*prompt, *response[:-1]]
    blocks = [chat.image_block(size) for size in sizes]
    left = iter(known)
    for place, block in enumerate(blocks):
        wanted = block.count(chat.image_token)  # type: ignore[arg-type]
        found = 0
        for token in left:
            found += token == chat.image_token
            if found == wanted:
                break
        if found != wanted:
            return f"image {place} has {found} of its {wanted} tokens"
    if more := sum(token == chat.image_token for token in left):
        return f"{more} image tokens are of no image"
    return ""
