"""Windows grow while access is sequential, and only then."""

from __future__ import annotations

from fscached.cache.planner import PACED_WINDOW_S, STREAM_LIMIT, Planner

MIB = 1024 * 1024


def test_random_misses_keep_the_smallest_window():
    """A reader that jumps about never gets more than the first window."""
    planner = Planner(MIB, 8 * MIB)
    for chunk in (90, 10, 50, 30):
        stream = planner.miss(chunk)
        assert stream.window_bytes == MIB
        planner.fetched(stream, chunk + 1)


def test_sequential_misses_double_up_to_the_limit():
    """A reader that asks where its window ended gets 1, 2, 4, 8, 8 MiB."""
    planner = Planner(MIB, 8 * MIB)
    sizes, chunk = [], 0
    for _ in range(5):
        stream = planner.miss(chunk)
        sizes.append(stream.window_bytes // MIB)
        chunk += stream.window_bytes // MIB
        planner.fetched(stream, chunk)
    assert sizes == [1, 2, 4, 8, 8]


def test_a_proven_reader_gets_the_next_window_from_the_middle_on():
    """In the first half of a window nothing is asked for ahead, in the second half it is, once."""
    planner = Planner(MIB, 8 * MIB)
    planner.fetched(planner.miss(0), 1)
    planner.fetched(planner.miss(1), 5)
    assert planner.seen(2) is None
    stream = planner.seen(3)
    assert stream is not None and (stream.first, stream.window_bytes) == (5, 4 * MIB)
    assert planner.seen(3) is None


def test_half_a_window_that_has_landed_calls_for_the_next():
    """A reader that is slower than the source never finds the source idle."""
    planner = Planner(MIB, 8 * MIB)
    planner.fetched(planner.miss(0), 1)
    planner.fetched(planner.miss(1), 5)
    assert planner.landed(1) is None and planner.landed(2) is None
    stream = planner.landed(3)
    assert stream is not None and (stream.first, stream.window_bytes) == (5, 4 * MIB)
    assert planner.landed(4) is None


def test_nothing_is_fetched_beyond_a_window_in_which_no_reader_was_seen():
    """The window ahead lands, and that is all, until a reader comes to it; then it goes on."""
    planner = Planner(MIB, 8 * MIB)
    planner.fetched(planner.miss(0), 1)
    planner.fetched(planner.miss(1), 5)
    planner.fetched(planner.landed(4), 9)
    assert [planner.landed(chunk) for chunk in range(5, 9)] == [None] * 4
    stream = planner.seen(5)
    assert stream is not None and stream.first == 9
    planner.fetched(stream, 17)
    assert planner.miss(17).window_bytes == 8 * MIB


def test_an_unproven_reader_gets_nothing_ahead():
    """One window alone says nothing about what is read next."""
    planner = Planner(MIB, 8 * MIB)
    planner.fetched(planner.miss(0), 8)
    assert planner.seen(7) is None and planner.landed(7) is None


def test_streams_are_bounded():
    """The reader not heard of for longest is forgotten."""
    planner = Planner(MIB, 8 * MIB)
    for chunk in range(0, 10 * (STREAM_LIMIT + 1), 10):
        planner.fetched(planner.miss(chunk), chunk + 1)
    assert planner.miss(1).window_bytes == MIB
    assert planner.miss(11).window_bytes == 2 * MIB


def test_windows_stay_as_short_as_the_link_is_slow():
    """What the link brings in PACED_WINDOW_S bounds the window, but never below the smallest."""
    planner = Planner(MIB, 8 * MIB)
    planner.fetched(planner.miss(0), 1)
    planner.paced(MIB, MIB, 0.0, 1.0)
    assert planner.miss(1).window_bytes == MIB
    planner.fetched(planner.miss(1), 2)
    planner.paced(MIB, MIB, 0.0, PACED_WINDOW_S / 3)
    stream = planner.miss(2)
    assert stream.window_bytes == 2 * MIB
    planner.fetched(stream, 4)
    assert planner.miss(4).window_bytes == 3 * MIB


def test_a_fetch_too_short_to_time_bounds_nothing():
    """A clock that has not moved is no infinite pace, and no error."""
    planner = Planner(MIB, 8 * MIB)
    planner.fetched(planner.miss(0), 1)
    planner.paced(MIB, MIB, 0.0, 0.0)
    assert planner.miss(1).window_bytes == 2 * MIB


def test_a_gap_is_worth_what_a_round_trip_brings():
    """50 ms away, 10 MB/s: half a megabyte; never more than a window, nothing while unknown."""
    planner = Planner(MIB, 8 * MIB)
    assert planner.gap_bytes == 0
    planner.paced(4_000_000, 1_000_000, 0.05, 0.15)
    assert planner.gap_bytes == 500_000
    planner.paced(4_000_000, 1_000_000, 3.0, 3.1)
    assert planner.gap_bytes == MIB
    planner.paced(4096, 4096, 0.05, 0.05)
    assert planner.gap_bytes == 0
