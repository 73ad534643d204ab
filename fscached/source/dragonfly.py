"""Peers in front of a registry: Dragonfly's daemon as registry mirror or as HTTP proxy, and any
other mirror that has the same blobs at the same paths.

Two daemons are in use and both are spoken to at once, since each ignores the other's headers: the
Go dfdaemon (v2.0, v2.1) and the Rust client (v2.2 on). Facts: dragonflyoss/client v1.5.1 and
dragonflyoss/dragonfly v2.0.9, read 2026-08.
"""

from __future__ import annotations

import enum
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from fscached.source import Fault, Giver, Priority, Refusal, SourceError
from fscached.source.health import Watch
from fscached.source.origin import Trust, is_loopback, origin_of
from fscached.source.patience import RETRIED_STATUSES, Busy, retry_after_s
from fscached.source.redirect import Route
from fscached.source.registry import Registry
from fscached.source.request import Pace, Reply, Request

log = logging.getLogger(__name__)

PIECE_BYTES: Final = 4 << 20
"""The Rust client's least piece: what is moved whatever is asked for. Since v1.4.1 a range that is
not longer goes to the origin at once, without a question to other peers."""

BUSY_PAUSE_S: Final = 1.0
"""How long a peer over its rate limit is left alone when it does not say."""

DENIED_S: Final = 60.0
"""How long a blob is not asked of a peer that may not, or cannot, give it."""

# nydusd sends the same. Only the first download of a task heeds it: 6 has a seed peer fetch the
# blob first, 3 this node's peer itself.
_PRIORITY: Final = {
    Priority.DEMAND: {"X-Dragonfly-Priority": "6"},
    Priority.EXPECTED: {"X-Dragonfly-Priority": "3"},
    Priority.PREFETCH: {"X-Dragonfly-Priority": "3"},
}
_DRAGONFLY: Final = {
    # Without a rule that matches, the Rust client passes everything through.
    "X-Dragonfly-Use-P2P": "true",
    # From v1.5.3 on: small ranges, and small blobs, are asked of other peers too.
    "X-Dragonfly-Scheduling-Policy": "always",
    # What a signature adds to an address must not make it another task. The Rust client knows all
    # stores' names for it by itself, and would forget them if X-Dragonfly-Filtered-Query-Params
    # named some.
    "X-Dragonfly-Filter": "Expires&Signature&ns",
}
# One that is shared has the rest of the blob for all who ask. One on this machine would take the
# link that demand needs, and all of an image that nobody prefetches.
_SHARED: Final = {"X-Dragonfly-Prefetch": "true"}
# What an answer has that went through a dfdaemon: the Rust client's, the Go daemon's.
_RUST: Final = ("x-dragonfly-task-id", "x-dragonfly-server-ip")
_GO: Final = ("x-dragonfly-task", "x-dragonfly-peer")
_LINE: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+: [\x20-\x7e]*")
_STEP_BYTES: Final = 1 << 20


class Verdict(enum.Enum):
    """Whose word a refusal is. ORIGINS: the origin's, passed on, and it may pass. DENIED: this
    image cannot be had there. BUSY: the peer wants to be left alone. FAULT: the peer's own."""

    ORIGINS = "origin's"
    DENIED = "denied"
    BUSY = "busy"
    FAULT = "fault"


_DENYING: Final = frozenset({401, 403, 404, 451})
_VERDICTS: Final = {
    # Who says so (X-Dragonfly-Error-Type), whether it denies, is busy (429), or anything else.
    "backend": (Verdict.DENIED, Verdict.ORIGINS, Verdict.ORIGINS),
    "proxy": (Verdict.DENIED, Verdict.BUSY, Verdict.FAULT),
    "dfdaemon": (Verdict.FAULT, Verdict.BUSY, Verdict.FAULT),
    # The Go daemon, and mirrors that are no peers, do not say.
    "": (Verdict.DENIED, Verdict.BUSY, Verdict.FAULT),
}


