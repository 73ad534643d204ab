"""Chunk states and waiting readers, in every order the loop could meet them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fscached.cache.blob import Blob, Ending, Fetch, Run, State
from fscached.cache.extents import Extents
from fscached.cache.planner import Planner

PAGE = 4096
END = 1 << 40


class Layout:
    """A chunk map of chunks with the given lengths in pages, some of them behind holes; the blob
    file is as long as the cache file."""

    def __init__(self, pages: list[int], holes: dict[int, int] | None = None) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        at = 0
        for index, length in enumerate(pages):
            at += (holes or {}).get(index, 0) * PAGE
            self._starts.append(at)
            at += length * PAGE
            self._ends.append(at)

    @property
    def count(self) -> int:
        return len(self._ends)

    def offset(self, index: int) -> int:
        return self._starts[index]

    def padded_end(self, index: int) -> int:
        return self._ends[index]

    def remote_offset(self, index: int) -> int:
        return self._starts[index]

    def remote_size(self, index: int) -> int:
        return self._ends[index] - self._starts[index]

    def overlapping(self, start: int, end: int) -> range:
        hits = [i for i in range(self.count) if self.offset(i) < end and self.padded_end(i) > start]
        return range(hits[0], hits[-1] + 1) if hits else range(0)


OUTAGE_LIMIT_S = 100.0


def blob(
    pages: list[int],
    window_pages: int = 4,
    limit_pages: int = 32,
    outage_limit_s: float | None = None,
) -> Blob:
    planner = Planner(window_pages * PAGE, limit_pages * PAGE)
    return Blob(Layout(pages), planner, 30.0, 1.0, outage_limit_s)


def fly(target: Blob, fetch: Fetch) -> list[int]:
    """Land all of a fetch at once."""
    tickets = []
    for index in range(fetch.first, fetch.end):
        if target.arrived(fetch, index):
            tickets += target.landed(Run(index, index + 1))
    return tickets + target.lost(fetch, 0.0).tickets


def test_a_reader_wakes_when_its_own_chunk_has_landed():
    """The rest of the window may still be on its way."""
    target = blob([1] * 8)
    verdict = target.want(7, 0, PAGE, 0.0)
    assert verdict.fetches == (Fetch(1, 0, 4),)
    assert target.arrived(verdict.fetches[0], 0)
    assert target.landed(Run(0, 1)) == [7]
    assert target.state(1) == State.DEMANDED


def test_a_want_across_chunks_waits_for_all_of_them():
    """A READ that covers two chunks is complete with the second."""
    target = blob([1] * 8)
    (fetch,) = target.want(7, 0, 2 * PAGE, 0.0).fetches
    target.arrived(fetch, 1)
    assert target.landed(Run(1, 2)) == []
    target.arrived(fetch, 0)
    assert target.landed(Run(0, 1)) == [7]


def test_a_reader_that_reads_on_finds_the_next_window_on_its_way():
    """Half of a window has landed: the next is fetched, once, wherever the reader is in it."""
    target = blob([1] * 40)
    (first,) = target.want(1, 0, PAGE, 0.0).fetches
    fly(target, first)
    (second,) = target.want(2, 4 * PAGE, 5 * PAGE, 0.0).fetches
    assert (second.first, second.end) == (4, 12)
    landed = []
    for index in range(second.first, second.end):
        target.arrived(second, index)
        target.landed(Run(index, index + 1))
        landed += target.ahead(Run(index, index + 1))
    assert [(fetch.first, fetch.end) for fetch in landed] == [(12, 28)]
    assert not target.want(3, 11 * PAGE, 12 * PAGE, 0.0).fetches


def test_a_reader_of_resident_bytes_is_seen_too():
    """On fanotify it asks for those as well: what follows them is fetched before it gets there."""
    target = blob([1] * 40)
    (first,) = target.want(1, 0, PAGE, 0.0).fetches
    fly(target, first)
    (second,) = target.want(2, 4 * PAGE, 5 * PAGE, 0.0).fetches
    fly(target, second)
    verdict = target.want(3, 11 * PAGE, 12 * PAGE, 0.0)
    assert verdict.complete
    assert [(fetch.first, fetch.end) for fetch in verdict.fetches] == [(12, 28)]


@pytest.mark.parametrize(("gap_pages", "fetched"), [(0, (0, 2)), (2, (0, 4)), (3, (0, 5))])
def test_a_hole_is_fetched_along_if_that_is_quicker_than_to_ask_again(gap_pages, fetched):
    """Bytes that are of no chunk of this image, between chunks that are."""
    planner = Planner(16 * PAGE, 32 * PAGE)
    planner.gap_bytes = gap_pages * PAGE
    target = Blob(Layout([1] * 6, {2: 2, 4: 3, 5: 9}), planner, 30.0, 1.0)
    (fetch,) = target.want(7, 0, PAGE, 0.0).fetches
    assert (fetch.first, fetch.end) == fetched
    assert fly(target, fetch) == [7]


def test_no_resident_byte_is_fetched_again_whatever_a_round_trip_costs():
    """Twice the bytes for fewer requests is no bargain (docs/decisions/windows.md)."""
    planner = Planner(16 * PAGE, 32 * PAGE)
    planner.gap_bytes = 8 * PAGE
    target = Blob(Layout([1] * 8), planner, 30.0, 1.0)
    target.learn(Extents([(2 * PAGE, 3 * PAGE)]))
    (fetch,) = target.want(7, 0, PAGE, 0.0).fetches
    assert (fetch.first, fetch.end) == (0, 2)


def test_wants_join_fetches_in_flight():
    """Sixty-four readers of one cold chunk lead to one fetch."""
    target = blob([1] * 8)
    fetches = [fetch for ticket in range(64) for fetch in target.want(ticket, 0, PAGE, 0.0).fetches]
    assert len(fetches) == 1
    assert sorted(fly(target, fetches[0])) == list(range(64))


class Prefetches:
    """Prefetches that are slow to bring the chunks in `late`."""

    def __init__(self) -> None:
        self.late: set[int] = set()
        self.stopped: list[int] = []

    def slow(self, number: int, index: int) -> bool:
        assert number not in self.stopped
        return index in self.late

    def stop(self, number: int) -> None:
        self.stopped.append(number)


def prefetching(pages: list[int]) -> tuple[Blob, Fetch, Prefetches]:
    """A blob, the prefetch of its first eight pages, and what becomes of that."""
    prefetches = Prefetches()
    planner = Planner(4 * PAGE, 32 * PAGE)
    target = Blob(Layout(pages), planner, 30.0, 1.0, None, prefetches)
    prefetch = target.prefetch(0, END, 8 * PAGE)
    assert prefetch is not None and (prefetch.first, prefetch.end) == (0, 8)
    return target, prefetch, prefetches


def test_demand_takes_over_from_a_slow_prefetch():
    """What of it has arrived lands, the rest is a window of the reader's and others' to bring."""
    target, slow, prefetches = prefetching([1] * 8)
    prefetches.late = {3}
    assert target.arrived(slow, 0)
    (quick,) = target.want(1, 3 * PAGE, 4 * PAGE, 0.0).fetches
    assert (quick.first, quick.end) == (3, 7)
    assert prefetches.stopped == [slow.number]
    assert not target.arrived(slow, 1)
    assert target.landed(Run(0, 1)) == []
    assert fly(target, quick) == [1]
    assert target.lost(slow, 0.0) == ([], ())
    states = [target.state(index) for index in range(8)]
    assert states == [State.RESIDENT, *[State.ABSENT] * 2, *[State.RESIDENT] * 4, State.ABSENT]


def test_bytes_that_come_from_a_prefetch_that_was_stopped_are_used_if_they_are_first():
    """Whichever comes second is not."""
    target, slow, prefetches = prefetching([1] * 8)
    prefetches.late = {3}
    (quick,) = target.want(1, 3 * PAGE, 4 * PAGE, 0.0).fetches
    assert target.arrived(slow, 3)
    assert not target.arrived(quick, 3)
    assert target.landed(Run(3, 4)) == [1]


def test_demand_joins_a_prefetch_that_is_as_quick_as_its_own_fetch_would_be():
    """No byte comes twice, and the reader wakes at its own chunk."""
    target, prefetch, prefetches = prefetching([1] * 8)
    assert target.want(1, 2 * PAGE, 3 * PAGE, 0.0) == (False, False, ())
    assert target.joined and target.overtake() == ()
    assert target.arrived(prefetch, 2)
    assert target.overtake() == ()
    assert target.landed(Run(2, 3)) == [1]
    assert not target.joined and not prefetches.stopped


def test_a_joined_prefetch_that_becomes_slow_is_stopped_for_all_who_wait():
    """Each of them gets a window, unless another's brings what it wants."""
    target, prefetch, prefetches = prefetching([1] * 16)
    for ticket, index in enumerate((1, 3, 6)):
        assert target.want(ticket, index * PAGE, (index + 1) * PAGE, 0.0).fetches == ()
    prefetches.late = {3}
    fetches = target.overtake()
    assert sorted((fetch.first, fetch.end) for fetch in fetches) == [(1, 3), (3, 7)]
    assert target.overtake() == () and not target.joined
    assert sorted(ticket for fetch in fetches for ticket in fly(target, fetch)) == [0, 1, 2]
    assert prefetches.stopped == [prefetch.number]


