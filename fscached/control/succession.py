"""How a daemon comes to answer the kernel, and how it makes room for the next one.

nydusd's states, turned by its API. A daemon that begins with the kernel's device is RUNNING before
anybody can ask. One that is started to follow another is INIT: `takeover` makes it READY with what
the supervisor keeps, `start` has it answer what its predecessor left unanswered. The snapshotter
asks for both once, or never when it has waited too long: a successor of a dead daemon that nobody
asks does both by itself, while the supervisor still gives.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Final, Protocol

from fscached.control import custody
from fscached.control.custody import CustodyError
from fscached.control.http import ApiError
from fscached.control.messages import DaemonInfo
from fscached.control.state import Lifecycle, State, Trigger
from fscached.failure import Failure

log = logging.getLogger(__name__)

PREDECESSOR_LIMIT_S: Final = 20.0
"""How long `start` waits for the predecessor's objects to be closed; its caller waits 30 s."""
PREDECESSOR_PAUSE_S: Final = 0.01
UNASKED_S: Final = 0.5
"""How long the successor of a dead daemon waits to be told to take over: the snapshotter looks
every 100 to 200 ms, and its supervisor gives for 10 s from the predecessor's end. (A second was too
long once, for one that had needed 8.7 s to listen.)"""
ORPHAN_S: Final = 60.0
"""How long a daemon without a parent waits to be told to take over."""


class Reign(Protocol):
    """A daemon that has the kernel's end. Everything is called in the event loop."""

    @property
    def holdings(self) -> Mapping[str, int]:
        """Descriptors that must outlive this process, by name."""
        ...

    def begin(self, takeover: bool) -> None:
        """Answer the kernel from now on; in a takeover first what the predecessor, all of whose
        descriptors are closed by now, left unanswered. Raises Failure."""
        ...

    async def end(self) -> None:
        """Stop reading what the kernel asks, and close all that a successor would need closed."""
        ...


