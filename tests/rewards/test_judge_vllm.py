"""The judge against a real vLLM server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards.judge import Judge
from rewards.judge_client import JudgeError
from tasks.load import load_task
from tests.support.judge_server import HOSTILE, seen


@pytest.fixture(scope="module")
def vllm_url(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A vLLM server with a random model; it starts in one to three minutes on a CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(tiny_models["qwen3_vl"]), "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8"]
    command += ["--distributed-executor-backend", "uni"]
    command += ["--limit-mm-per-prompt", '{"image": 1, "video": 0}']
    # What a random model writes between two JSON tokens is white space without end.
    no_spaces = '{"backend": "xgrammar", "disable_any_whitespace": true}'
    command += ["--structured-outputs-config", no_spaces]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    settings |= {"OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            env=os.environ | settings,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 1200
        while not _healthy(url):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until, log.read_text()[-4000:]
            time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        # Its own group, so nothing it started is left and nobody else is touched.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)


def _healthy(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return bool(direct.open(f"{url}/health").status == 200)
    except OSError:
        return False


def test_a_real_vllm_server_judges(vllm_url: str, tmp_path: Path) -> None:
    task = load_task("sudoku")
    knobs = {"size": 4, "cell_size": 16, "font_size": 12, "margin": 0, "blanks": 6}
    problem = task.generate(np.random.default_rng(0), task.spec(**knobs, prompt="brief"))
    one = seen(problem.perception, "all cells are 1", HOSTILE[3], problem.perception, None)
    one = replace(one, problem=problem)

    async def both() -> None:
        for structured in (True, "choice"):
            judge = Judge(
                base_url=vllm_url,
                model="tiny",
                structured=structured,
                cache=str(tmp_path),
                timeout_seconds=120.0,
            )
            scores = await judge(task, one)
            # A random model gives random scores, but each is one.
            assert all(score in [n / 10 for n in range(11)] for score in scores)
            assert scores[0] == scores[3] and scores[4] == 0
            counts = judge.counts()
            assert (counts["requests"], counts["shared"], counts["given_up"]) == (3, 1, 0)
            assert await judge(task, one) == scores
            assert judge.counts()["requests"] == 3
            await judge.aclose()
        for args, status, words in (
            ({"model": "nobody"}, 404, "nobody"),
            ({"model": "tiny", "max_tokens": 99_999}, 400, "99999"),
        ):
            judge = Judge(base_url=vllm_url, **args)
            with pytest.raises(JudgeError, match=words) as error:
                await judge(task, one)
            assert (error.value.status, error.value.tries) == (status, 1)
            await judge.aclose()

    asyncio.run(both())
