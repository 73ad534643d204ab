"""One open data blob: READs come in, flights go out, readers are woken."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from fscached.cache.blob import Blob, Ending, Fetch, Run
from fscached.cache.planner import Planner
from fscached.fill.crew import Crew
from fscached.fill.flight import Cargo, Flight, Hop
from fscached.fill.forecast import SLACK_S, Forecast
from fscached.fill.inquiry import Inquiry
from fscached.fill.replies import Replies
from fscached.fill.scout import Scout
from fscached.fill.stages import Pending
from fscached.fill.tally import Tally
from fscached.fill.writer import Landing, Writer
from fscached.source import LocalSource, Priority, Source, SourceError
from fscached.transport import Held, NotReady, ObjectId, Transport, Wanted
from rafs_v6 import ImageError
from rafs_v6.blob import ChunkMap

log = logging.getLogger(__name__)

CHUNK_TRIES = 2
"""How often a chunk whose bytes are wrong is fetched before its readers get EIO. Every further
peer that could be at fault is one more try."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How one blob is fetched; the units are in the names, the meaning in `fscached.config`."""

    window_bytes: int
    window_limit_bytes: int
    deadline_s: float
    refusal_s: float
    verify: bool
    outage_limit_s: float | None = None
    """None: a source that is away gets no more time than any other reason."""
    slow_read_s: float = 0.0
    """A READ that takes so long has a line in the log; 0: none has."""


class Origin(NamedTuple):
    """Where one blob's bytes come from and what they must be."""

    blob_id: str
    size_bytes: int
    source: Source
    chunks: Callable[[], Awaitable[ChunkMap]]


class Watcher(Protocol):
    """Whoever wants to know what becomes of an open blob. Called in the event loop, where READs
    wait meanwhile; raises nothing."""

    def ready(self) -> None:
        """Its chunks and their residency are known."""
        ...

    def read(self, start: int, end: int) -> None:
        """A reader wants bytes [start, end) of the cache file; what that leads to is under way."""
        ...

    def demanded(self, fetch: Fetch) -> None:
        """These chunks are fetched because somebody reads."""
        ...

    def closed(self) -> None:
        """The kernel is done with it."""
        ...


class Stage(enum.Enum):
    """What is known of an open blob. NEW: nothing, and every want waits until chunk map and
    residency have come. READY: wants are answered from them. CLOSED: by the kernel."""

    NEW = "new"
    READY = "ready"
    CLOSED = "closed"


class Brought(enum.Enum):
    """What became of a prefetch. WRONG: bytes of it were not what they should be. OVERTAKEN: it was
    slow, and what a reader waited for is fetched without it."""

    ALL = "all"
    WRONG = "wrong"
    OVERTAKEN = "overtaken"


