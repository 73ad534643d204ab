"""The open objects of the kernel: every event finds its object here, and every READ an answer."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from fscached.fill.blob import Limits, OpenBlob, Origin
from fscached.fill.bootstrap import OpenBootstrap
from fscached.fill.crew import Crew
from fscached.fill.renewal import renew
from fscached.fill.tally import Tally
from fscached.transport import (
    Closed,
    Event,
    Held,
    ObjectId,
    ObjectKey,
    Opened,
    Transport,
    Wanted,
)

log = logging.getLogger(__name__)


class LocalBootstrap(NamedTuple):
    """A bootstrap to serve: verified and complete on the local disk."""

    path: Path
    size_bytes: int


Lookup = Callable[[ObjectKey], "Origin | LocalBootstrap | None"]
"""What a key stands for, or None for a key nobody registered."""


class Objects:
    """All open objects of one transport. `handle` never raises and never blocks."""

    def __init__(self, transport: Transport, lookup: Lookup, limits: Limits, crew: Crew) -> None:
        self.tally = Tally()
        self.tallies: dict[ObjectKey, Tally] = {}
        self._transport = transport
        self._lookup = lookup
        self._limits = limits
        self._crew = crew
        self._open: dict[ObjectId, OpenBlob | OpenBootstrap] = {}
        self._keys: dict[ObjectId, ObjectKey] = {}
        self.on_blob: Callable[[ObjectKey, OpenBlob], None] = lambda key, blob: None
        self.on_closed: Callable[[ObjectKey], None] = lambda key: None

    def handle(self, event: Event) -> None:
        """Act on one event of the kernel."""
        try:
            if isinstance(event, Wanted):
                self._wanted(event)
            elif isinstance(event, Opened):
                self._opened(event)
            else:
                self._closed(event)
        except Exception:
            # The reader must not hang because of a bug of ours.
            log.exception("while handling %s", event)
            self._give_up(event)

    def held(self, read: Held) -> None:
        """A READ was answered already. Raises nothing."""
        opened = self._open.get(read.object)
        if not isinstance(opened, OpenBlob):
            return  # closed meanwhile
        try:
            self.tally.reads += 1
            self.tallies[self._keys[read.object]].reads += 1
            opened.held(read)
        except Exception:
            log.exception("after %s", read)

    def heed(self, events: Iterable[Event]) -> None:
        """Act on events, in order."""
        for event in events:
            self.handle(event)

    def withdraw(self, key: ObjectKey) -> None:
        """Nobody will mount a blob again; `on_closed` says when the kernel has let go of it."""
        for object in [object for object, known in self._keys.items() if known == key]:
            self.heed(self._transport.withdraw(object))

    def blobs(self, volume: str) -> dict[str, OpenBlob]:
        """The open data blobs of a volume by their blob id."""
        return {
            key.cookie: opened
            for object, key in self._keys.items()
            if key.volume == volume and isinstance(opened := self._open[object], OpenBlob)
        }

    async def renew(self, key: ObjectKey, offsets: Iterable[int]) -> int | None:
        """Fetch chunks of an open blob again that the disk has spoiled; how many, or None when no
        such blob is open. Raises as `fscached.fill.renewal.renew`."""
        opened = self.blobs(key.volume).get(key.cookie)
        if opened is None:
            return None
        return await renew(opened, offsets, self._transport, self._crew, self._limits.deadline_s)

    def opened(self) -> list[tuple[ObjectId, ObjectKey, int]]:
        """Everything that is open: its number, its key, its size in bytes."""
        return [
            (object, self._keys[object], opened.size_bytes) for object, opened in self._open.items()
        ]

    @property
    def keys(self) -> set[ObjectKey]:
        """What is open."""
        return set(self._keys.values())

    @property
    def waiting(self) -> int:
        """How many READs are unanswered."""
        return sum(opened.waiting for opened in self._open.values())

    def __len__(self) -> int:
        return len(self._open)

    def close(self) -> None:
        """End everything; unanswered READs stay unanswered for whoever takes over."""
        for opened in self._open.values():
            opened.closed()
        self._open.clear()
        self._keys.clear()

    def _wanted(self, event: Wanted) -> None:
        opened = self._open.get(event.object)
        if opened is None:
            self.tally.unknown_reads += 1
            log.error("READ for object %d, which was never opened here: EIO", event.object)
            self._transport.failed(event.object, event.ticket, errno.EIO)
            return
        self.tally.reads += 1
        self.tallies[self._keys[event.object]].reads += 1
        opened.wanted(event)

    def _opened(self, event: Opened) -> None:
        self.tally.opens += 1
        found = self._lookup(event.key)
        if found is None:
            log.error(
                "fsid or blob %r of domain %r is not registered here: the mount fails (ENOENT); "
                "register the image first, for instance with `fscached mount`",
                event.key.cookie,
                event.key.volume,
            )
            self._transport.open_failed(event.object, errno.ENOENT)
            return
        tally = self.tallies.setdefault(event.key, Tally())
        tally.opens += 1
        opened: OpenBlob | OpenBootstrap
        if isinstance(found, LocalBootstrap):
            opened = OpenBootstrap(event.object, *found, self._transport, self._crew, tally)
        else:
            opened = OpenBlob(event.object, found, self._transport, self._limits, self._crew, tally)
        self._open[event.object] = opened
        self._keys[event.object] = event.key
        self._transport.open_ok(event.object, found.size_bytes)
        if isinstance(opened, OpenBlob):
            self.on_blob(event.key, opened)

    def _closed(self, event: Closed) -> None:
        self.tally.closes += 1
        opened = self._open.pop(event.object, None)
        key = self._keys.pop(event.object, None)
        if opened is not None and key is not None:
            self.tallies[key].closes += 1
            opened.closed()
            self.on_closed(key)

    def _give_up(self, event: Event) -> None:
        if isinstance(event, Wanted):
            self._transport.failed(event.object, event.ticket, errno.EIO)
        elif isinstance(event, Opened):
            self._transport.open_failed(event.object, errno.EIO)
