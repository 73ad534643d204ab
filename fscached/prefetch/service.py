"""The prefetch service: brings what is expected to be read of every open image, readers first.

Blobs can only be written once the kernel answers for their file (cachefiles: 2–8 ms after copen,
tried on 6.1 and 6.12, with no event to say so but the first READ), so each is asked again and
again. After a restart it is opened anew at its next READ, and what is there is not fetched twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Final

from fscached.cache.blob import Fetch
from fscached.config import Prefetch
from fscached.fill.blob import Brought, OpenBlob, Stage
from fscached.prefetch.budget import Budget
from fscached.prefetch.clock import Clock
from fscached.prefetch.job import Job, Report, Taken, listed
from fscached.prefetch.phase import Phase
from fscached.prefetch.policy import Look, Range
from fscached.prefetch.recording import Recording
from fscached.prefetch.trace import Trace
from fscached.prefetch.traces import Traces
from fscached.source import Priority, SourceError
from fscached.store import Image
from fscached.transport import NotReady, ObjectKey, OutOfSpace

log = logging.getLogger(__name__)

READY_PAUSE_S: Final = 0.01
READY_PAUSE_LIMIT_S: Final = 60.0
FLIGHT_PAUSE_S: Final = 0.25
"""How often to look whether what a reader has under way has come, when there is nothing else."""
DISK_PAUSE_S: Final = 10.0

UNMOUNTED: Final = Report(Phase.UNMOUNTED, "", 0, 0, 0, 0.0, None)
OFF: Final = Report(Phase.OFF, "", 0, 0, 0, 0.0, None)


@dataclass(frozen=True, slots=True)
class Means:
    """What all images share: how long one request may take, how many at once, bytes per second (0:
    no limit); `room` raises OutOfSpace when the disk is nearly full, `held` says whether the link
    is the readers' alone just now."""

    deadline_s: float
    concurrency: int
    bandwidth_bytes_per_s: int
    room: Callable[[], None] = lambda: None
    held: Callable[[], bool] = lambda: False