class Succession:
    """The life of one daemon. `stop` ends the process soon; `heir` makes a daemon of a
    predecessor's holdings and raises Failure, OSError or ValueError for what are none. `place` is
    where the API listens; `answer_at` has it listen in a predecessor's place too, and may raise
    Failure."""

    def __init__(
        self,
        stop: Callable[[], None],
        heir: Callable[[dict[str, int]], Reign] | None = None,
        identity: str | None = None,
        supervisor: str | None = None,
        place: str = "",
        answer_at: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._lifecycle = Lifecycle()
        self._stop = stop
        self._heir = heir
        self._identity = identity
        self._supervisor = supervisor
        self._reign: Reign | None = None
        self._parcel: socket.socket | None = None
        self._predecessor = 0
        self._places = [place]
        self._answer_at = answer_at
        self._turn = asyncio.Lock()
        self._unasked: asyncio.Task[None] | None = None
        self._went_ahead = False

    @property
    def state(self) -> State:
        """As nydusd names it."""
        return self._lifecycle.state

    def await_takeover(self, predecessor_lives: bool) -> None:
        """Begin without the kernel's end, and end when nobody is left to bring it: a snapshotter
        that is being stopped starts a daemon that nobody will ever speak to."""
        if not predecessor_lives:
            self._unasked = asyncio.create_task(self._go_ahead())
        parent = os.getppid()

        def look() -> None:
            if self.state is State.INIT:
                if os.getppid() != parent or parent == 1:
                    log.error("nobody has this daemon take over, and its parent is gone: it ends")
                    self._stop()
                loop.call_later(ORPHAN_S, look)

        loop = asyncio.get_running_loop()
        loop.call_later(ORPHAN_S, look)

    def info(self) -> DaemonInfo:
        """Who is this, and in which state."""
        return DaemonInfo(state=self.state, id=self._identity, supervisor=self._supervisor)

    def accede(self, reign: Reign, takeover: bool) -> None:
        """Begin with the kernel's end in hand. Raises Failure."""
        self._lifecycle.fire(Trigger.TAKEOVER if takeover else Trigger.MOUNT)
        reign.begin(takeover)
        self._reign = reign
        self._lifecycle.fire(Trigger.START)

    async def take_over(self) -> None:
        """INIT becomes READY: what the supervisor keeps is here, and nothing is answered yet.

        Raises WrongState, ApiError.
        """
        async with self._turn:
            if not self._went_ahead:
                await self._take_over()

    async def start(self) -> None:
        """READY becomes RUNNING. Raises WrongState, ApiError."""
        async with self._turn:
            if not self._went_ahead:
                await self._start()

    async def _go_ahead(self) -> None:
        """Both, when nobody has asked for a while; who asks afterwards finds it done."""
        await asyncio.sleep(UNASKED_S)
        async with self._turn:
            if self.state is not State.INIT:
                return
            log.warning("nobody asks this daemon to take over: it does so by itself")
            try:
                await self._take_over()
                await self._start()
                self._went_ahead = True
            except ApiError as error:
                log.error("mounts hang until somebody has this daemon take over: %s", error)

    async def _take_over(self) -> None:
        self._lifecycle.check(Trigger.TAKEOVER)
        if self._supervisor is None or self._heir is None:
            raise _failed("Restore", "there is no supervisor: start with --id and --supervisor")
        try:
            testament, holdings = await custody.collect(self._supervisor)
            self._reign = self._heir(holdings)
        except (CustodyError, Failure, OSError, ValueError) as error:
            log.error("nothing is taken over: %s", error)
            raise _failed("Restore", str(error)) from None
        self._predecessor = testament.pid
        own = self._places[-1]
        self._places = [*(place for place in testament.sockets if place != own), own]
        self._lifecycle.fire(Trigger.TAKEOVER)
        log.info("taken over", extra={"from": testament.pid, "version": testament.version})

    async def _start(self) -> None:
        self._lifecycle.check(Trigger.START)
        assert self._reign is not None
        await self._predecessors_end()
        try:
            self._reign.begin(takeover=True)
        except Failure as failure:
            log.error("cannot start: %s", failure)
            raise _failed("Start", str(failure)) from None
        self._lifecycle.fire(Trigger.START)
        await self._answer_everywhere()

    async def _answer_everywhere(self) -> None:
        """A snapshotter that had its daemon upgraded goes on binding images where it did, and looks
        for the daemon there when it starts again."""
        for place in self._places[:-1]:
            try:
                if self._answer_at is not None:
                    await self._answer_at(place)
            except Failure as failure:
                log.warning("who asks a predecessor gets no answer: %s", failure)

    async def send_fd(self) -> None:
        """Leave everything with the supervisor; nothing without one. Raises ApiError."""
        if self._supervisor is None:
            return
        if self._reign is None:
            what = f"UnexpectedEvent(SendFd): the daemon is {self.state}"
            raise ApiError(HTTPStatus.BAD_REQUEST, what)
        if self._parcel is None:
            self._parcel = custody.parcel(self._reign.holdings)
        try:
            await custody.leave(self._supervisor, self._parcel, self._places)
        except CustodyError as error:
            log.error("if this daemon dies now, mounts die with it: %s", error)
            raise _failed("Save", str(error)) from None

    async def exit(self) -> None:
        """End after the reply has gone out; what the kernel asks from now on is a successor's.

        Raises WrongState.
        """
        async with self._turn:
            if self.state is State.RUNNING and self._reign is not None:
                await self._reign.end()
                self._lifecycle.fire(Trigger.STOP)
            self._lifecycle.fire(Trigger.STOP)
            self._stop()

    async def _predecessors_end(self) -> None:
        """Wait until the predecessor's objects are closed: the kernel gives an object's READs to
        nobody else while somebody has it open."""
        from fscached.transport import probe  # not before the API listens: it takes its time

        limit_s = asyncio.get_running_loop().time() + PREDECESSOR_LIMIT_S
        while await asyncio.to_thread(probe.has_objects, self._predecessor):
            if asyncio.get_running_loop().time() > limit_s:
                log.error(
                    "process %d still has objects open: their readers wait until it ends",
                    self._predecessor,
                )
                return
            await asyncio.sleep(PREDECESSOR_PAUSE_S)


def _failed(what: str, why: str) -> ApiError:
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, f"{what}(DaemonAbnormal(Other({why!r})))")
