"""The daemon's housekeeping: culls what it is asked to until it is gone, sweeps now and then."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from fscached.config import Cache
from fscached.culling.keeper import Census, Keeper, Look, Swept
from fscached.fill.crew import Crew
from fscached.store import Store
from fscached.transport import ObjectKey, Transport

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.05
"""Before a file is asked for the first time: the kernel lets go of it some milliseconds after its
CLOSE (cachefiles_withdraw_cookie in fs/cachefiles/interface.c). Doubles up to the interval."""

SETTLE_S = 10.0
"""How long a file that is to be culled may still turn up: it has no name before its CLOSE."""

SPACE_PAUSE_S = 5.0
"""Between two looks at the free space alone."""

WANTED_LIMIT = 65_536


@dataclass(slots=True)
class Counts:
    """Since the daemon started; the last three as the last look found them."""

    culled_files: int = 0
    culled_bytes: int = 0
    used_bytes: int = 0
    files: int = 0
    excess_bytes: int = 0


class Culling:
    """The event loop's half. The other, `Keeper`, has the one worker of `crew` to itself: the
    kernel takes `copen` and `cull` by turns, and who waits for a slow one must not be a worker that
    fetches."""

    def __init__(
        self,
        limits: Cache,
        transport: Transport,
        store: Store,
        crew: Crew,
        look: Callable[[], Look],
        clock: Callable[[], float] = time.time,
        statvfs: Callable[[str], os.statvfs_result] = os.statvfs,
    ) -> None:
        self.counts = Counts()
        self._limits = limits
        self._crew = crew
        self.look = look
        self._clock = clock
        self._keeper = Keeper(limits, transport, store, clock, statvfs)
        self._wanted: dict[str, float] = {}
        """Cookies whose files are to go, and until when one that is not there may turn up."""
        self._closed: dict[ObjectKey, float] = {}
        """Objects whose last use is still to be noted."""
        self._woken = asyncio.Event()
        self._pause_s = FIRST_PAUSE_S
        self._patrol: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Look after the cache from now on."""
        self._patrol = asyncio.get_running_loop().create_task(self.patrol())

    def end(self) -> None:
        """Begin nothing more. What was to be culled is left to a successor, as orphans."""
        if self._patrol is not None:
            self._patrol.cancel()

    def cull(self, cookie: str) -> None:
        """Have the files of a cookie deleted, in every volume in which no bound image needs them:
        soon, or as soon as nobody has them in use."""
        if cookie not in self._wanted and len(self._wanted) >= WANTED_LIMIT:
            log.error(
                "%d files wait to be deleted: %s is left to be an orphan", WANTED_LIMIT, cookie
            )
            return
        self._wanted[cookie] = self._clock() + SETTLE_S
        self._wake()

    def closed(self, key: ObjectKey) -> None:
        """The kernel has closed an object."""
        self._closed[key] = self._clock()
        if key.cookie in self._wanted:
            self._wanted[key.cookie] = self._clock() + SETTLE_S
        self._wake()

    async def remove(self, key: ObjectKey) -> bool:
        """Delete one file now, whoever needs it; False: it is in use. Raises OSError."""
        return await self._crew.run(partial(self._keeper.remove, key))

    @property
    def waiting(self) -> int:
        """How many cookies are to be culled."""
        return len(self._wanted)

    async def census(self) -> Census:
        """All there is. Raises OSError."""
        return await self._crew.run(partial(self._keeper.census, self.look()))

    async def sweep(self, all_idle: bool = False, dry_run: bool = False) -> Swept:
        """Delete orphans, and as much as is over the budget; `all_idle`: everything that no bound
        image needs; `dry_run`: only say what would go. Raises OSError."""
        sweep = partial(self._keeper.sweep, self.look(), all_idle, dry_run)
        swept = await self._crew.run(sweep)
        if not dry_run:
            self._count(swept)
        return swept

    async def settle(self) -> None:
        """Note last uses and cull what is wanted, as far as that can be done now; what cannot is
        tried again. Raises OSError."""
        closed, self._closed = self._closed, {}
        await self._crew.run(partial(self._keeper.touch, closed))
        for cookie, until_s in list(self._wanted.items()):
            try:
                gone = await self._culled(cookie, until_s)
            except OSError as error:
                log.error("%s is not deleted yet: %s", cookie[:12], error)
            else:
                if gone and self._wanted.get(cookie) == until_s:
                    del self._wanted[cookie]

    async def patrol(self) -> None:
        """Look after the cache until cancelled."""
        loop = asyncio.get_running_loop()
        sweep_at_s = loop.time() + SPACE_PAUSE_S
        while True:
            await self._pause(sweep_at_s - loop.time())
            try:
                await self.settle()
                due = loop.time() >= sweep_at_s
                if due or self._keeper.short_of_space():
                    swept = await self.sweep()
                    # What cannot be freed now is no reason to look at it without end.
                    due = due or bool(swept.excess)
            except OSError as error:
                log.error("the cache cannot be looked after: %s", error)
                due = True
            if due:
                sweep_at_s = loop.time() + self._limits.sweep_interval_s

    async def _culled(self, cookie: str, until_s: float) -> bool:
        """Whether nothing of it is left, and nothing of it will turn up."""
        look = self.look()
        culled, all_gone = await self._crew.run(partial(self._keeper.cull, cookie, look))
        self.counts.culled_files += len(culled)
        self.counts.culled_bytes += sum(it.file.allocated_bytes for it in culled)
        expected = any(it.key.cookie == cookie for it in look.opened)
        return all_gone and not expected and (bool(culled) or self._clock() >= until_s)

    async def _pause(self, sweep_s: float) -> None:
        """Wait until there may be something to do."""
        waits_s = SPACE_PAUSE_S
        if self._wanted or self._closed:
            waits_s, self._pause_s = self._pause_s, self._pause_s * 2
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, min(waits_s, sweep_s))):
                await self._woken.wait()
                self._woken.clear()
                await asyncio.sleep(FIRST_PAUSE_S)

    def _wake(self) -> None:
        self._pause_s = FIRST_PAUSE_S
        self._woken.set()

    def _count(self, swept: Swept) -> None:
        counts = self.counts
        counts.culled_files += len(swept.culled)
        counts.culled_bytes += sum(it.file.allocated_bytes for it in swept.culled)
        counts.used_bytes = swept.used_bytes
        counts.files = len(swept.census.files) + len(swept.census.nameless) - len(swept.culled)
        excess_bytes = max(0, swept.excess.allocated_bytes)
        if excess_bytes and not counts.excess_bytes:
            log.warning(
                "the cache is too large and all that is left is in use: unmount images, or raise "
                "[cache] budget_bytes",
                extra={"used_bytes": swept.used_bytes, "excess_bytes": excess_bytes},
            )
        counts.excess_bytes = excess_bytes
