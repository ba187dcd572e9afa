"""Demonstrations as training sequences: the same chat prompt and segments a rollout has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import BaseModel
from torch.utils.data import IterableDataset, get_worker_info

from learner.batch import TrainSequence, demonstration
from rollout.tokens import Chat, label_segments
from tasks.core import NO_SEGMENT, DataError, Demonstrates, Parsed, Problem, Style, Task
from tasks.images import check_image
from tasks.placeholders import as_shown, placed, text_alone
from tasks.responses import TAG
from tasks.splits import draw_problem


class Demonstrator:
    """Turns problems and response texts into training sequences for one processor."""

    def __init__(self, processor: Any, untagged: bool = False) -> None:
        """`untagged`: a response without any tag is learnt whole where its task cannot read it."""
        self._chat, self._untagged = Chat(processor), untagged
        self._prompt = lru_cache(maxsize=256)(self._make_prompt)

    def sequence(
        self, task: Task, problem: Problem, response: str, blind: bool = False
    ) -> TrainSequence:
        """The problem's chat prompt followed by `response` and the end-of-turn token.

        With `blind` no image is shown, and the response's perception is given instead of learnt,
        as a request of kind `blind` with that prefix gives it.

        Raises DataError when the task's own parser finds a defect in the response (a defect
        that is taught is a defect that is learnt), or no perception in one to be given.
        """
        parsed = task.parse(response)
        whole = bool(self._untagged and parsed.defects and not TAG.search(response))
        if parsed.defects and not whole:
            raise DataError(
                f"response of problem {problem.id}: has defect {parsed.defects[0]!r}; "
                "demonstrations must parse without defects (drop the row or mend its tags)"
            )
        field = "prompt"
        where = f"image of problem {problem.id}"
        sizes = tuple((0, 0) if blind else check_image(i, where).size for i in problem.images)
        try:
            prompt, field = self._prompt(problem.prompt, sizes, blind), "response"
            ids = self._chat.text(response)
        except DataError as error:
            raise DataError(f"problem {problem.id}: {field} {error}") from error
        text, offsets = self._chat.decoder.decode(ids)
        if text != response:  # another Unicode form, or a space before it
            parsed = task.parse(text)
        # A whole response is tokenised, as a policy writes it, and then cut.
        given = _given(problem, text, parsed, offsets) if blind else 0
        segments = label_segments(offsets[given:], {} if whole else parsed.spans)
        return demonstration(
            np.asarray([*prompt, *ids[:given]], np.int32),
            np.asarray([*ids[given:], self._chat.end], np.int32),
            () if blind else as_shown(problem.prompt, problem.images),
            np.append(segments, np.int8(NO_SEGMENT)).astype(np.int8),
        )

    def _make_prompt(
        self, prompt: str, sizes: tuple[tuple[int, int], ...], blind: bool
    ) -> list[int]:
        """Ids, placeholders expanded: how many there are depends on the images' sizes only."""
        parts = placed(prompt, sizes)
        if blind:
            return self._chat.prompt(text_alone(parts))
        return self._chat.expanded(self._chat.prompt(parts), as_shown(prompt, sizes))


def _given(problem: Problem, response: str, parsed: Parsed, offsets: np.ndarray) -> int:
    """Tokens of a response up to where its reasoning begins, line ends included."""
    if "perception" not in parsed.spans:
        raise DataError(
            f"response of problem {problem.id}: has no perception to be given (sft.blind_share)"
        )
    end = parsed.spans["perception"][1]
    end = len(response) - len(response[end:].lstrip("\n"))
    return int((offsets[1:] <= end).sum())


@dataclass(frozen=True)
class Source:
    """Where demonstrations of one task come from: generated with `spec`, or stored rows."""

    task: Task
    weight: float
    style: Style
    spec: BaseModel | None = None
    rows: Sequence[tuple[Problem, str]] = ()


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
    assert isinstance(source.task, Demonstrates)  # preflight asked
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
        untagged: bool = False,
    ) -> None:
        self._untagged = untagged
        self._sources, self._processor = tuple(sources), processor
        self._blind_share = blind_share
        self._batch_size, self._seed, self._start = batch_size, seed, start

    def __iter__(self) -> Iterator[list[TrainSequence]]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        demonstrator = Demonstrator(self._processor, self._untagged)
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
