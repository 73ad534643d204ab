"""Whether a peer is asked: what reads and pings say of it, and when it gets another chance."""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable
from typing import Final

log = logging.getLogger(__name__)

PAUSE_LIMIT_S: Final = 300.0
"""A peer that fails every chance it gets still gets one this often."""

LIES_LIMIT: Final = 2
"""Images of which a peer gave wrong bytes before no image is read there: one alone may be wrong at
its origin, and the peer innocent."""


class State(enum.Enum):
    """UP: asked. DOWN: not asked. DUE: the next read may try it. TRIAL: that read is under way, and
    no other goes there."""

    UP = "up"
    DOWN = "down"
    DUE = "due"
    TRIAL = "trial"


class Sign(enum.Enum):
    """What is heard of a peer. WORN: the last of so many failures in a row that it is enough.
    REVIVED: its ping is answered again, or its pause is over. LEFT: a read ended without saying
    anything of the peer."""

    ADMITTED = "admitted"
    SERVED = "served"
    FAILED = "failed"
    WORN = "worn"
    LEFT = "left"
    LIED = "lied"
    REVIVED = "revived"


TRANSITIONS: Final = {
    (State.UP, Sign.WORN): State.DOWN,
    (State.UP, Sign.LIED): State.DOWN,
    (State.DOWN, Sign.REVIVED): State.DUE,
    (State.DUE, Sign.ADMITTED): State.TRIAL,
    (State.DUE, Sign.LIED): State.DOWN,
    (State.TRIAL, Sign.SERVED): State.UP,
    (State.TRIAL, Sign.FAILED): State.DOWN,
    (State.TRIAL, Sign.WORN): State.DOWN,
    (State.TRIAL, Sign.LEFT): State.DUE,
    (State.TRIAL, Sign.LIED): State.DOWN,
}
"""Every other sign leaves the state as it is."""


class Health:
    """One peer's, for all images. Times are in seconds on any one clock that does not jump.

    After `failure_limit` failures in a row the peer is DOWN for `pause_s`, and twice as long after
    each trial that fails. `lie_pause_s` is for a peer that gave wrong bytes.
    """

    def __init__(self, *, failure_limit: int, pause_s: float, lie_pause_s: float) -> None:
        self.state = State.UP
        self._failure_limit = failure_limit
        self._first_pause_s = self._pause_s = pause_s
        self._lie_pause_s = lie_pause_s
        self._failures = 0
        self._shut_until_s = 0.0
        self._lies: dict[str, float] = {}

    def admit(self, now_s: float) -> bool:
        """Whether a read may go there. If so, `served`, `failed` or `left` must follow."""
        if now_s < self._shut_until_s or self.state in (State.DOWN, State.TRIAL):
            return False
        self._move(Sign.ADMITTED)
        return True

    def served(self) -> None:
        """A read got its bytes."""
        self._failures = 0
        if self.state is State.TRIAL:
            self._pause_s = self._first_pause_s
        self._move(Sign.SERVED)

    def failed(self, now_s: float) -> None:
        """A read did not get its bytes, by the peer's fault."""
        self._failures += 1
        if self.state is State.TRIAL:
            self._pause_s = min(2 * self._pause_s, PAUSE_LIMIT_S)
        worn = self._failures >= self._failure_limit
        self._move(Sign.WORN if worn else Sign.FAILED)
        if self.state is State.DOWN:
            self._failures = 0
            self._shut(now_s + self._pause_s)

    def left(self) -> None:
        """A read ended otherwise: cancelled, or by the origin's fault."""
        self._move(Sign.LEFT)

    def busy(self, until_s: float) -> None:
        """The peer asks to be left alone."""
        self._shut(until_s)
        self._move(Sign.LEFT)

    def lied(self, image: str, now_s: float) -> None:
        """Bytes of an image were not what the image says they are."""
        self._lies = {name: at for name, at in self._lies.items() if at > now_s}
        self._lies[image] = now_s + self._lie_pause_s
        if len(self._lies) >= LIES_LIMIT:
            self._shut(now_s + self._lie_pause_s)
            self._move(Sign.LIED)

    def revived(self, now_s: float) -> None:
        """Its ping is answered, or there is none and time has passed."""
        if now_s >= self._shut_until_s:
            self._move(Sign.REVIVED)

    def _shut(self, until_s: float) -> None:
        self._shut_until_s = max(self._shut_until_s, until_s)

    def _move(self, sign: Sign) -> None:
        self.state = TRANSITIONS.get((self.state, sign), self.state)


class Watch:
    """The health of one peer while the daemon runs. One that is DOWN is pinged every `interval_s`,
    but only while somebody wants it: nobody did for `idle_s`, and the pings pause. Without a ping
    it gets its next chance when its pause is over."""

    def __init__(
        self,
        name: str,
        health: Health,
        *,
        ping: Callable[[], Awaitable[bool]] | None,
        interval_s: float,
        idle_s: float,
    ) -> None:
        self._name = name
        self._health = health
        self._ping = ping
        self._interval_s = interval_s
        self._idle_s = idle_s
        self._wanted_at_s = 0.0
        self._pinging: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        return self._health.state

    def admit(self, now_s: float) -> bool:
        """See Health."""
        self._wanted_at_s = now_s
        if self._health.state is State.DOWN:
            if self._ping is None:
                self._health.revived(now_s)
            elif self._pinging is None:
                self._pinging = asyncio.create_task(self._keep_pinging(self._ping))
        return self._health.admit(now_s)

    def served(self) -> None:
        """See Health."""
        if self._health.state is not State.UP:
            log.info("peer %s: serves again", self._name)
        self._health.served()

    def failed(self, now_s: float, why: str) -> None:
        """See Health."""
        before = self._health.state
        self._health.failed(now_s)
        self._tell(before, why)

    def left(self) -> None:
        """See Health."""
        self._health.left()

    def busy(self, until_s: float) -> None:
        """See Health."""
        self._health.busy(until_s)

    def lied(self, image: str, now_s: float) -> None:
        """See Health."""
        before = self._health.state
        self._health.lied(image, now_s)
        self._tell(before, "it gave wrong bytes of several images")

    async def close(self) -> None:
        """End the pings."""
        if self._pinging is not None:
            self._pinging.cancel()
            await asyncio.wait([self._pinging])

    def _tell(self, before: State, why: str) -> None:
        if before is State.UP and self._health.state is State.DOWN:
            log.warning("peer %s: not asked for a while: %s", self._name, why)

    async def _keep_pinging(self, ping: Callable[[], Awaitable[bool]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._health.state is State.DOWN:
                await asyncio.sleep(self._interval_s)
                if loop.time() - self._wanted_at_s >= self._idle_s:
                    return
                if await ping():
                    self._health.revived(loop.time())
        finally:
            self._pinging = None