@pytest.mark.parametrize("ending", Ending)
def test_a_joined_prefetch_that_ends_is_no_verdict(ending):
    """Whoever joined it asks for the first time now, and fails or not by that."""
    target, prefetch, _ = prefetching([1] * 8)
    target.want(1, 2 * PAGE, 3 * PAGE, 0.0)
    assert target.lost(prefetch, 5.0, ending) == ([], (Fetch(2, 2, 6),))
    assert not target.joined
    assert target.lost(Fetch(2, 2, 6), 6.0) == ([1], ())


def test_a_window_ahead_leaves_what_is_prefetched_alone():
    """Nobody waits for it yet."""
    target = blob([1] * 16, window_pages=2)
    (first,) = target.want(1, 0, PAGE, 0.0).fetches
    assert target.prefetch(4 * PAGE, END, 4 * PAGE) is not None
    fly(target, first)
    (second,) = target.want(2, 2 * PAGE, 3 * PAGE, 0.0).fetches
    assert (second.first, second.end) == (2, 4)
    assert target.arrived(second, 2) and target.arrived(second, 3)
    target.landed(Run(2, 4))
    assert target.ahead(Run(2, 4)) == ()
    assert target.state(4) == State.PREFETCHING


def test_what_readers_wait_for_is_not_prefetched():
    """Stranded chunks are demand's own: a prefetch may be held up for the sake of readers."""
    target = blob([1] * 8, window_pages=1, outage_limit_s=OUTAGE_LIMIT_S)
    (fetch,) = target.want(1, 3 * PAGE, 4 * PAGE, 0.0).fetches
    assert target.lost(fetch, 1.0, Ending.AWAY) == ([], ()) and target.stranded
    brought = []
    while fetch := target.prefetch(0, END, 8 * PAGE):
        brought.append((fetch.first, fetch.end))
    assert brought == [(0, 3), (4, 8)]
    assert target.prefetch(3 * PAGE, 4 * PAGE, PAGE) is None


