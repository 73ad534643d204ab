"""How many bytes per second there are, and who may have them: demand first, prefetch what is left.

Pure: every call is told the time, in seconds on any one clock that does not jump.
"""

from __future__ import annotations

from collections import deque
from typing import Final

DEBT_S: Final = 1.0
"""Demand beyond the limit holds prefetch up for no longer than this after its end."""
RANGE_S: Final = 0.5
"""One request of prefetch should not be more than the limit gives in this time…"""
RANGE_LEAST_BYTES: Final = 64 << 10
"""…but no shorter than this: a request has its own price."""
SPEED_S: Final = 10.0
"""How far back a speed looks."""


class Budget:
    """A token bucket that demand empties without asking and prefetch waits for.

    It may be overdrawn: a request begins while there is anything left and is then paid for, so
    that over time no more than the limit is spent, however large one request is.
    """

    def __init__(self, bytes_per_s: int) -> None:
        """`bytes_per_s` 0: no limit."""
        self._rate = bytes_per_s
        self._left = float(bytes_per_s) * RANGE_S
        self._at_s: float | None = None

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self._rate > 0

    def demand(self, size_bytes: int, now_s: float) -> None:
        """Bytes that a reader waits for: they are never held up."""
        self._refill(now_s)
        floor = -self._rate * DEBT_S
        if self._left > floor:
            self._left = max(self._left - size_bytes, floor)

    def prefetch(self, size_bytes: int, now_s: float) -> None:
        """Bytes that prefetch asks for, `wait_s` having been 0."""
        self._refill(now_s)
        self._left -= size_bytes

    def wait_s(self, now_s: float) -> float:
        """How long prefetch has to wait; 0: it may ask now."""
        self._refill(now_s)
        return -self._left / self._rate if self._rate and self._left < 0 else 0.0

    def range_bytes(self, most_bytes: int) -> int:
        """How long a request of prefetch should be, at most."""
        if not self._rate:
            return most_bytes
        return min(most_bytes, max(int(self._rate * RANGE_S), RANGE_LEAST_BYTES))

    def _refill(self, now_s: float) -> None:
        if self._at_s is not None:
            full = self._rate * RANGE_S
            self._left = min(self._left + (now_s - self._at_s) * self._rate, full)
        self._at_s = now_s


class Speed:
    """Bytes per second of late."""

    def __init__(self) -> None:
        self._brought: deque[tuple[float, int]] = deque()
        self._total = 0
        self._began_s = 0.0

    def brought(self, size_bytes: int, began_s: float, now_s: float) -> None:
        """So many bytes have come, on the way since `began_s`."""
        if not self._brought:
            self._began_s = began_s
        self._brought.append((now_s, size_bytes))
        self._total += size_bytes
        self._forget(now_s)

    def bytes_per_s(self, now_s: float) -> float:
        """0 when nothing has come for SPEED_S."""
        self._forget(now_s)
        return self._total / max(now_s - self._began_s, 0.001) if self._brought else 0.0

    def _forget(self, now_s: float) -> None:
        while self._brought and self._brought[0][0] < now_s - SPEED_S:
            self._began_s, size_bytes = self._brought.popleft()
            self._total -= size_bytes
