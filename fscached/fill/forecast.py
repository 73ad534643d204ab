"""Whether a prefetch brings a chunk sooner than a fetch made now would, judged by their paces.

One that does not is stopped: the reader's own fetch takes over what has not arrived. So no more
comes twice than what of a chunk was on the link.
"""

from __future__ import annotations

import asyncio
from math import inf
from time import monotonic
from typing import Any, Final, NamedTuple

from fscached.fill.flight import Flight
from fscached.source import Priority
from rafs_v6.blob import ChunkMap

SLACK_S: Final = 0.02
"""How much later a prefetch may be: less is not worth bytes that come twice. Whoever has joined one
looks as often whether it still is no later."""


class Pace(NamedTuple):
    """Seconds from a question to its first byte, and bytes per second from there."""

    first_byte_s: float
    bytes_per_s: float

    def seconds(self, size_bytes: int) -> float:
        """From the question to the last of so many bytes."""
        return self.first_byte_s + size_bytes / self.bytes_per_s


class Forecast:
    """Of one blob's flights (`fscached.cache.blob.Prefetches`)."""

    def __init__(self, chunks: ChunkMap) -> None:
        self._chunks = chunks
        self._usual: Pace | None = None
        """The last demand flight's; before there was one, the last prefetch's."""
        self._prefetches: dict[int, tuple[Flight, asyncio.Task[Any]]] = {}

    def prefetch(self, number: int, flight: Flight, task: asyncio.Task[Any]) -> None:
        """The task flies the fetch of this number, and ends when it is cancelled."""
        self._prefetches[number] = flight, task

    def ended(self, number: int, flight: Flight, priority: Priority) -> None:
        """It is over."""
        self._prefetches.pop(number, None)
        if priority is Priority.DEMAND or self._usual is None:
            self._usual = _pace(flight) or self._usual

    def slow(self, number: int, index: int) -> bool:
        """Whether a fetch made now would bring the chunk sooner than the prefetch of this number,
        which has it on board. Nothing is known of one that never left: a fetch will."""
        if number not in self._prefetches:
            return True
        flight, _ = self._prefetches[number]
        if (usual := self._usual or _pace(flight)) is None:
            return True
        chunk = self._chunks[index]
        own_s = usual.seconds(chunk.remote_end - self._chunks.remote_offset(index))
        return _left_s(flight, chunk.remote_end, usual) > own_s + SLACK_S

    def stop(self, number: int) -> None:
        """End a prefetch, if it has left."""
        if number in self._prefetches:
            flight, task = self._prefetches.pop(number)
            flight.stopped = True
            task.cancel()


def _pace(flight: Flight) -> Pace | None:
    """Of a flight that has brought something."""
    if not flight.brought_bytes:
        return None
    streaming_s = monotonic() - flight.asked_s - flight.first_byte_s
    return Pace(flight.first_byte_s, flight.brought_bytes / max(streaming_s, 1e-6))


def _left_s(flight: Flight, remote_end: int, usual: Pace) -> float:
    """Until a flight will have brought the blob file's bytes up to `remote_end`: infinite when it
    has not asked, or its first byte is overdue."""
    due_bytes = remote_end - flight.remote_start
    if (pace := _pace(flight)) is not None:
        return max(0, due_bytes - flight.brought_bytes) / pace.bytes_per_s
    took_s = monotonic() - flight.asked_s
    if not flight.asked_s or took_s > usual.first_byte_s + SLACK_S:
        return inf
    return usual.seconds(due_bytes) - took_s
