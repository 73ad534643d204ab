"""What to bring before anybody asks, and in which order: by expected use, not by offset.

First what a trace says, then the image's prefetch table, then the operator's patterns, then what
follows where somebody is reading on, then the rest. Pure: an `Agenda` is asked for the next fetch
and asks back which chunks are absent.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple, TypeVar

from fscached.prefetch.trace import Trace
from fscached.source import Priority

T = TypeVar("T")

RANGE_LIMIT: Final = 65_536
"""Ranges listed of one image; what is behind them is the rest."""
GAP_BYTES: Final = 64 << 10
"""So much that nobody expects is fetched rather than sending one more request: it takes 2 ms at
300 Mbit/s, a tenth of a round trip of 20 ms."""
STREAM_LIMIT: Final = 16
"""Sequential readers remembered per image."""
PROVEN_BYTES: Final = 256 << 10
"""Who has read so much without a gap is a sequential reader: two of the kernel's longest READs."""
_LOOKS_LIMIT: Final = 256
"""Ranges looked at in one turn of the event loop: 1 µs to 3 µs each."""


class Range(NamedTuple):
    """Bytes [start, end) of a blob's cache file."""

    blob_id: str
    start: int
    end: int
    priority: Priority = Priority.PREFETCH

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


class Look(enum.Enum):
    """What else may come of looking at a range: nothing absent there, or its blob is not open."""

    NOTHING = "nothing"
    LATER = "later"


def expected(trace: Trace, blob_ids: frozenset[str]) -> Iterator[Range]:
    """A trace's chunks, soonest first, each with what was fetched along with it."""
    for access in trace.expected():
        if access.blob_id in blob_ids:
            priority = Priority.EXPECTED if trace.usual(access) else Priority.PREFETCH
            yield Range(access.blob_id, access.start, max(access.end, access.reach), priority)


def joined(ranges: Iterable[Range], window_bytes: int, gap_bytes: int = 0) -> Iterator[Range]:
    """The same bytes in fewer ranges. What lies within `window_bytes` of expected bytes is brought
    nearly at once anyway: there the order may be that of the blob, and ranges that are apart by
    `gap_bytes` or less are one, if their priority is one as well."""
    window: list[Range] = []
    size = 0
    for range in ranges:
        if window and (size >= window_bytes or range.priority is not window[0].priority):
            yield from _melted(window, gap_bytes)
            window, size = [], 0
        window.append(range)
        size += range.size_bytes
    yield from _melted(window, gap_bytes)


def _melted(window: list[Range], gap_bytes: int) -> Iterator[Range]:
    blobs: dict[str, list[Range]] = {}
    for range in window:
        blobs.setdefault(range.blob_id, []).append(range)
    for ranges in blobs.values():
        ranges.sort()
        at = ranges[0]
        for range in ranges[1:]:
            if range.start - at.end <= gap_bytes:
                at = at._replace(end=max(at.end, range.end))
            else:
                yield at
                at = range
        yield at


class Streams:
    """Who reads on where they stopped; `ahead_bytes` is how far to be in front of them."""

    def __init__(self, ahead_bytes: int) -> None:
        self._ahead_bytes = ahead_bytes
        self._begins: OrderedDict[tuple[str, int], int] = OrderedDict()
        """Of each reader where it began, by blob and where it stopped."""
        self._proven: OrderedDict[tuple[str, int], int] = OrderedDict()
        """As much, of sequential readers alone: of random ones there are many more."""

    def read(self, blob_id: str, start: int, end: int) -> bool:
        """A READ that the kernel sent. True: it is of a sequential reader.

        What is resident is read unasked, so the next READ of one comes where what was brought for
        it ends, or where it stopped.
        """
        stopped = blob_id, start
        first = self._begins.pop(stopped, None)
        if first is None and self._proven:
            stopped = self._led(blob_id, start) or stopped
            first = self._begins.pop(stopped, None)
        if first is None:
            first = start
        self._proven.pop(stopped, None)
        self._begins[blob_id, end] = first
        if len(self._begins) > STREAM_LIMIT:
            self._proven.pop(self._begins.popitem(last=False)[0], None)
        if end - first < PROVEN_BYTES:
            return False
        self._proven[blob_id, end] = first
        return True

    def ranges(self) -> Iterator[Range]:
        """What comes next for each, who has read last first."""
        for (blob_id, at), first in reversed(self._proven.items()):
            yield Range(blob_id, at, at + self._ahead(first, at))

    def _led(self, blob_id: str, start: int) -> tuple[str, int] | None:
        """The reader for whom these bytes were to be brought."""
        for (known, at), first in reversed(self._proven.items()):
            if known == blob_id and at <= start <= at + self._ahead(first, at):
                return known, at
        return None

    def _ahead(self, first: int, at: int) -> int:
        """As much as it has read."""
        return min(at - first, self._ahead_bytes)


class Agenda:
    """What is left to bring of one image. `listed` in order, then `streams`, then `rest`."""

    def __init__(
        self, listed: Iterable[Range], streams: Streams | None, rest: Sequence[Range]
    ) -> None:
        self._listed = deque(listed)
        self._later: list[Range] = []
        self._streams = streams
        self._rest = list(rest)
        self.listed_bytes = sum(range.size_bytes for range in self._listed)
        """Of ranges that are not done with; some of it may be there."""

    @property
    def priority(self) -> Priority:
        """Of what comes next."""
        return self._listed[0].priority if self._listed else Priority.PREFETCH

    @property
    def whole(self) -> bool:
        """Whether all of the image is to come."""
        return bool(self._rest)

    def insist(self, rest: Sequence[Range]) -> None:
        """Bring all of this too."""
        self._rest = list(rest)

    def read(self, blob_id: str, start: int, end: int) -> bool:
        """A reader is at these bytes; whether that gives something to do."""
        return self._streams is not None and self._streams.read(blob_id, start, end)

    def opened(self) -> None:
        """A blob is open and known now: ranges that were left for later have their turn."""
        self._listed.extendleft(reversed(self._later))
        self._later.clear()

    def again(self, range: Range) -> None:
        """What was taken of this range did not come: it is the next to be taken again."""
        self._listed.appendleft(range)
        self.listed_bytes += range.size_bytes

    def next(self, take: Callable[[Range], T | Look]) -> T | Look:
        """What `take` makes of the first range in which it finds something to do, all that it looks
        at being of one priority. Look.LATER: more ranges are left to look at, in another turn.
        Look.NOTHING: there is nothing to do."""
        priority = self.priority
        for _ in range(_LOOKS_LIMIT):
            if self.priority is not priority:
                return Look.LATER
            if not self._listed:
                return self._beyond(take)
            found = take(self._listed[0])
            if not isinstance(found, Look):
                return found
            done = self._listed.popleft()
            if found is Look.LATER:
                self._later.append(done)
            else:
                self.listed_bytes -= done.size_bytes
        return Look.LATER

    def _beyond(self, take: Callable[[Range], T | Look]) -> T | Look:
        ranges = self._streams.ranges() if self._streams is not None else iter(())
        for candidates in (ranges, iter(self._rest)):
            for candidate in candidates:
                found = take(candidate)
                if not isinstance(found, Look):
                    return found
        return Look.NOTHING
