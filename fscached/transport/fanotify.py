"""fanotify before content is read: EROFS over plain files, Linux 6.14 and later.

EROFS reads the cache files as anybody would, and the kernel asks the group before each read of a
file that is marked (fsnotify_pre_content in include/linux/fsnotify.h). Its own answer when nobody
is left to give one is "allow", and an allowed hole reads as zeros. So: the group outlives every
process of ours, an event is in shared memory before anybody has seen it
(`fscached.transport.slots`), and its number stays taken until it is answered and its slot clear.
docs/decisions/fanotify.md says what was tried.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import re
import select
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from errno import EIO
from pathlib import Path
from struct import Struct
from typing import NamedTuple, Self

from cdefs import fanotify
from cdefs.attend import ATTENDED, Attendant
from cdefs.fanotify import INFO_RANGE, METADATA, PRE_ACCESS, RANGE
from fscached.transport import (
    BLOCK_BYTES,
    Closed,
    Event,
    Held,
    ObjectId,
    ObjectKey,
    Opened,
    Ticket,
    Wanted,
)
from fscached.transport.cache_file import round_up, worth_a_line
from fscached.transport.floor import Floor
from fscached.transport.folder import Folder
from fscached.transport.slots import Left, Slots, reserve

log = logging.getLogger(__name__)

Record = bytes | memoryview

GROUP_NAME = "fanotify"
SLOTS_NAME = "slots"
FOLDER = "files"
"""Of the cache directory: where the files are."""

ERRNOS = frozenset(
    {
        *(errno.EIO, errno.EPERM, errno.EBUSY, errno.ETXTBSY),
        *(errno.EAGAIN, errno.ENOSPC, errno.EDQUOT),
    }
)
"""What a reader can be failed with (process_access_response in fanotify_user.c); with another one
it would wait on."""

LEAVE_PAUSE_S = 0.2

_DRAIN_EVENTS_MAX = 1024
"""One `drain` gives the event loop back after so many; the group stays readable."""

_NOT_OF_ONE_EVENT = {errno.EBADF, errno.EINVAL}
"""Any other failure of a read takes one event out of the queue and denies it, nothing else
(copy_event_to_user in fanotify_user.c)."""

_TOLD_BYTES = 1024 * ATTENDED.size
"""One `told` gives the event loop back after so much."""

_INFO = Struct("=BBH")
_MARK = re.compile(r"^fanotify ino:([0-9a-f]+) ", re.MULTILINE)


@dataclass(slots=True)
class Counts:
    """What went wrong without stopping anything."""

    events_lost: int = 0
    """The kernel could not hand over an event, and has denied it."""
    strangers: int = 0
    """Events of files that are no object: denied."""
    readers_gone: int = 0
    """Answers nobody waited for any more."""
    taken_over: int = 0
    """Events that a predecessor had read and not answered."""
    swept: int = 0
    """Such events that were in no slot: denied."""


class _Unanswered(NamedTuple):
    """An event that was read: its slot, its descriptor's number, and whether that is ours."""

    slot: int
    number: int
    ours: bool