def test_a_lost_chunk_refuses_for_a_while_and_then_is_fetched_anew():
    """The kernel asks again two to four times before it gives up: those fail at once."""
    target = blob([1] * 4)
    (fetch,) = target.want(1, 0, PAGE, 0.0).fetches
    assert target.lost(fetch, 5.0) == ([1], ())
    assert target.want(2, 0, PAGE, 5.5).refuse
    assert target.want(3, 0, PAGE, 6.5).fetches
    # The window's other chunks had no reader: asking for one of them is not refused.
    assert not target.want(4, PAGE, 2 * PAGE, 5.5).refuse


def test_the_deadline_belongs_to_the_chunk():
    """A second reader who comes late fails with the first; later ones fail at once."""
    target = blob([1] * 4)
    target.want(1, 0, PAGE, 0.0)
    target.want(2, 0, PAGE, 29.0)
    assert target.next_deadline_s() == 30.0
    assert target.expire(29.9) == []
    assert sorted(target.expire(30.0)) == [1, 2]
    assert target.want(3, 0, PAGE, 30.5).refuse
    assert target.next_deadline_s() is None


def test_a_source_that_was_silent_for_a_deadline_refuses_other_chunks_too():
    """A page fault across two chunks asks for one after the other: it fails within one deadline."""
    target = blob([1] * 8)
    target.want(1, 0, PAGE, 0.0)
    assert target.expire(30.0) == [1]
    assert target.want(2, 6 * PAGE, 7 * PAGE, 30.5).refuse
    assert target.want(3, 6 * PAGE, 7 * PAGE, 31.5).fetches


