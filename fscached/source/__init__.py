"""3 · Where bytes come from: one file per kind of source, and how to be let in.

What belongs here: ranged reads of remote blobs and everything on the way to them (auth, redirects,
retries, whose fault an error is). What does not: chunks, digests, cache files. Called by
`fscached.fill` (ranges) and `fscached.store` (manifests).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable


class Priority(enum.IntEnum):
    """Demand is a reader that waits in the kernel. What is expected will be demand in a moment, and
    comes beside it; prefetch gives way to demand."""

    DEMAND = 0
    EXPECTED = 1
    PREFETCH = 2


class Fault(enum.Enum):
    """Whose fault a failed read is: it decides whether to try again, and where."""

    NETWORK = "network"
    ORIGIN = "origin"
    PEER = "peer"
    AUTH = "auth"
    PROTOCOL = "protocol"
    LOCAL = "local"
    DEADLINE = "deadline"


_AWAY = frozenset({Fault.NETWORK, Fault.ORIGIN, Fault.PEER, Fault.DEADLINE})


class SourceError(Exception):
    """A read that did not bring its bytes: what was asked of whom, and whose fault it is.

    The text never holds a credential, nor the query of a redirect's target.
    """

    def __init__(self, message: str, fault: Fault) -> None:
        super().__init__(message)
        self.fault = fault

    @property
    def away(self) -> bool:
        """Whether nobody who has the bytes could be reached, so that they may come later."""
        return self.fault in _AWAY


class Refusal(SourceError):
    """The origin's answer, which another try will not change."""

    @property
    def away(self) -> bool:
        return False


class Giver(enum.StrEnum):
    """Who gave bytes, as far as the answer tells."""

    LOCAL_PEER = "local_peer"
    """A peer on this machine that had the whole blob when it was asked."""
    REMOTE_PEER = "remote_peer"
    """As much, on another machine."""
    PEER = "peer"
    """A peer that may have had them, or asked another peer or the origin: it does not say."""
    MIRROR = "mirror"
    """A mirror that is no peer."""
    ORIGIN = "origin"


class Answer(NamedTuple):
    """Who answered a read and what it cost. `requests` counts every HTTP request sent for it,
    retries and refused ones too; `received_bytes` every body byte, useful or not; `given` the
    useful ones by who gave them."""

    source: str
    requests: int
    received_bytes: int
    seconds: float
    given: Mapping[Giver, int] = MappingProxyType({})


class Source(Protocol):
    """Remote bytes of blobs."""

    name: str

    async def read(
        self,
        blob_id: str,
        start: int,
        end: int,
        priority: Priority,
        feed: Callable[[memoryview], None],
        deadline_s: float,
    ) -> Answer:
        """Bring bytes [start, end) of a blob, in order and each exactly once, to `feed`.

        `feed` is called from the event loop as bytes arrive and must not keep the memory. A
        transfer that breaks goes on where it stopped. `deadline_s` is a duration in seconds for
        every MiB, retries included: a long range on a slow link may take a multiple of it. A
        reader's own deadline is the caller's. Cancelling ends the transfer at once.

        Raises SourceError.
        """
        ...

    def distrust(self, blob_id: str, start: int, end: int) -> bool:
        """Bytes [start, end) that it brought are not the blob's. True: who gave them is set aside,
        and the next read of them asks somebody else."""
        ...

    async def close(self) -> None:
        """End what is under way and close all connections."""
        ...


@runtime_checkable
class LocalSource(Source, Protocol):
    """A source whose bytes are on this machine: a worker reads them where it writes them."""

    def read_now(self, blob_id: str, start: int, end: int, into: memoryview) -> int:
        """Fill `into` with bytes [start, end); their number. May block for as long as a disk
        does, and is called from worker threads. Raises SourceError."""
        ...
