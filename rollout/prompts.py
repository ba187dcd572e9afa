"""From a problem to what the engine is asked: ids with a placeholder an image, and the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rollout.starting import scaled_to
from rollout.tokens import Chat, pixel_limits
from tasks.core import DataError, Problem
from tasks.environments import Observation, opened
from tasks.images import check_image
from tasks.placeholders import placed, text_alone


class SamplerError(RuntimeError):
    """A request the engine refused or lost; names the problem and the remedy."""


class Prompts:
    """Prompts for the engine `name`, whose processor scales images as a request says."""

    def __init__(self, chat: Chat, processor: Any, name: str) -> None:
        self._chat, self._name = chat, name
        limits = pixel_limits(processor)
        self._reading = scaled_to(limits) if limits else None

    def of(
        self, problem: Problem, images: Sequence[bytes], prefix: str = ""
    ) -> tuple[dict[str, Any], tuple[bytes, ...]]:
        """What the engine is asked: the problem's prompt with these images, or with none.

        With it the images in the order in which the prompt shows them.
        """
        ids, shown = self.asked(problem, images, prefix)
        return self.request(problem, ids, shown), shown

    def asked(
        self,
        problem: Problem,
        images: Sequence[bytes],
        prefix: str = "",
        opening: Observation | None = None,
    ) -> tuple[list[int], tuple[bytes, ...]]:
        """Ids of the prompt with a placeholder an image, and the images in that order.

        `opening`: what an environment says behind the problem.
        """
        if images and self._chat.image_token is None:
            raise SamplerError(
                f"problem {problem.id}: {self._name} holds a text-only model and cannot be shown "
                'an image; ask it with view "none", or to score with no image'
            )
        try:
            own = placed(problem.prompt, images or problem.images)
            parts = opened(own if images else text_alone(own), opening)
            ids = self._chat.prompt(parts, opening.tools if opening else "")
            ids += self._chat.text(prefix) if prefix else []
        except DataError as error:
            raise SamplerError(f"problem {problem.id}: its prompt or prefix {error}") from error
        return ids, tuple(part for part in parts if isinstance(part, bytes))

    def request(
        self, problem: Problem, ids: Sequence[int], images: Sequence[bytes]
    ) -> dict[str, Any]:
        """The same as vLLM takes it."""
        prompt: dict[str, Any] = {"prompt_token_ids": [*ids]}
        if images:
            where = f"image of problem {problem.id}"
            prompt["multi_modal_data"] = {"image": [check_image(image, where) for image in images]}
            if self._reading:
                prompt["mm_processor_kwargs"] = self._reading
        return prompt
