"""Events reach the event loop, whichever way a transport hands them over."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fscached.fill import reception
from fscached.fill.reception import Reception
from fscached.transport import Attending, Closed, Event, Held, ObjectId, Ticket, Wanted
from tests.fill.conftest import KEY, Scene, settled, until

pytestmark = pytest.mark.asyncio

READ = Wanted(ObjectId(1), 0, 4096, Ticket(7))
HELD = Held(ObjectId(1), 0, 4096, 0.00001)


class Desk:
    """A transport that answers by itself, as far as a reception sees it. What is put into `asked`
    comes out of `attend`: None ends it."""

    def __init__(self) -> None:
        self.early: list[Event] = []
        self.asked: queue.SimpleQueue[Event | Exception | None] = queue.SimpleQueue()
        self.ears, self._mouth = os.pipe2(os.O_NONBLOCK)
        self.answered: list[Held] = []

    def drain(self) -> list[Event]:
        return self.early

    def attend(self) -> Iterator[Event]:
        while (event := self.asked.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event

    def dismiss(self) -> None:
        self.asked.put(None)

    def told_fileno(self) -> int:
        return self.ears

    def told(self) -> list[Held]:
        os.read(self.ears, 64)
        return self.answered

    def tell(self, read: Held) -> None:
        self.answered.append(read)
        os.write(self._mouth, b"x")


class Listener:
    """Objects that remember what they were told, and in which thread."""

    def __init__(self) -> None:
        self.heard: list[Event | Held] = []
        self.threads: set[int] = set()

    def handle(self, event: Event) -> None:
        self.heard.append(event)
        self.threads.add(threading.get_ident())

    def heed(self, events: list[Event]) -> None:
        for event in events:
            self.handle(event)

    held = handle


@pytest.fixture
def desk():
    return Desk()


@pytest.fixture
def listener():
    return Listener()


@contextmanager
def opened(desk: Desk, listener: Listener) -> Iterator[Reception]:
    """A reception, whose thread ends with it."""
    found = Reception(desk, listener)
    found.open()
    yield found
    found.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "reception"]


async def test_everything_is_told_in_the_event_loop(desk, listener):
    """What was asked before, what is asked now, and what was answered already."""
    assert isinstance(desk, Attending)
    desk.early = [Closed(ObjectId(3))]
    with opened(desk, listener):
        assert listener.heard == desk.early
        desk.asked.put(READ)
        await until(lambda: READ in listener.heard)
        desk.tell(HELD)
        await until(lambda: HELD in listener.heard)
    assert listener.threads == {threading.get_ident()}


async def test_many_events_come_in_their_order(desk, listener):
    """However the two threads take turns."""
    events = [Wanted(ObjectId(1), 0, 4096, Ticket(number)) for number in range(5000)]
    with opened(desk, listener):
        for event in events:
            desk.asked.put(event)
            if event.ticket % 100 == 0:
                await asyncio.sleep(0)
        await until(lambda: len(listener.heard) == len(events))
    assert listener.heard == events


async def test_an_error_is_not_the_end(desk, listener, monkeypatch, caplog):
    """It has a line, and the kernel is listened to again."""
    monkeypatch.setattr(reception, "FAULT_PAUSE_S", 0.0)
    with opened(desk, listener):
        desk.asked.put(OSError("no more descriptors"))
        desk.asked.put(READ)
        await until(lambda: READ in listener.heard)
    assert [one.levelno for one in caplog.records] == [logging.ERROR]


async def test_what_comes_after_the_end_is_for_a_successor(desk, listener):
    """An event that was taken and not acted upon stays unanswered."""
    with opened(desk, listener):
        desk.asked.put(READ)
        while desk.asked.qsize():  # the event loop does not turn meanwhile
            pass
    desk.tell(HELD)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert listener.heard == []


async def test_a_read_that_was_answered_already_leads_on(scene):
    """It counts as a hit, and its reader's next window is asked for."""
    here: Scene = scene([65536] * 256)
    try:
        await here.kernel.open(KEY)
        (object,) = here.objects._open
        await here.kernel.read(KEY, 0, 65536)
        await here.kernel.read(KEY, 16 * 65536, 17 * 65536)
        await settled(here.objects)
        asked = len(here.source.asked)
        here.objects.held(Held(object, 100 * 65536, 101 * 65536, 0.0))
        await settled(here.objects)
        assert len(here.source.asked) == asked + 1
        tally = here.objects.tallies[KEY]
        assert tally.hits == 1 and tally.reads == tally.reads_completed
        here.objects.held(Held(ObjectId(99), 0, 4096, 0.0))  # closed meanwhile
        assert here.objects.tally.unknown_reads == 0
    finally:
        here.close()
