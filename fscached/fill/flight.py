"""One fetch on its way into the cache file.

Chunks are written as they arrive, while the rest still streams, and the worker that has written
the last of a reader's chunks wakes the reader itself.
"""

from __future__ import annotations

import asyncio
import mmap
import sys
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import NamedTuple, Protocol

from fscached.cache.blob import Fetch, Run
from fscached.fill.crew import Crew
from fscached.fill.stages import Stamps
from fscached.fill.writer import Landing, Writer
from fscached.source import Answer, LocalSource, Priority, Source
from rafs_v6.blob import ChunkMap

BATCH_BYTES = 256 * 1024
"""Uncompressed bytes given to one worker at a time: how long an urgent one waits for its turn."""

FIRST_BATCH_BYTES = 128 * 1024
"""Of a fetch's first batch: a READ is not longer, and its reader waits."""


class Tower(Protocol):
    """Whoever sent a flight: told of everything, in the event loop but for `wake`."""

    def arrived(self, fetch: Fetch, index: int) -> bool:
        """A chunk is all here; whether it is still of use."""
        ...

    def completing(self, run: Run) -> list[int]:
        """Tickets that are complete once these chunks are in the file."""
        ...

    def wake(self, ticket: int) -> None:
        """Answer a ticket. Called from a worker."""
        ...

    def landed(self, landing: Landing) -> None:
        """What became of chunks that were of use."""
        ...


class Cargo(NamedTuple):
    """What a flight brings: chunks of a blob, and the writer for their bytes."""

    blob_id: str
    chunks: ChunkMap
    fetch: Fetch
    writer: Writer

    @property
    def remote(self) -> tuple[int, int]:
        """The range of the blob file: [start, end)."""
        return self.remote_of(Run(self.fetch.first, self.fetch.end))

    def remote_of(self, run: Run) -> tuple[int, int]:
        """The range that holds some of the chunks."""
        return self.chunks.remote_offset(run.first), self.chunks[run.end - 1].remote_end

    def batch(self, ready: Sequence[int], limit_bytes: int) -> Run:
        """As many of the chunks that are ready, from the first on, as one worker should take: of
        adjacent ones, since what is written must be all of chunks."""
        first = ready[0]
        start, at = self.chunks.offset(first), self.chunks.padded_end(first)
        count = 1
        while (
            count < len(ready)
            and ready[count] == first + count
            and self.chunks.offset(first + count) == at
            and (end := self.chunks.padded_end(first + count)) - start <= limit_bytes
        ):
            count, at = count + 1, end
        return Run(first, first + count)


def _land(
    cargo: Cargo,
    tower: Tower,
    run: Run,
    tickets: list[int],
    staged: memoryview,
    asked_s: float,
    arrived_s: float,
) -> Landing:
    """A worker's task: write, and wake those who waited for just that."""
    began_s = monotonic()
    landing = cargo.writer.land(run, staged)
    landing.stamps = Stamps(asked_s, arrived_s, began_s, monotonic(), landing.write_s)
    if not landing.bad:
        for ticket in tickets:
            tower.wake(ticket)
        landing.woken = tickets
    return landing


