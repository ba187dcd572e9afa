"""Where the images of a prompt stand: at `<image>`, or at `<image_1>`, `<image_2>` by number.

This is the one place that reads them. A model's own image token means nothing here, and what looks
like one in a text, `<|image_pad|>` say, stays text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

from tasks.core import DataError

T = TypeVar("T")
_PLACEHOLDER = re.compile(r"<image(?:_([0-9]{1,4}))?>")


def placed(prompt: str, images: Sequence[T]) -> list[str | T]:
    """Text and images in the order in which the policy reads them; no text is empty.

    `images` are whatever stands for them (files, sizes), but no text. Without placeholders all of
    them come first. Raises DataError where the placeholders are not as many as the images, or are
    not the numbers from 1, each once.
    """
    matches = list(_PLACEHOLDER.finditer(prompt))
    if not matches:
        return [*images, *([prompt] if prompt else [])]
    numbers = [int(match[1]) for match in matches if match[1]]
    image_numbers = numbers or range(1, len(matches) + 1)
    if len(image_numbers) != len(matches) or sorted(image_numbers) != list(
        range(1, len(images) + 1)
    ):
        names = ", ".join(match[0] for match in matches[:6]) + ", ..." * (len(matches) > 6)
        raise DataError(
            f"has the placeholder{'s' * (len(matches) > 1)} {names} for {len(images)} "
            f"image{'s' * (len(images) != 1)}; write <image> as often as there are images, or "
            "<image_1>, <image_2> and so on, each once, or none: the images then come first"
        )
    parts: list[str | T] = []
    end = 0
    for match, number in zip(matches, image_numbers, strict=True):
        parts += [prompt[end : match.start()], images[number - 1]]
        end = match.end()
    return [part for part in [*parts, prompt[end:]] if part != ""]


def check_placed(prompt: str, images: Sequence[object], source: str) -> None:
    """Raises DataError as `placed`, headed by `source` (`file: row 3: query`)."""
    try:
        placed(prompt, images)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


def as_shown(prompt: str, images: Sequence[T]) -> tuple[T, ...]:
    """The images in the order in which the prompt shows them. Raises DataError as `placed`."""
    return tuple(part for part in placed(prompt, images) if not isinstance(part, str))


def text_alone(parts: Iterable[object]) -> list[str]:
    """What is left of a prompt's parts where no image is shown: one text."""
    return ["".join(part for part in parts if isinstance(part, str))]


def removed(prompt: str) -> str:
    """A prompt without its placeholders, for whoever is shown no image."""
    return _PLACEHOLDER.sub("", prompt)


def escaped(text: str) -> str:
    """Text in which nothing is a placeholder any more: what a model wrote may stand in a prompt."""
    return _PLACEHOLDER.sub(lambda match: f"{match[0][:-1]} >", text)