def test_a_source_that_brought_anything_is_not_silent():
    """One slow chunk says nothing of the others."""
    target = blob([1] * 8)
    target.want(1, 0, PAGE, 0.0)
    (fetch,) = target.want(2, 4 * PAGE, 5 * PAGE, 10.0).fetches
    assert fly(target, fetch) == [2]
    assert target.expire(30.0) == [1]
    assert not target.want(3, 3 * PAGE, 4 * PAGE, 30.5).refuse
    assert target.want(4, 0, PAGE, 30.5).refuse


def test_a_fetch_out_of_time_is_no_verdict_on_those_who_came_later():
    """The window took longer than its first chunk may: who waits for less long is served anew."""
    target = blob([1] * 4)
    (fetch,) = target.want(1, 0, PAGE, 0.0).fetches
    target.want(2, 2 * PAGE, 3 * PAGE, 20.0)
    target.expire(30.0)
    assert target.lost(fetch, 30.0, Ending.LATE) == ([], (Fetch(2, 2, 4),))
    assert target.expire(49.9) == []
    assert target.expire(50.0) == [2]


def test_what_a_fetch_left_out_is_fetched_anew_for_those_who_came_for_it():
    """A fetch from this machine ends without the rest of its window when workers are behind: a
    reader that joined it, or whose READ goes on there, waits for the next one."""
    target = blob([1] * 4)
    (fetch,) = target.want(1, 0, 2 * PAGE, 0.0).fetches
    assert target.want(2, 2 * PAGE, 3 * PAGE, 0.5).fetches == ()
    assert target.arrived(fetch, 0)
    assert target.landed(Run(0, 1)) == []
    assert target.lost(fetch, 1.0, Ending.DONE) == ([], (Fetch(2, 1, 4),))
    assert not target.want(3, 3 * PAGE, 4 * PAGE, 1.0).refuse
    assert target.expire(29.9) == []
    assert target.expire(30.0) == [1]
    assert target.expire(30.5) == [2]


def test_what_a_fetch_left_out_and_nobody_wants_is_left_alone():
    """It is fetched when it is wanted."""
    target = blob([1] * 4)
    (fetch,) = target.want(1, 0, PAGE, 0.0).fetches
    assert target.arrived(fetch, 0)
    assert target.landed(Run(0, 1)) == [1]
    assert target.lost(fetch, 1.0, Ending.DONE) == ([], ())
    assert target.want(2, PAGE, 2 * PAGE, 1.0).fetches


def test_a_fetch_out_of_time_fails_who_waits_for_another_chunk_of_it():
    """A READ across an expired chunk and one that has time left has failed with the former."""
    target = blob([1] * 4)
    (fetch,) = target.want(1, 0, PAGE, 0.0).fetches
    target.want(2, 0, 2 * PAGE, 20.0)
    assert target.lost(fetch, 30.0, Ending.LATE) == ([1, 2], ())


