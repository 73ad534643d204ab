"""Reads replayed against the decisions of `fscached.cache`, over a link that is only reckoned.

One reader, who waits for each read and then thinks for as long as the trace says. A request costs a
round trip; from then on all that are under way share the link evenly. Workers and disk cost
nothing, and neither does TCP's start: what is left is what windows decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from fscached.cache.blob import Blob, Ending, Fetch, Run
from fscached.cache.planner import Planner, Stream
from rafs_v6.blob import ChunkMap

WINDOW_BYTES = 1 << 20
WINDOW_LIMIT_BYTES = 8 << 20
LEAST_BYTES = 128 << 10
"""Of a window that shrinks: a READ."""

PATIENT_S = 1e9
_DUST_BYTES = 0.5
"""Sums of fractions end within this of the whole."""


class Read(NamedTuple):
    """Bytes [start, end) of a blob's cache file, after so long a thought."""

    think_s: float
    blob_id: str
    start: int
    end: int


class Link(NamedTuple):
    """What a request costs, and what all together get."""

    round_trip_s: float
    bytes_s: float


class Shrinking(Planner):
    """The first window is half as long when less than half of the last one was read before the next
    was needed, and twice as long when more was. It is told of reads of resident bytes as well,
    which only fanotify tells of, and only until the blob is complete."""

    def __init__(self) -> None:
        super().__init__(WINDOW_BYTES, WINDOW_LIMIT_BYTES)
        self._first_bytes = WINDOW_BYTES
        self._last: Stream | None = None
        self._used: set[int] = set()

    def seen(self, chunk: int) -> Stream | None:
        self._used.add(chunk)
        return super().seen(chunk)

    def miss(self, chunk: int) -> Stream:
        last = self._last
        if last is not None:
            used = sum(index in self._used for index in range(last.first, last.end))
            factor = 0.5 if used * 2 < last.end - last.first else 2
            longer = int(self._first_bytes * factor)
            self._first_bytes = min(max(longer, LEAST_BYTES), WINDOW_BYTES)
        stream = super().miss(chunk)
        if not stream.proven:
            stream.window_bytes = self._first_bytes
        self._used.add(chunk)
        self._last = stream
        return stream


@dataclass(slots=True, eq=False)
class _Flow:
    """A fetch on the link; bytes count from the first of its range."""

    blob_id: str
    fetch: Fetch
    began_s: float
    first_byte_s: float
    next: int
    due: float
    came: float = 0.0


@dataclass(slots=True)
class Cost:
    """What a replay took."""

    waited_s: float = 0.0
    fetched_bytes: int = 0
    requests: int = 0


@dataclass(slots=True)
class Replay:
    """One node with nothing in its cache. `reads` may be given piece by piece."""

    chunks: Mapping[str, ChunkMap]
    link: Link
    planner: Callable[[], Planner]
    cost: Cost = field(default_factory=Cost)
    now_s: float = 0.0
    _blobs: dict[str, Blob] = field(default_factory=dict)
    _flows: list[_Flow] = field(default_factory=list)
    _done: set[int] = field(default_factory=set)
    _tickets: int = 0

    def run(self, reads: Iterable[Read]) -> Cost:
        """Replay them all."""
        for read in reads:
            self._pass(self.now_s + read.think_s)
            self._read(read)
        return self.cost

    def _read(self, read: Read) -> None:
        if read.blob_id not in self._blobs:
            chunks = self.chunks[read.blob_id]
            self._blobs[read.blob_id] = Blob(chunks, self.planner(), PATIENT_S, 0.0)
        self._tickets += 1
        verdict = self._blobs[read.blob_id].want(self._tickets, read.start, read.end, self.now_s)
        if verdict.refuse:
            raise SystemExit(f"blob {read.blob_id}: no chunk at {read.start}: not its trace")
        self._launch(read.blob_id, verdict.fetches)
        if not verdict.complete:
            came_s = self.now_s
            self._pass(math.inf, self._tickets)
            self.cost.waited_s += self.now_s - came_s

    def _launch(self, blob_id: str, fetches: Iterable[Fetch]) -> None:
        for fetch in fetches:
            first_byte_s = self.now_s + self.link.round_trip_s
            flow = _Flow(blob_id, fetch, self.now_s, first_byte_s, fetch.first, 0.0)
            flow.due = self._due(flow)
            self._flows.append(flow)
            self.cost.requests += 1
            self.cost.fetched_bytes += self._due(flow, fetch.end - 1)

    def _due(self, flow: _Flow, index: int | None = None) -> int:
        """How much has come when a chunk, the next if none is named, is all here."""
        chunks = self.chunks[flow.blob_id]
        end = chunks[flow.next if index is None else index].remote_end
        return end - chunks.remote_offset(flow.fetch.first)

    def _pass(self, until_s: float, ticket: int = 0) -> None:
        """Let time pass until then, or until a ticket is answered."""
        while ticket not in self._done if ticket else self.now_s < until_s:
            streaming = [flow for flow in self._flows if flow.first_byte_s <= self.now_s]
            share = self.link.bytes_s / max(len(streaming), 1)
            moments = [flow.first_byte_s for flow in self._flows if flow not in streaming]
            moments += [self.now_s + (flow.due - flow.came) / share for flow in streaming]
            next_s = min([until_s, *moments])
            for flow in streaming:
                flow.came += (next_s - self.now_s) * share
            self.now_s = next_s
            for flow in streaming:
                self._arrive(flow)

    def _arrive(self, flow: _Flow) -> None:
        blob = self._blobs[flow.blob_id]
        while flow.next < flow.fetch.end and flow.due <= flow.came + _DUST_BYTES:
            run = Run(flow.next, flow.next + 1)
            flow.next += 1
            if flow.next < flow.fetch.end:
                flow.due = self._due(flow)
            if blob.arrived(flow.fetch, run.first):
                self._done.update(blob.landed(run))
                self._launch(flow.blob_id, blob.ahead(run))
        if flow.next == flow.fetch.end:
            self._flows.remove(flow)
            first_byte_s = flow.first_byte_s - flow.began_s
            blob.paced(flow.fetch, first_byte_s, self.now_s - flow.began_s)
            blob.lost(flow.fetch, self.now_s, Ending.DONE)
