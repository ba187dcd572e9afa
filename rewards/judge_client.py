"""Asking a judge over any chat-completions API: rate, deadline, tries, and why no score came.

The `openai` client sends, and tries again: `_try` is one try. HTTP 429 and 5xx, timeouts, broken
connections and bodies that are no completion are tried up to `retries` times more, after what
`Retry-After` says or a growing pause. Any other status fails at once. A reply that came but is not
of the form that was asked for is tried again only if `temperature > 0` (another sample may do) or
`structured` (the server promised the form, so it slipped); a greedy model left to itself says the
same again. What is left is a `JudgeError`, never a score of 0.

**The key** is read from the environment whenever a request is made. It is in the request's
header and nowhere else: not on any object, in no log, exception or cache entry.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

import httpx2
from pydantic import Field, field_validator

from rewards.rate import Clock, TokenBucket
from tasks.fields import Amount, Count, Positive, Rate, Section, Text

if TYPE_CHECKING:
    from openai import AsyncOpenAI

LONGEST_RETRY_AFTER = 120.0
"""Seconds that the client waits at most; a server that asks for more is given up at once."""
MAX_REPLY_BYTES = 262_144
_MESSAGE_CHARS = 300
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_TRIES_BEFORE = "x-stainless-retry-count"
"""The header in which the client counts its tries."""

Kind = Literal[
    "timeout", "connection", "rate_limit", "server_error", "refused", "no_completion",
    "huge_reply", "empty_reply", "malformed", "out_of_range",
]  # fmt: skip
"""Why a request gave no score. `refused`: any status but 200, 429 and 5xx. `no_completion`: the
body is not JSON with `choices`. The last three are about what the judge wrote."""
_REMEDY: dict[Kind, str] = {
    "timeout": "raise timeout_seconds, or lower concurrency",
    "connection": "check that the server is up and reached from here, and base_url",
    "rate_limit": "set requests_per_minute, lower concurrency, or raise retries",
    "server_error": "see the server's log; raise retries if it passes",
    "refused": "check base_url (it usually ends in /v1), model and api_key_env",
    "no_completion": "check that base_url is an OpenAI-compatible API",
    "huge_reply": "check that base_url is an OpenAI-compatible API; lower max_tokens",
    "empty_reply": "raise max_tokens if the judge thinks before it replies",
    "malformed": 'set structured (true, or "choice" for vLLM) or raise max_tokens',
    "out_of_range": 'set structured (true, or "choice" for vLLM), or take another judge',
}


class JudgeError(RuntimeError):
    """No score came: the message names endpoint, model, status, tries and remedy.

    `status` is the last HTTP status, None where no reply came; `tries` counts requests.
    """

    def __init__(
        self, message: str, kind: Kind = "connection", status: int | None = None, tries: int = 0
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status
        self.tries = tries


class Endpoint(Section):
    """Where a judge is asked, and how often."""

    base_url: str
    """Where the API is, without `/chat/completions`: `http://localhost:8000/v1`."""
    model: Text
    """The judge, as the endpoint calls it."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "judge"
    """What metrics call the term; two judges need two names."""
    structured: bool | Literal["choice"] = True
    """Have the server hold the reply to its form. True: by `response_format` json_schema, which
    most know. `"choice"`: by vLLM's own `structured_outputs`, the eleven replies spelled out; a
    weak judge can lose itself in the white space that a schema allows. False: by words alone."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key; "" sends none."""
    concurrency: Positive = 8
    """Requests in flight at once, over all groups."""
    requests_per_minute: Amount = 0.0
    """0: no limit. Tries count, cache hits do not."""
    timeout_seconds: Rate = 60.0
    """For one whole request; the waits for a free slot and for the rate are not counted."""
    retries: Count = 4

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        # What is wrong is never shown: this is where a key may hide.
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            httpx2.URL(url)
        except (ValueError, httpx2.InvalidURL):
            usable = False
        if not usable:
            raise ValueError('no http address; write it as "http://localhost:8000/v1"')
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("holds a user, a query or a fragment; name a key by api_key_env")
        if parts.path.rstrip("/").endswith("/chat/completions"):
            raise ValueError("leave out /chat/completions, it is added")
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        # Upper case only, so that a key pasted here is told from a name, and never shown.
        if name and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", name):
            raise ValueError(
                "not the name of an environment variable in capitals, such as JUDGE_API_KEY; "
                "the key itself is never an argument"
            )
        return name


class Miss(httpx2.TransportError):
    """A try without a score; `again`: the next one may bring it, and the client makes it."""

    def __init__(self, kind: Kind, detail: str, again: bool, status: int | None = None) -> None:
        super().__init__(detail)
        self.kind, self.detail, self.again, self.status = kind, detail, again, status
        self.wait = ""
        """What the server's `Retry-After` says."""


