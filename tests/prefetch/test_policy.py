"""What comes next: by expected use, everything that is wanted, nothing twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fscached.prefetch.policy import (
    PROVEN_BYTES,
    STREAM_LIMIT,
    Agenda,
    Look,
    Range,
    Streams,
    expected,
    joined,
)
from fscached.prefetch.trace import Access, Trace
from fscached.source import Priority

CHUNK = 65536
COUNT = 24

ranges = st.builds(
    lambda blob, first, count: Range(blob, first * CHUNK, min(first + count, COUNT) * CHUNK),
    st.sampled_from("ab"),
    st.integers(0, COUNT - 1),
    st.integers(1, 4),
)


def places(found: Range) -> set[tuple[str, int]]:
    return {(found.blob_id, at) for at in range(found.start, found.end, CHUNK)}


def covered(found: list[Range]) -> set[tuple[str, int]]:
    return set().union(*map(places, found)) if found else set()


class Blobs:
    """Chunks of two blobs, brought one at a time."""

    def __init__(self) -> None:
        self.open = {"a", "b"}
        self.brought: list[tuple[str, int]] = []

    def take(self, wanted: Range) -> tuple[str, int] | Look:
        if wanted.blob_id not in self.open:
            return Look.LATER
        absent = sorted(places(wanted) - set(self.brought))
        if not absent:
            return Look.NOTHING
        self.brought.append(absent[0])
        return absent[0]

    def drain(self, agenda: Agenda) -> list[tuple[str, int]]:
        """Everything there is to do; bounded, since each step brings something or looks on."""
        before = len(self.brought)
        for _ in range(10_000):
            if agenda.next(self.take) is Look.NOTHING:
                return self.brought[before:]
        raise AssertionError("there is no end of it")


@given(st.lists(ranges, max_size=20), st.integers(1, 40 * CHUNK), st.integers(0, 4 * CHUNK))
def test_joined_ranges_hold_the_same_bytes(given_ranges, window, gap):
    """Nothing is lost, what is added lies in gaps, and what a window holds is not far from where
    it was."""
    found = list(joined(given_ranges, window, gap))
    assert covered(given_ranges) <= covered(found)
    if gap < CHUNK:
        assert covered(found) == covered(given_ranges)
    assert len(found) <= len(given_ranges)


def test_within_a_window_the_order_is_that_of_the_blob():
    """Three chunks next to each other, read in another order, are one request."""
    found = [Range("a", chunk * CHUNK, (chunk + 1) * CHUNK) for chunk in (7, 5, 6, 20)]
    assert list(joined(found, 3 * CHUNK)) == [Range("a", 5 * CHUNK, 8 * CHUNK), found[3]]
    assert list(joined(found, CHUNK)) == found


@given(st.lists(ranges, max_size=12), st.booleans())
def test_everything_wanted_comes_in_order_and_once(listed, whole):
    """The list first, in its order; then, if it is wanted, the rest."""
    rest = [Range("a", 0, COUNT * CHUNK), Range("b", 0, COUNT * CHUNK)] if whole else []
    agenda, blobs = Agenda(listed, None, rest), Blobs()
    brought = blobs.drain(agenda)
    assert len(set(brought)) == len(brought)
    assert set(brought) == covered(listed) | covered(rest)
    order = [place for found in listed for place in sorted(places(found))]
    first_listed = list(dict.fromkeys(order))
    assert brought[: len(first_listed)] == first_listed
    assert agenda.listed_bytes == 0


@given(st.lists(ranges, max_size=12))
def test_a_blob_that_opens_late_has_its_turn(listed):
    """Others go on meanwhile; then what was left for later comes first."""
    agenda, blobs = Agenda(listed, None, ()), Blobs()
    blobs.open = {"b"}
    assert {blob for blob, _ in blobs.drain(agenda)} <= {"b"}
    blobs.open = {"a", "b"}
    agenda.opened()
    blobs.drain(agenda)
    assert set(blobs.brought) == covered(listed)


def test_what_did_not_come_is_taken_again_first():
    listed = [Range("a", 0, CHUNK), Range("b", 0, CHUNK)]
    agenda, blobs = Agenda(listed, None, ()), Blobs()
    assert agenda.next(blobs.take) == ("a", 0)
    assert agenda.next(blobs.take) == ("b", 0)
    blobs.brought.clear()
    agenda.again(listed[0])
    assert agenda.next(blobs.take) == ("a", 0)


def test_many_ranges_do_not_hold_the_loop_up():
    """Ranges that are there are looked at in turns."""
    listed = [Range("a", 0, CHUNK)] * 1000
    agenda, blobs = Agenda(listed, None, ()), Blobs()
    blobs.brought = [("a", 0)]
    looks = [agenda.next(blobs.take) for _ in range(4)]
    assert looks == [Look.LATER, Look.LATER, Look.LATER, Look.NOTHING]


def test_ranges_of_one_priority_are_not_joined_with_others():
    """What is expected does not wait for readers; what else is listed does."""
    expected = [
        Range("a", chunk * CHUNK, (chunk + 1) * CHUNK, Priority.EXPECTED) for chunk in (1, 0)
    ]
    others = [Range("a", chunk * CHUNK, (chunk + 1) * CHUNK) for chunk in (3, 2)]
    found = list(joined([*expected, *others], 8 * CHUNK, CHUNK))
    assert found == [
        Range("a", 0, 2 * CHUNK, Priority.EXPECTED),
        Range("a", 2 * CHUNK, 4 * CHUNK),
    ]
    agenda, blobs = Agenda(found, None, ()), Blobs()
    blobs.brought = [("a", 0), ("a", CHUNK)]
    assert agenda.priority is Priority.EXPECTED
    assert agenda.next(blobs.take) is Look.LATER
    assert agenda.priority is Priority.PREFETCH
    assert blobs.drain(agenda) == [("a", 2 * CHUNK), ("a", 3 * CHUNK)]


def test_a_trace_names_what_came_along_too():
    """In the order of the trace, without blobs the image does not have."""
    trace = Trace(
        "f",
        "",
        1,
        (
            Access("a", 0, CHUNK, 0.1, reach=4 * CHUNK),
            Access("z", 0, CHUNK, 0.2),
            Access("b", 0, CHUNK, 0.3),
        ),
    )
    found = list(expected(trace, frozenset("ab")))
    assert found == [
        Range("a", 0, 4 * CHUNK, Priority.EXPECTED),
        Range("b", 0, CHUNK, Priority.EXPECTED),
    ]


def test_what_most_runs_do_not_read_gives_way_to_readers():
    """It comes behind what is expected."""
    seldom, usual = Access("a", 0, CHUNK, 0.1, demands=1), Access("b", 0, CHUNK, 0.2, demands=2)
    trace = Trace("f", "host/app:1", 3, (seldom, usual))
    assert list(expected(trace, frozenset("ab"))) == [
        Range("b", 0, CHUNK, Priority.EXPECTED),
        Range("a", 0, CHUNK, Priority.PREFETCH),
    ]


class TestStreams:
    """Readers who read on."""

    def test_a_random_reader_is_none(self):
        streams = Streams(1 << 24)
        assert not any(streams.read("a", at * CHUNK, at * CHUNK + 4096) for at in (9, 3, 7, 1))
        assert list(streams.ranges()) == []

    def test_a_sequential_reader_is_led_by_as_much_as_it_has_read(self):
        streams = Streams(8 * PROVEN_BYTES)
        for step in range(20):
            streams.read("a", step * CHUNK, (step + 1) * CHUNK)
            done = (step + 1) * CHUNK
            ahead = min(done, 8 * PROVEN_BYTES) if done >= PROVEN_BYTES else 0
            found = [Range("a", done, done + ahead)] if ahead else []
            assert list(streams.ranges()) == found

    def test_it_is_known_again_where_what_was_brought_ends(self):
        """Resident bytes are read unasked: the next READ comes behind them."""
        streams = Streams(1 << 24)
        streams.read("a", 0, PROVEN_BYTES)
        assert streams.read("a", 2 * PROVEN_BYTES, 2 * PROVEN_BYTES + 4096)
        (ahead,) = streams.ranges()
        assert ahead.start == 2 * PROVEN_BYTES + 4096
        assert not streams.read("a", 1 << 30, (1 << 30) + 4096)

    @given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 1000)), max_size=200))
    def test_however_many_there_are_few_are_remembered(self, reads):
        streams = Streams(1 << 24)
        for blob, chunk in reads:
            streams.read(blob, chunk * CHUNK, (chunk + 1) * CHUNK)
            assert len(list(streams.ranges())) <= STREAM_LIMIT

    def test_who_read_last_comes_first_and_before_the_rest(self):
        streams = Streams(4 * CHUNK)
        agenda = Agenda((), streams, [Range("a", 0, COUNT * CHUNK), Range("b", 0, COUNT * CHUNK)])
        agenda.read("a", 8 * CHUNK, 12 * CHUNK)
        agenda.read("b", 4 * CHUNK, 8 * CHUNK)
        blobs = Blobs()
        brought = blobs.drain(agenda)
        assert [place[0] for place in brought[:8]] == ["b"] * 4 + ["a"] * 4
        assert brought[8] == ("a", 0)
