"""Blobs at the far end of a network: ranged reads that go on until all bytes are there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fscached.source import Answer, Fault, Priority, SourceError
from fscached.source.endpoint import UNAUTHORISED_STATUSES, Endpoint, refusal
from fscached.source.origin import Traffic, origin_of
from fscached.source.patience import Busy, Patience
from fscached.source.redirect import REDIRECT_STATUSES, STALE_STATUSES, Route, Routes, follow
from fscached.source.transfer import Reply, Request, Transfers

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
    """One read on its way."""

    blob_id: str
    url: str
    position: int
    end: int
    priority: Priority
    reader: Callable[[memoryview], None]
    deadline: asyncio.Timeout
    deadline_s: float
    step_bytes: int = 0
    spent: Traffic = field(default_factory=Traffic)
    failures: int = 0
    refusals: int = 0
    stale_routes: int = 0
    last: SourceError | None = None

    def feed(self, memory: memoryview) -> None:
        """Hand on what came; the next step may take as long as this one."""
        self.step_bytes += len(memory)
        if self.step_bytes >= _STEP_BYTES and not self.deadline.expired():
            self.step_bytes = 0
            self.deadline.reschedule(asyncio.get_running_loop().time() + self.deadline_s)
        self.reader(memory)


class Remote:
    """The blobs of one endpoint. `redirect_limit_s` is how long the target of a redirect is used
    at most, whatever its signature promises.

    `traffic` counts requests for blobs, not those for tokens (see Tokens); it may be shared.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        transfers: Transfers,
        patience: Patience,
        redirect_limit_s: float = 300.0,
        traffic: Traffic | None = None,
    ) -> None:
        self.name = endpoint.name
        self.traffic = traffic if traffic is not None else Traffic()
        self._endpoint = endpoint
        self._transfers = transfers
        self._patience = patience
        self._redirect_limit_s = redirect_limit_s
        self._routes = Routes()

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
        url = self._endpoint.url(blob_id)
        loop = asyncio.get_running_loop()
        began = loop.time()
        deadline = asyncio.timeout(deadline_s)
        read = _Read(blob_id, url, start, end, priority, feed, deadline, deadline_s)
        try:
            async with deadline:
                await self._persist(read)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise self._late(read, deadline_s) from None
        finally:
            self.traffic.add(read.spent)
        spent = read.spent
        return Answer(self.name, spent.requests, spent.received_bytes, loop.time() - began)

    async def close(self) -> None:
        """Nothing is this source's alone: connections are the Transfers'."""

    async def _persist(self, read: _Read) -> None:
        """Go on until all bytes are there or there is no hope."""
        loop = asyncio.get_running_loop()
        while read.position < read.end:
            try:
                route = self._routes.get(read.blob_id, loop.time())
                if route is not None:
                    await self._attempt(read, route)
                elif await self._routes.lead(read.blob_id):
                    await self._scout(read)
            except SourceError as error:
                await asyncio.sleep(self._weigh(read, error))

    async def _scout(self, read: _Read) -> None:
        """Ask the endpoint, go where it sends us, and let others know as soon as bytes come."""
        try:
            route: Route | None = Route(read.url, origin_of(read.url), 0, float("inf"))
            while route is not None:
                route = await self._attempt(read, route, scouting=True)
        finally:
            self._routes.settle(read.blob_id)

    async def _attempt(self, read: _Read, route: Route, *, scouting: bool = False) -> Route | None:
        """Send one request; returns where else to go if that is the answer.

        Raises SourceError, whose text is the bare reason.
        """
        request = await self._endpoint.request(route, read.position, read.end, read.priority)

        def accepted() -> None:
            self._routes.learn(read.blob_id, route)
            self._routes.settle(read.blob_id)

        reply = await self._transfers.get(
            request, read.feed, read.spent, accepted if scouting else None
        )
        read.position += reply.fed_bytes
        if reply.fed_bytes:
            read.failures = 0
        if reply.fault is None and reply.status in (200, 206):
            return None
        return await self._respond(read, route, request, reply)

    async def _respond(
        self, read: _Read, route: Route, request: Request, reply: Reply
    ) -> Route | None:
        """What to do about an answer that did not bring all bytes."""
        status, ours = reply.status, route.origin == self._endpoint.origin
        if reply.fault is not None:
            self._routes.forget(read.blob_id, route)
            raise SourceError(f"{route.origin}: {reply.reason}", reply.fault)
        if status in REDIRECT_STATUSES and "location" in reply.headers:
            self._routes.forget(read.blob_id, route)
            now = asyncio.get_running_loop().time()
            return follow(route, reply.headers["location"], self._redirect_limit_s, now)
        if status in STALE_STATUSES and not ours and not read.stale_routes:
            read.stale_routes += 1
            self._routes.forget(read.blob_id, route)
            return None
        try:
            if not ours:
                raise refusal(route.origin, reply)
            await self._refused(read, request, reply)
        except Busy as busy:
            self._transfers.rest(route.origin, busy.retry_after_s)
            raise
        return None

    async def _refused(self, read: _Read, request: Request, reply: Reply) -> None:
        if read.refusals == _REFUSALS_LIMIT and reply.status in UNAUTHORISED_STATUSES:
            raise SourceError(f"{self._endpoint.origin} answered {reply.status} again", Fault.AUTH)
        await self._endpoint.refused(request, reply)
        read.refusals += 1

    def _weigh(self, read: _Read, error: SourceError) -> float:
        """Seconds until the next try. Raises what the reader gets when there is none."""
        read.last = error
        read.failures += 1
        pause_s = self._patience.pause_after(error, read.failures)
        if pause_s is None:
            raise self._error(read, str(error), error.fault) from None
        return pause_s

    def _late(self, read: _Read, deadline_s: float) -> SourceError:
        what = f"not there within {deadline_s:g} s"
        if read.last is None:
            return self._error(read, what, Fault.DEADLINE)
        return self._error(read, f"{what}, at last because {read.last}", read.last.fault)

    def _error(self, read: _Read, what: str, fault: Fault) -> SourceError:
        where = f"{self.name}: blob {read.blob_id[:12]}, bytes {read.position}-{read.end}"
        remedy = _REMEDIES.get(fault, "see the text before this")
        return SourceError(f"{where}: {what} ({read.spent.requests} requests): {remedy}", fault)