@dataclass(frozen=True)
class _Session:
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    client: AsyncOpenAI
    slots: asyncio.Semaphore


class JudgeClient:
    """Requests to one endpoint, and what became of them.

    Args:
        endpoint: where, how many at once, how often.
        read: from what the judge wrote (any JSON value) and the `finish_reason` to a verdict;
            raises Miss where it is none.
    """

    def __init__(self, endpoint: Endpoint, read: Callable[[Any, str], Any]) -> None:
        self.endpoint = endpoint
        self._read = read
        self.use_clock(Clock())
        self._session: _Session | None = None
        self._tally = Counter({"requests": 0, "retries": 0, "given_up": 0})
        self._latencies = (0.0, 0.0)  # sum and largest, in seconds

    def use_clock(self, clock: Clock) -> None:
        """Take time from `clock`; the rate limit starts anew."""
        self.clock = clock
        self.bucket = TokenBucket(self.endpoint.requests_per_minute, clock)

    def counts(self) -> dict[str, float]:
        """What happened since the client was made.

        `requests` (tries included), `retries`, perceptions `given_up`, requests without a score as
        `failures/<kind>` (some were tried again with success), latencies in seconds.
        """
        total, longest = self._latencies
        mean = total / self._tally["requests"] if total else 0.0
        return {**self._tally, "latency_mean": mean, "latency_max": longest}

    async def ask(self, body: Mapping[str, Any]) -> Any:
        """Send a request until a verdict comes; raises JudgeError where none does."""
        import openai  # takes a second; only who asks a judge needs it

        client = self._open_session().client
        try:
            reply = await client.post("/chat/completions", cast_to=httpx2.Response, body=body)
            return reply.extensions["verdict"]
        except openai.APIStatusError as error:
            miss, request = error.response.extensions["miss"], error.request
        except openai.APIConnectionError as error:
            miss, request = error.__cause__, error.request
        # Outside `except`: what the client raised holds the request, and with it the key.
        raise self._give_up(miss, request)

    async def aclose(self) -> None:
        """Close connections; the client can be used again."""
        if self._session is not None:
            await self._session.client.close()
            self._session = None

    async def try_once(
        self, request: httpx2.Request, send: Callable[[], Awaitable[httpx2.Response]]
    ) -> httpx2.Response:
        """One try, in a free slot and at the rate: a reply whose extensions hold the verdict.

        What the client shall try again is raised as `Miss`, or is a reply of 429 or 5xx, of which
        it reads how long to wait. Raises JudgeError for what it shall not.
        """
        self._sign(request)
        async with self._open_session().slots:
            await self.bucket.take()
            self._tally["requests"] += 1
            self._tally["retries"] += request.headers[_TRIES_BEFORE] != "0"
            start = self.clock.now()
            try:
                async with asyncio.timeout(self.endpoint.timeout_seconds):
                    extensions = {"verdict": await self._verdict_in(await send())}
                return httpx2.Response(200, request=request, extensions=extensions)
            except TimeoutError:
                waited = f"no whole reply within {self.endpoint.timeout_seconds:g} s"
                miss = Miss("timeout", waited, again=True)
            except Miss as error:
                miss = error
            except httpx2.TransportError as error:
                miss = Miss("connection", f"{type(error).__name__} {error}".strip(), again=True)
            finally:
                seconds = self.clock.now() - start
                total, longest = self._latencies
                self._latencies = total + seconds, max(longest, seconds)
        self._tally[f"failures/{miss.kind}"] += 1
        if not miss.again:
            raise self._give_up(miss, request)
        if miss.status in (None, 200):
            raise miss
        headers = {"Retry-After": miss.wait} if miss.wait else {}
        return httpx2.Response(
            miss.status, headers=headers, request=request, extensions={"miss": miss}
        )

    def _sign(self, request: httpx2.Request) -> None:
        for name in ("Authorization", "OpenAI-Organization", "OpenAI-Project"):
            request.headers.pop(name, None)
        if key := read_key(self.endpoint.api_key_env):
            request.headers["Authorization"] = f"Bearer {key}"
        # Nothing is decompressed: a small reply could unpack to any size.
        request.headers["Accept-Encoding"] = "identity"

    async def _verdict_in(self, response: httpx2.Response) -> Any:
        """Read a reply, no further than just past the limit; raises Miss where it has none."""
        body = bytearray()
        async with contextlib.aclosing(response):
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_REPLY_BYTES:
                    break
        if response.status_code != 200:
            raise self._refusal(response, bytes(body))
        if len(body) > MAX_REPLY_BYTES:
            raise Miss("huge_reply", f"more than {MAX_REPLY_BYTES} bytes", True, 200)
        try:
            choice = _json(body)["choices"][0]
            content, finish = choice["message"]["content"], choice.get("finish_reason")
        except (TypeError, KeyError, IndexError):
            text = body.decode("utf-8", "replace")
            raise Miss("no_completion", f"the body is {text or 'empty'}", True, 200) from None
        return self._read(content, f"finish_reason {finish!r}")

    def _refusal(self, response: httpx2.Response, body: bytes) -> Miss:
        """What a status other than 200 means; the detail is the server's own message."""
        answer, status = _json(body), response.status_code
        error = answer.get("error", answer) if isinstance(answer, dict) else None
        message = error.get("message") if isinstance(error, dict) else error
        text = body[:MAX_REPLY_BYTES].decode("utf-8", "replace")
        detail = message if isinstance(message, str) and message else text or "no message"
        if status != 429 and status < 500:
            return Miss("refused", detail, False, status)
        wait = response.headers.get("Retry-After", "")
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", wait) and float(wait) <= LONGEST_RETRY_AFTER:
            self.bucket.close_for(float(wait))  # nobody else is to ask meanwhile
        if wait:
            detail = f"asks to wait {wait} s: {detail}"
        miss = Miss("rate_limit" if status == 429 else "server_error", detail, True, status)
        miss.wait = wait
        return miss

    def _open_session(self) -> _Session:
        """Client and slots of the running loop; connections do not outlive their loop."""
        from openai import AsyncOpenAI

        loop = asyncio.get_running_loop()
        if self._session is None or self._session.loop is not loop:
            endpoint = self.endpoint
            # A proxy set for the world outside cannot reach a server on this machine.
            outside = urlsplit(endpoint.base_url).hostname not in _LOOPBACK
            # Over plain http there is no certificate to load authorities for.
            secure = endpoint.base_url.lower().startswith("https:")
            client = AsyncOpenAI(
                api_key="the true one is only in the header",
                base_url=endpoint.base_url,
                max_retries=endpoint.retries,
                timeout=None,  # one deadline for the whole try, in try_once
                http_client=_Http(self, trust_env=outside, verify=secure),
            )
            self._session = _Session(loop, client, asyncio.Semaphore(endpoint.concurrency))
        return self._session

    def _give_up(self, miss: Miss, request: httpx2.Request) -> JudgeError:
        self._tally["given_up"] += 1
        endpoint, tries = self.endpoint, 1 + int(request.headers[_TRIES_BEFORE])
        status = "no reply" if miss.status is None else f"status {miss.status}"
        remedy = _REMEDY[miss.kind]
        if miss.status in (400, 422) and endpoint.structured:
            remedy += "; set structured = false if the server cannot hold a reply to a form"
        detail = _printable(_without_key(miss.detail, endpoint.api_key_env))
        return JudgeError(
            f"judge {endpoint.name!r}: {endpoint.base_url}/chat/completions, model "
            f"{endpoint.model!r}: {miss.kind}, {status}, {tries} "
            f"{'try' if tries == 1 else 'tries'}: {detail}; {remedy}",
            miss.kind,
            miss.status,
            tries,
        )