def test_readers_outlast_a_source_that_is_away():
    """A fetch that reached nobody fails none of them; one scout, then all that is stranded."""
    target = blob([1] * 12, outage_limit_s=OUTAGE_LIMIT_S)
    (first,) = target.want(1, 0, PAGE, 0.0).fetches
    (second,) = target.want(2, 8 * PAGE, 9 * PAGE, 5.0).fetches
    assert target.lost(first, 6.0, Ending.AWAY) == ([], ()) and target.stranded
    assert target.lost(second, 6.0, Ending.AWAY) == ([], ())
    assert target.expire(99.9) == []
    (scout,) = target.resume(scout=True)
    assert (scout.first, scout.end) == (0, 4)
    assert fly(target, scout) == [1]
    (rest,) = target.resume()
    assert fly(target, rest) == [2]
    assert not target.stranded and target.next_deadline_s() is None


def test_a_reader_outlasts_no_more_than_its_limit():
    """At the limit it fails, and the kernel's next questions with it."""
    target = blob([1] * 4, outage_limit_s=OUTAGE_LIMIT_S)
    (fetch,) = target.want(1, 0, PAGE, 0.0).fetches
    target.lost(fetch, 3.0, Ending.AWAY)
    assert target.expire(target.next_deadline_s()) == []
    assert target.next_deadline_s() == OUTAGE_LIMIT_S
    assert target.expire(OUTAGE_LIMIT_S) == [1]
    assert target.want(2, 0, PAGE, OUTAGE_LIMIT_S + 0.5).refuse
    assert target.resume() == () and not target.stranded


def test_whoever_asks_during_an_outage_is_a_scout():
    """A want for a stranded chunk fetches it anew, for all who wait for it."""
    target = blob([1] * 4, outage_limit_s=OUTAGE_LIMIT_S)
    (fetch,) = target.want(1, 0, PAGE, 0.0).fetches
    target.lost(fetch, 3.0, Ending.AWAY)
    (again,) = target.want(2, 0, PAGE, 50.0).fetches
    assert sorted(fly(target, again)) == [1, 2]


def test_only_the_source_is_outlasted():
    """Bytes that are here and cannot be written, or stay wrong, fail as soon as ever."""
    target = blob([1] * 8, window_pages=1, outage_limit_s=OUTAGE_LIMIT_S)
    (stuck,) = target.want(1, 0, PAGE, 0.0).fetches
    target.arrived(stuck, 0)
    assert target.expire(30.0) == [1]
    (broken,) = target.want(2, 4 * PAGE, 5 * PAGE, 40.0).fetches
    assert target.lost(broken, 41.0, Ending.FAILED) == ([2], ())
    (wrong,) = target.want(3, 6 * PAGE, 7 * PAGE, 50.0).fetches
    target.arrived(wrong, 6)
    assert target.give_up(6, 51.0) == [3]


def test_without_patience_an_outage_fails_at_once():
    """`eio`: what could not be fetched is as any other failure."""
    target = blob([1] * 4)
    (fetch,) = target.want(1, 0, PAGE, 0.0).fetches
    assert target.lost(fetch, 5.0, Ending.AWAY) == ([1], ())
    assert not target.stranded


def test_bytes_that_come_after_the_deadline_are_kept():
    """The reader has failed, its chunk lands all the same."""
    target = blob([1] * 4)
    (fetch,) = target.want(1, 0, PAGE, 0.0).fetches
    target.expire(30.0)
    assert fly(target, fetch) == []
    assert target.want(2, 0, PAGE, 30.1).complete


def test_a_bad_chunk_is_fetched_again_while_its_reader_waits():
    """Its readers are woken by the second try."""
    target = blob([1] * 4)
    (fetch,) = target.want(1, 0, PAGE, 0.0).fetches
    target.arrived(fetch, 0)
    second = target.again(0)
    assert target.lost(fetch, 0.0) == ([], ())
    assert fly(target, second) == [1]


def test_a_torn_chunk_is_not_resident():
    """All padded pages must be data: one page short is absent."""
    target = blob([2, 2, 2])
    target.learn(Extents([(0, 3 * PAGE), (4 * PAGE, 6 * PAGE)]))
    assert [target.state(i) for i in range(3)] == [State.RESIDENT, State.ABSENT, State.RESIDENT]


