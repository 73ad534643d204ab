"""A stand-in for the kernel's cachefiles, with the quirks that were seen on 6.1 and 6.12.

The real one runs in `vm-tests/`. Modelled: nothing but READ says that an object is ready; READs of
at most 128 KiB that never cross an EROFS chunk; the hole at the front of a range decides (a prefix
is progress, a suffix is not); asking again before EIO; direct I/O's alignment; the floor of free
space; readers that are killed; a daemon that dies while the device is held elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from cffi import FFI

from fscached.transport import (
    BLOCK_BYTES,
    Closed,
    Event,
    NotReady,
    ObjectId,
    ObjectKey,
    Opened,
    OutOfSpace,
    Ticket,
    Wanted,
)
from fscached.transport import CacheFile as DiskFile

READ_BYTES_MAX = 128 * 1024
_FFI = FFI()


class State(enum.Enum):
    """Of one object. DORMANT: its daemon is gone, the next READ opens it again."""

    OPENING = enum.auto()
    OPEN = enum.auto()
    DORMANT = enum.auto()
    CLOSED = enum.auto()


@dataclass(slots=True)
class CacheFile:
    """What is on disk; outlives the object."""

    size_bytes: int
    data: bytearray = field(repr=False)
    resident: set[int] = field(default_factory=set, repr=False)
    """Numbers of the blocks that were written."""
    linked: bool = False
    """It has a name: since its first CLOSE."""
    used_s: float = 0.0


class FakeFiles:
    """The cache's directory, as `Files`."""

    def __init__(self, kernel: FakeKernel) -> None:
        self._kernel = kernel
        self.tidied: list[str] = []
        self.errors: list[OSError] = []
        """The next commands fail with these, one each."""

    def path(self, key: ObjectKey) -> str:
        return f"/cache/{key.volume}/{key.cookie}"

    def listed(self) -> Iterator[DiskFile]:
        for key, file in list(self._kernel.cache_files.items()):
            if file.linked:
                allocated = len(file.resident) * BLOCK_BYTES
                yield DiskFile(key, self.path(key), file.size_bytes, allocated, file.used_s)

    def found(self, cookie: str) -> list[DiskFile]:
        return [file for file in self.listed() if file.key.cookie == cookie]

    def touch(self, key: ObjectKey, used_s: float) -> None:
        if (file := self._kernel.cache_files.get(key)) and file.linked:
            file.used_s = used_s

    def cull(self, key: ObjectKey) -> bool:
        if self.errors:
            raise self.errors.pop(0)
        if self._kernel.uses(key):
            return False
        file = self._kernel.cache_files.get(key)
        if file is not None and file.linked:
            self._kernel.free_bytes += len(file.resident) * BLOCK_BYTES
            del self._kernel.cache_files[key]
        return True

    def tidy(self, volume: str) -> None:
        self.tidied.append(volume)


@dataclass(slots=True, eq=False)
class CacheObject:
    """An open cookie; `id` changes with every OPEN."""

    key: ObjectKey
    id: ObjectId
    opened: asyncio.Future[int]
    state: State = State.OPENING
    deaf_answers: int = 0
    """How many more calls are answered with NotReady."""


@dataclass(slots=True, eq=False)
class Read:
    """A READ without an answer."""

    object: CacheObject
    start: int
    end: int
    ticket: Ticket
    answered: asyncio.Future[None]


