"""How fast is a sampler of ours beside bare `vllm.LLM.generate` and HF generate?

    python -m benchmarks.sampling                                    # all sizes, both lengths
    python -m benchmarks.sampling --sizes 2M --lengths 64 --pairs 3

All get the same prompts, images, seeds and parameters. Ours is a `SamplerPool` with one sampler
actor, as in a run; the engines are started alike. Policies' responses end where they are cut, so
all sample the same number of tokens. Each lives in a process of its own, and turns alternate.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine, tables
from benchmarks.race import KV_CACHE_GIB, LENGTHS, SIZES, policy
from benchmarks.race_work import GROUP, KNOBS, PROBLEMS, TASK
from benchmarks.sides import Racer, side
from rollout.record import SampleRequest, Sampling
from rollout.settings import ModelConfig, SamplerConfig
from tasks.load import load_task
from tasks.splits import draw_problem

KEYS = ("size", "cap", "threads")
OURS = "ours"
SIDES = {OURS: "ours", "vllm": "bare_vllm", "vllm, plain": "plain_vllm", "HF": "hf"}


@dataclass(frozen=True)
class Job:
    """What a side is started with."""

    model: str
    tokens: int
    threads: int
    problems: int
    kv_cache_gib: float
    folder: str = ""

    @property
    def settings(self) -> tuple[ModelConfig, SamplerConfig]:
        """Of the engine, as a recipe would have them."""
        model = ModelConfig(path=self.model, max_model_len=self.tokens + 160)
        return model, SamplerConfig(
            max_tokens=self.tokens, threads=self.threads, kv_cache_gib=self.kv_cache_gib
        )

    def requests(self, turn: int) -> list[SampleRequest]:
        """Those of a turn, each of a problem that no other turn has."""
        task: Any = load_task(TASK)
        spec, first = task.spec(**KNOBS), turn * self.problems
        numbers = range(first, first + self.problems)
        return [
            SampleRequest(
                f"turn-{turn}/{number}",
                draw_problem(task, spec, "train", 0, number),
                GROUP,
                Sampling(max_tokens=self.tokens),
            )
            for number in numbers
        ]


Sample = Callable[[list[SampleRequest]], int]
"""Answers requests; how many tokens were sampled."""


def serve(connection: Any, job: Job, sample: Sample) -> None:
    """Say "ready", then the seconds and tokens of each turn that is asked for."""
    connection.send("ready")
    while (turn := connection.recv()) is not None:
        requests = job.requests(turn)
        begin = time.perf_counter()
        tokens = sample(requests)
        connection.send((time.perf_counter() - begin, tokens))


def ours(connection: Any, job: Job) -> None:
    """A pool with one sampler actor."""
    from cluster.run.session import connected
    from rollout.pool import SamplerPool
    from rollout.sampler import ray_samplers

    model, sampler = job.settings
    with connected(None):
        pool = SamplerPool(ray_samplers(model, sampler), 1, sampler)
        pool.wait_ready(sampler.start_timeout_seconds)

        def sample(requests: list[SampleRequest]) -> int:
            groups = pool.sample(requests)
            return sum(len(r.response_ids) for group in groups for r in group.rollouts)

        serve(connection, job, sample)
        pool.stop()


def bare_vllm(connection: Any, job: Job) -> None:
    """vLLM by itself, asked what our engine asks it."""
    _vllm(connection, job, plain=False)


def plain_vllm(connection: Any, job: Job) -> None:
    """The same, but it may draw all rows at once and keeps no log-probs."""
    _vllm(connection, job, plain=True)


def _vllm(connection: Any, job: Job, plain: bool) -> None:
    model, sampler = job.settings
    # As `rollout.starting.start_engine` has it, but for where the engine runs: LLM's own choice.
    os.environ |= {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(sampler.engine_threads),
        "TORCHDYNAMO_DISABLE": "1",
    }
    import torch
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    from rollout.engine import Engine
    from rollout.starting import engine_args

    torch.set_num_threads(sampler.engine_threads)
    args, processor = engine_args(model, sampler, "host", False, 0)
    defaults = EngineArgs(model=model.path)
    chosen = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(EngineArgs)
        if field.init and getattr(args, field.name) != getattr(defaults, field.name)
    }
    llm = LLM(**({"model": args.model} | chosen))
    asking: Any = Engine(None, processor, "bare")  # type: ignore[arg-type]

    def sample(requests: list[SampleRequest]) -> int:
        prompts = [asking._prompts.of(r.problem, r.problem.images)[0] for r in requests]
        params = [asking._sampling(r) for r in requests]
        for chosen in params if plain else ():
            chosen.seed, chosen.logprobs = None, None
            chosen.n = GROUP
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(one.token_ids) for output in outputs for one in output.outputs)

    serve(connection, job, sample)


def hf(connection: Any, job: Job) -> None:
    """Transformers' generate on all responses as one batch, as TRL calls it."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForImageTextToText

    from rollout.tokens import Chat, load_processor
    from tasks.images import check_image
    from tasks.placeholders import placed

    torch.set_num_threads(job.threads)
    processor = load_processor(job.model)
    chat = Chat(processor)
    model: Any = AutoModelForImageTextToText.from_pretrained(job.model).eval()
    image_token = model.config.image_token_id

    @torch.no_grad()
    def sample(requests: list[SampleRequest]) -> int:
        rows, images = [], []
        for request in requests:
            problem = request.problem
            for _ in range(request.n):
                parts = placed(problem.prompt, problem.images)
                pictures = [check_image(data, problem.id) for data in problem.images]
                prompt = chat.expanded(chat.prompt(parts), [image.size for image in pictures])
                rows.append(torch.tensor(prompt))
                images += pictures
        pad = chat.tokenizer.pad_token_id
        ids = pad_sequence(rows, True, pad, "left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
        pixels = processor.image_processor(images, return_tensors="pt")
        generated = model.generate(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=(ids == image_token).long(),
            **pixels,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=job.tokens,
            suppress_tokens=[image_token],
            eos_token_id=sorted(chat.ends),
            pad_token_id=pad,
        )
        return int((generated[:, ids.shape[1] :] != pad).sum())

    serve(connection, job, sample)


def main() -> None:
    """Compare, and write the table of docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens a response")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5, help="turns of each side")
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="groups a turn")
    parser.add_argument("--to", type=Path, help="a JSON file; without it docs/ is written")
    parser.add_argument("--busy-ok", action="store_true", help="run beside other work all the same")
    args = parser.parse_args()
    machine.refuse_if_busy(args.busy_ok)
    for size in args.sizes:
        for length in args.lengths:
            tables.keep("sampling", KEYS, [compare(size, length, args)], args.to)


def compare(size: str, length: int, args: argparse.Namespace) -> tables.Row:
    """All sides in turns, the first of each not counted; a row."""
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    foreign, tokens = [0.0], dict.fromkeys(SIDES, 0)
    with tempfile.TemporaryDirectory(prefix="equipoise-sampling-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        model, _ = policy(size, folder / "model")
        job = Job(model, length, args.threads, args.problems, KV_CACHE_GIB[size])
        racers: dict[str, Racer] = {}
        for name, function in SIDES.items():
            target = f"benchmarks.sampling:{function}"
            racers[name] = stack.enter_context(side(name, target, job, folder))
            racers[name].answer()
        for turn in range(args.pairs + 1):
            for name in SIDES if turn % 2 else reversed(SIDES):
                shared = machine.Shared([racers[name].process.pid])
                seconds, tokens[name] = racers[name].ask(turn)
                if turn:
                    foreign.append(shared.foreign())
                    rates[name].append(tokens[name] / seconds)
    others = [name for name in SIDES if name != OURS]
    return {
        "size": size,
        "cap": length,
        "threads": args.threads,
        **{
            f"ours over {name}": tables.spread(tables.ratios(rates[OURS], rates[name]))
            for name in others
        },
        **{f"tokens/s: {name}": f"{statistics.median(rates[name]):,.0f}" for name in SIDES},
        "tokens a turn": " / ".join(f"{tokens[name]:,}" for name in SIDES),
        "turns": args.pairs,
        "foreign, at most": f"{max(foreign):.0%}",
        "machine": machine.where(),
        "command": machine.command("benchmarks.sampling"),
    }


if __name__ == "__main__":
    main()
