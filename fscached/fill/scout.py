"""Asking whether a source that was away is back: one fetch at a time, after pauses that double.

A source has tried for a whole deadline before it says that it is away, so this is no storm; and
when it is back, all who wait are served at once.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator

PAUSE_S = 0.5
PAUSE_LIMIT_S = 5.0


def pauses() -> Iterator[float]:
    """Seconds between tries. The jitter of a half keeps nodes from coming back together."""
    pause_s = PAUSE_S
    while True:
        yield pause_s * random.uniform(0.5, 1)
        pause_s = min(pause_s * 2, PAUSE_LIMIT_S)


class Scout:
    """Calls `ask` in the running event loop, once after every `later`."""

    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask = ask
        self._loop = asyncio.get_running_loop()
        self._pauses = pauses()
        self._away = False
        self._timer: asyncio.TimerHandle | None = None

    def later(self) -> bool:
        """Ask after a pause, if that is not to come already; whether the source was not known to
        be away."""
        first, self._away = not self._away, True
        if self._timer is None:
            self._timer = self._loop.call_later(next(self._pauses), self._go)
        return first

    def stop(self) -> None:
        """The source is back, or nobody waits for it: the next pause is the shortest again."""
        self._pauses, self._away = pauses(), False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _go(self) -> None:
        self._timer = None
        self._ask()
