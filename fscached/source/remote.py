"""Blobs at the far end of a network: ranged reads that go on until all bytes are there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from fscached.source import Answer, Fault, Giver, Priority, Refusal, SourceError
from fscached.source.dragonfly import Peer
from fscached.source.endpoint import UNAUTHORISED_STATUSES, Endpoint, refusal
from fscached.source.origin import Traffic, origin_of
from fscached.source.patience import Busy, Patience
from fscached.source.redirect import REDIRECT_STATUSES, STALE_STATUSES, Route, Routes, follow
from fscached.source.request import Reply, Request
from fscached.source.trail import Trail, Trails
from fscached.source.transfer import Transfers

# What must come within each deadline (see Source.read).
_STEP_BYTES: Final = 1 << 20
# One refusal for a token that ended, one for what the server then asks for.
_REFUSALS_LIMIT: Final = 2
_REMEDIES: Final = {
    Fault.NETWORK: "check that the server can be reached from this node",
    Fault.ORIGIN: "see the server's log",
    Fault.AUTH: "check the credential and its rights",
    Fault.PROTOCOL: "check what stands between this node and the server",
    Fault.DEADLINE: "the link or the server is too slow for this deadline",
}


@dataclass(slots=True)
class _Read:
    """One read on its way. `asked` are the peers that had their turn since the origin had its;
    `origin` is who was asked last; `surplus` is how much of an answer comes before what is
    wanted."""

    trail: Trail[Endpoint]
    end: int
    priority: Priority
    reader: Callable[[memoryview], None]
    deadline: asyncio.Timeout
    deadline_s: float
    ended_s: float = 0.0
    origin: str = ""
    surplus: int = 0
    step_bytes: int = 0
    spent: Traffic = field(default_factory=Traffic)
    asked: set[Peer] = field(default_factory=set)
    failures: int = 0
    refusals: int = 0
    stale_routes: int = 0
    last: SourceError | None = None

    @property
    def missing(self) -> bool:
        """Whether there are bytes that have not come."""
        return self.trail.position < self.end

    def feed(self, memory: memoryview) -> None:
        """Hand on what came and is wanted; the next step may take as long as this one."""
        trail = self.trail
        left = self.end - trail.position
        if self.surplus or len(memory) > left:
            before = min(self.surplus, len(memory))
            self.surplus -= before
            memory = memory[before : before + left]
            if not memory:
                return
        size = len(memory)
        trail.position += size
        self.step_bytes += size
        if size == left or self.step_bytes >= _STEP_BYTES:
            self._go_on()
        self.reader(memory)

    def _go_on(self) -> None:
        if self.deadline.expired():
            return
        now_s = asyncio.get_running_loop().time()
        if not self.missing:
            self.ended_s = now_s
            self.deadline.reschedule(None)
        else:
            self.step_bytes = 0
            self.deadline.reschedule(now_s + self.deadline_s)


class Remote:
    """The blobs of one endpoint, the origin, with `peers` that are asked before it.

    Each read asks the peers in order, those that may be asked, each for all that is still missing;
    then the origin; and after a pause, as `patience` says, all of them again. `redirect_limit_s` is
    how long the target of a redirect is used at most, whatever its signature promises. `sizes` of
    blobs, where they are known, let peers be asked for more than is wanted.

    `traffic` counts requests for blobs, not those for tokens (see Tokens); it may be shared.
    """

    def __init__(
        self,
        origin: Endpoint,
        peers: Sequence[Peer] = (),
        *,
        transfers: Transfers,
        patience: Patience,
        redirect_limit_s: float = 300.0,
        traffic: Traffic | None = None,
        sizes: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.name = origin.name
        self.traffic = traffic if traffic is not None else Traffic()
        self._origin = origin
        self._peers = tuple(peers)
        self._transfers = transfers
        self._respites = transfers.respites
        self._patience = patience
        self._redirect_limit_s = redirect_limit_s
        self._sizes = sizes
        self._routes = Routes()
        self._trails: Trails[Endpoint] = Trails()

    async def read(
        self,
        blob_id: str,
        start: int,
        end: int,
        priority: Priority,
        feed: Callable[[memoryview], None],
        deadline_s: float,
    ) -> Answer:
        """See Source."""
        self._origin.url(blob_id)
        loop = asyncio.get_running_loop()
        began = loop.time()
        deadline = asyncio.timeout(deadline_s)
        trail = self._trails.begin(blob_id, start)
        read = _Read(trail, end, priority, feed, deadline, deadline_s)
        try:
            async with deadline:
                await self._persist(read)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise self._late(read, deadline_s) from None
        finally:
            self.traffic.add(read.spent)
        spent, name = read.spent, trail.steps[-1][1].name
        seconds = read.ended_s - began
        return Answer(name, spent.requests, spent.received_bytes, seconds, spent.given)

    def distrust(self, blob_id: str, start: int, end: int) -> bool:
        """See Source."""
        now_s = asyncio.get_running_loop().time()
        givers = self._trails.givers(blob_id, start, end)
        liars = [peer for peer in self._peers if peer in givers]
        for peer in liars:
            peer.lied(now_s)
        return bool(liars)

    async def close(self) -> None:
        """Nothing is this source's alone: connections are the Transfers'."""

    async def _persist(self, read: _Read) -> None:
        """Go on until all bytes are there or there is no hope."""
        while read.missing:
            peer = self._next_peer(read)
            if peer is not None:
                await self._consult(read, peer)
                continue
            try:
                await self._ask_origin(read)
            except SourceError as error:
                if not read.missing:
                    return
                if isinstance(error, Busy):
                    self._respites.grant(error.origin, error.retry_after_s)
                read.asked.clear()
                await asyncio.sleep(self._weigh(read, error))
                await self._respites.again(read.origin)

    def _next_peer(self, read: _Read) -> Peer | None:
        """The first that may be asked and was not."""
        if len(read.asked) == len(self._peers):
            return None
        now_s = asyncio.get_running_loop().time()
        for peer in self._peers:
            if peer not in read.asked and peer.admit(read.trail.blob_id, now_s):
                return peer
        return None

    async def _consult(self, read: _Read, peer: Peer) -> None:
        """Ask a peer for all that is missing. Whatever comes of it, others are asked next."""
        blob_id = read.trail.blob_id
        read.asked.add(peer)
        try:
            while read.missing:
                route: Route | None = _begin(peer, blob_id)
                while route is not None:
                    route = await self._attempt(read, peer, route)
        except SourceError as error:
            if not read.missing:  # only of the surplus
                peer.served()
                return
            read.last = error
            peer.failed(blob_id, error, asyncio.get_running_loop().time())
            if isinstance(error, Busy) and error.origin != peer.origin:
                self._respites.grant(error.origin, error.retry_after_s)
        except BaseException:
            peer.left()
            raise
        else:
            peer.served()

    async def _ask_origin(self, read: _Read) -> None:
        """Send one request where the blob is known to be, or find out where that is."""
        blob_id = read.trail.blob_id
        route = self._routes.get(blob_id, asyncio.get_running_loop().time())
        if route is not None:
            await self._attempt(read, self._origin, route)
        elif await self._routes.lead(blob_id):
            await self._scout(read)

    async def _scout(self, read: _Read) -> None:
        """Go where the origin sends us, and let others know as soon as bytes come."""
        blob_id = read.trail.blob_id
        try:
            route: Route | None = _begin(self._origin, blob_id)
            while route is not None:
                route = await self._attempt(read, self._origin, route, scouting=True)
        finally:
            self._routes.settle(blob_id)

    async def _attempt(
        self, read: _Read, endpoint: Endpoint, route: Route, *, scouting: bool = False
    ) -> Route | None:
        """Send one request; returns where else to go if that is the answer.

        Raises SourceError, whose text is the bare reason.
        """
        trail = read.trail
        trail.step(endpoint)
        read.origin = route.origin
        began, start, end = trail.position, trail.position, read.end
        if isinstance(endpoint, Peer):
            size_bytes = self._sizes.get(trail.blob_id, 0)
            start, end = endpoint.extent(trail.blob_id, start, end, size_bytes)
        read.surplus = began - start
        request = await endpoint.request(route, start, end, read.priority)

        def accepted() -> None:
            self._routes.learn(trail.blob_id, route)
            self._routes.settle(trail.blob_id)

        reply = await self._transfers.get(
            request, read.feed, read.spent, accepted if scouting else None
        )
        if brought := trail.position - began:
            read.failures = read.refusals = read.stale_routes = 0
            self._respites.answered(route.origin)
            giver = Giver.ORIGIN
            if isinstance(endpoint, Peer):
                giver = endpoint.answered(trail.blob_id, request, reply)
            read.spent.given[giver] += brought
        if reply.fault is None and reply.status in (200, 206):
            return None
        return await self._respond(read, endpoint, route, request, reply)

    async def _respond(
        self, read: _Read, endpoint: Endpoint, route: Route, request: Request, reply: Reply
    ) -> Route | None:
        """What to do about an answer that did not bring all bytes."""
        status, ours = reply.status, route.origin == endpoint.origin
        if reply.fault is not None:
            self._routes.forget(read.trail.blob_id, route)
            raise SourceError(f"{route.origin}: {reply.reason}", reply.fault)
        if status in REDIRECT_STATUSES and "location" in reply.headers:
            self._routes.forget(read.trail.blob_id, route)
            now = asyncio.get_running_loop().time()
            return follow(route, reply.headers["location"], self._redirect_limit_s, now)
        if status in STALE_STATUSES and not ours and not read.stale_routes:
            read.stale_routes += 1
            self._routes.forget(read.trail.blob_id, route)
        elif not ours:
            raise refusal(route.origin, reply)
        elif read.refusals == _REFUSALS_LIMIT and status in UNAUTHORISED_STATUSES:
            raise SourceError(f"{endpoint.origin} answered {status} again", Fault.AUTH)
        else:
            await endpoint.refused(request, reply)
            read.refusals += 1
        return None

    def _weigh(self, read: _Read, error: SourceError) -> float:
        """Seconds until the next try. Raises what the reader gets when there is none."""
        read.last = error
        read.failures += 1
        pause_s = self._patience.pause_after(error, read.failures)
        if pause_s is None:
            kind = Refusal if isinstance(error, Refusal) else SourceError
            raise self._error(read, str(error), error.fault, kind) from None
        return pause_s

    def _late(self, read: _Read, deadline_s: float) -> SourceError:
        what = f"not there within {deadline_s:g} s"
        if read.last is None:
            return self._error(read, what, Fault.DEADLINE)
        return self._error(read, f"{what}, at last because {read.last}", read.last.fault)

    def _error(
        self, read: _Read, what: str, fault: Fault, kind: type[SourceError] = SourceError
    ) -> SourceError:
        where = (
            f"{self.name}: blob {read.trail.blob_id[:12]}, bytes {read.trail.position}-{read.end}"
        )
        remedy = _REMEDIES.get(fault, "see the text before this")
        return kind(f"{where}: {what} ({read.spent.requests} requests): {remedy}", fault)


def _begin(endpoint: Endpoint, blob_id: str) -> Route:
    url = endpoint.url(blob_id)
    return Route(url, origin_of(url), 0, float("inf"))
