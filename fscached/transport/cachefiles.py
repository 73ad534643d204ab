"""The cachefiles on-demand device: EROFS over fscache, Linux 5.19 to 7.1.

One `read` of the device is one message; OPEN brings the object's descriptor along, which takes
writes, seeks and the answer to a READ. What the kernel does with all of it is in
fs/cachefiles/ondemand.c.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from dataclasses import dataclass
from typing import NamedTuple, Self

from cdefs.cachefiles import (
    MESSAGE,
    MESSAGE_BYTES_MAX,
    OP_CLOSE,
    OP_OPEN,
    OP_READ,
    OPEN,
    READ,
    read_complete,
)
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
from fscached.transport.cache_file import (
    NO_SPACE,
    check_blocks,
    data_extents,
    punch,
    round_up,
    worth_a_line,
    write_all,
)
from fscached.transport.cookie_files import VOLUME_PREFIX, CookieFiles

DEVICE = "/dev/cachefiles"
DEVICE_NAME = "cachefiles"

log = logging.getLogger(__name__)

_DRAIN_MESSAGES_MAX = 1024
"""One `drain` gives the event loop back after so many; the device stays readable."""

_ONE_OPEN_FAILED = {errno.EEXIST, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EFAULT}
"""A failing read of the device takes one OPEN out of the queue and fails it, nothing else."""

_OFFSET_MAX = (1 << 63) - 1


class NoRestore(OSError):
    """This kernel has no `restore` (mainline before 6.8): a daemon that dies takes its mounts
    along, whoever holds the device."""


class _Malformed(Exception):
    """A message that cannot be what it says it is."""


class Culling(NamedTuple):
    """Free blocks (or inodes) of the cache file system, in percent of all: below `stop` nothing is
    cached any more, below `cull` the kernel wants culling, until `run`. The kernel's defaults."""

    run: int = 7
    cull: int = 5
    stop: int = 1


@dataclass(slots=True)
class Counts:
    """What went wrong without stopping anything."""

    opens_failed: int = 0
    """The kernel could not hand over an object's descriptor."""
    malformed: int = 0
    orphans: int = 0
    """READs of objects this process was never told about: somebody else still holds their
    descriptors (a copy in a dying predecessor). Nobody can answer them; their readers wait until
    the holder is gone and `restore` is written again."""
    readers_gone: int = 0
    """Answers nobody waited for any more, and those to orphans."""


@dataclass(slots=True, eq=False)
class _Object:
    key: ObjectKey
    fd: int
    message: int | None
    """Of its OPEN, until that is answered."""
    ready: bool = False
    """The kernel has answered for its file once: from now on ENOBUFS is about space."""
    users: int = 0
    closed: bool = False


