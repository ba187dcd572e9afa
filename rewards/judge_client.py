"""Asking a judge over any chat-completions API: rate, deadline, tries, and why no score came.

**Which failures are tried again.** HTTP 429 and 5xx, timeouts, broken connections, and bodies
that are no completion: up to `retries` times, after an exponential pause with jitter, or after
what `Retry-After` says. Any other status fails at once. A reply that came but is not
`{"score": 0..10}` is tried again only if `temperature > 0` (another sample may do) or `structured`
(the server promised the form, so it slipped); a greedy model left to itself says the same again.
What is left is a `JudgeError`, never a score of 0.

**The key** is read from the environment whenever a request is made. It is in the request's
header and nowhere else: not on any object, in no log, exception or cache entry.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, ConfigDict, Field, field_validator

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
"""Seconds between tries: FIRST_PAUSE, doubled with each try up to LONGEST_PAUSE, times 0.5 to 1."""
LONGEST_RETRY_AFTER = 300.0
"""A server that asks for a longer wait is given up at once, instead of asked too early."""
MAX_REPLY_BYTES = 262_144
_MESSAGE_CHARS = 300
_LOOPBACK = ("localhost", "127.0.0.1", "::1")

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


class Endpoint(BaseModel):
    """Where a judge is asked, and how often."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    base_url: str
    """Where the API is, without `/chat/completions`: `http://localhost:8000/v1`."""
    model: Annotated[str, Field(min_length=1)]
    """The judge, as the endpoint calls it."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "judge"
    """What metrics call the term; two judges need two names."""
    structured: bool | Literal["choice"] = True
    """Have the server hold the reply to its form. True: by `response_format` json_schema, which
    most know. `"choice"`: by vLLM's own `structured_outputs`, the eleven replies spelled out; a
    weak judge can lose itself in the white space that a schema allows. False: by words alone."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key; "" sends none."""
    concurrency: Annotated[int, Field(ge=1)] = 8
    """Requests in flight at once, over all groups."""
    requests_per_minute: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """0: no limit. Tries count, cache hits do not."""
    timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """For one whole request; the waits for a free place and for the rate are not counted."""
    retries: Annotated[int, Field(ge=0)] = 4

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        # What is wrong is never shown: this is where a key may hide.
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            httpx.URL(url)
        except (ValueError, httpx.InvalidURL):
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