class FakeKernel:
    """Both ends of a `Transport`: the daemon's (the protocol's methods) and, as coroutines, the
    applications' (`open`, `read`, `umount`) and the administrator's (`restart`, `freeze`).

    Everything but `write`, `resident` and `done` belongs to the thread of the event loop.
    """

    name = "fake"
    needs_holder = False

    def __init__(self, *, chunk_bytes: int = 1024 * 1024, deaf_answers: int = 2) -> None:
        self._chunk_bytes = chunk_bytes
        self._deaf_answers = deaf_answers
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._queue: list[Event] = []
        self._files: dict[ObjectKey, CacheFile] = {}
        self._keys: dict[ObjectKey, CacheObject] = {}
        self._objects: dict[ObjectId, CacheObject] = {}
        self._reads: dict[Ticket, Read] = {}
        self._killed: set[Ticket] = set()
        self._ids = itertools.count(1)
        self._tickets = itertools.count(1)
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._thawed = threading.Event()
        self._thawed.set()
        self.files = FakeFiles(self)
        self.closing: set[ObjectKey] = set()
        """Closed, and still in use for a moment: `cachefiles_commit_object` comes after CLOSE."""
        self.free_bytes = 1 << 40
        self.floor_bytes = 0
        self.asked: list[Wanted] = []
        """Every READ that was sent, after a restart again."""
        self.orphans: list[Ticket] = []
        """Answers through an object the READ does not belong to: the kernel refuses them."""
        self.rewritten_bytes = 0
        """Written although resident."""
        self.completed: list[ObjectId] = []
        """Told that all of their chunks are resident."""
        self.write_errors: list[OSError] = []
        """The next writes fail with these, one each."""

    # The applications.

    async def open(self, key: ObjectKey) -> int:
        """Mount something that holds this object; its size in bytes.

        Raises OSError: the daemon's `open_failed`, or EBUSY when it is open already.
        """
        if key in self._keys:
            raise OSError(errno.EBUSY, f"{key} is open")
        object = CacheObject(key, ObjectId(0), asyncio.get_running_loop().create_future())
        self._keys[key] = object
        self._send_open(object)
        try:
            return await object.opened
        except BaseException:
            self._retire(object, State.CLOSED)
            del self._keys[key]
            raise

    async def read(self, key: ObjectKey, start: int, end: int, *, asks: int = 2) -> bytes:
        """Bytes [start, end) as read(2) gives them; `asks=4` is an mmap fault on 6.1.

        Raises OSError EIO. Cancelling is killing the reader.
        """
        object, file = self._keys[key], self._files[key]
        for segment_start, segment_end in self._segments(start, end):
            await self._fill(object, segment_start, segment_end)
            for block in range(segment_start // BLOCK_BYTES, segment_end // BLOCK_BYTES):
                await self._fill_block(object, block, asks - 1)
                if block not in file.resident:
                    raise OSError(errno.EIO, f"{key} at {block * BLOCK_BYTES}")
        return bytes(file.data[start:end])

    def umount(self, key: ObjectKey) -> None:
        """End the object; its file stays."""
        object = self._keys.pop(key)
        if key in self._files:
            self._files[key].linked = True
        if object.state in {State.OPENING, State.OPEN}:
            self._send(Closed(object.id))
        self._retire(object, State.CLOSED)

    # The administrator.

    def restart(self) -> None:
        """The daemon died, a successor wrote `restore`: stalled OPENs come again, pending READs
        come back with their tickets after their object was opened again."""
        self._queue.clear()
        waiting = {id(read.object) for read in self._reads.values()}
        for object in self._keys.values():
            stalled = object.state is State.OPENING
            self._retire(object, State.DORMANT)
            if stalled or id(object) in waiting:
                self._send_open(object)

    def freeze(self) -> None:
        """Writes hang from now on, as under fsfreeze(8)."""
        self._thawed.clear()

    def thaw(self) -> None:
        """Writes go on."""
        self._thawed.set()

    def settle(self, key: ObjectKey) -> None:
        """Enough time has passed since copen: the object answers."""
        self._keys[key].deaf_answers = 0

    # The observer.

    @property
    def cache_files(self) -> dict[ObjectKey, CacheFile]:
        """All there are, those without a name too."""
        return self._files

    def uses(self, key: ObjectKey) -> bool:
        """Whether the kernel has the file in use."""
        return key in self._keys or key in self.closing

    @property
    def unanswered(self) -> int:
        """READs that wait."""
        return len(self._reads)

    def object_id(self, key: ObjectKey) -> ObjectId:
        """The number of an open object."""
        return self._keys[key].id

    def content(self, key: ObjectKey) -> bytes:
        """The file as it is, padding left out."""
        file = self._files[key]
        return bytes(file.data[: file.size_bytes])

    def resident_bytes(self, key: ObjectKey) -> int:
        """How much of the file is data."""
        return len(self._files[key].resident) * BLOCK_BYTES

    # The daemon: Transport.

    @property
    def holdings(self) -> dict[str, int]:
        return {}

    def take_over(self) -> None:
        self.restart()

    def device(self, key: ObjectKey) -> str | None:
        return None

    def offer(self, key: ObjectKey, size_bytes: int) -> list[Event]:
        return []

    def withdraw(self, object: ObjectId) -> list[Event]:
        return []

    def complete(self, object: ObjectId) -> None:
        self.completed.append(object)

    def fileno(self) -> int:
        return self._event_fd

    def drain(self) -> list[Event]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event_fd)
        events, self._queue = self._queue, []
        return [e for e in events if not (isinstance(e, Wanted) and e.ticket in self._killed)]

    def open_ok(self, object: ObjectId, size_bytes: int) -> None:
        opened = self._objects.get(object)
        if opened is None:
            return
        assert opened.state is State.OPENING, f"object {object} was answered twice"
        file = self._files.get(opened.key)
        if file is None or file.size_bytes != size_bytes:
            blocks = -(-size_bytes // BLOCK_BYTES)
            self._files[opened.key] = CacheFile(size_bytes, bytearray(blocks * BLOCK_BYTES))
        opened.state, opened.deaf_answers = State.OPEN, self._deaf_answers
        if not opened.opened.done():
            opened.opened.set_result(size_bytes)
        for read in self._reads.values():
            if read.object is opened:
                self._send_read(read)

    def open_failed(self, object: ObjectId, errno: int) -> None:
        failed = self._objects.get(object)
        if failed is None:
            return
        assert errno > 0 and failed.state is State.OPENING
        self._retire(failed, State.DORMANT)
        if not failed.opened.done():
            failed.opened.set_exception(OSError(errno, os.strerror(errno)))
        for read in [read for read in self._reads.values() if read.object is failed]:
            self._answer(read)

    def resident(self, object: ObjectId, size_bytes: int) -> list[tuple[int, int]]:
        with self._lock:
            resident = sorted(self._ready_file(object).resident)
        extents: list[tuple[int, int]] = []
        for block in resident:
            start = block * BLOCK_BYTES
            if extents and extents[-1][1] == start:
                start = extents.pop()[0]
            extents.append((start, (block + 1) * BLOCK_BYTES))
        return extents

    def write(self, object: ObjectId, offset: int, memory: memoryview) -> None:
        address = int(_FFI.cast("uintptr_t", _FFI.from_buffer(memory)))
        if offset % BLOCK_BYTES or memory.nbytes % BLOCK_BYTES or address % BLOCK_BYTES:
            raise OSError(errno.EINVAL, f"{memory.nbytes} bytes at {offset}: not aligned")
        self._thawed.wait()
        with self._lock:
            if self.write_errors:
                raise self.write_errors.pop(0)
            file = self._ready_file(object)
            if offset < 0 or offset + memory.nbytes > len(file.data):
                raise OSError(errno.EINVAL, f"{memory.nbytes} bytes at {offset}: not in the file")
            blocks = set(range(offset // BLOCK_BYTES, (offset + memory.nbytes) // BLOCK_BYTES))
            fresh_bytes = len(blocks - file.resident) * BLOCK_BYTES
            if self.free_bytes - fresh_bytes < self.floor_bytes:
                raise OutOfSpace(errno.ENOBUFS, "the cache file system is full")
            self.free_bytes -= fresh_bytes
            self.rewritten_bytes += memory.nbytes - fresh_bytes
            file.data[offset : offset + memory.nbytes] = memory
            file.resident |= blocks

    def discard(self, object: ObjectId, start: int, end: int) -> bool:
        with self._lock:
            file = self._ready_file(object)
            file.resident -= set(range(start // BLOCK_BYTES, end // BLOCK_BYTES))
        return True

    def done(self, object: ObjectId, ticket: Ticket) -> None:
        if threading.get_ident() != self._thread:
            self._loop.call_soon_threadsafe(self.done, object, ticket)
            return
        if ticket in self._killed:
            return
        read = self._reads.get(ticket)
        assert read is not None, f"ticket {ticket} was answered twice"
        if read.object is not self._objects.get(object):
            self.orphans.append(ticket)
            return
        self._answer(read)

    def failed(self, object: ObjectId, ticket: Ticket, errno: int) -> None:
        assert errno > 0
        self.done(object, ticket)

    def relinquish(self) -> bool:
        return True

    def close(self) -> None:
        """End the cache: what waits now and whatever is asked later is EIO."""
        self._thawed.set()
        for object in self._keys.values():
            self._retire(object, State.CLOSED)
            if not object.opened.done():
                object.opened.set_exception(OSError(errno.EIO, "the cache is gone"))
        for read in list(self._reads.values()):
            self._answer(read)
        os.close(self._event_fd)

    # Inside.

    def _segments(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """READs for a range of bytes: whole blocks, within one chunk, at most 128 KiB."""
        position = start // BLOCK_BYTES * BLOCK_BYTES
        end = -(-end // BLOCK_BYTES) * BLOCK_BYTES
        while position < end:
            chunk_end = (position // self._chunk_bytes + 1) * self._chunk_bytes
            segment_end = min(end, chunk_end, position + READ_BYTES_MAX)
            yield position, segment_end
            position = segment_end

    async def _fill(self, object: CacheObject, start: int, end: int) -> None:
        """Ask for each hole in a range until one stays a hole (cachefiles_do_prepare_read)."""
        resident = self._files[object.key].resident
        blocks = range(start // BLOCK_BYTES, end // BLOCK_BYTES)
        while hole := list(itertools.dropwhile(resident.__contains__, blocks)):
            size = sum(1 for _ in itertools.takewhile(lambda b: b not in resident, hole))
            if not await self._ask(object, hole[0] * BLOCK_BYTES, (hole[0] + size) * BLOCK_BYTES):
                return

    async def _fill_block(self, object: CacheObject, block: int, asks: int) -> None:
        """Ask for one page that reading ahead has not brought, `asks` times at most."""
        for _ in range(asks):
            if block in self._files[object.key].resident:
                return
            await self._fill(object, block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)

    async def _ask(self, object: CacheObject, start: int, end: int) -> bool:
        """Send a READ and wait; whether its first block is there now."""
        if object.state is State.CLOSED:
            return False
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        read = Read(object, start, end, Ticket(next(self._tickets)), answered)
        self._reads[read.ticket] = read
        if object.state is State.DORMANT:
            self._send_open(object)
        elif object.state is State.OPEN:
            self._send_read(read)
        try:
            await answered
        except asyncio.CancelledError:
            self._reads.pop(read.ticket, None)
            self._killed.add(read.ticket)
            raise
        return start // BLOCK_BYTES in self._files[object.key].resident

    def _answer(self, read: Read) -> None:
        del self._reads[read.ticket]
        if not read.answered.done():
            read.answered.set_result(None)

    def _send(self, event: Event) -> None:
        self._queue.append(event)
        os.eventfd_write(self._event_fd, 1)

    def _send_open(self, object: CacheObject) -> None:
        object.state, object.id = State.OPENING, ObjectId(next(self._ids))
        with self._lock:
            self._objects[object.id] = object
        self._send(Opened(object.id, object.key))

    def _send_read(self, read: Read) -> None:
        read.object.deaf_answers = 0
        wanted = Wanted(read.object.id, read.start, read.end, read.ticket)
        self.asked.append(wanted)
        self._send(wanted)

    def _retire(self, object: CacheObject, state: State) -> None:
        with self._lock:
            self._objects.pop(object.id, None)
            object.state = state

    def _ready_file(self, id: ObjectId) -> CacheFile:
        """The file of an object that answers. Under the lock."""
        object = self._objects.get(id)
        if object is None:
            raise OSError(errno.EBADF, f"object {id} is closed")
        if object.state is State.OPENING or object.deaf_answers:
            object.deaf_answers = max(0, object.deaf_answers - 1)
            raise NotReady(f"object {id}")
        return self._files[object.key]
