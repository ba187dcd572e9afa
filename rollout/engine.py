"""The one file that drives vLLM: prompts in, groups of rollouts out, weights in.

Relies on this vLLM surface and nothing else: `EngineArgs` (in `rollout/starting.py`); `LLMEngine`
with `from_engine_args`, `add_request`, `abort_request`, `step`, `has_unfinished_requests`,
`collective_rpc`, `set_weight_version`, `reset_prefix_cache`, `reset_encoder_cache`, `sleep`,
`wake_up`, `model_config` and, of its core, `pause_scheduler`, `resume_scheduler`, `batch_queue`,
`shutdown` (in `rollout/engine_thread.py`; weights and sleep: `rollout/engine_state.py`); the
workers' `start_weight_update`, `update_weights`, `finish_weight_update`,
`init_weight_transfer_engine` and `compute_weight_checksums`;
`SamplingParams` with `n`, `seed`, `logprobs=0`, `flat_logprobs`, `ignore_eos`, `stop_token_ids`,
`stop`, `include_stop_str_in_output`, `detokenize`, FINAL_ONLY outputs, and for scoring
`prompt_logprobs=0` (which turns the reading of the prefix cache off) and `logprob_token_ids`;
`RequestOutput.{prompt_token_ids, prompt_logprobs}`, `CompletionOutput.{token_ids, logprobs,
weight_versions, finish_reason}`;
`worker_extension_cls` and the weight-transfer registry.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rollout.engine_state import EngineDied, EngineState
from rollout.engine_thread import EngineThread
from rollout.environments import EnvironmentPool
from rollout.episode import Budgets
from rollout.episodes import Answers, Asked, EpisodeError, Written, converse
from rollout.prompts import Prompts, SamplerError
from rollout.record import Group, Rollout, SampleRequest, ScoreRequest, viewed
from rollout.settings import ModelConfig, SamplerConfig
from rollout.starting import start_engine
from rollout.tokens import Chat, label_segments
from tasks.core import Problem, Task, labelled
from tasks.environments import Observation
from tasks.images import check_image

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput


class Engine(EngineState):
    """A live vLLM engine holding one policy version at a time."""

    def __init__(
        self,
        llm: EngineThread,
        processor: Any,
        name: str,
        frozen: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(llm, name, frozen)
        self._seed = seed
        self._chat = Chat(processor)
        self._prompts = Prompts(self._chat, processor, name)
        self._requests = 0

    @classmethod
    def start(
        cls,
        model: ModelConfig,
        sampler: SamplerConfig,
        name: str = "sampler-0",
        *,
        transport: str = "host",
        frozen: bool = False,
        seed: int = 0,
        sleeps: bool = False,
    ) -> Engine:
        """Load the model and start the engine (10-30 s on a CPU).

        `frozen`: it takes no weight updates, and its model may be a text-only language model.
        `sleeps`: it will be asked to `sleep`, and on a GPU allocates what it gives away then by
        vLLM's own allocator.
        Raises ModelError when the folder has no processor, and EngineNotStarted with the
        engine's own error otherwise.
        """
        llm, processor = start_engine(
            model, sampler, transport=transport, frozen=frozen, seed=seed, sleeps=sleeps
        )
        return cls(llm, processor, name, frozen, seed)

    def begin(self, seed: int) -> None:
        """Draw from now on as an engine that was started with `seed`."""
        self._seed = seed

    async def sample(self, request: SampleRequest, task: Task) -> Group:
        """Sample `request.n` responses to one problem as one engine request.

        Prompt and image are processed once for the group. Raises SamplerError naming the
        problem when the prompt does not fit or the engine fails, EngineDied when it is gone.
        """
        problem = request.problem
        prefix = request.prefix
        if request.kind == "oracle" and not prefix:
            if not labelled(task, problem):
                raise SamplerError(f"problem {problem.id}: has no perception label to start from")
            prefix = task.oracle_prefix(problem)
        # Tokenised apart from the prompt, as a response would be.
        prompt, images = self._prompts.of(problem, viewed(problem, request.view), prefix)
        start = time.perf_counter()
        final = await self._generate(problem, prompt, self._sampling(request), request.n)
        seconds = time.perf_counter() - start
        prompt_ids = np.asarray(final.prompt_token_ids, np.int32)
        rollouts = tuple(
            self._rollout(request, task, output, prompt_ids, images, prefix, seconds)
            for output in sorted(final.outputs, key=lambda output: output.index)
        )
        return Group(request.group_id, problem, rollouts)

    async def converse(
        self, request: SampleRequest, task: Task, environments: EnvironmentPool
    ) -> Group:
        """Sample `request.n` episodes of one problem with the environment that it names.

        A turn is an engine request whose prompt is everything so far: the engine's prefix cache
        serves it. Raises as `sample`.
        """
        assert request.environment is not None
        problem, sampling = request.problem, request.sampling
        budgets = Budgets.of(request.environment, sampling.max_tokens, self._llm.context)

        def prompt_of(opening: Observation | None) -> Asked:
            ids, images = self._prompts.asked(
                problem, viewed(problem, request.view), request.prefix, opening
            )
            sizes = [check_image(image, f"image of problem {problem.id}").size for image in images]
            return Asked(ids, self._chat.expanded(ids, sizes), images)

        async def write(
            turn: str, ids: Sequence[int], images: Sequence[bytes], room: int
        ) -> Written:
            of_turn = replace(
                request, group_id=turn, n=1, sampling=replace(sampling, max_tokens=room)
            )
            prompt = self._prompts.request(problem, ids, images)
            final = await self._generate(problem, prompt, self._sampling(of_turn), 1)
            (output,) = final.outputs
            tokens = [int(token) for token in output.token_ids]
            logprobs, versions = list(output.logprobs.logprobs), self._versions(output, len(tokens))
            return Written([*final.prompt_token_ids], tokens, logprobs, versions.tolist())

        def environment(index: int) -> Answers:
            name = f"{request.group_id}/{index}"
            seed = request_seed(self._seed, f"{name}/environment")
            return environments.open(name, problem, seed, request.returns)

        try:
            return await converse(
                self._chat, request, task, budgets, prompt_of, write, environment, self._name
            )
        except EpisodeError as error:
            raise SamplerError(f"problem {problem.id}: {error}") from error

    async def score(self, request: ScoreRequest) -> np.ndarray:
        """float32 [T]: log-probs (nats, temperature 1) of the response's tokens under the policy.

        All tokens are of one policy version: a weight update starts a running request again.
        Raises SamplerError naming the problem when the tokens do not fit, hold a placeholder
        before their end, or did not reach the model as they are; EngineDied when it is gone.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        problem, count = request.problem, len(request.response_ids)
        if not count:
            return np.zeros(0, np.float32)
        *inputs, last = [int(token) for token in request.response_ids]
        if placed := sorted(set(self._chat.placeholders) & set(inputs)):
            raise SamplerError(
                f"problem {problem.id}: cannot score special token {placed[0]} before the last "
                "position: as an input it would announce an image, and no sampler makes one there"
            )
        prompt, _ = self._prompts.of(problem, request.images)
        prompt["prompt_token_ids"] += inputs
        # The last token is only ever a target: as no input it needs no room in the context,
        # and a placeholder there announces nothing. Greedy, so the one token that an engine
        # must make leaves its random stream alone.
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=0,
            logprob_token_ids=[last],
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        final = await self._generate(problem, prompt, params, 1)
        prompt_logprobs, sampled = final.prompt_logprobs, final.outputs[0].logprobs
        start = len(final.prompt_token_ids) - len(inputs)
        if (
            list(final.prompt_token_ids[start:]) != inputs
            or prompt_logprobs.token_ids[start - 1 :] != inputs
        ):
            raise SamplerError(
                f"problem {problem.id}: the engine did not score the {count} tokens it was given"
            )
        # `prompt_logprobs` has an entry a prompt token but none for the first; `sampled` the token
        # made and then the one asked for.
        return np.asarray([*prompt_logprobs.logprobs[start - 1 :], sampled.logprobs[1]], np.float32)

    @property
    def vocabulary(self) -> int:
        """How many token ids the model can draw from."""
        return self._llm.vocabulary

    def shutdown(self) -> None:
        """Stop the engine, and its processes where it has some."""
        self._llm.shutdown()

    async def _generate(
        self, problem: Problem, prompt: dict[str, Any], params: Any, count: int
    ) -> RequestOutput:
        """The finished output of one engine request, with `count` responses."""
        self._requests += 1
        request_id = f"{self._name}-{self._requests}"
        try:
            final = await self._answered(self._llm.generate(request_id, prompt, params))
        except EngineDied:
            raise
        except Exception as error:  # of the request: vLLM's own, or its processor's
            raise SamplerError(f"problem {problem.id}: {error}") from error
        if len(final.outputs) != count:
            raise SamplerError(
                f"problem {problem.id}: the engine returned {len(final.outputs)} of {count} "
                "responses"
            )
        return final

    def _sampling(self, request: SampleRequest) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        return SamplingParams(
            n=request.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            logprobs=0,
            flat_logprobs=True,
            # vLLM knows of the tokenizer's end and of the configs', defaults of a class included.
            ignore_eos=True,
            stop_token_ids=sorted({*self._chat.ends, *self._chat.placeholders}),
            seed=request_seed(self._seed, request.group_id),
            stop=sampling.until or None,
            include_stop_str_in_output=True,
            detokenize=bool(sampling.until),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _rollout(
        self,
        request: SampleRequest,
        task: Task,
        output: CompletionOutput,
        prompt_ids: np.ndarray,
        images: tuple[bytes, ...],
        prefix: str,
        seconds: float,
    ) -> Rollout:
        ids = np.asarray(output.token_ids, np.int32)
        logprobs = np.asarray(output.logprobs.logprobs, np.float32)
        if len(logprobs) != len(ids):
            raise SamplerError(
                f"problem {request.problem.id}: {len(logprobs)} log-probs for {len(ids)} tokens"
            )
        ended = len(ids) > 0 and int(ids[-1]) in self._chat.ends
        text, offsets = self._chat.decoder.decode(ids[:-1] if ended else ids)
        if ended:
            offsets = np.append(offsets, offsets[-1])
        parsed = task.parse(prefix + text)
        return Rollout(
            rollout_id=f"{request.group_id}/{output.index}",
            group_id=request.group_id,
            kind=request.kind,
            view=request.view,
            prompt_ids=prompt_ids,
            response_ids=ids,
            images=images,
            logprobs=logprobs,
            versions=self._versions(output, len(ids)),
            segments=label_segments(offsets, parsed.spans, shift=len(prefix)),
            prefix=prefix,
            text=text,
            parsed=parsed,
            finish_reason=output.finish_reason or "abort",
            seconds=seconds,
            sampler=self._name,
        )

    def _versions(self, output: CompletionOutput, length: int) -> np.ndarray:
        versions = np.full(length, self._version, np.int32)
        for span in output.weight_versions or ():
            if span.version.isdigit():
                versions[span.start : span.end] = int(span.version)
        return versions


def request_seed(seed: int, group_id: str) -> int:
    """The seed of a group's tokens, in [0, 2^62); vLLM adds `i` for response `i` of the group.

    So what a group draws hangs on neither the time nor its company, and a resumed run draws what
    the uninterrupted one would have.
    """
    digest = hashlib.sha256(f"{seed}/{group_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