class Clock:
    """Time in seconds as the client sees it; a test puts another in its place."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)


class TokenBucket:
    """At most `burst + rate * t` requests in any t seconds; a burst is one second's worth.

    Args:
        per_minute: 60 * rate; 0: no limit.
    """

    def __init__(self, per_minute: float, clock: Clock) -> None:
        self.rate = per_minute / 60
        self.burst = max(1.0, self.rate)
        self.clock = clock
        self._tokens = self.burst
        self._at = clock.now()
        self._closed_until = self._at

    def close_for(self, seconds: float) -> None:
        """Let nobody through for a while, as a server asked."""
        self._closed_until = max(self._closed_until, self.clock.now() + seconds)

    async def take(self) -> None:
        """Wait until a request may go."""
        while True:
            now = self.clock.now()
            self._tokens = min(self.burst, self._tokens + (now - self._at) * self.rate)
            self._at = now
            wait = self._closed_until - now
            if self.rate and self._tokens < 1 - 1e-9:
                wait = max(wait, (1 - self._tokens) / self.rate)
            if wait <= 0:
                break
            await self.clock.sleep(wait)
        if self.rate:
            self._tokens -= 1


@dataclass(frozen=True)
class Miss:
    """A request without a score. `wait`: seconds the server asked for."""

    kind: Kind
    detail: str
    again: bool
    status: int | None = None
    wait: float | None = None


@dataclass(frozen=True)
class _Session:
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    client: httpx.AsyncClient
    places: asyncio.Semaphore


class JudgeClient:
    """Requests to one endpoint, and what became of them.

    Args:
        endpoint: where, how many at once, how often.
        read: from what the judge wrote (any JSON value) and the `finish_reason` to a score, or why
            it is none.
    """

    def __init__(self, endpoint: Endpoint, read: Callable[[Any, str], int | Miss]) -> None:
        self.endpoint = endpoint
        self._read = read
        self.use_clock(Clock())
        self._session: _Session | None = None
        self.requests = 0
        """Requests sent, tries included."""
        self.retries = 0
        self.given_up = 0
        """Perceptions for which no score came."""
        self.failures: Counter[str] = Counter()
        """Requests without a score, by `Kind`; some were tried again with success."""
        self.latency_total = 0.0
        """Seconds, summed over requests."""
        self.latency_max = 0.0

    def use_clock(self, clock: Clock) -> None:
        """Take time from `clock`; the rate limit starts anew."""
        self.clock = clock
        self.bucket = TokenBucket(self.endpoint.requests_per_minute, clock)

    def counts(self) -> dict[str, float]:
        """What happened since the client was made; latencies in seconds, failures by kind."""
        return {
            "requests": self.requests,
            "retries": self.retries,
            "given_up": self.given_up,
            "latency_mean": self.latency_total / self.requests if self.requests else 0.0,
            "latency_max": self.latency_max,
            **{f"failures/{kind}": float(n) for kind, n in sorted(self.failures.items())},
        }

    async def ask(self, body: bytes, key: str) -> int:
        """Send a request until a score comes.

        Args:
            body: the request, as JSON.
            key: what the request is known by; the pauses between tries hang on it.

        Raises:
            JudgeError: no score came.
        """
        # Jitter from the key alone, so that a run can be repeated.
        jitter = random.Random(key)
        pauses = (min(LONGEST_PAUSE, FIRST_PAUSE * 2**n) for n in range(self.endpoint.retries))
        tries = 1
        while isinstance(result := await self._request(body), Miss):
            self.failures[result.kind] += 1
            pause = next(pauses, None)
            if pause is None or not result.again:
                self.given_up += 1
                raise self._error(result, tries)
            tries += 1
            self.retries += 1
            pause *= jitter.uniform(0.5, 1.0)
            if result.wait is not None:
                self.bucket.close_for(result.wait)
                pause = max(pause, result.wait)
            await self.clock.sleep(pause)
        return result

    async def aclose(self) -> None:
        """Close connections; the client can be used again."""
        if self._session is not None:
            await self._session.client.aclose()
            self._session = None

    async def _request(self, body: bytes) -> int | Miss:
        """One request: the score, or why there is none."""
        session = self._open_session()
        async with session.places:
            await self.bucket.take()
            self.requests += 1
            start = self.clock.now()
            try:
                async with asyncio.timeout(self.endpoint.timeout_seconds):
                    return await self._post(session.client, body)
            except TimeoutError:
                waited = f"no whole reply within {self.endpoint.timeout_seconds:g} s"
                return Miss("timeout", waited, again=True)
            except httpx.TransportError as error:
                return Miss("connection", f"{type(error).__name__} {error}".strip(), again=True)
            finally:
                seconds = self.clock.now() - start
                self.latency_total += seconds
                self.latency_max = max(self.latency_max, seconds)

    async def _post(self, client: httpx.AsyncClient, body: bytes) -> int | Miss:
        # Nothing is decompressed: a small reply could unpack to any size.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key := read_key(self.endpoint.api_key_env):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.endpoint.base_url}/chat/completions"
        found = bytearray()
        async with client.stream("POST", url, content=body, headers=headers) as response:
            async for chunk in response.aiter_raw():
                found += chunk
                if len(found) > MAX_REPLY_BYTES:
                    break
        status = response.status_code
        if status != 200:
            return _refusal(status, bytes(found), response.headers.get("Retry-After"))
        if len(found) > MAX_REPLY_BYTES:
            return Miss("huge_reply", f"more than {MAX_REPLY_BYTES} bytes", True, status)
        written = _written(bytes(found))
        return written if isinstance(written, Miss) else self._read(*written)

    def _open_session(self) -> _Session:
        """Client and places of the running loop; connections do not outlive their loop."""
        loop = asyncio.get_running_loop()
        if self._session is None or self._session.loop is not loop:
            endpoint = self.endpoint
            client = httpx.AsyncClient(
                timeout=None,  # one deadline for the whole request, in _request
                # Over plain http there is no certificate to load authorities for.
                verify=endpoint.base_url.lower().startswith("https:"),
                limits=httpx.Limits(max_keepalive_connections=endpoint.concurrency),
                # A proxy set for the world outside cannot reach a server on this machine.
                trust_env=urlsplit(endpoint.base_url).hostname not in _LOOPBACK,
            )
            self._session = _Session(loop, client, asyncio.Semaphore(endpoint.concurrency))
        return self._session

    def _error(self, miss: Miss, tries: int) -> JudgeError:
        endpoint = self.endpoint
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


def _refusal(status: int, body: bytes, retry_after: str | None) -> Miss:
    """What a status other than 200 means; the detail is the server's own message."""
    text = body[:MAX_REPLY_BYTES].decode("utf-8", "replace")
    found = _json(body)
    error = found.get("error", found) if isinstance(found, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    detail = message if isinstance(message, str) and message else text or "no message"
    if status != 429 and status < 500:
        return Miss("refused", detail, False, status)
    kind: Kind = "rate_limit" if status == 429 else "server_error"
    wait = _seconds(retry_after)
    if wait is not None and wait > LONGEST_RETRY_AFTER:
        detail = f"asks to wait {wait:.0f} s, longer than {LONGEST_RETRY_AFTER:.0f} s: {detail}"
        return Miss(kind, detail, False, status)
    return Miss(kind, detail, True, status, wait)


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` (RFC 9110, 10.2.3) in seconds: a number or a date; None if unreadable."""
    if retry_after is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _written(body: bytes) -> tuple[Any, str] | Miss:
    """What the judge wrote in a completion, and why it stopped."""
    found = _json(body)
    try:
        choice = found["choices"][0]
        return choice["message"]["content"], f"finish_reason {choice.get('finish_reason')!r}"
    except (TypeError, KeyError, IndexError):
        text = body.decode("utf-8", "replace")
        return Miss("no_completion", f"the body is {text or 'empty'}", True, 200)


def _json(body: bytes) -> Any:
    """A server's JSON, None if it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _printable(text: str) -> str:
    """The start of a text, on one line that cannot steer a terminal."""
    shown = "".join(c if c.isprintable() else " " for c in text[:_MESSAGE_CHARS])
    return shown + (" ..." if len(text) > _MESSAGE_CHARS else "")
