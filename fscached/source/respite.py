"""When an origin may be asked: not while it wants to be left alone (Retry-After), by anybody here,
and no more often again than its budget has it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from fscached.source.origin import origin_of
from fscached.source.patience import Budget

RETRIES_S: Final = 10.0
ORIGINS_LIMIT: Final = 256


@dataclass(slots=True)
class _Queue:
    """Those who want to ask an origin again, one after the other."""

    budget: Budget
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    answered: asyncio.Event = field(default_factory=asyncio.Event)


class Respites:
    """Shared by both planes: a registry that pauses one of them would only be asked by the other.
    Moments are of the running event loop's clock. `retries_s` is each origin's budget."""

    def __init__(self, retries_s: float = RETRIES_S) -> None:
        self._retries_s = retries_s
        self._until: dict[str, float] = {}
        self._queues: dict[str, _Queue] = {}

    def grant(self, origin: str, pause_s: float) -> None:
        """Send nothing to an origin for `pause_s` seconds."""
        if pause_s > 0:
            now = asyncio.get_running_loop().time()
            self._until = {known: end for known, end in self._until.items() if end > now}
            self._until[origin] = max(now + pause_s, self._until.get(origin, 0.0))

    async def over(self, url: str) -> None:
        """Return when the origin of `url` may be asked."""
        if not self._until:
            return
        origin = origin_of(url)
        loop = asyncio.get_running_loop()
        while True:
            left_s = self._until.get(origin, 0.0) - loop.time()
            if left_s <= 0:
                return
            await asyncio.sleep(left_s)

    async def again(self, origin: str) -> None:
        """Return when one more try at an origin is within its budget; who waits longest is
        first."""
        queue = self._queues.get(origin) or self._open(origin)
        loop = asyncio.get_running_loop()
        async with queue.turn:
            while left_s := queue.budget.take(loop.time()):
                queue.answered.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(left_s):
                        await queue.answered.wait()

    def answered(self, origin: str) -> None:
        """An origin gave bytes."""
        if queue := self._queues.get(origin):
            queue.budget.answered()
            queue.answered.set()

    def _open(self, origin: str) -> _Queue:
        if len(self._queues) >= ORIGINS_LIMIT:
            waited_for = {name: one for name, one in self._queues.items() if one.turn.locked()}
            self._queues = waited_for
        queue = self._queues[origin] = _Queue(Budget(self._retries_s))
        return queue
