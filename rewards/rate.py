"""How often requests may go: a token bucket, and the clock it reads."""

from __future__ import annotations

import asyncio
import time


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
