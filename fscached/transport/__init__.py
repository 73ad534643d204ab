"""1 · The kernel asks: one file per way the kernel has of asking for bytes.

What belongs here: system calls on the kernel's own file descriptors, and nothing that decides.
What does not: event loops, chunks, sources. Called by `fscached.daemon` and `fscached.fill`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, NewType, Protocol, runtime_checkable

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
    """An object is open and waits for `open_ok` or `open_failed`."""

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


class CacheFile(NamedTuple):
    """A file of the cache on the disk."""

    key: ObjectKey
    path: str
    size_bytes: int
    allocated_bytes: int
    """What it takes of the disk: its holes take nothing."""
    used_s: float
    """When it was used last, in seconds since 1970: its atime, the one place where that is kept."""


class NotReady(Exception):
    """The kernel does not answer for this object's file yet (cachefiles: before copen and some
    milliseconds after it). The first READ says it does; until then ask again later."""


class OutOfSpace(OSError):
    """The cache file system has less free space than the kernel's floor (ENOBUFS or ENOSPC)."""


class Files(Protocol):
    """The cache files of one transport. All of it blocks, and is called from one thread."""

    def path(self, key: ObjectKey) -> str:
        """Where an object's file is, if it has one. Raises OSError for impossible names."""
        ...

    def listed(self) -> Iterator[CacheFile]:
        """All that have a name. Raises OSError."""
        ...

    def found(self, cookie: str) -> list[CacheFile]:
        """Those of one cookie, in whatever volume. Raises OSError."""
        ...

    def touch(self, key: ObjectKey, used_s: float) -> None:
        """Say when a file was used last; nothing where it has no name. Raises OSError."""
        ...

    def cull(self, key: ObjectKey) -> bool:
        """Delete a file; one that is not there is gone already. False: somebody has it in use.

        Raises OSError.
        """
        ...

    def tidy(self, volume: str) -> None:
        """Take away what a volume without files leaves behind. Raises OSError."""
        ...


class Held(NamedTuple):
    """A READ of bytes that were in the file, and how long its reader waited for the answer."""

    object: ObjectId
    start: int
    end: int
    seconds: float


@runtime_checkable
class Attending(Protocol):
    """A transport whose kernel asks about resident bytes as well, and which answers that itself."""

    def attend(self) -> Iterator[Event]:
        """What else the kernel asks, as `Transport.drain`, until `dismiss`. Waits for it: for a
        thread of its own, in which nothing else is drained meanwhile.

        Raises OSError; call it again.
        """
        ...

    def dismiss(self) -> None:
        """End `attend`, from the event loop."""
        ...

    def told_fileno(self) -> int:
        """The descriptor that becomes readable when `told` has something to return."""
        ...

    def told(self) -> Iterator[Held]:
        """What was answered."""
        ...


class Transport(Protocol):
    """One way of the kernel to ask. Unless something else is said, nothing blocks and all is called
    from the event loop; `done` does not block either, `write` and `resident` may: all three are
    called from any thread."""

    name: str

    needs_holder: bool
    """Whether readers get wrong bytes, not errors, when nobody holds `holdings` any more."""

    @property
    def files(self) -> Files:
        """What lies on the disk."""
        ...

    @property
    def holdings(self) -> dict[str, int]:
        """Descriptors that must outlive this process, by the name a successor finds them under."""
        ...

    def take_over(self) -> None:
        """Go on where a predecessor stopped, all of whose descriptors are closed by now; every
        object it had was offered again. What it left unanswered comes out of `drain`.

        Raises OSError when the kernel cannot do that.
        """
        ...

    def device(self, key: ObjectKey) -> str | None:
        """The file to mount for an object; None where the kernel asks by the object's name."""
        ...

    def offer(self, key: ObjectKey, size_bytes: int) -> list[Event]:
        """Make a blob ready to be mounted; the events that follow at once. Nothing to do where
        the kernel says itself what it opens. Called from any thread.

        Raises OutOfSpace, OSError.
        """
        ...

    def withdraw(self, object: ObjectId) -> list[Event]:
        """Nobody will mount the object again: `Closed` if the kernel has let go of it, else
        nothing; ask again later. Nothing, too, where the kernel says itself what it closes."""
        ...

    def complete(self, object: ObjectId) -> None:
        """All of the object's chunks are in its file: readers need not ask any more."""
        ...

    def fileno(self) -> int:
        """The descriptor that becomes readable when `drain` has something to return."""
        ...

    def drain(self) -> Iterable[Event]:
        """Everything the kernel has asked so far, in its order; empty when there is nothing. To be
        acted upon as it comes: the next event may be read only then."""
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

    def discard(self, object: ObjectId, start: int, end: int) -> bool:
        """Make whole blocks [start, end) a hole, so that readers ask for them. False: not possible
        here, they stay as they are until they are written anew.

        Raises OSError.
        """
        ...

    def done(self, object: ObjectId, ticket: Ticket) -> None:
        """Let the reader look again. A reader that has been killed meanwhile is no error."""
        ...

    def failed(self, object: ObjectId, ticket: Ticket, errno: int) -> None:
        """Let the reader fail. cachefiles has no wire form for it: looking again at a hole is
        EIO."""
        ...

    def relinquish(self) -> bool:
        """Close what a successor needs closed before it takes over; whether all of that is closed
        now: workers may be inside a call on it, ask again. Nothing is drained or answered after."""
        ...

    def close(self) -> None:
        """Close every descriptor. The kernel's cache lives on if somebody else holds its own."""
        ...
