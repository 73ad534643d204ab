"""A link that is only reckoned, and readers that wait at it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from replay import LEAST_BYTES, WINDOW_BYTES, Cost, Link, Read, Replay, Shrinking

from fscached.cache.planner import Planner
from rafs_v6.layout import Compressor
from tests.fill.conftest import Remote

KIB = 1 << 10
CHUNK = 64 * KIB
LINK = Link(0.05, 1e6)


def replayed(sizes: list[int], reads: list[Read], **window: int) -> Cost:
    remote = Remote(sizes, Compressor.NONE)
    first, most = window.get("first", CHUNK), window.get("most", CHUNK)
    return Replay({"b": remote.chunks}, LINK, lambda: Planner(first, most)).run(reads)


def test_a_read_takes_a_round_trip_and_its_chunks_transfer():
    """And nothing once it is resident."""
    reads = [Read(0.0, "b", 0, 4096), Read(0.3, "b", 4096, CHUNK)]
    cost = replayed([CHUNK] * 4, reads)
    assert cost.waited_s == pytest.approx(0.05 + CHUNK / 1e6)
    assert (cost.requests, cost.fetched_bytes) == (1, CHUNK)


def test_a_reader_waits_for_its_own_chunk_and_not_for_the_window():
    """What follows shares the link with the next request."""
    reads = [Read(0.0, "b", 0, 4096), Read(0.0, "b", 40 * CHUNK, 40 * CHUNK + 4096)]
    cost = replayed([CHUNK] * 64, reads, first=8 * CHUNK, most=8 * CHUNK)
    one_s = CHUNK / 1e6
    # The first window has the link alone for a round trip more, then half of it.
    assert cost.waited_s == pytest.approx((0.05 + one_s) + (0.05 + 2 * one_s))
    assert cost.requests == 2


@given(st.lists(st.integers(0, 31), min_size=1, max_size=20), st.integers(1, 8))
def test_every_read_is_served_and_nothing_comes_twice(chunks: list[int], window: int):
    """Whatever is read in whatever order."""
    reads = [Read(0.01, "b", index * CHUNK, (index + 1) * CHUNK) for index in chunks]
    cost = replayed([CHUNK] * 32, reads, first=window * CHUNK, most=8 * CHUNK)
    assert len(set(chunks)) * CHUNK <= cost.fetched_bytes <= 32 * CHUNK
    assert cost.requests <= cost.fetched_bytes // CHUNK


def test_windows_shrink_while_they_bring_what_is_not_read():
    """And grow again when it is; never below a READ, never above the first."""
    planner = Shrinking()
    sizes = []
    for chunk in range(0, 5000, 1000):
        stream = planner.miss(chunk)
        sizes.append(stream.window_bytes)
        planner.fetched(stream, chunk + 16)
    assert sizes == [WINDOW_BYTES >> shift for shift in (0, 1, 2, 3, 3)]
    assert sizes[-1] == LEAST_BYTES
    for chunk in range(4000, 4016):
        planner.seen(chunk)
    assert planner.miss(9000).window_bytes == 2 * LEAST_BYTES
