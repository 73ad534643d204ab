"""All data connections: ranged GETs at the speed of curl; prefetch gives way to demand.

Redirects, 401s and retries are the caller's: here one request gets one reply.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

import pycurl

from fscached.source import Fault, Priority, SourceError
from fscached.source.lane import OPTIONS, STALL_CHECKS, Lane, Transfer
from fscached.source.link import Link
from fscached.source.origin import Traffic
from fscached.source.outlet import Outlet
from fscached.source.request import Reply, Request
from fscached.source.respite import Respites
from fscached.source.window import Window

# No connection gets on with less: some segments and their acknowledgements.
_WINDOW_LEAST_BYTES: Final = 16 << 10


class Transfers:
    """All data connections of the daemon. Make it where the event loop runs.

    A transfer without a byte for `stall_timeout_s` (found up to a quarter later) has broken. As
    long as demand is under way, and for `prefetch_quiet_s` after, prefetch stands still, unless the
    link is known to be fast (`Link`): then it goes on beside demand, else constant demand would
    leave it nothing. What is expected goes on beside demand on any link, on as many connections of
    its own. What either has under way on the link is what fills it (`Window`), all its connections
    together from `prefetch_window_bytes` up to `prefetch_window_limit_bytes`.
    """

    def __init__(
        self,
        *,
        demand_connections: int = 16,
        prefetch_connections: int = 2,
        connect_timeout_s: float = 5.0,
        stall_timeout_s: float = 10.0,
        prefetch_quiet_s: float = 0.02,
        prefetch_window_bytes: int = 128 << 10,
        prefetch_window_limit_bytes: int = 8 << 20,
        outlet: Outlet | None = None,
        respites: Respites | None = None,
        link: Link | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        options = OPTIONS | {pycurl.CONNECTTIMEOUT_MS: round(connect_timeout_s * 1000)}
        limits = [
            max(size_bytes // prefetch_connections, _WINDOW_LEAST_BYTES)
            for size_bytes in (prefetch_window_bytes, prefetch_window_limit_bytes)
        ]
        outlet = outlet or Outlet()
        self._demand = Lane(demand_connections, options, outlet)
        window = partial(Window, *limits)
        self._expected = Lane(prefetch_connections, options, outlet, window)
        self._prefetch = Lane(prefetch_connections, options, outlet, window)
        self._stall_timeout_s = stall_timeout_s
        self._stall_timer: asyncio.TimerHandle | None = None
        self._quiet_s = prefetch_quiet_s
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._quiet_timer: asyncio.TimerHandle | None = None
        self._demand_ended_at = 0.0
        self._demanding = 0
        self._link = link or Link()
        self.respites = respites or Respites()
        self._closed = False

    async def get(
        self,
        request: Request,
        feed: Callable[[memoryview], None],
        traffic: Traffic,
        accepted: Callable[[], None] | None = None,
    ) -> Reply:
        """Send one request and hand the bytes of a good answer to `feed` as they come.

        `accepted` is called once before the first of them. What was spent is added to `traffic`
        also when it is cancelled. Raises what `feed` raises, and SourceError once closed.
        """
        await self.respites.over(request.url)
        if request.priority is Priority.DEMAND:
            self._begin_demand()
            try:
                async with self._demand.slots:
                    began_s = self._loop.time()
                    reply = await self._run(self._demand, request, feed, traffic, accepted)
                    self._link.brought(reply.fed_bytes, self._loop.time() - began_s)
                    return reply
            finally:
                self._end_demand()
        if request.priority is Priority.EXPECTED:
            async with self._expected.slots:
                return await self._run(self._expected, request, feed, traffic, accepted)
        async with self._prefetch.slots:
            while self._prefetch.held:
                await self._quiet.wait()
            return await self._run(self._prefetch, request, feed, traffic, accepted)

    @property
    def readers_alone(self) -> bool:
        """Whether prefetch stands still because of readers."""
        return self._prefetch.held

    async def close(self) -> None:
        """End what is under way and close all connections."""
        self._closed = True
        for timer in (self._stall_timer, self._quiet_timer):
            if timer is not None:
                timer.cancel()
        self._prefetch.held = False
        self._quiet.set()
        for lane in self._lanes:
            lane.close()

    async def _run(
        self,
        lane: Lane,
        request: Request,
        feed: Callable[[memoryview], None],
        traffic: Traffic,
        accepted: Callable[[], None] | None,
    ) -> Reply:
        if self._closed:
            raise SourceError("the daemon is closing its connections", Fault.LOCAL)
        if self._stall_timer is None:
            self._stall_timer = self._after(self._stall_timeout_s / STALL_CHECKS, self._check)
        transfer = lane.idle.pop() if lane.idle else Transfer(lane)
        try:
            return await transfer.run(request, feed, traffic, accepted)
        finally:
            if self._closed:
                transfer.curl.close()
            else:
                lane.idle.append(transfer)

    def _begin_demand(self) -> None:
        self._demanding += 1
        if not self._prefetch.held and not self._link.fast:
            self._quiet.clear()
            self._prefetch.hold()

    def _end_demand(self) -> None:
        self._demanding -= 1
        if self._closed or not self._prefetch.held:
            return
        if self._link.fast:
            self._let_go()
        elif not self._demanding:
            self._demand_ended_at = self._loop.time()
            if self._quiet_timer is None:
                self._quiet_timer = self._after(self._quiet_s, self._release_prefetch)

    def _release_prefetch(self) -> None:
        self._quiet_timer = None
        if self._demanding:
            return
        left_s = self._demand_ended_at + self._quiet_s - self._loop.time()
        if left_s > 0:
            self._quiet_timer = self._after(left_s, self._release_prefetch)
            return
        self._let_go()

    def _let_go(self) -> None:
        if self._prefetch.held:
            self._prefetch.release()
            self._quiet.set()

    def _check(self) -> None:
        """Look for transfers that stand still; the timer rests while there are none at all."""
        self._stall_timer = None
        for transfer in list(self._live()):
            if not transfer.check_progress():
                transfer.fail(Fault.NETWORK, f"no byte came for {self._stall_timeout_s:g} s")
        if any(lane.running for lane in self._lanes):
            self._stall_timer = self._after(self._stall_timeout_s / STALL_CHECKS, self._check)

    def _live(self) -> Iterator[Transfer]:
        for lane in self._lanes:
            if not lane.held:
                yield from lane.running.values()

    @property
    def _lanes(self) -> tuple[Lane, ...]:
        return self._demand, self._expected, self._prefetch

    def _after(self, delay_s: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        return self._loop.call_later(delay_s, call)
