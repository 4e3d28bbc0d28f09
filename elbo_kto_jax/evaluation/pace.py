"""When requests are sent: the pace that all share, and the pauses between attempts."""

import asyncio
import random
import time
from collections.abc import Callable


class Pace:
    """When the next request may be sent.

    Args:
      requests_per_minute: 0: at any time.
      clock: seconds.
    """

    def __init__(self, requests_per_minute: float, clock: Callable[[], float] = time.monotonic):
        self._interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._clock, self._next = clock, clock()

    async def wait(self) -> None:
        """Returns when the caller may send; requests are `60 / requests_per_minute` seconds apart."""
        while (rest := self._next - self._clock()) > 0:
            await asyncio.sleep(rest)
        self._next = self._clock() + self._interval


def backoff(repeated: int) -> float:
    """Seconds before the next attempt, as the official client counts them."""
    return min(8.0, 0.5 * 2**repeated) * random.uniform(0.75, 1.0)
