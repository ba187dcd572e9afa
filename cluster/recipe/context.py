"""What problems and responses take of a policy's context, measured without the policy.

The processor decides: how many tokens an image is hangs on its size alone, so each size is asked
for once, and a text costs its tokenizer only. What it refuses is a reason, never an exception.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from cluster.recipe.recipe import Recipe
from rewards.language import OwnText
from rollout.tokens import Chat, load_processor
from tasks.core import DataError, Problem
from tasks.datasets import Example
from tasks.environments import Observation, opened
from tasks.images import check_image
from tasks.placeholders import placed

Size = tuple[int, int]
"""Width and height in pixels."""

PROBES = 3
"""Sizes at which a processor's own count must agree with what it makes of an image."""


@dataclass(frozen=True)
class Fault:
    """Why a problem cannot be used: the field of its row, and what is wrong with it.

    `damaged`: with any policy; else it does not fit this one.
    """

    field: str
    reason: str
    damaged: bool = False


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a prompt, `image` of them of its images; `fault` where it cannot be made."""

    prompt: int = 0
    image: int = 0
    fault: Fault | None = None


@dataclass
class Context:
    """The context of a policy, of `length` tokens, `answer` of them left for a response."""

    processor: Any
    length: int
    answer: int
    _texts: dict[tuple[str, int], int | Fault] = field(default_factory=dict, repr=False)
    _blocks: dict[Size, int | Fault] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, recipe: Recipe) -> Context:
        """That of a recipe's policy, which is on this machine. Raises ModelError."""
        processor = load_processor(recipe.model.path, reading=recipe.model)
        return cls(processor, recipe.model.max_model_len, recipe.sampler.max_tokens)

    def require_own_text(self) -> None:
        """Raise DataError where what `eval.text` asks does not fit."""
        longest = max(
            len(self._chat.prompt([request.problem.prompt])) + len(request.response_ids)
            for request in OwnText.read().requests(self._chat.text)
        )
        if longest > self.length:
            raise DataError(
                f"eval.text: its longest passage takes {longest:,} tokens, which do not fit in "
                f"model.max_model_len = {self.length:,}; raise that, or leave eval.text out"
            )

    def token_counts(self, prompts: Sequence[tuple[str, tuple[Size, ...]]]) -> list[TokenCounts]:
        """What each prompt with images of those sizes takes."""
        self._measure_sizes({size for _, sizes in prompts for size in sizes})
        all_counts = []
        for prompt, sizes in prompts:
            counts = [*(self._blocks[size] for size in sizes), self._text(prompt, len(sizes))]
            fault = next((count for count in counts if isinstance(count, Fault)), None)
            known = [count for count in counts if isinstance(count, int)]
            all_counts.append(
                TokenCounts(fault=fault) if fault else TokenCounts(sum(known), sum(known[:-1]))
            )
        return all_counts

    def lack(self, counts: TokenCounts, prefix: str = "") -> Fault | None:
        """Why a response does not fit, where it does not; nor behind a forced prefix."""
        if counts.fault:
            return counts.fault
        if counts.prompt + self.answer > self.length:
            return Fault(
                "image" if 2 * counts.image > counts.prompt else "query",
                f"{counts.prompt:,} tokens, {counts.image:,} of them of the images, and "
                f"sampler.max_tokens = {self.answer:,} do not fit in model.max_model_len = "
                f"{self.length:,}",
            )
        forced = self._length("perception", prefix) if prefix else 0
        if isinstance(forced, Fault):
            return forced
        if counts.prompt + forced >= self.length:
            return Fault(
                "perception",
                f"{forced:,} tokens behind {counts.prompt:,} of query and images leave no room for "
                f"an answer in model.max_model_len = {self.length:,}",
            )
        return None

    def token_counts_of(self, problem: Problem) -> TokenCounts:
        """What one problem takes. Raises DataError for an image that cannot be read."""
        where = f"image of problem {problem.id}"
        sizes = tuple(check_image(image, where).size for image in problem.images)
        return self.token_counts([(problem.prompt, sizes)])[0]

    def opened(self, problem: Problem, opening: Observation | None) -> int | str:
        """Tokens of a prompt with what an environment says behind it; why it cannot be made."""
        try:
            parts = opened(placed(problem.prompt, problem.images), opening)
            images = [part for part in parts if isinstance(part, bytes)]
            sizes = [check_image(image, "image").size for image in images]
            ids = self._chat.prompt(parts, opening.tools if opening else "")
            return len(self._chat.expanded(ids, sizes))
        except DataError as error:
            return str(error)

    def response_lack(
        self, counts: TokenCounts, example: Example, later: Sequence[Size] = ()
    ) -> Fault | None:
        """Why a response to learn from does not fit behind its prompt, where it does not.

        `later`: sizes of the images that answer its earlier turns.
        """
        length, sizes = 0, iter(later)
        for turn in (*(exchange.turn for exchange in example.earlier), example.response):
            taken = self._length("response", turn)
            if isinstance(taken, Fault):
                return taken
            length += taken + 1  # the end of turn
        for exchange in example.earlier:
            images = [*islice(sizes, len(exchange.images))]
            parts = [*images, *([exchange.text] if exchange.text else [])]
            try:
                ids = self._chat.turn(parts, self._chat.end)
                length += len(self._chat.expanded(ids, images))
            except Exception as error:  # whatever a processor does with an odd size
                why = str(error).partition("\n")[0]
                return Fault("response", f"an answer to a turn: {why}")
        if counts.prompt + length <= self.length:
            return None
        return Fault(
            "response",
            f"{length:,} tokens behind {counts.prompt:,} of query and images do not fit in "
            f"model.max_model_len = {self.length:,}",
        )

    @cached_property
    def _chat(self) -> Chat:
        return Chat(self.processor)

    @cached_property
    def fingerprint(self) -> str:
        """Of all that measurements of prompts and images depend on."""
        import transformers

        tokenizer = self.processor.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts = (
            transformers.__version__,
            json.dumps(self.processor.to_dict(), sort_keys=True, default=str),
            str(self.processor.chat_template or tokenizer.chat_template),
            *self._chat.system,
            backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True),
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _text(self, prompt: str, images: int) -> int | Fault:
        """Tokens of a prompt without those that stand for its images."""
        if (prompt, images) not in self._texts:
            try:
                ids = self._chat.prompt(placed(prompt, range(images)))
                self._texts[prompt, images] = len(ids) - images
            except DataError as error:
                self._texts[prompt, images] = Fault("query", str(error))
        return self._texts[prompt, images]

    def _length(self, field: str, text: str) -> int | Fault:
        """Tokens of text that a response begins with or is."""
        try:
            return len(self._chat.text(text))
        except DataError as error:
            return Fault(field, str(error))

    def _measure_sizes(self, sizes: Iterable[Size]) -> None:
        new = sorted(set(sizes) - self._blocks.keys(), key=lambda size: size[0] * size[1])
        long = sorted(new, key=lambda size: max(size) / min(size))
        probes = {*new[:1], *new[-1:], *long[-1:]} if len(new) > PROBES else set(new)
        self._blocks |= {size: self._encoded_tokens(size) for size in probes}
        # Marks around an image are not among those that a processor counts.
        around = {
            block - (self._counted(size) or 0)
            for size in probes
            if not isinstance(block := self._blocks[size], Fault)
        }
        for size in set(new) - probes:
            counted = self._counted(size) if len(around) == 1 else None
            self._blocks[size] = counted + min(around) if counted else self._encoded_tokens(size)

    def _encoded_tokens(self, size: Size) -> int | Fault:
        """Tokens that stand for an image of a size, as the processor makes them."""
        try:
            return len(self._chat.image_block(size))
        except Exception as error:  # whatever a processor does with an odd size
            return _refused(size, error)

    def _counted(self, size: Size) -> int | None:
        """The same by the processor's own arithmetic, without an image; None where it has none."""
        try:
            counts = self.processor._get_num_multimodal_tokens(image_sizes=[size[::-1]])
            return int(counts.num_image_tokens[0])
        except Exception:
            return None


def _refused(size: Size, error: Exception) -> Fault:
    why = (str(error).splitlines() or [type(error).__name__])[0]
    return Fault(
        "image", f"{size[0]}x{size[1]} pixels, which the policy's image processor refuses: {why}"
    )