def verdict(error_type: str, status: int) -> Verdict:
    """Whose fault a refusal is, and so who is asked next."""
    denied, busy, other = _VERDICTS.get(error_type, _VERDICTS[""])
    if status in _DENYING:
        return denied
    return busy if status == 429 else other


def widened(start: int, end: int, size_bytes: int) -> tuple[int, int]:
    """The least range around [start, end) that a Rust client asks other peers for, or that range
    itself if there is none. It ends later, so that what is wanted comes first; where the blob ends,
    or its size is not known (0), it begins earlier."""
    last = max(end, min(start + PIECE_BYTES + 1, size_bytes))
    first = min(start, last - PIECE_BYTES - 1)
    return (first, last) if first >= 0 else (start, end)


def _pieces(start: int, end: int) -> range:
    """The numbers of those that hold [start, end), where pieces are the least there are."""
    return range(start // PIECE_BYTES, -(-end // PIECE_BYTES))


@dataclass(frozen=True, slots=True)
class Way:
    """How one peer is reached. `base` takes the place of the registry's scheme and host, empty:
    they stay; `proxy` is the address of an HTTP proxy. `authorised`: what the registry wants as
    Authorization goes there too. `small_ranges`: it shares them too. A MiB should not take longer
    than `timeout_s`."""

    name: str
    base: str
    proxy: str
    headers: Mapping[str, str]
    authorised: bool
    small_ranges: bool
    timeout_s: float
    lie_pause_s: float


class Peer:
    """A registry's repository, asked of a peer: an `Endpoint` that may be passed over.

    A blob it denies is not asked there for a while. Wrong bytes set it aside for the image, and for
    all images when it gives them of several.
    """

    def __init__(self, registry: Registry, way: Way, watch: Watch, trust: Trust) -> None:
        """Raises SourceError for an address or a header that is none."""
        self.name = way.name
        self._base = way.base or registry.base
        self.origin = origin_of(self._base)
        self._registry = registry
        self._way = way
        self._watch = watch
        self._trust = trust
        self._here = is_loopback(urlsplit(way.name).netloc)
        self._granular = self._here and not way.small_ranges
        self._pieces: dict[str, set[int]] = {}
        """What it has, by blob: forgotten when it fails, for a new one may have none."""
        self._pace = Pace(round(_STEP_BYTES / way.timeout_s), math.ceil(way.timeout_s))
        ours = _DRAGONFLY | {"X-Dragonfly-Registry": registry.base}
        if not self._here:
            ours |= _SHARED
        self._headers = {
            priority: _lines(ours | said, way.headers) for priority, said in _PRIORITY.items()
        }
        self._denied: dict[str, float] = {}
        self._lied_until_s = 0.0

    def url(self, blob_id: str) -> str:
        """See Endpoint."""
        return self._base + self._registry.path(blob_id)

    async def request(self, route: Route, start: int, end: int, priority: Priority) -> Request:
        """See Endpoint."""
        lines = self._headers[priority] if route.origin == self.origin else ()
        if lines and self._way.authorised:
            with _blameless(self._registry.origin):
                lines += await self._registry.authorization()
        trust, proxy = self._trust, self._way.proxy
        return Request(route.url, lines, start, end, priority, trust, proxy, self._pace)

    async def refused(self, request: Request, reply: Reply) -> None:
        """See Endpoint."""
        status, headers = reply.status, reply.headers
        error_type = headers.get("x-dragonfly-error-type", "")
        if status == 401 and self._way.authorised and error_type in ("backend", ""):
            with _blameless(self._registry.origin):
                return await self._registry.refused(request, reply)
        what = f"{self.name} answered {status} ({error_type or 'of its own'})"
        match verdict(error_type, status):
            case Verdict.DENIED:
                raise Refusal(what, Fault.ORIGIN)
            case Verdict.BUSY:
                raise Busy(what, retry_after_s(headers) or BUSY_PAUSE_S, self.origin)
            case Verdict.ORIGINS if status in RETRIED_STATUSES:
                raise Busy(what, retry_after_s(headers), self._registry.origin)
            case Verdict.ORIGINS:
                raise Refusal(what, Fault.ORIGIN)
            case Verdict.FAULT:
                raise SourceError(what, Fault.PEER)

    def extent(self, blob_id: str, start: int, end: int, size_bytes: int) -> tuple[int, int]:
        """The range to ask for when [start, end) is wanted of a blob; `size_bytes` 0: not known.

        One on this machine that is, or may be, a Rust client is asked for one that it shares with
        other peers, unless it has those pieces. Any other would move what nobody wants over the
        network, or keep it apart.
        """
        if not self._granular or self._pieces.get(blob_id, set()).issuperset(_pieces(start, end)):
            return start, end
        return widened(start, end, size_bytes)

    def answered(self, blob_id: str, request: Request, reply: Reply) -> Giver:
        """Who gave the bytes of an answer, as far as it tells. What it is, and what it has from now
        on, shows in the same."""
        headers = reply.headers
        rust = any(name in headers for name in _RUST)
        self._granular = rust and self._here and not self._way.small_ranges
        if self._granular and reply.fault is None:
            got = _pieces(request.start, request.start + reply.fed_bytes)
            self._pieces.setdefault(blob_id, set()).update(got)
        if headers.get("x-dragonfly-task-download-finished") == "true":
            return Giver.LOCAL_PEER if self._here else Giver.REMOTE_PEER
        if rust or any(name in headers for name in _GO):
            return Giver.PEER
        return Giver.MIRROR

    def admit(self, blob_id: str, now_s: float) -> bool:
        """Whether a read may go there now; if so, one of the next three must follow."""
        if now_s < max(self._lied_until_s, self._denied.get(blob_id, 0.0)):
            return False
        return self._watch.admit(now_s)

    def served(self) -> None:
        """A read got its bytes."""
        self._watch.served()

    def left(self) -> None:
        """A read was cancelled, which says nothing of the peer."""
        self._watch.left()

    def failed(self, blob_id: str, error: SourceError, now_s: float) -> None:
        """A read did not get its bytes: they are asked of somebody else."""
        match error:
            case Busy() if error.origin == self.origin:
                self._watch.busy(now_s + error.retry_after_s)
            case Busy():
                self._watch.left()
            case _ if isinstance(error, Refusal) or error.fault in (Fault.ORIGIN, Fault.AUTH):
                self._denied[blob_id] = now_s + DENIED_S
                self._watch.left()
                log.info("peer %s: blob %s is read elsewhere: %s", self.name, blob_id[:12], error)
            case _:
                self._pieces.clear()
                self._watch.failed(now_s, str(error))

    def lied(self, now_s: float) -> None:
        """Bytes it gave were not what the image says they are."""
        self._lied_until_s = now_s + self._way.lie_pause_s
        self._watch.lied(self._registry.name, now_s)
        log.error(
            "peer %s gave wrong bytes of %s: it is not asked for this image for %g s",
            self.name,
            self._registry.name,
            self._way.lie_pause_s,
        )


@contextmanager
def _blameless(registry: str) -> Iterator[None]:
    """A token that cannot be had now is no fault of a peer's."""
    try:
        yield
    except SourceError as error:
        if error.fault is Fault.AUTH:
            raise
        raise Busy(str(error), 0.0, registry) from None


def _lines(ours: Mapping[str, str], configured: Mapping[str, str]) -> tuple[str, ...]:
    """Whole header lines; what is configured takes the place of what we would say."""
    names = {name.lower() for name in configured}
    said = {name: value for name, value in ours.items() if name.lower() not in names}
    lines = tuple(f"{name}: {value}" for name, value in (*said.items(), *configured.items()))
    for line in lines:
        if not _LINE.fullmatch(line):
            name = line.partition(":")[0]
            raise SourceError(f"header {name[:64]!r} of a peer cannot be sent", Fault.LOCAL)
    return lines
