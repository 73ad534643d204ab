"""READs of one object that wait for an answer, and get exactly one."""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import Iterable

from fscached.fill.stages import Pending, Stamps, tell
from fscached.fill.tally import Tally
from fscached.transport import ObjectId, Transport, Wanted


class Replies:
    """Kernels before 6.11 hand a ticket out again at once: READs have numbers of our own here,
    which tell them apart while an answer by a worker is not accounted for yet.

    `names` are the blob's and the source's, for the line of a READ that took `slow_read_s` (0: no
    READ has one).
    """

    def __init__(
        self,
        object: ObjectId,
        transport: Transport,
        tally: Tally,
        names: tuple[str, str],
        slow_read_s: float,
    ) -> None:
        self._object = object
        self._transport = transport
        self._tally = tally
        self._names = names
        self._slow_read_s = slow_read_s
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._pending: dict[int, Pending] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def expect(self, want: Wanted, now_s: float) -> int:
        """A READ has come: its number."""
        number = next(self._numbers)
        self._pending[number] = want, now_s
        return number

    def answered(self, seconds: float) -> None:
        """A READ that was not expected here has had its answer."""
        self._tally.reads_completed += 1
        self._tally.latencies.count(seconds)

    def wake(self, number: int) -> None:
        """Answer a READ, from a worker; `woken` follows in the event loop."""
        pending = self._pending.get(number)
        if pending is not None:
            self._transport.done(self._object, pending[0].ticket)

    def woken(self, numbers: Iterable[int], stamps: Stamps | None) -> None:
        """Workers have answered these."""
        for number in numbers:
            pending = self._pending.pop(number, None)
            if pending is not None:
                self._tally.reads_completed += 1
                self._timed(pending, stamps)

    def complete(self, numbers: Iterable[int], stamps: Stamps | None = None) -> None:
        """Let these readers look again, those that have no answer yet."""
        for number in numbers:
            pending = self._pending.pop(number, None)
            if pending is not None:
                self._tally.reads_completed += 1
                self._transport.done(self._object, pending[0].ticket)
                self._timed(pending, stamps)

    def fail(self, numbers: Iterable[int]) -> None:
        """Let these readers fail, those that have no answer yet."""
        for number in numbers:
            pending = self._pending.pop(number, None)
            if pending is not None:
                self._tally.reads_failed += 1
                self._transport.failed(self._object, pending[0].ticket, errno.EIO)
                self._timed(pending, None, failed=True)

    def forget(self) -> None:
        """The kernel has closed the object: nobody waits any more."""
        self._pending.clear()

    def _timed(self, pending: Pending, stamps: Stamps | None, *, failed: bool = False) -> None:
        """A READ has its answer: was it slow?"""
        now_s = self._loop.time()
        self._tally.latencies.count(now_s - pending[1])
        if self._slow_read_s and now_s - pending[1] >= self._slow_read_s:
            self._tally.slow_reads += 1
            tell(pending, now_s, *self._names, stamps, failed)
