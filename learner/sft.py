"""Demonstrations as training sequences: the same chat prompt and segments a rollout has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel
from torch.utils.data import IterableDataset, get_worker_info

from learner.batch import TrainSequence, demonstration
from learner.losses import PERCEPTION
from rollout.demonstrated import demonstrated, in_form
from rollout.settings import EnvironmentConfig
from rollout.tokens import Chat
from tasks.core import (
    DataError,
    Demonstrates,
    DemonstratesCalls,
    Parsed,
    Problem,
    Style,
    Task,
)
from tasks.datasets import Example
from tasks.environments import Observation, opened
from tasks.images import check_image
from tasks.placeholders import as_shown, placed, text_alone
from tasks.responses import TAG
from tasks.splits import draw_problem
from tasks.turns import read_turns

Size = tuple[int, int]


class Demonstrator:
    """Turns problems and response texts into training sequences for one processor."""

    def __init__(
        self,
        processor: Any,
        untagged: bool = False,
        environment: EnvironmentConfig | None = None,
        part: Literal["whole", "perception"] = "whole",
    ) -> None:
        """`untagged`: a response without any tag is learnt whole where its task cannot read it.

        `environment` answers between turns, as it does in sampling. `part`: see [sft].
        """
        self._chat, self._untagged, self._environment = Chat(processor), untagged, environment
        self._part = part
        self._prompt = lru_cache(maxsize=256)(self._make_prompt)

    def sequence(
        self,
        task: Task,
        problem: Problem,
        response: str,
        blind: bool = False,
        calls: Sequence[str] = (),
        answers: Sequence[Observation] | None = None,
        seed: int = 0,
    ) -> TrainSequence:
        """The problem's chat prompt followed by `response` and the end-of-turn token.

        `calls` are turns before it, each answered by the environment, whose randomness is of
        `seed`, or as `answers` say where they are given; the tokens are those that sampling the
        same turns would have made. With `blind` no image is shown, nothing answers, and the
        response's perception is given instead of learnt, as a request of kind `blind` with that
        prefix gives it.

        Raises DataError when the task's own parser finds a defect in the response (a defect
        that is taught is a defect that is learnt), no perception in one to be given or learnt
        alone, or where the environment does not take the turns as they are meant.
        """
        said = "".join([*calls, response])
        parsed = read_turns(task, [*calls, response])
        whole = bool(self._untagged and parsed.defects and not TAG.search(said))
        if parsed.defects and not whole:
            raise DataError(
                f"response of problem {problem.id}: has defect {parsed.defects[0]!r}; "
                "demonstrations must parse without defects (drop the row or mend its tags)"
            )
        where = f"image of problem {problem.id}"
        sizes = tuple((0, 0) if blind else check_image(i, where).size for i in problem.images)
        field = "prompt"
        try:
            self._prompt(problem.prompt, sizes, blind, None)
            field = "response"
            turns = [self._chat.text(turn) for turn in (*calls, response)]
            text, offsets = self._chat.decoder.decode(turns[-1])
            # A whole response is tokenised, as a policy writes it, and then cut.
            forced = _given(text, task.parse(text), offsets) if blind else 0
            given, turns[-1] = turns[-1][:forced], turns[-1][forced:]

            def prompt(
                opening: Observation | None,
            ) -> tuple[list[int], list[int], tuple[bytes, ...]]:
                ids, expanded = self._prompt(problem.prompt, sizes, blind, opening)
                shown = () if blind else as_shown(problem.prompt, problem.images)
                shown += opening.images if opening else ()
                return [*ids, *given], [*expanded, *given], shown

            environment = None if blind else self._environment
            asked, episode = demonstrated(
                self._chat, problem, prompt, turns, environment, seed, answers
            )
        except DataError as error:
            raise DataError(f"problem {problem.id}: {field} {error}") from error
        written, offsets, _ = episode.read()
        before = text[: len(text) - len(written)] if blind else ""
        if before + written != said:  # another Unicode form, or a space before it
            first, *later = [turn.text for turn in episode.turns]
            parsed = read_turns(task, [before + first, *later])
        if whole:
            parsed = replace(parsed, spans={}, earlier=())
        segments = episode.labelled(parsed, offsets, len(before))
        end = len(segments)
        if self._part == "perception":
            seen = np.flatnonzero(segments == PERCEPTION)
            if not len(seen):
                raise DataError(f"problem {problem.id}: response has no perception (sft.part)")
            end = int(seen[-1]) + 1
        return demonstration(
            np.asarray(asked.prompt_ids, np.int32),
            np.asarray(episode.ids[:end], np.int32),
            tuple(episode.images),
            segments[:end],
        )

    def of(
        self, task: Task, example: Example, blind: bool, calls: bool, seed: int = 0
    ) -> TrainSequence:
        """The sequence of an example; raises as `sequence`.

        Its earlier turns are answered as it says; where it has none, those that the task's teacher
        calls in are put before it, with `calls`.
        """
        earlier = () if blind else example.earlier
        answers = [Observation(exchange.text, exchange.images) for exchange in earlier]
        turns = tuple(exchange.turn for exchange in earlier)
        if calls and not (turns or blind):
            problem = example.problem
            turns = in_form(calls_of(task, problem), self._environment, problem, seed)
        return self.sequence(
            task, example.problem, example.response, blind, turns, answers or None, seed
        )

    def _make_prompt(
        self, prompt: str, sizes: tuple[Size, ...], blind: bool, opening: Observation | None
    ) -> tuple[list[int], list[int]]:
        """Ids with a placeholder an image, and expanded: how many there are hangs on sizes only."""
        parts = placed(prompt, sizes)
        parts = opened(text_alone(parts) if blind else parts, opening)
        ids = self._chat.prompt(parts, opening.tools if opening else "")
        shown = [part for part in parts if not isinstance(part, str)]
        found = [check_image(p, "image").size if isinstance(p, bytes) else p for p in shown]
        return ids, self._chat.expanded(ids, found)


def _given(response: str, parsed: Parsed, offsets: np.ndarray) -> int:
    """Tokens of a response up to where its reasoning begins, line ends included."""
    if "perception" not in parsed.spans:
        raise DataError("has no perception to be given (sft.blind_share)")
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
    rows: Sequence[Example] = ()


def draw(sources: Sequence[Source], seed: int, index: int) -> tuple[Source, Example]:
    """Demonstration number `index` of an endless stream, and where it comes from.

    Each index has its own random stream, so any worker makes any part of it and a resumed run
    goes on where it stopped. Generated problems are of the `train` split.
    """
    rng = np.random.default_rng([seed, index])
    weights = np.array([source.weight for source in sources])
    source = sources[int(rng.choice(len(sources), p=weights / weights.sum()))]
    if source.rows:
        return source, Example(*source.rows[int(rng.integers(len(source.rows)))])
    assert source.spec is not None
    problem = draw_problem(source.task, source.spec, "train", seed, index)
    assert isinstance(source.task, Demonstrates)  # preflight asked
    return source, Example(problem, source.task.demonstrate(problem, source.style))


def calls_of(task: Task, problem: Problem) -> tuple[str, ...]:
    """The turns in which a task's teacher calls the environment; of one without that ability none.

    Whether there must be one is asked before anything starts (`sft.call_share`).
    """
    return task.calls(problem) if isinstance(task, DemonstratesCalls) else ()


class DemonstrationStream(IterableDataset[list[TrainSequence]]):
    """Batches of demonstrations, made ahead of the learner in a worker process."""

    def __init__(
        self,
        sources: Sequence[Source],
        demonstrator: Callable[[], Demonstrator],
        batch_size: int,
        seed: int,
        start: int = 0,
        blind_share: float = 0.0,
        call_share: float = 0.0,
    ) -> None:
        """`demonstrator` makes one, in the worker."""
        self._sources, self._demonstrator = tuple(sources), demonstrator
        self._blind_share, self._call_share = blind_share, call_share
        self._batch_size, self._seed, self._start = batch_size, seed, start

    def __iter__(self) -> Iterator[list[TrainSequence]]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        demonstrator = self._demonstrator()
        step = self._start + offset
        while True:
            batch = []
            for index in range(step * self._batch_size, (step + 1) * self._batch_size):
                source, example = draw(self._sources, self._seed, index)
                chances = np.random.default_rng([self._seed, index, 1])
                blind = chances.random() < self._blind_share
                calls = chances.random() < self._call_share
                batch.append(demonstrator.of(source.task, example, blind, calls=calls, seed=index))
            yield batch
            step += stride
