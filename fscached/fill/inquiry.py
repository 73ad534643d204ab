"""Finding out what a blob's chunks are, and which of them its cache file holds."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable

from fscached.cache.extents import Extents
from fscached.fill.crew import Crew
from fscached.fill.scout import pauses
from fscached.source import SourceError
from fscached.transport import NotReady
from rafs_v6.blob import ChunkMap

log = logging.getLogger(__name__)

READY_PAUSE_S = 0.002


class Inquiry:
    """Asks a blob's source for its chunk map (`chunks`), and the kernel for the extents of its file
    (`resident`, which a worker calls). `waiting_since` says when the first reader came that waits
    for the answer, None while there is none. The times are those of `fscached.fill.blob.Limits`."""

    def __init__(
        self,
        name: str,
        chunks: Callable[[], Awaitable[ChunkMap]],
        resident: Callable[[], list[tuple[int, int]]],
        waiting_since: Callable[[], float | None],
        crew: Crew,
        deadline_s: float,
        outage_limit_s: float | None,
    ) -> None:
        self._name = name
        self._chunks = chunks
        self._resident = resident
        self._waiting_since = waiting_since
        self._crew = crew
        self._deadline_s = deadline_s
        self._outage_limit_s = outage_limit_s
        self._loop = asyncio.get_running_loop()

    async def answer(self) -> tuple[ChunkMap, Extents]:
        """Both, within one deadline, not counting how long the source was away.

        Raises SourceError, ImageError, OSError (TimeoutError), NotReady.
        """
        for pause_s in pauses():
            until_s = self._loop.time() + min(self._deadline_s, self._left_s(math.inf))
            try:
                async with asyncio.timeout_at(until_s):
                    chunks = await self._chunks()
                break
            except (SourceError, TimeoutError) as error:
                self._consider(error, pause_s)
            await asyncio.sleep(pause_s)
        async with asyncio.timeout_at(until_s):
            return chunks, await self._extents()

    def _consider(self, error: SourceError | TimeoutError, pause_s: float) -> None:
        """Raises the error unless readers wait for a source that is away."""
        away = error.away if isinstance(error, SourceError) else True
        if not away or self._left_s(0.0) <= pause_s:
            raise error
        log.warning("blob %s: its readers wait for its source: %s", self._name, error)

    def _left_s(self, otherwise_s: float) -> float:
        """How long the first reader may go on waiting for a source that is away; something else
        if nobody waits, or if outages are not waited for."""
        since_s = self._waiting_since()
        if self._outage_limit_s is None or since_s is None:
            return otherwise_s
        return since_s + self._outage_limit_s - self._loop.time()

    async def _extents(self) -> Extents:
        """Raises NotReady while the kernel does not answer; once somebody reads, it soon does."""
        while True:
            try:
                return Extents(await self._crew.run(self._resident))
            except NotReady:
                if self._waiting_since() is None:
                    raise
                await asyncio.sleep(READY_PAUSE_S)