class _Http(httpx2.AsyncClient):
    """Sends as `JudgeClient.try_once` says."""

    def __init__(self, judge: JudgeClient, **options: Any) -> None:
        super().__init__(**options)
        self._judge = judge

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """One try."""
        plain = functools.partial(super().send, request, **options | {"stream": True})
        return await self._judge.try_once(request, plain)


def read_key(variable: str) -> str:
    """The key in an environment variable; "" for no variable. No error shows it."""
    if not variable:
        return ""
    key = os.environ.get(variable, "")
    if not key:
        raise ValueError(
            f"api_key_env: the environment variable {variable} is not set where this term runs; "
            "set it there before the run starts"
        )
    # A line end in a header is an error that quotes the header.
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError(
            f"api_key_env: the value of {variable} holds white space or characters beyond ASCII, "
            "which no HTTP header takes; set it again"
        )
    return key


def _without_key(text: str, variable: str) -> str:
    """A server may quote the key it refuses."""
    key = read_key(variable)
    return text.replace(key, "[key]") if key else text


def _json(body: bytes | bytearray) -> Any:
    """A server's JSON, None if it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _printable(text: str) -> str:
    """The start of a text, on one line that cannot steer a terminal."""
    printable = "".join(c if c.isprintable() else " " for c in text[:_MESSAGE_CHARS])
    return printable + (" ..." if len(text) > _MESSAGE_CHARS else "")
