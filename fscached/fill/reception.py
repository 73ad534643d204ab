"""Where the kernel's questions come in: in the event loop, or in a thread where the transport
answers by itself what is resident, and leaves the others to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque

from fscached.fill.objects import Objects
from fscached.transport import Attending, Event, Transport

log = logging.getLogger(__name__)

END_LIMIT_S = 5.0
"""For the thread to be done with the transport: it waits for nothing but the interpreter."""

FAULT_PAUSE_S = 0.1


class Reception:
    """Takes a transport's events to its objects. Make it in the running loop."""

    def __init__(self, transport: Transport, objects: Objects) -> None:
        self._transport = transport
        self._attending = transport if isinstance(transport, Attending) else None
        self._objects = objects
        self._loop = asyncio.get_running_loop()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._left: deque[Event] = deque()
        """To the event loop."""
        self._told = False
        """Whether the event loop will look."""

    def open(self) -> None:
        """Act on what the kernel has asked so far, and from now on."""
        self._drain()
        if self._attending is None:
            self._loop.add_reader(self._transport.fileno(), self._drain)
            return
        self._loop.add_reader(self._attending.told_fileno(), self._account, self._attending)
        self._thread = threading.Thread(
            target=self._attend, args=[self._attending], name="reception", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Take nothing any more: what is not answered by now stays so, for whoever comes next."""
        if self._closed:
            return
        self._closed = True
        if self._attending is None:
            self._loop.remove_reader(self._transport.fileno())
        elif self._thread is not None:
            self._loop.remove_reader(self._attending.told_fileno())
            self._attending.dismiss()
            self._thread.join(END_LIMIT_S)
            self._left.clear()

    def _drain(self) -> None:
        self._objects.heed(self._transport.drain())

    def _account(self, attending: Attending) -> None:
        for read in attending.told():
            self._objects.held(read)

    def _attend(self, attending: Attending) -> None:
        """The thread."""
        while not self._closed:
            try:
                for event in attending.attend():
                    self._leave(event)
            except Exception:
                log.exception("while the kernel was asking")
                time.sleep(FAULT_PAUSE_S)

    def _leave(self, event: Event) -> None:
        self._left.append(event)
        if not self._told:
            self._told = True
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._heed)

    def _heed(self) -> None:
        self._told = False  # before it looks: what is left from now on is told anew
        while self._left:
            self._objects.handle(self._left.popleft())