def test_bytes_of_no_chunk_are_refused():
    """A READ beyond the last chunk can never be filled."""
    assert blob([1, 1]).want(1, 2 * PAGE, 3 * PAGE, 0.0).refuse
    assert blob([1, 1]).want(1, PAGE, 3 * PAGE, 0.0).refuse


def test_impossible_moves_raise():
    """A chunk that never arrived cannot land unseen by the table."""
    target = blob([1])
    target.want(1, 0, PAGE, 0.0)
    with pytest.raises(AssertionError, match="cannot become RESIDENT"):
        target.landed(Run(0, 1))


class Interleavings(RuleBasedStateMachine):
    """Any order of wants, arrivals, losses and deadlines: every ticket is answered exactly once,
    and no chunk is owned by two demand fetches."""

    @initialize(
        pages=st.lists(st.integers(1, 3), min_size=1, max_size=12),
        holes=st.dictionaries(st.integers(0, 11), st.integers(1, 4), max_size=4),
        gap_pages=st.integers(0, 4),
        outage_limit_s=st.sampled_from([None, OUTAGE_LIMIT_S]),
    )
    def begin(self, pages, holes, gap_pages, outage_limit_s):
        self.layout = Layout(pages, holes)
        self.planner = Planner(4 * PAGE, 8 * PAGE)
        self.planner.gap_bytes = gap_pages * PAGE
        self.prefetches = Prefetches()
        self.target = Blob(self.layout, self.planner, 30.0, 1.0, outage_limit_s, self.prefetches)
        self.now = 0.0
        self.next_ticket = 0
        self.open: set[int] = set()
        self.answers: Counter[int] = Counter()
        self.flights: list[Fetch] = []
        self.arrived: list[tuple[Fetch, int]] = []

    def _answer(self, tickets):
        self.answers.update(tickets)
        self.open.difference_update(tickets)

    @rule(data=st.data())
    def want(self, data):
        size = self.layout.padded_end(self.layout.count - 1) // PAGE
        start = data.draw(st.integers(0, size - 1))
        end = data.draw(st.integers(start + 1, min(size, start + 4)))
        ticket, self.next_ticket = self.next_ticket, self.next_ticket + 1
        verdict = self.target.want(ticket, start * PAGE, end * PAGE, self.now)
        if verdict.complete or verdict.refuse:
            self.answers[ticket] += 1
            assert verdict.complete or not verdict.fetches
        else:
            self.open.add(ticket)
        self._take_off(verdict.fetches)

    def _take_off(self, fetches):
        """No chunk that is resident, and no hole that is dear, is in a fetch."""
        for fetch in fetches:
            for index in range(fetch.first, fetch.end):
                assert self.target.state(index) == State.DEMANDED
                hole = self.layout.offset(index) - self.layout.padded_end(max(index - 1, 0))
                assert index == fetch.first or hole <= self.planner.gap_bytes
        self.flights += fetches

    @rule(pages=st.integers(1, 8))
    def prefetch(self, pages):
        fetch = self.target.prefetch(0, END, pages * PAGE)
        if fetch is not None:
            self.flights.append(fetch)

    @precondition(lambda self: self.flights)
    @rule(data=st.data())
    def arrive(self, data):
        fetch = data.draw(st.sampled_from(self.flights))
        index = data.draw(st.integers(fetch.first, fetch.end - 1))
        if self.target.arrived(fetch, index):
            self.arrived.append((fetch, index))

    @precondition(lambda self: self.arrived)
    @rule(data=st.data(), good=st.booleans())
    def land(self, data, good):
        pair = data.draw(st.sampled_from(self.arrived))
        self.arrived.remove(pair)
        index = pair[1]
        if good:
            self._answer(self.target.landed(Run(index, index + 1)))
            self._take_off(self.target.ahead(Run(index, index + 1)))
        else:
            self.flights.append(self.target.again(index))

    @precondition(lambda self: self.flights)
    @rule(data=st.data(), ending=st.sampled_from(Ending))
    def lose(self, data, ending):
        fetch = data.draw(st.sampled_from(self.flights))
        self.flights.remove(fetch)
        self.arrived = [pair for pair in self.arrived if pair[0] != fetch]
        lost = self.target.lost(fetch, self.now, ending)
        self._answer(lost.tickets)
        self._take_off(lost.fetches)

    @rule(scout=st.booleans())
    def resume(self, scout):
        fetches = self.target.resume(scout=scout)
        assert bool(fetches) or not self.target.stranded
        self._take_off(fetches)
        assert scout or not self.target.stranded

    @rule(late=st.sets(st.integers(0, 11)))
    def overtake(self, late):
        self.prefetches.late = late
        self._take_off(self.target.overtake())

    @rule(seconds=st.floats(0, 40))
    def pass_time(self, seconds):
        self.now += seconds
        self._answer(self.target.expire(self.now))

    @invariant()
    def answered_once(self):
        assert all(count == 1 for count in self.answers.values())
        assert self.target.waiting == len(self.open)

    def teardown(self):
        if hasattr(self, "target"):
            self._answer(self.target.expire(self.now + 31))
            self._answer(self.target.expire(self.now + OUTAGE_LIMIT_S + 1))
            assert not self.open
            assert sorted(self.answers) == list(range(self.next_ticket))