class Fanotify:
    """`Transport` over a fanotify group of the pre-content class."""

    name = "fanotify"
    needs_holder = True

    def __init__(self, group_fd: int, slots: Slots, folder: Folder) -> None:
        self.counts = Counts()
        self._group = group_fd
        self._slots = slots
        self._folder = folder
        self._pid = os.getpid()
        # Between the group and whoever waits: it stays silent while no slot is free.
        self._epoll = select.epoll(1)
        self._epoll.register(group_fd, select.EPOLLIN)
        self._paused = False
        self._tickets = map(Ticket, itertools.count(1))
        self._unanswered: dict[Ticket, _Unanswered] = {}
        self._left: list[Left] = []
        self._reserved: set[int] = set()
        self._descriptors_max = 0
        self._events: list[Event] = []
        self._lock = threading.Lock()
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._told, self._teller = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._attendant = Attendant(group_fd, self._end, self._teller, slots.memory)
        # A lease that is broken while it is looked at would end the process.
        signal.signal(signal.SIGIO, signal.SIG_IGN)

    @classmethod
    def open(cls, directory: str, floor: Floor, slots: int) -> Self:
        """A new group over an existing cache directory.

        Raises OSError: EINVAL a kernel before 6.14 or a file system that cannot be watched, EPERM
        not root, EWOULDBLOCK another daemon has the directory.
        """
        group_fd = fanotify.init()
        with tempfile.TemporaryFile(dir=directory) as trial:
            fanotify.mark(group_fd, trial.fileno())
        folder = Folder(group_fd, Path(directory, FOLDER), floor)
        return cls(group_fd, Slots(None, slots), folder)

    @classmethod
    def adopt(
        cls, holdings: dict[str, int], directory: str, floor: Floor, descriptors_max: int
    ) -> Self:
        """Take over a group and its slots, by their names among `holdings`, which changes where one
        is in the way of a number that is unanswered. Objects are offered next, then `take_over`.

        To be called before anything else is opened. `descriptors_max`: how high the predecessor's
        numbers may go. Raises OSError.
        """
        slots = Slots(holdings[SLOTS_NAME], 0)
        left = list(slots.left())
        reserved = reserve((event.number for event in left), holdings)
        slots.fd, group_fd = holdings[SLOTS_NAME], holdings[GROUP_NAME]
        folder = Folder(group_fd, Path(directory, FOLDER), floor)
        marks = _MARK.findall(Path(f"/proc/self/fdinfo/{group_fd}").read_text())
        folder.inherit({int(inode, 16) for inode in marks})
        transport = cls(group_fd, slots, folder)
        transport._left, transport._reserved = left, reserved
        transport._descriptors_max = descriptors_max
        return transport

    @property
    def files(self) -> Folder:
        return self._folder

    @property
    def holdings(self) -> dict[str, int]:
        return {SLOTS_NAME: self._slots.fd, GROUP_NAME: self._group}

    def condemn(self) -> list[Path]:
        """See `Folder.condemn`: for a new group, before anything is offered."""
        return self._folder.condemn()

    def leave(self, take_down: Callable[[list[Path]], None]) -> None:
        """Serve nobody any more: have `take_down` unmount what needs these files, and fail every
        read of them until nobody can read a hole. Then the group may be closed."""
        for object in self._folder.objects():
            self._folder.drop(object)
        for ticket in list(self._unanswered):
            self._answer(ticket, EIO)
        self.take_over()
        take_down(self._folder.marked())
        while not self._folder.let_go():
            list(self.drain())  # without objects every event is denied as it is read
            self._epoll.poll(LEAVE_PAUSE_S)

    def take_over(self) -> None:
        self._folder.inherited()
        numbers = {event.number for event in self._left}
        for number in range(self._descriptors_max):
            if number not in numbers and self._swept(number):
                self.counts.swept += 1
        for event in self._left:
            unanswered = _Unanswered(event.slot, event.number, event.number in self._reserved)
            self._ask(self._folder.find(event.inode), event.record, unanswered)
        self.counts.taken_over, self._left = len(self._left), []
        log.info("took over %d events, denied %d", self.counts.taken_over, self.counts.swept)

    def device(self, key: ObjectKey) -> str | None:
        return self._folder.path(key)

    def offer(self, key: ObjectKey, size_bytes: int) -> list[Event]:
        object = self._folder.offer(key, size_bytes)
        return [] if object is None else [Opened(object, key)]

    def withdraw(self, object: ObjectId) -> list[Event]:
        return [Closed(object)] if self._folder.withdraw(object) else []

    def complete(self, object: ObjectId) -> None:
        self._folder.complete(object)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def drain(self) -> Iterator[Event]:
        # One by one: a reader is answered before the group is asked for the next event.
        yield from self._queued()
        for _ in range(_DRAIN_EVENTS_MAX):
            slot = self._take_slot()
            if slot is None or not self._read(slot):
                return
            yield from self._queued()

    def attend(self) -> Iterator[Event]:
        while (slot := self._awaited_slot()) is not None and self._attended(slot):
            yield from self._queued()

    def dismiss(self) -> None:
        os.eventfd_write(self._end, 1)

    def told_fileno(self) -> int:
        return self._told

    def told(self) -> Iterator[Held]:
        for inode, start, end, took_ns in ATTENDED.iter_unpack(os.read(self._told, _TOLD_BYTES)):
            if (object := self._folder.find(inode)) is not None:
                start = start // BLOCK_BYTES * BLOCK_BYTES
                yield Held(object, start, round_up(end), took_ns / 1e9)

    def _queued(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def open_ok(self, object: ObjectId, size_bytes: int) -> None:
        """Nothing waits: `offer` has made the file."""

    def open_failed(self, object: ObjectId, errno: int) -> None:
        self._folder.drop(object)

    def resident(self, object: ObjectId, size_bytes: int) -> list[tuple[int, int]]:
        return self._folder.resident(object)

    def write(self, object: ObjectId, offset: int, memory: memoryview) -> None:
        self._folder.write(object, offset, memory)

    def discard(self, object: ObjectId, start: int, end: int) -> bool:
        return self._folder.discard(object, start, end)

    def done(self, object: ObjectId, ticket: Ticket) -> None:
        self._answer(ticket, 0)

    def failed(self, object: ObjectId, ticket: Ticket, errno: int) -> None:
        self._answer(ticket, errno if errno in ERRNOS else EIO)

    def relinquish(self) -> bool:
        """A successor waits for the end of this process: the folder is locked until then."""
        return True

    def close(self) -> None:
        self._folder.close()
        self._epoll.close()
        for fd in (self._end, self._told, self._teller):
            os.close(fd)
        os.close(self._group)
        os.close(self._slots.fd)

    def _take_slot(self) -> int | None:
        """A free slot; if there is none, no word from the group before there is one again."""
        slot = self._slots.take()
        if slot is not None:
            return slot
        with self._lock:
            # Whoever clears one after this look sees that we pause.
            self._paused = True
            if (slot := self._slots.take()) is None:
                self._epoll.modify(self._group, 0)
                log.warning("%d reads wait, the limit: others wait to be asked", self._slots.count)
            else:
                self._paused = False
        return slot

    def _awaited_slot(self) -> int | None:
        """A free slot as soon as there is one and an event for it; None at the end."""
        while (slot := self._take_slot()) is None:
            waiting = select.poll()
            waiting.register(self._epoll, select.POLLIN)
            waiting.register(self._end, select.POLLIN)
            if self._end in dict(waiting.poll()):
                return None
        return slot

    def _clear(self, slot: int) -> None:
        self._slots.clear(slot)
        if self._paused:
            with self._lock:
                self._paused = False
                self._epoll.modify(self._group, select.EPOLLIN)

    def _read(self, slot: int) -> bool:
        """Read one event into a slot and act on it; False when there is none."""
        record = self._slots.record(slot)
        try:
            os.readv(self._group, [record])
        except OSError as error:
            self._clear(slot)
            if error.errno in _NOT_OF_ONE_EVENT:
                raise
            return error.errno != errno.EAGAIN and self._lost(error)
        self._slots.note(slot, os.fstat(METADATA.unpack_from(record)[5]).st_ino)
        self._act(slot)
        return True

    def _attended(self, slot: int) -> bool:
        """Act on the next event that is not answered without us; False when there is to be none."""
        try:
            came = self._attendant.attend(slot)
        except OSError as error:
            self._clear(slot)
            if error.errno in _NOT_OF_ONE_EVENT:
                raise
            return self._lost(error)
        if came:
            self._act(slot)
        else:
            self._clear(slot)
        return came

    def _act(self, slot: int) -> None:
        """See to an event that lies in a slot."""
        record, inode = self._slots.record(slot), self._slots.inode(slot)
        number, pid = METADATA.unpack_from(record)[5:]
        object = self._folder.find(inode)
        if object is not None:
            self._attendant.know(inode)
            self._folder.lend(object, number)
        unanswered = _Unanswered(slot, number, True)
        if pid == self._pid:
            # A lure, or a write of ours because another group watches too: we cannot wait for us.
            self._settle(unanswered, 0)
        else:
            self._ask(object, record, unanswered)

    def _ask(self, object: ObjectId | None, record: Record, unanswered: _Unanswered) -> None:
        """Queue what an event wants, or answer it at once."""
        extent = None
        if object is not None:
            with contextlib.suppress(OSError):  # closed meanwhile
                extent = wanted_extent(record, self._folder.file(object).size_bytes)
        if object is None or extent is None:
            self.counts.strangers += 1
            if worth_a_line(self.counts.strangers):
                log.error("an event of no file that is served here: EIO")
            self._settle(unanswered, errno.EIO)
        elif extent[0] >= extent[1]:
            self._settle(unanswered, 0)  # behind the end of the file
        else:
            ticket = next(self._tickets)
            self._unanswered[ticket] = unanswered
            self._events.append(Wanted(object, *extent, ticket))

    def _lost(self, error: OSError) -> bool:
        self.counts.events_lost += 1
        if worth_a_line(self.counts.events_lost):
            log.error("the kernel denied a read that it could not tell us of: %s", error)
        return True

    def _answer(self, ticket: Ticket, code: int) -> None:
        unanswered = self._unanswered.pop(ticket, None)
        if unanswered is None:
            self.counts.readers_gone += 1
        else:
            self._settle(unanswered, code)

    def _settle(self, unanswered: _Unanswered, code: int) -> None:
        """Answer, then clear the slot, then let go of the number: in this order whoever comes after
        us finds every number that is unanswered, and no other event has it."""
        slot, number, ours = unanswered
        try:
            if code:
                fanotify.deny(self._group, number, code)
            else:
                fanotify.allow(self._group, number)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            self.counts.readers_gone += 1
        self._clear(slot)
        if ours:
            os.close(number)

    def _swept(self, number: int) -> bool:
        try:
            fanotify.deny(self._group, number, errno.EIO)
        except OSError:
            return False
        return True


def wanted_extent(record: Record, size_bytes: int) -> tuple[int, int] | None:
    """The whole blocks [start, end) that an event asks for, within the file; all of it when the
    record does not say. None for a record that is not one of a read before its content."""
    length, version, _, at, mask, *_ = METADATA.unpack_from(record)
    if version != fanotify.VERSION or not mask & PRE_ACCESS:
        return None
    while at + _INFO.size <= length <= len(record):
        kind, _, info_length = _INFO.unpack_from(record, at)
        if kind == INFO_RANGE and at + RANGE.size <= length:
            _, _, _, _, offset, count = RANGE.unpack_from(record, at)
            if count:
                start = offset // BLOCK_BYTES * BLOCK_BYTES
                return start, min(size_bytes, round_up(offset + count))
        at += max(info_length, _INFO.size)
    return 0, size_bytes