class Cachefiles:
    """`Transport` over the on-demand device.

    A descriptor is closed only when no worker thread is inside a call on it: its number could be
    another object's a moment later, and the bytes would go there.
    """

    name = "cachefiles"
    needs_holder = False

    def __init__(self, device_fd: int, directory: str) -> None:
        """`directory`: the cache's."""
        self.counts = Counts()
        self.files = CookieFiles(device_fd, directory)
        self.supports_restore = False
        self._device = device_fd
        self._directory = directory
        self._objects: dict[ObjectId, _Object] = {}
        self._lost: list[Event] = []
        self._lock = threading.Lock()
        self._lingering = 0
        """Descriptors of closed objects that a worker is still inside a call on."""

    @classmethod
    def open(cls, directory: str, device: str = DEVICE) -> Self:
        """Open the device for a cache in `directory` (absolute, existing); `bind` comes next.

        Raises OSError: ENOENT no such device, EBUSY it or one of its objects is open elsewhere,
        EPERM not root; `probe.explain_open_failure` says which and what to do.
        """
        return cls(os.open(device, os.O_RDWR | os.O_CLOEXEC), directory)

    @classmethod
    def adopt(cls, device_fd: int, directory: str) -> Self:
        """Take over a device that is bound already, to `directory`; `restore` comes next, once no
        other process has a descriptor of an object any more."""
        os.set_inheritable(device_fd, False)
        return cls(device_fd, directory)

    def bind(
        self,
        tag: str | None = None,
        blocks: Culling | None = None,
        inodes: Culling | None = None,
    ) -> None:
        """Make the directory the cache and start on-demand mode.

        Raises OSError that names the refused command; EINVAL for `bind ondemand` is a kernel
        without on-demand mode.
        """
        self._command(f"dir {self._directory}")
        if tag is not None:
            self._command(f"tag {tag}")
        for letter, culling in (("b", blocks), ("f", inodes)):
            if culling is not None:
                self._set_culling(letter, culling)
        self._command("bind ondemand")
        with contextlib.suppress(NoRestore):
            self.restore()

    def restore(self) -> None:
        """Have everything that is unanswered sent again. An OPEN whose descriptor is still held
        somewhere fails by it, so not while a predecessor lives.

        Raises NoRestore, OSError.
        """
        try:
            self._command("restore")
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:
                raise
            raise NoRestore(error.errno, "this kernel has no restore (6.8 has)") from error
        self.supports_restore = True

    @property
    def holdings(self) -> dict[str, int]:
        return {DEVICE_NAME: self._device}

    def take_over(self) -> None:
        self.restore()

    def device(self, key: ObjectKey) -> str | None:
        return None

    def offer(self, key: ObjectKey, size_bytes: int) -> list[Event]:
        return []

    def withdraw(self, object: ObjectId) -> list[Event]:
        return []

    def complete(self, object: ObjectId) -> None:
        """Reads of what is there have never asked."""

    def fileno(self) -> int:
        return self._device

    def drain(self) -> list[Event]:
        events, self._lost = self._lost, []
        for _ in range(_DRAIN_MESSAGES_MAX):
            try:
                message = os.read(self._device, MESSAGE_BYTES_MAX)
            except BlockingIOError:
                break
            except OSError as error:
                self._open_lost(error)
                continue
            if not message:
                break
            event = self._event(message)
            if event is not None:
                events.append(event)
        return events

    def open_ok(self, object: ObjectId, size_bytes: int) -> None:
        opened = self._objects.get(object)
        if opened is not None and not self._copen(opened, size_bytes):
            self._drop(object)
            self._lost.append(Closed(object))

    def open_failed(self, object: ObjectId, errno: int) -> None:
        opened = self._objects.get(object)
        if opened is None or opened.message is None:
            return
        # Not the other way round: a descriptor closed before copen is EBADFD for the mount.
        self._copen(opened, -errno)
        self._drop(object)

    def resident(self, object: ObjectId, size_bytes: int) -> list[tuple[int, int]]:
        opened = self._hold(object)
        try:
            extents = list(data_extents(opened.fd, round_up(size_bytes)))
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            raise NotReady(f"{opened.key}: no file yet") from error
        finally:
            self._release(opened)
        opened.ready = True
        return extents

    def write(self, object: ObjectId, offset: int, memory: memoryview) -> None:
        # The kernel would round the offset down and write there (ondemand_fd_write_iter).
        check_blocks(offset, memory)
        opened = self._hold(object)
        try:
            write_all(opened.fd, offset, memory)
        except OSError as error:
            raise _write_error(opened, offset, memory.nbytes, error) from error
        finally:
            self._release(opened)
        opened.ready = True

    def discard(self, object: ObjectId, start: int, end: int) -> bool:
        opened = self._objects.get(object)
        # An object's descriptor takes no fallocate: by its name, if it has one.
        return opened is not None and punch(self.files.path(opened.key), start, end)

    def done(self, object: ObjectId, ticket: Ticket) -> None:
        # Under the lock, so that the descriptor is this object's for the length of the call.
        with self._lock:
            opened = self._objects.get(object)
            if opened is None:
                self.counts.readers_gone += 1
                return
            try:
                read_complete(opened.fd, ticket)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.counts.readers_gone += 1

    def failed(self, object: ObjectId, ticket: Ticket, errno: int) -> None:
        self.done(object, ticket)

    def relinquish(self) -> bool:
        for object in list(self._objects):
            self._drop(object)
        return not self._lingering

    def close(self) -> None:
        self.relinquish()
        os.close(self._device)

    def _command(self, command: str) -> None:
        if "\n" in command or "\0" in command:
            raise OSError(errno.EINVAL, f"cachefiles takes one line, not {command!r}")
        try:
            os.write(self._device, os.fsencode(command))
        except OSError as error:
            text = f"cachefiles refused {command!r}: {error.strerror}"
            raise OSError(error.errno, text) from error

    def _set_culling(self, letter: str, culling: Culling) -> None:
        """The kernel checks each value against its neighbours: make room first."""
        for command in (
            f"{letter}run 99%",
            f"{letter}stop 0%",
            f"{letter}cull {culling.cull}%",
            f"{letter}stop {culling.stop}%",
            f"{letter}run {culling.run}%",
        ):
            self._command(command)

    def _event(self, message: bytes) -> Event | None:
        length = len(message)
        try:
            if length == READ.size:
                msg_id, opcode, size, object, start, count = READ.unpack(message)
                if opcode == OP_READ and size == length:
                    return self._wanted(object, start, start + count, msg_id)
            if length < MESSAGE.size:
                raise _Malformed("shorter than a header")
            msg_id, opcode, size, object = MESSAGE.unpack_from(message)
            if size != length:
                raise _Malformed(f"says it has {size} bytes")
            if opcode == OP_OPEN:
                return self._opened(message, msg_id, object)
            if opcode == OP_CLOSE and length == MESSAGE.size:
                return Closed(object) if self._drop(object) else None
            raise _Malformed(f"opcode {opcode}")
        except _Malformed as reason:
            self.counts.malformed += 1
            if worth_a_line(self.counts.malformed):
                log.error("a message of %d bytes from cachefiles is malformed: %s", length, reason)
            return None

    def _wanted(self, object: ObjectId, start: int, end: int, msg_id: Ticket) -> Wanted:
        opened = self._objects.get(object)
        if opened is None:
            self._orphaned(object, msg_id)
        else:
            opened.ready = True
        if start % BLOCK_BYTES or end % BLOCK_BYTES or not start < end <= _OFFSET_MAX:
            if opened is not None:
                self.failed(object, msg_id, errno.EINVAL)
            raise _Malformed(f"READ {msg_id} of object {object} wants [{start}, {end})")
        return Wanted(object, start, end, msg_id)

    def _opened(self, message: bytes, msg_id: int, object: ObjectId) -> Opened:
        if len(message) < MESSAGE.size + OPEN.size:
            raise _Malformed("OPEN without a body")
        volume_bytes, cookie_bytes, fd, _flags = OPEN.unpack_from(message, MESSAGE.size)
        volume_start = MESSAGE.size + OPEN.size
        cookie_start = volume_start + volume_bytes
        if cookie_start + cookie_bytes > len(message):
            raise _Malformed(f"OPEN with keys of {volume_bytes} and {cookie_bytes} bytes")
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            raise _Malformed(f"OPEN with descriptor {fd}: {error.strerror}") from error
        volume = message[volume_start:cookie_start]
        cookie = message[cookie_start : cookie_start + cookie_bytes]
        opened = _Object(ObjectKey("", ""), fd, msg_id)
        try:
            opened.key = _object_key(volume, cookie)
            if object in self._objects:
                raise _Malformed(f"OPEN of object {object}, which is {self._objects[object].key}")
        except _Malformed:
            self._copen(opened, -errno.EINVAL)
            os.close(fd)
            raise
        self._objects[object] = opened
        return Opened(object, opened.key)

    def _copen(self, opened: _Object, answer: int) -> bool:
        """Answer an OPEN with a size or a negative errno; whether somebody still waited."""
        command = f"copen {opened.message},{answer}"
        opened.message = None
        try:
            os.write(self._device, command.encode())
        except OSError as error:
            log.warning("%s: nobody waits for its OPEN: %s", opened.key, error.strerror)
            return False
        return True

    def _open_lost(self, error: OSError) -> None:
        if error.errno not in _ONE_OPEN_FAILED:
            raise error
        self.counts.opens_failed += 1
        log.error(
            "the kernel could not hand over an object, its mount fails: %s%s",
            error.strerror,
            "; raise LimitNOFILE" if error.errno in {errno.EMFILE, errno.ENFILE} else "",
        )

    def _orphaned(self, object: ObjectId, ticket: Ticket) -> None:
        self.counts.orphans += 1
        if worth_a_line(self.counts.orphans):
            log.error(
                "READ %d is for object %d, which is not open here: a predecessor's descriptor is "
                "alive somewhere; its reader waits until that process ends and restore is written",
                ticket,
                object,
            )

    def _hold(self, object: ObjectId) -> _Object:
        """Keep an object's descriptor open for the length of a call."""
        with self._lock:
            opened = self._objects.get(object)
            if opened is None:
                raise OSError(errno.EBADF, f"object {object} is closed")
            opened.users += 1
            return opened

    def _release(self, opened: _Object) -> None:
        with self._lock:
            opened.users -= 1
            last = opened.closed and not opened.users
        if last:
            os.close(opened.fd)
            with self._lock:
                self._lingering -= 1

    def _drop(self, object: ObjectId) -> bool:
        """Forget an object; its descriptor closes with its last user."""
        with self._lock:
            opened = self._objects.pop(object, None)
            if opened is None:
                return False
            opened.closed = True
            unused = not opened.users
            self._lingering += not unused
        if unused:
            os.close(opened.fd)
        return True


def _object_key(volume: bytes, cookie: bytes) -> ObjectKey:
    """The volume key ends with a NUL and says who asks; the cookie key is as EROFS gave it."""
    prefix = VOLUME_PREFIX.encode()
    name = volume.removesuffix(b"\0").removeprefix(prefix)
    if not volume.startswith(prefix) or not name or not cookie:
        raise _Malformed(f"OPEN of volume {volume!r}, cookie {cookie!r}")
    try:
        return ObjectKey(name.decode(), cookie.decode())
    except UnicodeDecodeError as error:
        raise _Malformed(f"OPEN of volume {volume!r}, cookie {cookie!r}") from error


def _write_error(opened: _Object, offset: int, count: int, error: OSError) -> Exception:
    what = f"{opened.key}: {count} bytes at {offset}: {error.strerror}"
    if error.errno == errno.ENOBUFS and not opened.ready:
        return NotReady(what)
    if error.errno in NO_SPACE:
        return OutOfSpace(error.errno, f"{what}; free space on the cache file system")
    if error.errno == errno.EINVAL:
        what += " (is the memory aligned to a page?)"
    return OSError(error.errno, what)
