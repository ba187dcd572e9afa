"""A real engine beside both sets of weights that it is compared with, for tests of families."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from learner.batch import Layout, TrainSequence
from learner.collate import Collator
from learner.policy import Policy, load_policy
from learner.weights import GatheredWeights, OfferedWeights, stored
from rollout.engine import Engine
from rollout.record import (
    Group,
    Rollout,
    SampleRequest,
    Sampling,
    ScoreRequest,
    Weights,
)
from rollout.settings import ModelConfig, SamplerConfig
from rollout.tokens import load_processor
from rollout.transfer import TransferReport, fetched
from tasks.core import Problem
from tasks.environments import Observation
from tasks.load import load_task
from tasks.returns import Returns
from tasks.splits import draw_problem
from tests.support.samples import problem as picture
from tests.support.shaken import shake

TASK = load_task("graph_coloring")


class Given:
    """A bucket that can be waited for; one that nobody waits for any more leaves no coroutine."""

    def __init__(self, bucket: Any) -> None:
        self.bucket = bucket

    def __await__(self) -> Generator[None, None, Any]:
        yield from ()
        return self.bucket


class Live:
    """An engine on an event loop of its own thread, and both sets of weights to compare with."""

    name = "sampler-0"

    def __init__(
        self,
        model: ModelConfig,
        original: Policy,
        perturbed: Policy,
        processor: Any,
        sampler: SamplerConfig | None = None,
    ) -> None:
        self.dtype: torch.dtype = getattr(torch, model.dtype)
        self.weights = {"original": original, "perturbed": perturbed}
        self.processor, self.folder = processor, Path(model.path)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

        async def start() -> Engine:
            return Engine.start(model, sampler or SamplerConfig(max_num_seqs=64))

        self.engine = asyncio.run_coroutine_threadsafe(start(), self.loop).result(400)
        self.first_checksums = self.checksums()

    def close(self) -> None:
        self.engine.shutdown()
        self.loop.call_soon_threadsafe(self.loop.stop)

    def call(self, method: str, *args: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(getattr(self.engine, method)(*args), self.loop)

    def wait(self, future: Any, seconds: float) -> Any:
        return future.result(seconds)

    def do(self, work: Callable[[Any], Any]) -> Any:
        """What the engine's thread makes of vLLM's own engine between two steps."""
        return asyncio.run_coroutine_threadsafe(self.engine._llm.do(work), self.loop).result(60)

    def checksums(self) -> dict[str, str]:
        found: dict[str, str] = self.wait(self.call("weight_checksums"), 60)
        return found

    def source(self, which: str) -> GatheredWeights:
        """These weights as a learner offers them."""
        return GatheredWeights(self.weights[which].model, lambda _: nullcontext(), self.dtype)

    def send(self, weights: str | OfferedWeights, version: int, spoilt: str = "") -> TransferReport:
        """Give the engine weights, or those of that name, as a sampler does; Ray is left out.

        `spoilt`: a tensor of which a byte changes on the way.
        """
        source = self.source(weights) if isinstance(weights, str) else weights
        buckets: list[Any] = list(stored(source.iter_groups()))
        manifest = buckets.pop()
        for pieces, arrays in zip(manifest, buckets, strict=True):
            for place, piece in enumerate(pieces):
                if piece.name == spoilt:
                    arrays[place] = arrays[place].copy()
                    arrays[place][-1] ^= 1

        async def renew() -> None:
            fetchable = Weights(version, manifest, tuple(map(Given, buckets)))
            await self.engine.renew(version, fetched(fetchable, self.name))

        start = time.perf_counter()
        asyncio.run_coroutine_threadsafe(renew(), self.loop).result(120)
        return TransferReport.of(Weights(version, manifest, ()), time.perf_counter() - start)

    def sample(self, problems: Sequence[Problem], n: int = 2, **request: Any) -> list[Group]:
        sampling = request.pop("sampling", Sampling(max_tokens=40))
        futures = [
            self.call("sample", SampleRequest(f"g{i}", p, n, sampling, **request), TASK)
            for i, p in enumerate(problems)
        ]
        return [self.wait(future, 300) for future in futures]

    def learner_gap(self, which: str, groups: Sequence[Group], layout: Layout = "padded") -> float:
        """Largest |log-prob difference| between the engine and one micro-batch of the learner's."""
        inputs = [
            (r.prompt_ids, r.response_ids, r.images, r.segments) for g in groups for r in g.rollouts
        ]
        found = [r.logprobs for g in groups for r in g.rollouts]
        return float(
            np.concatenate(gaps(self.weights[which], self.processor, inputs, found, layout)).max()
        )

    def gap(self, which: str, inputs: Sequence[Any], logprobs: Sequence[np.ndarray]) -> float:
        """For (prompt ids, response ids, images) and the engine's log-probs, in a padded batch."""
        return float(np.concatenate(self.gaps(which, inputs, logprobs)).max())

    def gaps(
        self, which: str, inputs: Sequence[Any], logprobs: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """The difference of each token of each response."""
        return gaps(self.weights[which], self.processor, inputs, logprobs)

    def score(
        self, scored: Sequence[tuple[Problem, np.ndarray]], images: Sequence[tuple[bytes, ...]]
    ) -> list[np.ndarray]:
        futures = [
            self.call("score", ScoreRequest(f"s{i}", problem, ids, shown))
            for i, ((problem, ids), shown) in enumerate(zip(scored, images, strict=True))
        ]
        return [self.wait(future, 300) for future in futures]


def gaps(
    policy: Policy,
    processor: Any,
    inputs: Sequence[Any],
    logprobs: Sequence[np.ndarray],
    layout: Layout = "padded",
) -> list[np.ndarray]:
    """|difference| of log-probs of (prompt ids, response ids, images) to a policy's, a token.

    A fourth of each, its segments, says which tokens are the policy's.
    """
    sequences = [
        TrainSequence(
            prompt, response, images, *(segments or [np.zeros_like(response)]), found, found
        )
        for (prompt, response, images, *segments), found in zip(inputs, logprobs, strict=True)
    ]
    batch = Collator(policy, processor, layout)(sequences).to(next(policy.parameters()).device)
    with torch.no_grad():
        expected, _ = policy.eval().run(batch)
    differences = (expected - batch.tokens.sampler_logprobs).abs().cpu().numpy()
    return np.split(differences, np.cumsum([s.targets.sum() for s in sequences])[:-1])


def perturbed_engine(
    policy: Path,
    folders: pytest.TempPathFactory,
    image_size: dict[str, int] | None = None,
    **reading: Any,
) -> Iterator[Live]:
    """An engine of a policy with noise on its weights; shut down after the one item.

    `image_size`: what the folder's image processor has in place of its own `size`. `reading`: of
    the recipe's [model].
    """
    torch.set_num_threads(1)  # tiny matrices: threads that wait for each other only cost time
    original, plain = load_policy(str(policy))
    perturbed, _ = load_policy(str(policy))
    if image_size:
        plain.image_processor.size = image_size
    shake(perturbed, seed=1)
    start_from = folders.mktemp("perturbed") / policy.name
    perturbed.model.save_pretrained(start_from)  # type: ignore[operator]
    plain.save_pretrained(start_from)
    model = ModelConfig(path=str(start_from), max_model_len=512, **reading)
    processor = load_processor(model.path, reading=model)
    live = Live(model, original, perturbed, processor)
    yield live
    live.close()


def mixed_sizes(count: int) -> list[Problem]:
    """Problems whose images have different sizes."""
    specs = [
        TASK.spec(vertices=4, canvas=canvas, layout="circle", label_size=0, prompt="brief")
        for canvas in (64, 96, 128)
    ]
    return [draw_problem(TASK, specs[i % 3], "train", 5, i) for i in range(count)]


def drawn(groups: Sequence[Group]) -> tuple[list[tuple[Problem, np.ndarray]], list[Rollout]]:
    """What to score of every rollout, and the rollouts."""
    rollouts = [r for g in groups for r in g.rollouts]
    return [(g.problem, r.response_ids) for g in groups for r in g.rollouts], rollouts


def worst(found: Sequence[np.ndarray], rollouts: Sequence[Rollout]) -> float:
    """Largest |difference| from the rollouts' own sampler log-probs, over all tokens."""
    assert all(f.dtype == np.float32 for f in found)
    assert [len(f) for f in found] == [len(r.response_ids) for r in rollouts]
    return max(
        float(np.abs(f - r.logprobs).max()) for f, r in zip(found, rollouts, strict=True) if len(f)
    )


class Showing:
    """Environments, as many as episodes, that each show another number of pictures a turn."""

    place, spent = 0, 0.0
    returns: ClassVar[list[Returns | None]] = []

    def open(
        self, name: str, problem: Problem, seed: int, returns: Returns | None = None
    ) -> Showing:
        self.returns.append(returns)
        shown = Showing()
        shown.place = int(name.rpartition("/")[-1])
        return shown

    async def answer(self, text: str | None) -> Observation | None:
        sizes = [(96, 40), (64, 64), (40, 90), (128, 64)][self.place % 4 :][: self.place % 3]
        if text is not None:
            shown = picture(self.place, *sizes).images if sizes else ()
            return Observation(f"So? {text[:9]} <|im_end|>", shown)
        return Observation("Look.", picture(9, (48, 48)).images) if self.place == 5 else None


@contextmanager
def steps_in_flight(live: Live) -> Iterator[None]:
    """Within, vLLM keeps a step in flight, as it does on accelerators."""

    def keep(llm: Any, queue: deque[Any] | None) -> None:
        core = llm.engine_core.engine_core
        core.batch_queue, core.batch_queue_size = queue, 1 if queue is None else 2
        core.step_fn = core.step if queue is None else core.step_with_batch_queue

    live.do(lambda llm: keep(llm, deque(maxlen=2)))
    yield
    live.do(lambda llm: keep(llm, None))