class Flight:
    """Brings a cargo from a remote source."""

    def __init__(self, cargo: Cargo, crew: Crew, tower: Tower) -> None:
        self._cargo = cargo
        self._crew = crew
        self._tower = tower
        self._start, self._end = cargo.remote
        self._filled = 0
        self.first_byte_s = 0.0
        """From the question to the first byte."""
        self._next = cargo.fetch.first
        self._due = cargo.chunks[self._next].remote_end - self._start
        """How much must be here for the next chunk to be."""
        self._ready: list[int] = []
        self._working = 0
        self._idle: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._view = memoryview(b"")
        self.asked_s = 0.0
        """On the monotonic clock; 0.0: not yet."""
        self.stopped = False
        """Whether readers do without it: what has not arrived is not to come."""

    @property
    def remote_start(self) -> int:
        """Where in the blob file it begins."""
        return self._start

    @property
    def brought_bytes(self) -> int:
        """How much has come so far."""
        return self._filled

    async def fly(self, source: Source, priority: Priority, deadline_s: float) -> Answer:
        """Fetch, and return when every chunk that was of use has landed.

        Raises SourceError when the bytes do not come, OSError when they cannot be written; chunks
        that have landed before stay.
        """
        demand = priority is Priority.DEMAND
        memory = await self._crew.pool.take(self._end - self._start, demand)
        try:
            return await self._bring(memory, source, priority, deadline_s)
        finally:
            self._view.release()
            self._crew.pool.give(memory)

    async def _bring(
        self, memory: mmap.mmap, source: Source, priority: Priority, deadline_s: float
    ) -> Answer:
        self._view = memoryview(memory)
        self.asked_s = monotonic()
        try:
            answer = await source.read(
                self._cargo.blob_id, self._start, self._end, priority, self._feed, deadline_s
            )
        finally:
            await self._settle()
        if self._error is not None:
            raise self._error
        return answer

    def _feed(self, memory: memoryview) -> None:
        if self._error is not None:
            raise self._error  # what cannot be written need not come
        if not self._filled:
            self.first_byte_s = monotonic() - self.asked_s
        filled = self._filled + len(memory)
        self._view[self._filled : filled] = memory
        self._filled = filled
        # curl hands over 16 KiB at a time: whatever else is done here is done 64 times a MiB.
        if filled >= self._due:
            self._arrive()

    def _arrive(self) -> None:
        """The chunk that is to come next is all here, and perhaps others behind it."""
        fetch, chunks = self._cargo.fetch, self._cargo.chunks
        while self._filled >= self._due:
            if self._tower.arrived(fetch, self._next):
                self._ready.append(self._next)
            self._next += 1
            if self._next == fetch.end:
                self._due = sys.maxsize
            else:
                self._due = chunks[self._next].remote_end - self._start
        self._dispatch()

    def _dispatch(self) -> None:
        """Give what is ready to the workers: runs, not single chunks, when they are behind."""
        while self._ready and self._working < self._crew.workers and self._error is None:
            run = self._cargo.batch(self._ready, BATCH_BYTES)
            del self._ready[: run.end - run.first]
            start, end = self._cargo.remote_of(run)
            staged = self._view[start - self._start : end - self._start]
            tickets = self._tower.completing(run)
            times = self.asked_s, monotonic()
            task = partial(_land, self._cargo, self._tower, run, tickets, staged, *times)
            self._crew.start(task, self._worked, urgent=bool(tickets))
            self._working += 1

    def _worked(self, outcome: Landing | Exception) -> None:
        self._working -= 1
        try:
            if isinstance(outcome, Landing):
                self._tower.landed(outcome)
            else:
                self._error = self._error or outcome
            self._dispatch()
        finally:
            if self._working == 0 and self._idle is not None and not self._idle.done():
                self._idle.set_result(None)

    async def _settle(self) -> None:
        """Wait for the workers: they read the memory that is given back next. A worker cannot be
        stopped in a system call, so neither can this."""
        while self._working:
            self._idle = asyncio.get_running_loop().create_future()
            try:
                await asyncio.shield(self._idle)
            except asyncio.CancelledError:
                if self._working == 0:
                    raise
                self._error = self._error or OSError("the fetch was cancelled")


class Hop:
    """Brings a cargo from a source on this machine: workers read what they write, and no task of
    the event loop is needed."""

    def __init__(
        self, cargo: Cargo, crew: Crew, tower: Tower, ended: Callable[[Exception | None], None]
    ) -> None:
        """`ended` is called when every chunk has landed, or with the first error."""
        self._cargo = cargo
        self._crew = crew
        self._tower = tower
        self._ended = ended
        self._working = 0
        self._error: Exception | None = None

    def go(self, source: LocalSource) -> None:
        """Begin with a short batch, since its reader waits. The rest of the window is left out
        when the workers are behind: it is here whenever it is wanted. Whoever has joined the fetch
        for it meanwhile has it fetched anew."""
        fetch, limit_bytes = self._cargo.fetch, FIRST_BATCH_BYTES
        at = fetch.first
        while at < fetch.end and not (at > fetch.first and self._crew.behind):
            run = self._cargo.batch(range(at, fetch.end), limit_bytes)
            at, limit_bytes = run.end, BATCH_BYTES
            for index in range(run.first, run.end):
                useful = self._tower.arrived(fetch, index)
                # The fetch was made in this very turn of the loop: all of it is its own.
                assert useful
            tickets = self._tower.completing(run)
            task = partial(self._bring, source, run, tickets)
            self._crew.start(task, self._worked, urgent=bool(tickets))
            self._working += 1

    def _bring(self, source: LocalSource, run: Run, tickets: list[int]) -> Landing:
        """A worker's task: as `_land`, reading first."""
        start, end = self._cargo.remote_of(run)
        staged = self._cargo.writer.stage(end - start)
        asked_s = monotonic()
        source.read_now(self._cargo.blob_id, start, end, staged)
        return _land(self._cargo, self._tower, run, tickets, staged, asked_s, monotonic())

    def _worked(self, outcome: Landing | Exception) -> None:
        self._working -= 1
        try:
            if isinstance(outcome, Landing):
                self._tower.landed(outcome)
            else:
                self._error = self._error or outcome
        finally:
            if self._working == 0:
                self._ended(self._error)