class Service:
    """Prefetches images, each by its own settings, all within the same means."""

    def __init__(self, means: Means, traces: Traces, clock: Clock) -> None:
        self._means = means
        self._traces = traces
        self._clock = clock
        self._budget = Budget(means.bandwidth_bytes_per_s)
        self._slots = {
            priority: asyncio.Semaphore(means.concurrency)
            for priority in (Priority.EXPECTED, Priority.PREFETCH)
        }
        """What gives way to readers keeps its own while it does."""
        self._jobs: dict[ObjectKey, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._endings: set[asyncio.Task[None]] = set()
        """Runs that are being kept."""
        self._full = ""
        self._full_until_s = 0.0
        self._refused = False
        self._recovering = asyncio.ensure_future(asyncio.to_thread(traces.recover))

    def begin(
        self, key: ObjectKey, image: Image, settings: Prefetch, blob_id: str, opened: OpenBlob
    ) -> None:
        """One of an image's blobs was opened; `key` is the image's."""
        job = self._jobs.get(key)
        if job is None:
            job = self._jobs[key] = Job(image, settings)
            if settings.record:
                job.recording = self._recording(image, settings)
            self._spawn(self._plan(job))
        if not isinstance(opened.watcher, _Audience):
            opened.watcher = _Audience(self, blob_id, opened)
            if settings.enabled:
                self._spawn(self._await_ready(opened))
        opened.watcher.jobs[key] = job
        job.blobs[blob_id] = opened
        if opened.stage is Stage.READY:
            opened.watcher.ready()

    def insist(self, key: ObjectKey) -> bool:
        """Bring all of an image, whatever its settings. False when none of it is open."""
        job = self._jobs.get(key)
        if job is None:
            return False
        job.insist()
        for opened in job.blobs.values():
            if opened.stage is Stage.NEW:
                self._spawn(self._await_ready(opened))
        self.kick(job)
        return True

    def report(self, key: ObjectKey, settings: Prefetch) -> Report:
        """How the prefetch of an image goes on."""
        job = self._jobs.get(key)
        if job is None:
            return UNMOUNTED if settings.enabled else OFF
        return job.report(self._clock.now(), self._means.held(), self._full)

    async def trace(self, key: ObjectKey, image: Image, *, run: bool = False) -> Trace | None:
        """What is known of how an image is read; with `run` only of the run that goes on."""
        job = self._jobs.get(key)
        recording = job.recording if job is not None else None
        present = recording.trace if recording is not None else None
        if run:
            return present
        if recording is not None:
            return await recording.known()
        return await asyncio.to_thread(self._traces.load, image.identity)

    async def adopt(self, trace: Trace) -> None:
        """Take over a trace from elsewhere; for images mounted from now on. Raises OSError."""
        await asyncio.to_thread(self._traces.adopt, trace)

    async def record(self, key: ObjectKey, *, prefetch: bool) -> bool:
        """End the run that goes on, and begin another; without `prefetch` nothing more is brought
        until the image's last umount. False when it is not open, or not to be recorded."""
        job = self._jobs.get(key)
        if job is None or job.recording is None:
            return False
        ended, job.recording = job.recording, self._recording(job.image, job.settings)
        for blob_id, opened in job.blobs.items():
            if opened.stage is Stage.READY and opened.blob is not None:
                job.recording.learn(blob_id, opened.blob.chunks, not opened.blob.untouched)
        job.wanted = job.wanted and prefetch
        await ended.end()
        return True

    async def forget(self, image: Image) -> bool:
        """Forget what runs that are over have read. False when nothing was known."""
        return await asyncio.to_thread(self._traces.forget, image.identity)

    async def close(self) -> None:
        """Stop; what is resident stays, and what was recorded is kept."""
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(self._recovering, *tasks, return_exceptions=True)
        for job in self._jobs.values():
            self._end(job.recording)
        self._jobs.clear()
        await asyncio.gather(*self._endings, return_exceptions=True)

    # What the blobs tell.

    def kick(self, job: Job, most: int = 1 << 10) -> None:
        """There may be something to do."""
        if not (job.wanted and job.planned):
            return
        limit = min(job.settings.threads or most, self._means.concurrency, most)
        while job.workers < limit:
            job.workers += 1
            self._spawn(self._work(job))

    def demanded(self, opened: OpenBlob, fetch: Fetch, jobs: list[Job]) -> None:
        """Readers have bytes fetched."""
        budgets = [self._budget, *(job.budget for job in jobs)]
        if any(budget.limited for budget in budgets):
            size_bytes, now_s = opened.remote_bytes(fetch), self._clock.now()
            for budget in budgets:
                budget.demand(size_bytes, now_s)

    def left(self, blob_id: str, jobs: dict[ObjectKey, Job]) -> None:
        """A blob was closed; an image none of whose blobs is open is not in use."""
        for key, job in jobs.items():
            job.blobs.pop(blob_id, None)
            if not job.blobs and self._jobs.get(key) is job:
                del self._jobs[key]
                self._end(job.recording)

    # Inside.

    def _recording(self, image: Image, settings: Prefetch) -> Recording:
        return Recording(image, settings.record_s, self._traces, self._clock)

    async def _plan(self, job: Job) -> None:
        def ranges() -> list[Range]:
            return listed(job.image, job.settings, self._traces.load(job.image.identity))

        await asyncio.shield(self._recovering)
        job.plan(await asyncio.to_thread(ranges) if job.settings.enabled else [])
        self.kick(job)

    async def _work(self, job: Job) -> None:
        """Bring one thing after the other, until there is nothing left to bring."""
        try:
            while job.blobs and job.wanted:
                if wait_s := self._hindrance(job):
                    await self._clock.sleep(wait_s)
                    continue
                found = await self._step(job)
                if found is Look.LATER:
                    await asyncio.sleep(0)
                elif found is Look.NOTHING:
                    if job.workers > 1 or not job.in_flight:
                        return
                    await self._clock.sleep(FLIGHT_PAUSE_S)
        finally:
            job.workers -= 1

    async def _step(self, job: Job) -> Taken | Look:
        priority = job.agenda.priority
        async with self._slots[priority]:
            if self._hindrance(job) or job.agenda.priority is not priority:
                return Look.LATER
            most = self._budget.range_bytes(job.budget.range_bytes(job.settings.range_bytes))
            found = job.next(most)
            if isinstance(found, Taken):
                await self._bring(job, found)
            return found

    async def _bring(self, job: Job, taken: Taken) -> None:
        opened, fetch, range = taken
        began_s = self._clock.now()
        if self._budget.limited or job.budget.limited:
            size_bytes = opened.remote_bytes(fetch)
            self._budget.prefetch(size_bytes, began_s)
            job.budget.prefetch(size_bytes, began_s)
        if isinstance(opened.watcher, _Audience):
            opened.watcher.prefetched(fetch)
        job.requests += 1
        try:
            brought = await opened.prefetch(fetch, self._means.deadline_s, range.priority)
        except (SourceError, OSError, NotReady) as error:
            if opened.stage is Stage.READY:
                self._failed(job, taken, error)
            return
        if brought is Brought.OVERTAKEN:
            job.agenda.again(range)
            return
        self._emptied()
        if brought is Brought.WRONG:
            wrong = "bytes are not what the image says they are: see the errors before this"
            job.failed(wrong, self._clock.now())
            return
        job.brought(range.size_bytes, began_s, self._clock.now())

    def _failed(self, job: Job, taken: Taken, error: Exception) -> None:
        job.agenda.again(taken.range)
        if isinstance(error, OutOfSpace):
            self._refused = True
            self._filled(error)
        else:
            job.failed(str(error), self._clock.now())

    def _hindrance(self, job: Job) -> float:
        """For how many seconds nothing may be asked for; 0: go on."""
        now_s = self._clock.now()
        if job.pause is not None:
            if now_s < job.pause.until_s:
                return job.pause.until_s - now_s
            job.pause = None
        if now_s < self._full_until_s:
            return self._full_until_s - now_s
        try:
            self._means.room()
        except OSError as error:
            self._filled(error)
            return DISK_PAUSE_S
        if not self._refused:
            self._emptied()
        return max(self._budget.wait_s(now_s), job.budget.wait_s(now_s))

    def _emptied(self) -> None:
        if self._full:
            log.info("prefetch goes on: there is room again")
            self._full, self._refused = "", False

    def _filled(self, error: OSError) -> None:
        """Said once, until there is room; where a write was refused (a quota), until one is not."""
        self._full_until_s = self._clock.now() + DISK_PAUSE_S
        if not self._full:
            log.warning("prefetch stops, readers are still served: %s", error.strerror or error)
        self._full = error.strerror or str(error)

    async def _await_ready(self, opened: OpenBlob) -> None:
        """Ask until the blob's chunks and residency are known, or it is closed."""
        pause_s = READY_PAUSE_S
        while opened.stage is Stage.NEW:
            await self._clock.sleep(pause_s)
            pause_s = min(pause_s * 2, READY_PAUSE_LIMIT_S)
            if opened.stage is Stage.NEW:
                await asyncio.wait([opened.learn()])

    def _end(self, recording: Recording | None) -> None:
        """A run is over."""
        if recording is not None:
            self._spawn(recording.end(), self._endings)

    def _spawn(
        self, work: Coroutine[None, None, None], among: set[asyncio.Task[None]] | None = None
    ) -> None:
        tasks = self._tasks if among is None else among
        task = asyncio.ensure_future(work)
        tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._endings.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("prefetch: a bug of ours", exc_info=error)


class _Audience:
    """What one open blob tells the images that have it (`fscached.fill.blob.Watcher`). A bug here
    is no reason for a reader's EIO."""

    def __init__(self, service: Service, blob_id: str, opened: OpenBlob) -> None:
        self._service = service
        self._blob_id = blob_id
        self._opened = opened
        self.jobs: dict[ObjectKey, Job] = {}

    def ready(self) -> None:
        blob = self._opened.blob
        assert blob is not None
        for job in self.jobs.values():
            if job.recording is not None:
                job.recording.learn(self._blob_id, blob.chunks, not blob.untouched)
            job.agenda.opened()
            self._service.kick(job)

    def read(self, start: int, end: int) -> None:
        try:
            for job in self.jobs.values():
                if job.recording is not None:
                    job.recording.read(self._blob_id, start, end)
                if job.agenda.read(self._blob_id, start, end):
                    self._service.kick(job, 1)
        except Exception:
            log.exception("a READ of blob %s is not recorded", self._blob_id[:12])

    def demanded(self, fetch: Fetch) -> None:
        self._service.demanded(self._opened, fetch, list(self.jobs.values()))
        for job in self.jobs.values():
            if job.recording is not None:
                job.recording.fetched(self._blob_id, fetch.first, fetch.end)

    def prefetched(self, fetch: Fetch) -> None:
        """Prefetch asks for these chunks."""
        for job in self.jobs.values():
            if job.recording is not None:
                job.recording.prefetched(self._blob_id, fetch.first, fetch.end)

    def closed(self) -> None:
        self._service.left(self._blob_id, self.jobs)
