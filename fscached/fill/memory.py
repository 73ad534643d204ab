"""Page-aligned memory: bounded, handed out and taken back.

cachefiles writes with direct I/O: offset, length and the memory itself must be aligned to 4 KiB
(a plain bytes object gives EINVAL; tried on 6.1 and 6.12). Anonymous mappings are.
"""

from __future__ import annotations

import asyncio
import mmap
from collections import deque
from contextlib import suppress

GRAIN_BYTES = 256 * 1024
"""The smallest buffer. Each larger size is twice the one before, so that what is given back fits
the next request: the compressed bytes of a window are never as many as those of the last."""

KEEP_BYTES = 16 * 1024 * 1024
"""Free memory kept for the next requests; what is over goes back to the kernel."""


class Pool:
    """Aligned buffers of one daemon, at most `limit_bytes` of them at any time."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._taken_bytes = 0
        self._free_bytes = 0
        self._free: dict[int, list[mmap.mmap]] = {}
        self._demand: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._prefetch: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size_bytes: int, demand: bool) -> mmap.mmap:
        """A buffer of at least `size_bytes`; waits while the pool is empty, demand first. A
        buffer larger than the whole pool is given when nothing else is taken."""
        rounded = max(GRAIN_BYTES, 1 << (size_bytes - 1).bit_length())
        if not self._fits(rounded) or self._demand or (self._prefetch and not demand):
            queue = self._demand if demand else self._prefetch
            await self._wait(rounded, queue)
        else:
            self._taken_bytes += rounded
        return self._buffer(rounded)

    def give(self, buffer: mmap.mmap) -> None:
        """Take a buffer back; nobody may use a view of it any more."""
        self._taken_bytes -= len(buffer)
        # What is not kept is unmapped with its last view: a traceback may still hold one.
        if self._free_bytes + len(buffer) <= KEEP_BYTES:
            self._free.setdefault(len(buffer), []).append(buffer)
            self._free_bytes += len(buffer)
        self._admit()

    def _fits(self, size_bytes: int) -> bool:
        return self._taken_bytes == 0 or self._taken_bytes + size_bytes <= self._limit_bytes

    def _buffer(self, size_bytes: int) -> mmap.mmap:
        if free := self._free.get(size_bytes):
            self._free_bytes -= size_bytes
            return free.pop()
        return _mapped(size_bytes)

    async def _wait(self, size_bytes: int, queue: deque[tuple[int, asyncio.Future[None]]]) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append((size_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._taken_bytes -= size_bytes
            else:
                queue.remove((size_bytes, turn))
            self._admit()
            raise

    def _admit(self) -> None:
        for queue in (self._demand, self._prefetch):
            while queue and self._fits(queue[0][0]):
                size_bytes, turn = queue.popleft()
                if not turn.done():
                    self._taken_bytes += size_bytes
                    turn.set_result(None)
            if queue:
                return


def _mapped(size_bytes: int) -> mmap.mmap:
    """Private, in huge pages where the kernel has them: to fill 8 MiB that are new costs the event
    loop 0.4 ms then, and 7 ms if they are shared, Python's default (measured on 6.18)."""
    buffer = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer
