"""One data blob: which chunks are resident, which are under way, and who waits for which.

A chunk goes through the states of `TRANSITIONS`; every other move is a bug and raises. Bytes that
arrive for a chunk somebody else has brought meanwhile are simply not used.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fscached.cache.deadlines import Deadlines
from fscached.cache.extents import Extents
from fscached.cache.planner import Planner, Stream


class State(enum.IntEnum):
    """Where a chunk's bytes are."""

    ABSENT = 0
    PREFETCHING = 1
    DEMANDED = 2
    ARRIVED = 3
    RESIDENT = 4


TRANSITIONS: dict[int, frozenset[State]] = {
    State.ABSENT: frozenset({State.PREFETCHING, State.DEMANDED, State.RESIDENT}),
    # Absent again when it ends, or is stopped because a demand is quicker: see Prefetches.
    State.PREFETCHING: frozenset({State.ABSENT, State.ARRIVED}),
    State.DEMANDED: frozenset({State.ABSENT, State.ARRIVED}),
    # Bytes that fail their digest, or cannot be written, are as if they had never come.
    State.ARRIVED: frozenset({State.ABSENT, State.DEMANDED, State.RESIDENT}),
    # What the disk has lost meanwhile is fetched again.
    State.RESIDENT: frozenset({State.DEMANDED}),
}


class Chunks(Protocol):
    """What is asked of a blob's chunk map (`rafs_v6.blob.ChunkMap`)."""

    @property
    def count(self) -> int: ...
    def offset(self, index: int) -> int: ...
    def padded_end(self, index: int) -> int: ...
    def remote_offset(self, index: int) -> int: ...
    def remote_size(self, index: int) -> int: ...
    def overlapping(self, start: int, end: int) -> range: ...


class Prefetches(Protocol):
    """What is asked of the prefetches under way, by the numbers of their fetches."""

    def slow(self, number: int, index: int) -> bool:
        """Whether a fetch made now would bring the chunk sooner."""
        ...

    def stop(self, number: int) -> None:
        """Bring nothing more: what had not arrived is others' now."""
        ...


class Run(NamedTuple):
    """Chunks [first, end). What is landed is adjacent, in the cache file and in the blob file."""

    first: int
    end: int


class Fetch(NamedTuple):
    """One ranged request to make, for chunks [first, end); `number` tells it from all others."""

    number: int
    first: int
    end: int


class Ending(enum.Enum):
    """How a fetch ended. DONE: what it did not bring it had left out, and brings when it is asked
    again. LATE: its time was up, which is no verdict on a chunk whose readers came
    later than it began, a window being longer than a slow link is quick. AWAY: nobody who has the
    bytes could be reached; if readers outlast that, what it was to bring is left to `resume`."""

    DONE = "done"
    FAILED = "failed"
    LATE = "late"
    AWAY = "away"


class Verdict(NamedTuple):
    """What a want leads to: complete it now, refuse it now, or wait for `fetches` and others."""

    complete: bool
    refuse: bool
    fetches: tuple[Fetch, ...]


class Lost(NamedTuple):
    """What the end of a fetch leads to: tickets that fail now, and fetches made in its place."""

    tickets: list[int]
    fetches: tuple[Fetch, ...]


REFUSE = Verdict(False, True, ())


@dataclass(slots=True)
class Want:
    """A reader that waits: its ticket and how many of its chunks are not resident yet."""

    ticket: int
    missing: int


class Blob:
    """The chunks of one data blob and the readers waiting for them. Times are in seconds on any
    one clock that does not jump."""

    def __init__(
        self,
        chunks: Chunks,
        planner: Planner,
        deadline_s: float,
        refusal_s: float,
        outage_limit_s: float | None = None,
        prefetches: Prefetches | None = None,
    ) -> None:
        """The times are those of Deadlines."""
        self.chunks = chunks
        self._planner = planner
        self._prefetches = prefetches
        self._deadlines = Deadlines(deadline_s, refusal_s, outage_limit_s)
        self._states = bytearray(chunks.count)
        self._residents = 0
        self.resident_bytes = 0
        """Of the cache file, that belong to resident chunks."""
        self._owners: dict[int, int] = {}
        self._fetches = 0
        self._wants: dict[int, list[Want]] = {}
        self._joined: set[int] = set()
        """Chunks that a prefetch brings to readers who wait."""

    def learn(self, extents: Extents) -> None:
        """Take over what the cache file holds. A chunk is resident only if all its padded pages
        are data: a chunk torn by a power cut shows as partly hole."""
        for index in range(self.chunks.count):
            start, end = self.chunks.offset(index), self.chunks.padded_end(index)
            if self._states[index] == State.ABSENT and extents.covers(start, end):
                self._move(index, State.RESIDENT)
                self.resident_bytes += end - start

    def state(self, index: int) -> State:
        return State(self._states[index])

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of the cache file whose chunks are on their way."""
        return sum(
            self.chunks.padded_end(index) - self.chunks.offset(index) for index in self._owners
        )

    @property
    def untouched(self) -> bool:
        """Whether no chunk is resident."""
        return not self._residents

    @property
    def complete(self) -> bool:
        return self._residents == len(self._states)

    @property
    def waiting(self) -> int:
        """How many readers wait."""
        return len({id(want) for wants in self._wants.values() for want in wants})

    def seen(self, start: int, end: int) -> tuple[Fetch, ...]:
        """A reader has read bytes [start, end): what to fetch next for it."""
        covering = self.chunks.overlapping(start, end)
        return self._continue(self._planner.seen(covering[-1])) if covering else ()

    def want(self, ticket: int, start: int, end: int, now_s: float) -> Verdict:
        """A reader asks for bytes [start, end). Bytes that belong to no chunk cannot be fetched:
        such a want is refused."""
        covering = self.chunks.overlapping(start, end)
        if not covering or not self._covered(covering, start, end):
            return REFUSE
        missing = [index for index in covering if self._states[index] != State.RESIDENT]
        if not missing:
            return Verdict(True, False, self._continue(self._planner.seen(covering[-1])))
        if self._deadlines.refuses(missing, now_s):
            return REFUSE
        want = Want(ticket, len(missing))
        for index in missing:
            self._wants.setdefault(index, []).append(want)
            self._deadlines.begin(index, now_s)
        fetches = [*self._bring(missing)]
        if not fetches:
            fetches += self._continue(self._planner.seen(missing[-1]))
        return Verdict(False, False, tuple(fetches))

    def prefetch(self, start: int, end: int, limit_bytes: int) -> Fetch | None:
        """The first absent chunks of bytes [start, end), at most `limit_bytes` (but at least one
        chunk), now marked as being prefetched; None when there are none. Those that readers wait
        for are not among them: a prefetch may be held up for readers."""
        within = self.chunks.overlapping(start, end)
        first = self._states.find(State.ABSENT, within.start, within.stop)
        while first in self._wants:
            first = self._states.find(State.ABSENT, first + 1, within.stop)
        if first < 0:
            return None
        stop = min((i for i in self._wants if first < i < within.stop), default=within.stop)
        return self._fetch(first, limit_bytes, State.PREFETCHING, stop)

    def arrived(self, fetch: Fetch, index: int) -> bool:
        """A chunk's bytes are all here. False: somebody else was faster, do not use them."""
        if self._states[index] not in (State.PREFETCHING, State.DEMANDED):
            return False
        self._move(index, State.ARRIVED)
        self._owners[index] = fetch.number
        return True

    def completing(self, run: Run) -> list[int]:
        """The tickets that will be complete once these chunks have landed."""
        found: dict[int, int] = {}
        missing: dict[int, int] = {}
        for index in range(run.first, run.end):
            for want in self._wants.get(index, ()):
                found[want.ticket] = found.get(want.ticket, 0) + 1
                missing[want.ticket] = want.missing
        return [ticket for ticket, count in found.items() if count == missing[ticket]]

    def landed(self, run: Run) -> list[int]:
        """Chunks are in the cache file: the tickets that are complete now."""
        self._deadlines.landed()
        tickets = []
        start, end = self.chunks.offset(run.first), self.chunks.padded_end(run.end - 1)
        self.resident_bytes += end - start
        for index in range(run.first, run.end):
            self._move(index, State.RESIDENT)
            self._owners.pop(index, None)
            self._joined.discard(index)
            self._deadlines.end(index)
            for want in self._wants.pop(index, ()):
                want.missing -= 1
                if want.missing == 0:
                    tickets.append(want.ticket)
        return tickets

    @property
    def joined(self) -> bool:
        """Whether readers wait for what a prefetch is bringing: `overtake` from time to time."""
        return bool(self._joined)

    def overtake(self) -> tuple[Fetch, ...]:
        """Fetch what readers wait for and prefetches have become slow to bring."""
        self._joined.intersection_update(self._wants)
        return tuple(self._bring(list(self._joined)))

    def ahead(self, run: Run) -> tuple[Fetch, ...]:
        """Chunks have landed: what to fetch next for a reader that reads on."""
        return self._continue(self._planner.landed(run.end - 1))

    def paced(self, fetch: Fetch, first_byte_s: float, seconds: float) -> None:
        """A fetch brought all its bytes, in so many seconds; the first after `first_byte_s`."""
        chunks = self.chunks
        start, end = chunks.offset(fetch.first), chunks.padded_end(fetch.end - 1)
        remote_bytes = self._remote_end(fetch.end - 1) - chunks.remote_offset(fetch.first)
        self._planner.paced(end - start, remote_bytes, first_byte_s, seconds)

    def again(self, index: int) -> Fetch:
        """A chunk arrived but was not what it should be: it is demanded once more."""
        return self._own(Run(index, index + 1), State.DEMANDED)

    def spoiled(self, offset: int) -> Fetch | None:
        """The chunk at byte `offset` is in the cache file and is not what it should be: it is
        demanded, and readers wait for it; None when it is not resident."""
        covering = self.chunks.overlapping(offset, offset + 1)
        if not covering or self._states[covering[0]] != State.RESIDENT:
            return None
        index = covering[0]
        self._residents -= 1
        self.resident_bytes -= self.chunks.padded_end(index) - self.chunks.offset(index)
        return self.again(index)

    def lost(self, fetch: Fetch, now_s: float, ending: Ending = Ending.FAILED) -> Lost:
        """A fetch has ended: those of its chunks that did not land are absent again, unless
        another fetch has taken them over."""
        owned = [i for i in range(fetch.first, fetch.end) if self._owners.get(i) == fetch.number]
        if not owned:
            return Lost([], ())
        anew = ending in (Ending.DONE, Ending.LATE)
        patient = anew or (ending is Ending.AWAY and self._deadlines.outlasts)
        # A prefetch's end is no verdict for those who joined it: they have not asked yet.
        joined = self._joined.intersection(owned)
        kept = [i for i in owned if i in joined or (patient and self._deadlines.has_time(i, now_s))]
        self._abandon(owned)
        tickets = self._refuse([i for i in owned if i not in kept], now_s)
        return Lost(tickets, self._anew(i for i in kept if anew or i in joined))

    @property
    def stranded(self) -> bool:
        """Whether readers wait for chunks that nobody brings."""
        return any(self._states[index] == State.ABSENT for index in self._wants)

    def resume(self, *, scout: bool = False) -> tuple[Fetch, ...]:
        """Bring what is stranded; as a `scout`, only what has been waited for longest."""
        stranded = [i for i in self._wants if self._states[i] == State.ABSENT]
        return self._anew(stranded[:1] if scout else stranded)

    def give_up(self, index: int, now_s: float) -> list[int]:
        """A chunk will not come: it is absent. The tickets that fail now."""
        self._abandon([index])
        return self._refuse([index], now_s)

    def _abandon(self, indexes: Iterable[int]) -> None:
        for index in indexes:
            self._move(index, State.ABSENT)
            del self._owners[index]

    def expire(self, now_s: float) -> list[int]:
        """The tickets whose chunk has been waited for too long."""
        return self._refuse(self._deadlines.expired(now_s, self._here), now_s)

    def next_deadline_s(self) -> float | None:
        """When `expire` has something to do, or None."""
        return self._deadlines.next_s

    def _here(self, index: int) -> bool:
        return self._states[index] == State.ARRIVED

    def _anew(self, indexes: Iterable[int]) -> tuple[Fetch, ...]:
        """Fetches of such of these as are still waited for."""
        return tuple(self._bring(index for index in indexes if index in self._wants))

    def _bring(self, indexes: Iterable[int]) -> Iterator[Fetch]:
        """Fetches of such of these as are not on their way, or on that of a slow prefetch; one may
        bring several of them."""
        for index in indexes:
            left: list[int] = []
            if self._states[index] == State.PREFETCHING:
                number = self._owners[index]
                if self._prefetches and not self._prefetches.slow(number, index):
                    self._joined.add(index)
                    continue
                left = self._stop(number, index)
            if self._states[index] == State.ABSENT:
                yield self._window(self._planner.miss(index))
            yield from self._bring(left)

    def _stop(self, number: int, index: int) -> list[int]:
        """End the prefetch that brings a chunk. Those of its chunks that others wait for."""
        first = end = index
        while first and self._brings(number, first - 1):
            first -= 1
        while end < self.chunks.count and self._brings(number, end):
            end += 1
        self._abandon(range(first, end))
        if self._prefetches:
            self._prefetches.stop(number)
        return [i for i in range(first, end) if i in self._wants]

    def _brings(self, number: int, index: int) -> bool:
        return self._states[index] == State.PREFETCHING and self._owners[index] == number

    def _refuse(self, indexes: Iterable[int], now_s: float) -> list[int]:
        tickets: dict[int, None] = {}
        for index in indexes:
            self._deadlines.refuse(index, now_s)
            tickets.update(dict.fromkeys(want.ticket for want in self._wants.pop(index, ())))
        for index in [i for i, wants in self._wants.items() if wants]:
            kept = [want for want in self._wants[index] if want.ticket not in tickets]
            if kept:
                self._wants[index] = kept
            else:
                del self._wants[index]
                self._deadlines.end(index)
        return list(tickets)

    def _covered(self, covering: range, start: int, end: int) -> bool:
        """Whether the chunks leave none of the bytes out."""
        at = start
        for index in covering:
            if self.chunks.offset(index) > at:
                return False
            at = self.chunks.padded_end(index)
        return at >= end

    def _continue(self, stream: Stream | None) -> tuple[Fetch, ...]:
        """The window, if there is anything to fetch of it. What is on its way is not: nobody waits
        for it yet."""
        fetch = self._window(stream) if stream is not None else None
        return (fetch,) if fetch is not None and fetch.end > fetch.first else ()

    def _window(self, stream: Stream) -> Fetch:
        """The window from its first chunk on, as far as it is absent; demanded now."""
        fetch = self._fetch(stream.first, stream.window_bytes, State.DEMANDED)
        self._planner.fetched(stream, fetch.end)
        return fetch

    def _fetch(self, first: int, limit_bytes: int, state: State, stop: int | None = None) -> Fetch:
        """Absent chunks from `first` on until `limit_bytes` are reached, `stop` or the blob's end,
        a chunk that is not absent, or bytes of no chunk that take longer than a round trip (maps
        built from a bootstrap's chunk table have holes: what only other images use)."""
        end, start, at = first, 0, 0
        stop = len(self._states) if stop is None else stop
        while end < stop and self._states[end] == State.ABSENT:
            offset = self.chunks.offset(end)
            if end == first:
                start = offset
            elif at - start >= limit_bytes or (offset != at and not self._bridged(end)):
                break
            at = self.chunks.padded_end(end)
            end += 1
        return self._own(Run(first, end), state)

    def _bridged(self, index: int) -> bool:
        """Whether the hole before a chunk is fetched with what is around it."""
        hole_bytes = self.chunks.remote_offset(index) - self._remote_end(index - 1)
        return hole_bytes <= self._planner.gap_bytes

    def _remote_end(self, index: int) -> int:
        return self.chunks.remote_offset(index) + self.chunks.remote_size(index)

    def _own(self, run: Run, state: State) -> Fetch:
        self._fetches += 1
        for index in range(run.first, run.end):
            self._move(index, state)
            self._owners[index] = self._fetches
            if state is State.DEMANDED:
                self._joined.discard(index)
        return Fetch(self._fetches, run.first, run.end)

    def _move(self, index: int, state: State) -> None:
        if state not in TRANSITIONS[self._states[index]]:
            was = self.state(index).name
            raise AssertionError(f"chunk {index} cannot become {state.name}: it is {was}")
        self._states[index] = state
        self._residents += state is State.RESIDENT
