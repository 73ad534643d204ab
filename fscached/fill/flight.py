"""One ranged request on its way into the cache file.

Chunks are written as they arrive, while the rest still streams: a reader is woken by its own bytes.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from fscached.cache.blob import Fetch, Run
from fscached.fill.memory import Pool
from fscached.fill.writer import Landing, Writer
from fscached.source import Answer, LocalSource, Priority, Source
from rafs_v6.blob import ChunkMap

BATCH_BYTES = 1024 * 1024
"""Uncompressed bytes given to one worker at a time; more would keep the other cores waiting."""

FIRST_BATCH_BYTES = 128 * 1024
"""Of a fetch's first batch: a READ is not longer, and its reader waits."""


@dataclass(frozen=True, slots=True)
class Crew:
    """What all flights of a daemon share: memory, worker threads and how many of them there are."""

    pool: Pool
    executor: Executor
    workers: int


class Flight:
    """Brings the chunks of one fetch from a source into the cache file."""

    def __init__(
        self,
        blob_id: str,
        chunks: ChunkMap,
        fetch: Fetch,
        crew: Crew,
        writer: Writer,
        arrived: Callable[[Fetch, int], bool],
        landed: Callable[[Landing], None],
    ) -> None:
        """`arrived` is asked for every chunk that is all here whether it is still of use; `landed`
        is told what became of those that were. Both are called in the event loop."""
        self.fetch = fetch
        self._blob_id = blob_id
        self._chunks = chunks
        self._crew = crew
        self._writer = writer
        self._arrived = arrived
        self._landed = landed
        self._start = chunks.remote_offset(fetch.first)
        self._end = chunks.remote_offset(fetch.end - 1) + chunks.remote_size(fetch.end - 1)
        self._filled = 0
        self._next = fetch.first
        self._ready: list[int] = []
        self._working = 0
        self._idle: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._view = memoryview(b"")
        self._local: LocalSource | None = None
        self._batch_bytes = FIRST_BATCH_BYTES

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

    async def land(self, source: LocalSource) -> Answer:
        """As `fly`, from a source on this machine: workers read what they write."""
        began = asyncio.get_running_loop().time()
        memory = await self._crew.pool.take(self._end - self._start, True)
        self._local = source
        try:
            self._view = memoryview(memory)
            self._claim(self._end)
            await self._settle()
            if self._error is not None:
                raise self._error
        finally:
            self._view.release()
            self._crew.pool.give(memory)
        seconds = asyncio.get_running_loop().time() - began
        return Answer(source.name, 0, self._end - self._start, seconds)

    async def _bring(
        self, memory: mmap.mmap, source: Source, priority: Priority, deadline_s: float
    ) -> Answer:
        self._view = memoryview(memory)
        try:
            answer = await source.read(
                self._blob_id, self._start, self._end, priority, self._feed, deadline_s
            )
        finally:
            await self._settle()
        if self._error is not None:
            raise self._error
        return answer

    def _feed(self, memory: memoryview) -> None:
        filled = self._filled + len(memory)
        self._view[self._filled : filled] = memory
        self._filled = filled
        self._claim(self._start + filled)

    def _claim(self, at: int) -> None:
        """All remote bytes before `at` are here: hand on the chunks that are complete."""
        chunks = self._chunks
        while self._next < self.fetch.end:
            index = self._next
            if chunks.remote_offset(index) + chunks.remote_size(index) > at:
                break
            self._next += 1
            if self._arrived(self.fetch, index):
                self._ready.append(index)
        self._dispatch()

    def _dispatch(self) -> None:
        """Give what is ready to the workers: runs, not single chunks, when they are behind."""
        while self._ready and self._working < self._crew.workers and self._error is None:
            batch = self._batch()
            start = self._chunks.remote_offset(batch.first) - self._start
            last = batch.end - 1
            end = self._chunks.remote_offset(last) + self._chunks.remote_size(last) - self._start
            future = asyncio.get_running_loop().run_in_executor(
                self._crew.executor, self._land, batch, start, end
            )
            self._working += 1
            future.add_done_callback(self._worked)

    def _land(self, batch: Run, start: int, end: int) -> Landing:
        """A worker's task: chunks whose remote bytes are [start, end) of the memory."""
        staged = self._view[start:end]
        if self._local is not None:
            self._local.read_now(self._blob_id, self._start + start, self._start + end, staged)
        return self._writer.land(batch, staged)

    def _batch(self) -> Run:
        first = self._ready[0]
        count = 1
        while (
            count < len(self._ready)
            and self._ready[count] == first + count
            and self._chunks.padded_end(first + count) - self._chunks.offset(first)
            <= self._batch_bytes
        ):
            count += 1
        self._batch_bytes = BATCH_BYTES
        del self._ready[:count]
        return Run(first, first + count)

    def _worked(self, future: asyncio.Future[Landing]) -> None:
        self._working -= 1
        try:
            self._account(future)
            self._dispatch()
        finally:
            if self._working == 0 and self._idle is not None and not self._idle.done():
                self._idle.set_result(None)

    def _account(self, future: asyncio.Future[Landing]) -> None:
        if future.cancelled():
            self._error = self._error or OSError("the writer was stopped")
        elif (error := future.exception()) is None:
            self._landed(future.result())
        elif self._error is None:
            self._error = error if isinstance(error, Exception) else RuntimeError(repr(error))

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
