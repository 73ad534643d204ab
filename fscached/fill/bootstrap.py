"""One open bootstrap: its first READ is answered by writing all of it."""

from __future__ import annotations

import asyncio
import errno
import logging
import mmap
from pathlib import Path

from fscached.cache.bootstrap import Bootstrap
from fscached.cache.extents import Extents
from fscached.fill.crew import Crew
from fscached.fill.tally import Tally
from fscached.transport import ObjectId, Ticket, Transport, Wanted

log = logging.getLogger(__name__)

SPAN_BYTES = 1024 * 1024


class OpenBootstrap:
    """The event loop's half of one open bootstrap object."""

    def __init__(
        self,
        object: ObjectId,
        path: Path,
        size_bytes: int,
        transport: Transport,
        crew: Crew,
        tally: Tally,
    ) -> None:
        self.object = object
        self.size_bytes = size_bytes
        self.bootstrap = Bootstrap(size_bytes)
        self._path = path
        self._transport = transport
        self._crew = crew
        self._tally = tally
        self._writing: asyncio.Task[None] | None = None
        self._closed = False
        self._came_s: dict[int, float] = {}

    def wanted(self, want: Wanted) -> None:
        """A READ: completed now, or when the whole bootstrap is in the cache file."""
        self._came_s[want.ticket] = asyncio.get_running_loop().time()
        if self.bootstrap.want(want.ticket):
            self._tally.hits += 1
            self._complete([want.ticket])
        elif self.bootstrap.write():
            self._writing = asyncio.ensure_future(self._write())

    def closed(self) -> None:
        """The kernel closed the object; nobody waits any more."""
        self._closed = True

    @property
    def waiting(self) -> int:
        """How many readers wait."""
        return self.bootstrap.waiting

    async def _write(self) -> None:
        try:
            resident = await self._crew.run(self._copy)
        except OSError as error:
            log.error("bootstrap %s: cannot be written: %s", self._path, error)
            self._fail(self.bootstrap.lost())
        else:
            self._tally.landed_bytes += 0 if resident else self.bootstrap.size_bytes
            self._complete(self.bootstrap.landed())

    def _copy(self) -> bool:
        """Fill the cache file from the local bootstrap; True if it was complete before."""
        size = self.bootstrap.size_bytes
        if Extents(self._transport.resident(self.object, size)).covers(0, size):
            return True
        with self._path.open("rb", buffering=0) as file, mmap.mmap(-1, SPAN_BYTES) as memory:
            for offset in range(0, size, SPAN_BYTES):
                length = min(SPAN_BYTES, size - offset)
                with memoryview(memory) as view, view[:length] as span:
                    if file.readinto(span) != length:
                        raise OSError(errno.EIO, f"shorter than {size} bytes", str(self._path))
                    self._transport.write(self.object, offset, span)
        return False

    def _complete(self, tickets: list[int] | list[Ticket]) -> None:
        for ticket in tickets:
            self._tally.reads_completed += 1
            self._timed(ticket)
            if not self._closed:
                self._transport.done(self.object, Ticket(ticket))

    def _fail(self, tickets: list[int]) -> None:
        for ticket in tickets:
            self._tally.reads_failed += 1
            self._timed(ticket)
            if not self._closed:
                self._transport.failed(self.object, Ticket(ticket), errno.EIO)

    def _timed(self, ticket: int) -> None:
        now_s = asyncio.get_running_loop().time()
        self._tally.latencies.count(now_s - self._came_s.pop(ticket, now_s))
