"""Demonstrations as training sequences: the same chat prompt and segments a rollout has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel
from torch.utils.data import IterableDataset, get_worker_info

from learner.batch import TrainSequence, demonstration
from rollout.tokens import Decoder, encode, label_segments, render_prompt
from tasks.core import NO_SEGMENT, DataError, Parsed, Problem, Style, Task
from tasks.images import check_image
from tasks.splits import draw_problem


class Demonstrator:
    """Turns problems and response texts into training sequences for one processor."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._decoder = Decoder(processor.tokenizer)
        self._prompt = lru_cache(maxsize=256)(self._make_prompt)

    def sequence(
        self, task: Task, problem: Problem, response: str, blind: bool = False
    ) -> TrainSequence:
        """The problem's chat prompt followed by `response` and the end-of-turn token.

        With `blind` there is no image, and the response's perception is given instead of learnt,
        as a request of kind `blind` with that prefix gives it.

        Raises DataError when the task's own parser finds a defect in the response (a defect
        that is taught is a defect that is learnt), or no perception in one to be given.
        """
        parsed = task.parse(response)
        if parsed.defects:
            raise DataError(
                f"response of problem {problem.id}: has defect {parsed.defects[0]!r}; "
                "demonstrations must parse without defects (drop the row or mend its tags)"
            )
        tokenizer = self._processor.tokenizer
        given = _given(problem, response, parsed) if blind else 0
        size = None if blind else check_image(problem.image, f"image of problem {problem.id}").size
        ids = encode(tokenizer, response[given:])
        _, offsets = self._decoder.decode(ids)
        segments = label_segments(offsets, parsed.spans, shift=given)
        prompt = self._prompt(problem.prompt, size)
        if given:
            prompt = np.append(prompt, encode(tokenizer, response[:given])).astype(np.int32)
        return demonstration(
            prompt,
            np.asarray([*ids, tokenizer.eos_token_id], np.int32),
            None if blind else problem.image,
            np.append(segments, np.int8(NO_SEGMENT)).astype(np.int8),
        )

    def _make_prompt(self, prompt: str, size: tuple[int, int] | None) -> np.ndarray:
        """int32 [P], placeholders expanded: how many there are depends on the image's size only.

        Without a size there is no image.
        """
        if size is None:
            bare = render_prompt(self._processor, prompt, with_image=False)
            return np.asarray(encode(self._processor.tokenizer, bare), np.int32)
        text = render_prompt(self._processor, prompt, with_image=True)
        made = self._processor(images=[Image.new("RGB", size)], text=[text])
        return np.asarray(made["input_ids"][0], np.int32)


def _given(problem: Problem, response: str, parsed: Parsed) -> int:
    """Characters of a response up to where its reasoning begins."""
    if "perception" not in parsed.spans:
        raise DataError(
            f"response of problem {problem.id}: has no perception to be given (sft.blind_share)"
        )
    end = parsed.spans["perception"][1]
    return len(response) - len(response[end:].lstrip())


@dataclass(frozen=True)
class Source:
    """Where demonstrations of one task come from: generated with `spec`, or stored rows."""

    task: Task
    weight: float
    style: Style
    spec: BaseModel | None = None
    rows: tuple[tuple[Problem, str], ...] = ()


def draw(sources: Sequence[Source], seed: int, index: int) -> tuple[Source, Problem, str]:
    """Demonstration number `index` of an endless stream: (source, problem, response).

    Each index has its own random stream, so any worker makes any part of it and a resumed run
    goes on where it stopped. Generated problems are of the `train` split.
    """
    rng = np.random.default_rng([seed, index])
    weights = np.array([source.weight for source in sources])
    source = sources[int(rng.choice(len(sources), p=weights / weights.sum()))]
    if source.rows:
        problem, response = source.rows[int(rng.integers(len(source.rows)))]
        return source, problem, response
    assert source.spec is not None
    problem = draw_problem(source.task, source.spec, "train", seed, index)
    return source, problem, source.task.demonstrate(problem, source.style)


class DemonstrationStream(IterableDataset[list[TrainSequence]]):
    """Batches of demonstrations, made ahead of the learner in a worker process."""

    def __init__(
        self,
        sources: Sequence[Source],
        processor: Any,
        batch_size: int,
        seed: int,
        start: int = 0,
        blind_share: float = 0.0,
    ) -> None:
        self._sources, self._processor = tuple(sources), processor
        self._blind_share = blind_share
        self._batch_size, self._seed, self._start = batch_size, seed, start

    def __iter__(self) -> Iterator[list[TrainSequence]]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        demonstrator = Demonstrator(self._processor)
        step = self._start + offset
        while True:
            batch = []
            for index in range(step * self._batch_size, (step + 1) * self._batch_size):
                source, problem, response = draw(self._sources, self._seed, index)
                chance = np.random.default_rng([self._seed, index, 1]).random()
                blind = chance < self._blind_share
                batch.append(demonstrator.sequence(source.task, problem, response, blind))
            yield batch
            step += stride