class OpenBlob:
    """The event loop's half of one open data blob. Every ticket is answered exactly once."""

    def __init__(
        self,
        object: ObjectId,
        origin: Origin,
        transport: Transport,
        limits: Limits,
        crew: Crew,
        tally: Tally,
    ) -> None:
        self.object = object
        self.origin = origin
        self.size_bytes = origin.size_bytes
        self.stage = Stage.NEW
        self.blob: Blob | None = None
        self.watcher: Watcher | None = None
        # Asked once: to look at a protocol takes 20 µs.
        self._local = origin.source if isinstance(origin.source, LocalSource) else None
        self._transport = transport
        self._limits = limits
        self._crew = crew
        self._tally = tally
        self._chunks: ChunkMap | None = None
        self._writer: Writer | None = None
        self._forecast: Forecast | None = None
        self._loop = asyncio.get_running_loop()
        self._early: dict[int, Pending] = {}
        """READs that came before the chunks were known."""
        self._learning: asyncio.Task[None] | None = None
        self._refused_until = 0.0
        names = origin.blob_id[:12], origin.source.name
        self._replies = Replies(object, transport, tally, names, limits.slow_read_s)
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._overtaking: asyncio.TimerHandle | None = None
        self._tries: dict[int, int] = {}
        self._scout = Scout(self._ask_again)

    def wanted(self, want: Wanted) -> None:
        """A READ: completed now, when its last chunk lands, or failed at the chunk's deadline."""
        now_s = self._loop.time()
        number = self._replies.expect(want, now_s)
        if self.stage is Stage.READY:
            self._want(number, want, now_s)
        elif now_s < self._refused_until:
            self._replies.fail([number])
        else:
            self._early[number] = want, now_s
            self.learn()
        if self.watcher is not None:
            self.watcher.read(want.start, want.end)

    def held(self, read: Held) -> None:
        """A READ of resident bytes was answered already."""
        self._replies.answered(read.seconds)
        self._tally.hits += 1
        if self.blob is not None and self.stage is Stage.READY:
            self._launch(self.blob.seen(read.start, read.end))
        if self.watcher is not None:
            self.watcher.read(read.start, read.end)

    def learn(self) -> asyncio.Task[None]:
        """Find out what the blob's chunks are and which are resident. When the task is done the
        stage is READY, or NEW again: the source failed, or the kernel does not answer yet."""
        if self._learning is None or self._learning.done():
            self._learning = self._spawn(self._learn())
        return self._learning

    def take(self, start: int, end: int, limit_bytes: int) -> Fetch | None:
        """The next absent chunks of bytes [start, end), which are the caller's to `prefetch` now;
        None when there are none, or nothing is known."""
        if self.blob is None or self.stage is not Stage.READY:
            return None
        return self.blob.prefetch(start, end, limit_bytes)

    def remote_bytes(self, fetch: Fetch) -> int:
        """How much a fetch asks of the source."""
        start, end = self._cargo(fetch).remote
        return end - start

    async def prefetch(
        self, fetch: Fetch, deadline_s: float, priority: Priority = Priority.PREFETCH
    ) -> Brought:
        """Bring what was taken. Raises SourceError, NotReady and OSError as a flight does."""
        self._tally.prefetches += 1
        if self._local is not None:
            await self._hop_and_wait(fetch, self._local)
            return self._brought(fetch)
        assert self._forecast is not None
        flight = Flight(self._cargo(fetch), self._crew, self)
        task = self._loop.create_task(self._fly(fetch, flight, priority, deadline_s))
        self._forecast.prefetch(fetch.number, flight, task)
        try:
            return await task
        except asyncio.CancelledError:
            ours = asyncio.current_task()
            if not flight.stopped or (ours is not None and ours.cancelling()):
                raise
            self._tally.prefetches_stopped += 1
            return Brought.OVERTAKEN

    def _brought(self, fetch: Fetch) -> Brought:
        wrong = any(fetch.first <= index < fetch.end for index in self._tries)
        return Brought.WRONG if wrong else Brought.ALL

    def closed(self) -> None:
        """The kernel closed the object: end everything; nobody waits any more."""
        self.stage = Stage.CLOSED
        self._replies.forget()
        self._early.clear()
        self._scout.stop()
        for timer in (self._timer, self._overtaking):
            if timer is not None:
                timer.cancel()
        for task in self._tasks:
            task.cancel()
        if self.watcher is not None:
            self.watcher.closed()

    @property
    def waiting(self) -> int:
        """How many readers wait."""
        return len(self._replies)

    async def _learn(self) -> None:
        if self.stage is not Stage.NEW:
            return
        try:
            chunks, extents = await self._inquiry().answer()
        except (SourceError, ImageError, NotReady, OSError) as error:
            self._unlearned(error)
            return
        limits = self._limits
        planner = Planner(limits.window_bytes, limits.window_limit_bytes)
        times = limits.deadline_s, limits.refusal_s, limits.outage_limit_s
        self._chunks = chunks
        self._forecast = Forecast(chunks)
        self.blob = Blob(chunks, planner, *times, self._forecast)
        self.blob.learn(extents)
        self._writer = Writer(chunks, self._write, limits.verify)
        self.stage = Stage.READY
        self._completed()
        if self.watcher is not None:
            self.watcher.ready()
        early, self._early = self._early, {}
        for number, (want, came_s) in early.items():
            self._want(number, want, came_s)

    def _inquiry(self) -> Inquiry:
        size_bytes, limits = self.origin.size_bytes, self._limits
        return Inquiry(
            self.origin.blob_id[:12],
            self.origin.chunks,
            partial(self._transport.resident, self.object, size_bytes),
            lambda: next((came_s for _, came_s in self._early.values()), None),
            self._crew,
            limits.deadline_s,
            limits.outage_limit_s,
        )

    def _unlearned(self, error: BaseException) -> None:
        """Nobody knows the chunks yet: those who wait fail, and who asks later tries anew."""
        if not self._early:
            return
        late = "its chunks are not known in time: check the source"
        log.error("blob %s: %s", self.origin.blob_id[:12], str(error) or late)
        self._refused_until = self._loop.time() + self._limits.refusal_s
        early, self._early = self._early, {}
        self._replies.fail(list(early))

    def _write(self, offset: int, memory: memoryview) -> None:
        self._transport.write(self.object, offset, memory)

    def _want(self, number: int, want: Wanted, came_s: float) -> None:
        assert self.blob is not None
        verdict = self.blob.want(number, want.start, want.end, came_s)
        if verdict.complete:
            self._tally.hits += 1
            self._replies.complete([number])
            self._launch(verdict.fetches)
        elif verdict.refuse:
            self._replies.fail([number])
        else:
            self._tally.joined += not verdict.fetches
            # Before any worker is woken: it would only wait for the interpreter's lock.
            self._arm()
            self._launch(verdict.fetches)
            self._watch()

    def _watch(self) -> None:
        """Look again whether what prefetches bring to readers is still on time."""
        if self.blob is not None and self.blob.joined and self._overtaking is None:
            self._overtaking = self._loop.call_later(SLACK_S, self._overtake)

    def _overtake(self) -> None:
        self._overtaking = None
        if self.blob is not None:
            self._launch(self.blob.overtake())
            self._watch()

    def _launch(self, fetches: Iterable[Fetch]) -> None:
        """Bring what readers wait for."""
        for fetch in fetches:
            self._tally.fetches += 1
            self._tally.fetched_s = self._loop.time()
            if self.watcher is not None:
                self.watcher.demanded(fetch)
            self._bring(fetch)

    def _bring(self, fetch: Fetch) -> None:
        if self._local is not None:
            self._hop(fetch, self._local, self._fetched)
        else:
            self._spawn(self._demand(fetch))

    async def _demand(self, fetch: Fetch) -> None:
        flight = Flight(self._cargo(fetch), self._crew, self)
        try:
            await self._fly(fetch, flight, Priority.DEMAND, self._limits.deadline_s)
        except (SourceError, OSError, NotReady) as error:
            self._fetched(error)

    def _fetched(self, error: Exception | None) -> None:
        if error is not None:
            log.error("blob %s: a fetch failed: %s", self.origin.blob_id[:12], error)

    async def _fly(
        self, fetch: Fetch, flight: Flight, priority: Priority, deadline_s: float
    ) -> Brought:
        """Bring chunks from a remote source. Raises SourceError, OSError, NotReady."""
        assert self._forecast is not None
        began_s = self._loop.time()
        ending = Ending.FAILED
        try:
            answer = await flight.fly(self.origin.source, priority, deadline_s)
            self._tally.requests += answer.requests
            self._tally.received_bytes += answer.received_bytes
            self._tally.given.update(answer.given)
            self._tally.sources[answer.source].count(answer, self.remote_bytes(fetch))
            if priority is Priority.DEMAND and self.blob is not None:
                self.blob.paced(fetch, flight.first_byte_s, answer.seconds)
            ending = Ending.DONE
            return self._brought(fetch)
        except SourceError as error:
            self._tally.source_errors += 1
            self._tally.sources[self.origin.source.name].failures += 1
            late = self._loop.time() - began_s >= deadline_s
            if late and (flight.brought_bytes or self._limits.outage_limit_s is None):
                ending = Ending.LATE
            elif error.away:
                ending = Ending.AWAY
            raise
        finally:
            self._forecast.ended(fetch.number, flight, priority)
            self._end(fetch, ending)

    async def _hop_and_wait(self, fetch: Fetch, source: LocalSource) -> None:
        done: asyncio.Future[Exception | None] = self._loop.create_future()

        def ended(error: Exception | None) -> None:
            if not done.done():
                done.set_result(error)

        self._hop(fetch, source, ended)
        if (error := await done) is not None:
            raise error

    def _hop(
        self, fetch: Fetch, source: LocalSource, ended: Callable[[Exception | None], None]
    ) -> None:
        def end(error: Exception | None) -> None:
            self._end(fetch, Ending.DONE if error is None else Ending.FAILED)
            ended(error)

        Hop(self._cargo(fetch), self._crew, self, end).go(source)

    def _cargo(self, fetch: Fetch) -> Cargo:
        assert self._chunks is not None and self._writer is not None
        return Cargo(self.origin.blob_id, self._chunks, fetch, self._writer)

    def _end(self, fetch: Fetch, ending: Ending) -> None:
        if self.blob is None or self.stage is not Stage.READY:
            return
        lost = self.blob.lost(fetch, self._loop.time(), ending)
        self._replies.fail(lost.tickets)
        self._launch(lost.fetches)
        if ending is Ending.DONE:
            self._scout.stop()
            self._launch(self.blob.resume())
        elif self.blob.stranded and self._scout.later():
            log.warning("blob %s: readers wait for its source", self.origin.blob_id[:12])
        self._arm()

    def _ask_again(self) -> None:
        """Send a fetch to see whether the source is back."""
        if self.blob is not None and self.stage is Stage.READY:
            self._launch(self.blob.resume(scout=True))

    # What flights report (`fscached.fill.flight.Tower`).

    def arrived(self, fetch: Fetch, index: int) -> bool:
        assert self.blob is not None
        return self.blob.arrived(fetch, index)

    def completing(self, run: Run) -> list[int]:
        assert self.blob is not None
        return self.blob.completing(run)

    def wake(self, number: int) -> None:
        self._replies.wake(number)

    def landed(self, landing: Landing) -> None:
        assert self.blob is not None
        self._replies.woken(landing.woken, landing.stamps)
        before = self.blob.resident_bytes
        for run in landing.landed:
            self._replies.complete(self.blob.landed(run), landing.stamps)
            if self.stage is Stage.READY:
                self._launch(self.blob.ahead(run))
        self._tally.landed_bytes += self.blob.resident_bytes - before
        for index, reason in landing.bad:
            self._bad(index, reason)
        self._completed()

    def _completed(self) -> None:
        if self.blob is None or not self.blob.complete or self.stage is not Stage.READY:
            return
        try:
            self._transport.complete(self.object)
        except OSError as error:
            log.warning("blob %s: readers go on asking: %s", self.origin.blob_id[:12], error)

    def _bad(self, index: int, reason: str) -> None:
        """Bytes that are not what they should be are fetched again, never written."""
        assert self.blob is not None
        self._tally.bad_chunks += 1
        tries = self._tries[index] = self._tries.get(index, 1) + 1
        log.error(
            "blob %s: chunk %d from %s: %s",
            self.origin.blob_id[:12],
            index,
            self.origin.source.name,
            reason,
        )
        start, end = self._remote(index)
        elsewhere = self.origin.source.distrust(self.origin.blob_id, start, end)
        if elsewhere or tries <= CHUNK_TRIES:
            self._bring(self.blob.again(index))
        else:
            self._tries.pop(index)
            self._replies.fail(self.blob.give_up(index, self._loop.time()))

    def _remote(self, index: int) -> tuple[int, int]:
        """Where a chunk is in the blob file."""
        assert self._chunks is not None
        return self._chunks.remote_offset(index), self._chunks[index].remote_end

    def _arm(self) -> None:
        """Have the next deadline fire in the event loop, where no stuck writer can hold it up."""
        if self.blob is None or self.stage is Stage.CLOSED:
            return
        deadline_s = self.blob.next_deadline_s()
        if self._timer is not None and (deadline_s is None or self._timer.when() > deadline_s):
            self._timer.cancel()
            self._timer = None
        if self._timer is None and deadline_s is not None:
            self._timer = self._loop.call_at(deadline_s, self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self.blob is not None:
            late = self.blob.expire(self._loop.time())
            if late:
                log.error("blob %s: no bytes in time, EIO", self.origin.blob_id[:12])
            self._replies.fail(late)
            self._arm()

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("blob %s: a bug of ours", self.origin.blob_id[:12], exc_info=error)
            if task is self._learning:
                self._unlearned(error)
