"""The worker threads of one daemon, and the memory its flights share.

Why not `ThreadPoolExecutor`: its threads are joined when the interpreter ends, so one that is
stuck in a write (fsfreeze) would hold up SIGTERM; and a task costs it and asyncio two futures,
where a READ of 4 KiB has 100 µs for everything (docs/decisions/workers.md).
"""

from __future__ import annotations

import asyncio
import errno
import sys
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

from fscached.fill.memory import Pool

T = TypeVar("T")

SWITCH_INTERVAL_S = 0.0005
"""How long a worker that runs Python code may keep the event loop waiting; Python's own 5 ms is
longer than a READ takes."""


class Crew:
    """Workers that take urgent tasks in order, then the others. Make it in the running loop."""

    def __init__(self, workers: int, pool: Pool) -> None:
        self.workers = workers
        self.pool = pool
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._urgent: deque[Callable[[], None]] = deque()
        self._later: deque[Callable[[], None]] = deque()
        self._turns: SimpleQueue[bool] = SimpleQueue()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        for number in range(workers):
            threading.Thread(target=self._work, name=f"fill-{number}", daemon=True).start()

    @property
    def behind(self) -> bool:
        """Whether there is more to do than hands: what nobody waits for had better not begin."""
        return len(self._later) >= self.workers

    def start(
        self, task: Callable[[], T], ended: Callable[[T | Exception], None], urgent: bool = True
    ) -> None:
        """Have a worker run `task`, an urgent one before all that are not; then `ended` is called
        in the event loop with what it returned or raised."""

        def run() -> None:
            outcome: T | Exception
            try:
                outcome = task()
            except Exception as error:
                outcome = error
            self._loop.call_soon_threadsafe(ended, outcome)

        if self._closed:
            self._loop.call_soon(ended, OSError(errno.ESHUTDOWN, "the daemon is ending"))
        else:
            (self._urgent if urgent else self._later).append(run)
            self._turns.put(True)

    async def run(self, task: Callable[[], T]) -> T:
        """Have a worker run `task` and wait for what it returns or raises."""
        future: asyncio.Future[T] = self._loop.create_future()

        def ended(outcome: T | Exception) -> None:
            if future.done():
                return
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        self.start(task, ended)
        return await future

    def close(self) -> None:
        """Let the workers go when they have done what they were given; nobody waits for them."""
        self._closed = True
        for _ in range(self.workers):
            self._turns.put(False)

    def _work(self) -> None:
        while self._turns.get():
            try:
                self._next()()
            except RuntimeError:
                return  # the event loop has ended, and with it whoever asked

    def _next(self) -> Callable[[], None]:
        """One task for every turn: of the urgent ones, if there are any left when it is taken."""
        try:
            return self._urgent.popleft()
        except IndexError:
            return self._later.popleft()
