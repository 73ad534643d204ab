"""One run of an image being recorded: from its first READ until nobody has it open any more, or the
time for it is over. What has come so far is on the disk soon, whatever happens to the daemon."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Final

from fscached.prefetch.clock import Clock
from fscached.prefetch.trace import Chunks, Recorder, Trace, merge
from fscached.prefetch.traces import Traces
from fscached.store import Image

log = logging.getLogger(__name__)

KEEP_S: Final = 5.0
"""After the first READ; then after twice as long, and so on."""


class Recording:
    """Feeds a recorder and keeps what it has."""

    def __init__(self, image: Image, limit_s: float, traces: Traces, clock: Clock) -> None:
        """Nothing later than `limit_s` after the first READ is recorded."""
        self._image = image.identity
        self._run = secrets.token_hex(4)
        self._limit_s = limit_s
        self._traces = traces
        self._clock = clock
        self._recorder = Recorder(image.identity, image.reference)
        self._ends_s: float | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._writing: asyncio.Future[None] | None = None

    @property
    def trace(self) -> Trace | None:
        """What was recorded so far; None before the first READ."""
        return self._recorder.trace()

    def learn(self, blob_id: str, chunks: Chunks, resident: bool) -> None:
        """See Recorder."""
        self._recorder.learn(blob_id, chunks, resident)

    def read(self, blob_id: str, start: int, end: int) -> None:
        """See Recorder."""
        now_s = self._clock.now()
        if self._ends_s is None:
            self._ends_s = now_s + self._limit_s
            self._keeping = asyncio.ensure_future(self._keep())
        if now_s < self._ends_s:
            self._recorder.read(blob_id, start, end, now_s)

    def fetched(self, blob_id: str, first: int, end: int) -> None:
        """See Recorder."""
        if self._ends_s is None or self._clock.now() < self._ends_s:
            self._recorder.fetched(blob_id, first, end)

    def prefetched(self, blob_id: str, first: int, end: int) -> None:
        """See Recorder."""
        now_s = self._clock.now()
        if self._ends_s is None or now_s < self._ends_s:
            self._recorder.prefetched(blob_id, first, end, now_s)

    async def known(self) -> Trace | None:
        """What was known before, and this run."""
        before = await asyncio.to_thread(self._traces.load, self._image)
        traces = [trace for trace in (before, self.trace) if trace is not None]
        return merge(traces) if traces else None

    async def end(self) -> None:
        """The run is over: it becomes one of those that are known."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
            if self._writing is not None:
                await asyncio.wait([self._writing])  # threads cannot be cancelled
            await self._write()
            await self._disk(lambda: self._traces.settle(self._image, self._run))

    async def _keep(self) -> None:
        pause_s = KEEP_S
        while self._ends_s is not None and self._clock.now() < self._ends_s:
            await self._clock.sleep(pause_s)
            await self._write()
            pause_s *= 2

    async def _write(self) -> None:
        run = self._recorder.trace()
        if run is not None:
            await self._disk(lambda: self._traces.keep_run(run, self._run))

    async def _disk(self, task: Callable[[], None]) -> None:
        """A trace that cannot be kept is no reason to trouble anybody."""
        self._writing = asyncio.ensure_future(asyncio.to_thread(task))
        try:
            await asyncio.shield(self._writing)
        except OSError as error:
            log.warning("the trace of image %s cannot be kept: %s", self._image[:12], error)
