"""The prefetch service: brings the rest of every open blob while readers are served first.

Blobs can only be written once the kernel answers for their file (cachefiles: 2–8 ms after copen,
tried on 6.1 and 6.12, with no event to say so but the first READ), so each is asked a few times.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from fscached.fill.blob import OpenBlob, Stage
from fscached.source import SourceError
from fscached.transport import NotReady

log = logging.getLogger(__name__)

READY_TRIES = 8
READY_PAUSE_S = 0.01
RETRY_PAUSE_S = 1.0
RETRY_PAUSE_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How to prefetch: bytes of one request, how long it may take, how many at once."""

    range_bytes: int
    deadline_s: float
    concurrency: int


class Service:
    """Prefetches blobs in the order in which they were opened."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._turns = asyncio.Semaphore(plan.concurrency)
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, blob: OpenBlob) -> None:
        """Bring all of a blob that has just been opened."""
        task = asyncio.ensure_future(self._blob(blob))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def close(self) -> None:
        """Stop; what is resident stays."""
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _blob(self, blob: OpenBlob) -> None:
        if not await self._ready(blob):
            return
        pause_s = RETRY_PAUSE_S
        while blob.stage is Stage.READY:
            try:
                async with self._turns:
                    if not await blob.prefetch(self._plan.range_bytes, self._plan.deadline_s):
                        return
                pause_s = RETRY_PAUSE_S
            except (SourceError, OSError, NotReady) as error:
                log.warning(
                    "prefetch of blob %s pauses for %g s: %s",
                    blob.origin.blob_id[:12],
                    pause_s,
                    error,
                )
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, RETRY_PAUSE_LIMIT_S)

    async def _ready(self, blob: OpenBlob) -> bool:
        """Whether the blob's chunks and residency are known, having tried for a while."""
        for attempt in range(READY_TRIES):
            if blob.stage is Stage.READY:
                return True
            if blob.stage is Stage.CLOSED:
                return False
            await asyncio.sleep(READY_PAUSE_S * 2**attempt)
            await asyncio.wait([blob.learn()])
        return blob.stage is Stage.READY

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("prefetch: a bug of ours", exc_info=error)
