"""A repository of an OCI registry, its blobs read by range (distribution spec, pulling blobs)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fscached.source import Answer, Fault, Priority, SourceError
from fscached.source.auth import Authorization, Keychain, Secret, Tokens
from fscached.source.origin import Traffic, Trust, origin_of
from fscached.source.patience import RETRIED_STATUSES, Busy, Patience, Refusal, retry_after_s
from fscached.source.redirect import REDIRECT_STATUSES, STALE_STATUSES, Route, Routes, follow
from fscached.source.reference import REPOSITORY
from fscached.source.transfer import Reply, Request, Transfers

_BLOB_ID: Final = re.compile(r"[0-9a-f]{64}")
# What must come within each deadline (see Source.read).
_STEP_BYTES: Final = 1 << 20
# One refusal for a token that ended, one for what the registry then asks for.
_REFUSALS_LIMIT: Final = 2
_REMEDIES: Final = {
    Fault.NETWORK: "check that the registry can be reached from this node",
    Fault.ORIGIN: "see the registry's log",
    Fault.AUTH: "check the credential and its rights to this repository",
    Fault.PROTOCOL: "check what stands between this node and the registry",
    Fault.DEADLINE: "the link or the registry is too slow for this deadline",
}


@dataclass(slots=True)
class _Read:
    """One read on its way."""

    blob_id: str
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


class Registry:
    """One repository. `host` is `host[:port]`, `scheme` https or http; `redirect_limit_s` is how
    long the target of a redirect is used at most, whatever its signature promises.

    `traffic` counts requests for blobs, not those for tokens (see Tokens); it may be shared.
    """

    def __init__(
        self,
        host: str,
        repository: str,
        *,
        scheme: str,
        transfers: Transfers,
        tokens: Tokens,
        keychain: Keychain,
        trust: Trust,
        patience: Patience,
        redirect_limit_s: float = 300.0,
        traffic: Traffic | None = None,
    ) -> None:
        """Raises SourceError (LOCAL) for names that are none."""
        if not REPOSITORY.fullmatch(repository):
            raise SourceError(f"{repository[:255]!r} is no name of a repository", Fault.LOCAL)
        self.name = f"{host}/{repository}"
        self.traffic = traffic if traffic is not None else Traffic()
        self._origin = origin_of(f"{scheme}://{host}")
        self._blobs = f"{scheme}://{host}/v2/{repository}/blobs/sha256:"
        self._transfers = transfers
        self._trust = trust
        self._patience = patience
        self._redirect_limit_s = redirect_limit_s
        self._routes = Routes()
        self._authorization = Authorization(
            self._origin, host, f"repository:{repository}:pull", keychain, tokens
        )

    async def read(
        self,
        blob_id: str,
        start: int,
        end: int,
        priority: Priority,
        feed: Callable[[memoryview], None],
        deadline_s: float,
    ) -> Answer:
        """See Source. `blob_id` is the sha256 of the blob, 64 hex digits."""
        if not _BLOB_ID.fullmatch(blob_id):
            raise SourceError(f"{blob_id[:64]!r} is no sha256 of a blob", Fault.PROTOCOL)
        loop = asyncio.get_running_loop()
        began = loop.time()
        deadline = asyncio.timeout(deadline_s)
        read = _Read(blob_id, start, end, priority, feed, deadline, deadline_s)
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
        """Nothing is this repository's alone: connections are the Transfers'."""

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
        """Ask the registry, go where it sends us, and let others know as soon as bytes come."""
        try:
            route: Route | None = Route(self._blobs + read.blob_id, self._origin, 0, float("inf"))
            while route is not None:
                route = await self._attempt(read, route, scouting=True)
        finally:
            self._routes.settle(read.blob_id)

    async def _attempt(self, read: _Read, route: Route, *, scouting: bool = False) -> Route | None:
        """Send one request; returns where else to go if that is the answer.

        Raises SourceError, whose text is the bare reason.
        """
        sent: Secret | None = None
        headers: tuple[str, ...] = ()
        if route.origin == self._origin:
            sent = await self._authorization.header()
            if sent is not None:
                headers = (f"Authorization: {sent.reveal()}",)
        request = Request(route.url, headers, read.position, read.end, read.priority, self._trust)

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
        return await self._respond(read, route, reply, sent)

    async def _respond(
        self, read: _Read, route: Route, reply: Reply, sent: Secret | None
    ) -> Route | None:
        """What to do about an answer that did not bring all bytes: the table of 4xx and 5xx."""
        status, ours = reply.status, route.origin == self._origin
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
        elif status in (401, 403) and ours:
            await self._refused(read, reply, sent)
        elif status in RETRIED_STATUSES:
            wait_s = retry_after_s(reply.headers)
            self._transfers.rest(route.origin, wait_s)
            raise Busy(f"{route.origin} answered {status}", wait_s)
        else:
            raise Refusal(f"{route.origin} answered {status}", Fault.ORIGIN)
        return None

    async def _refused(self, read: _Read, reply: Reply, sent: Secret | None) -> None:
        read.refusals += 1
        challenge = reply.headers.get("www-authenticate", "")
        if read.refusals > _REFUSALS_LIMIT:
            raise SourceError(f"{self._origin} answered {reply.status} again", Fault.AUTH)
        await self._authorization.refused(challenge, sent)

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
