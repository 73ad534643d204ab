"""How fast the link is, as far as reads that were waited for have shown."""

from __future__ import annotations

from collections import deque
from typing import Final

SAMPLE_BYTES: Final = 128 << 10
"""Shorter reads say more about the way there and back."""
SAMPLES: Final = 8
SAMPLES_LEAST: Final = 4
FAST_BYTES_PER_S: Final = 50e6
"""A reader's MiB takes 20 ms then, and half the link is still much."""


class Link:
    """Fast when all of the last reads were. A read's time is counted from its request to its last
    byte, so that no link seems faster than it is, whatever was buffered meanwhile; one with long
    ways seems slower."""

    def __init__(self, fast_bytes_per_s: float = FAST_BYTES_PER_S) -> None:
        self._fast_bytes_per_s = fast_bytes_per_s
        self._speeds: deque[float] = deque(maxlen=SAMPLES)

    def brought(self, size_bytes: int, seconds: float) -> None:
        """A read that was waited for has brought so many bytes."""
        if size_bytes >= SAMPLE_BYTES:
            self._speeds.append(size_bytes / max(seconds, 1e-6))

    @property
    def fast(self) -> bool:
        """Whether prefetch is in nobody's way."""
        return len(self._speeds) >= SAMPLES_LEAST and min(self._speeds) >= self._fast_bytes_per_s