class Outage(RuleBasedStateMachine):
    """A source that is away for good: whoever waits does so for the limit of a chunk of theirs, no
    less and no more."""

    @initialize(pages=st.lists(st.integers(1, 3), min_size=1, max_size=12))
    def begin(self, pages):
        self.layout = Layout(pages)
        self.target = Blob(self.layout, Planner(4 * PAGE, 8 * PAGE), 30.0, 1.0, OUTAGE_LIMIT_S)
        self.now = 0.0
        self.failed_at = -2.0
        self.next_ticket = 0
        self.open: dict[int, range] = {}
        self.since: dict[int, float] = {}
        self.flights: list[Fetch] = []

    def _fail(self, tickets):
        for ticket in tickets:
            chunks = self.open.pop(ticket)
            assert any(self.since[i] + OUTAGE_LIMIT_S <= self.now for i in chunks)
            self.failed_at = self.now
        waited_for = {i for chunks in self.open.values() for i in chunks}
        self.since = {i: at for i, at in self.since.items() if i in waited_for}

    @rule(data=st.data())
    def want(self, data):
        index = data.draw(st.integers(0, self.layout.count - 1))
        end = data.draw(st.integers(index + 1, self.layout.count))
        start, end_byte = self.layout.offset(index), self.layout.padded_end(end - 1)
        ticket, self.next_ticket = self.next_ticket, self.next_ticket + 1
        verdict = self.target.want(ticket, start, end_byte, self.now)
        assert not verdict.complete
        if verdict.refuse:
            assert self.now < self.failed_at + 1.0
            return
        self.open[ticket] = range(index, end)
        for chunk in range(index, end):
            self.since.setdefault(chunk, self.now)
        self.flights += verdict.fetches

    @precondition(lambda self: self.flights)
    @rule(data=st.data(), ending=st.sampled_from([Ending.AWAY, Ending.LATE]))
    def lose(self, data, ending):
        fetch = data.draw(st.sampled_from(self.flights))
        self.flights.remove(fetch)
        lost = self.target.lost(fetch, self.now, ending)
        self._fail(lost.tickets)
        self.flights += lost.fetches

    @rule(scout=st.booleans())
    def resume(self, scout):
        self.flights += self.target.resume(scout=scout)

    @rule(seconds=st.floats(0, 70))
    def pass_time(self, seconds):
        self.now += seconds
        self._fail(self.target.expire(self.now))
        assert all(self.since[i] + OUTAGE_LIMIT_S > self.now for c in self.open.values() for i in c)


Outage.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestOutage = Outage.TestCase

Interleavings.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestInterleavings = Interleavings.TestCase
