"""1 · The kernel asks: one file per way the kernel has of asking for bytes.

What belongs here: system calls on the kernel's own file descriptors, and nothing that decides.
What does not: event loops, chunks, sources. Called by `fscached.daemon` and `fscached.fill`.
"""

from __future__ import annotations

from typing import NamedTuple, NewType, Protocol

ObjectId = NewType("ObjectId", int)
"""The kernel's number for one open cache object; a new number after every OPEN."""

Ticket = NewType("Ticket", int)
"""The kernel's number for one unanswered READ; answered exactly once with `done` or `failed`."""

BLOCK_BYTES = 4096
"""Unit of every write, and of residency: EROFS over fscache works on pages of 4 KiB only."""


class ObjectKey(NamedTuple):
    """Names of an object. `volume` is the domain (or fsid), `cookie` a fsid or a blob id."""

    volume: str
    cookie: str


class Opened(NamedTuple):
    """The kernel opened an object and waits for `open_ok` or `open_failed`."""

    object: ObjectId
    key: ObjectKey


class Wanted(NamedTuple):
    """A reader waits for bytes [start, end) of an object: a READ. Multiples of `BLOCK_BYTES`."""

    object: ObjectId
    start: int
    end: int
    ticket: Ticket


class Closed(NamedTuple):
    """The kernel is done with an object."""

    object: ObjectId


Event = Opened | Wanted | Closed


class NotReady(Exception):
    """The kernel does not answer for this object's file yet (cachefiles: before copen and some
    milliseconds after it). The first READ says it does; until then ask again later."""


class OutOfSpace(OSError):
    """The cache file system has less free space than the kernel's floor (ENOBUFS or ENOSPC)."""


class Transport(Protocol):
    """One way of the kernel to ask. `drain`, `open_*` and `failed` never block and are called from
    the event loop; `done` does not block either, `write` and `resident` may: all three are called
    from any thread."""

    name: str

    def fileno(self) -> int:
        """The descriptor that becomes readable when `drain` has something to return."""
        ...

    def drain(self) -> list[Event]:
        """Everything the kernel has asked so far, in its order; empty when there is nothing."""
        ...

    def open_ok(self, object: ObjectId, size_bytes: int) -> None:
        """Answer `Opened`. The size is a pure function of the image: another one next time makes
        the kernel drop the whole file."""
        ...

    def open_failed(self, object: ObjectId, errno: int) -> None:
        """Answer `Opened` with an error (a positive errno); the mount fails with it."""
        ...

    def resident(self, object: ObjectId, size_bytes: int) -> list[tuple[int, int]]:
        """Extents [start, end) of the object's file that hold data, ascending.

        Raises NotReady while the kernel cannot say, OSError when the object is gone.
        """
        ...

    def write(self, object: ObjectId, offset: int, memory: memoryview) -> None:
        """Write page-aligned memory at an aligned offset, whole blocks, all of it.

        Raises OutOfSpace, NotReady, or OSError (the object is closed, the disk failed).
        """
        ...

    def done(self, object: ObjectId, ticket: Ticket) -> None:
        """Let the reader look again. A reader that has been killed meanwhile is no error."""
        ...

    def failed(self, object: ObjectId, ticket: Ticket, errno: int) -> None:
        """Let the reader fail. cachefiles has no wire form for it: looking again at a hole is
        EIO."""
        ...

    def close(self) -> None:
        """Close every descriptor. The kernel's cache lives on if somebody else holds its own."""
        ...
