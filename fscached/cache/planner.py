"""How far to read ahead: windows start at the wanted chunk and grow while access is sequential.

A window is counted in uncompressed bytes. It is the unit of one ranged request, so its smallest
size bounds the requests of a random reader and its largest the memory of a sequential one.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

STREAM_LIMIT = 32
"""Sequential readers remembered per blob; the one not heard of for longest is forgotten."""

PACED_WINDOW_S = 0.5
"""How long a window may be on the link. To hide a round trip takes far less; a longer one would
stand in the way of the reader's next chunk, up to its deadline."""


@dataclass(slots=True)
class Stream:
    """One sequential reader: the window fetched for it last, as chunks [first, end)."""

    first: int
    end: int
    window_bytes: int
    proven: bool
    seen: bool = True
    """Whether the reader is known to have come to this window."""
    halfway: bool = False
    """Whether the window, or its reader, has come to its middle."""


class Planner:
    """Window sizes of one blob's readers.

    A reader that asks for the very chunk where a window ended is sequential: its next window is
    twice as long. From then on the next one is asked for when half of the last has landed, if the
    reader was seen in that: so it never waits for a round trip, one window is decoded while the
    next arrives, and no more than one is fetched beyond the last where it was seen (what is
    resident it may read without asking). No window is longer than what the link, by the last fetch,
    brings in PACED_WINDOW_S.
    """

    def __init__(self, window_bytes: int, window_limit_bytes: int) -> None:
        self._window_bytes = window_bytes
        self._limit_bytes = max(window_bytes, window_limit_bytes)
        self._streams: OrderedDict[int, Stream] = OrderedDict()
        self._pace_bytes: float | None = None
        """What the last fetch brought, per PACED_WINDOW_S."""
        self.gap_bytes = 0
        """Of a blob file: as many as come, by the last fetch, in the time of a round trip, but no
        more than a window. So many between two chunks that nobody wants cost less than a request
        of its own for the second."""

    def miss(self, chunk: int) -> Stream:
        """The window to fetch for a reader that misses `chunk`; its end is set by `fetched`."""
        before = self._streams.pop(chunk, None)
        if before is None:
            return Stream(chunk, chunk, self._window_bytes, proven=False)
        return Stream(chunk, chunk, self._longer(before), proven=True)

    def seen(self, chunk: int) -> Stream | None:
        """A reader is at a chunk that is resident or in flight: the window to fetch next for it,
        if it is time for that."""
        return self._ahead(chunk, seen=True)

    def landed(self, chunk: int) -> Stream | None:
        """As much, when a chunk has landed."""
        return self._ahead(chunk, seen=False)

    def _ahead(self, chunk: int, *, seen: bool) -> Stream | None:
        for end, stream in reversed(self._streams.items()):
            if stream.first <= chunk < end:
                stream.seen |= seen
                stream.halfway |= chunk * 2 >= stream.first + end
                if not (stream.proven and stream.seen and stream.halfway):
                    return None
                del self._streams[end]
                return Stream(end, end, self._longer(stream), proven=True, seen=False)
        return None

    def fetched(self, stream: Stream, end: int) -> None:
        """Remember that the window reaches to chunk `end`."""
        stream.end = end
        self._streams[end] = stream
        self._streams.move_to_end(end)
        if len(self._streams) > STREAM_LIMIT:
            self._streams.popitem(last=False)

    def paced(
        self, brought_bytes: int, remote_bytes: int, first_byte_s: float, seconds: float
    ) -> None:
        """Remember how fast a fetch was: bytes of the cache file and of the blob file, seconds to
        the first and to the last."""
        self._pace_bytes = brought_bytes / seconds * PACED_WINDOW_S if seconds > 0 else None
        streaming_s = seconds - first_byte_s
        gap_bytes = remote_bytes * first_byte_s / streaming_s if streaming_s > 0 else 0
        self.gap_bytes = min(round(gap_bytes), self._window_bytes)

    def _longer(self, stream: Stream) -> int:
        longer = min(stream.window_bytes * 2, self._limit_bytes)
        if self._pace_bytes is None:
            return longer
        return max(min(longer, round(self._pace_bytes)), self._window_bytes)
