"""How much prefetch has under way: what fills the link, little more, and what the kernel makes of
it."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscached.source.window import ALLOWANCE_S, Window, offer, round_trip_s

KIB = 1 << 10
LEAST, MOST = 64 * KIB, 4096 * KIB


def settle(window: Window, link_bytes_s: float, trip_s: float, looks: int = 200) -> list[int]:
    """Windows offered on a link of that speed and round trip, which brings a whole window per
    round trip or what it can."""
    offered, now_s = [], 0.0
    for _ in range(looks * 8):
        now_s += max(trip_s, window.size_bytes / link_bytes_s)
        if window.received(window.size_bytes, now_s):
            offered.append(window.adapt(trip_s))
    return offered


@pytest.mark.parametrize(
    ("link_bytes_s", "trip_s"), [(37.5e6, 0.02), (10e6, 0.02), (250e6, 0.001), (100e6, 0.005)]
)
def test_it_fills_the_link_and_holds_nobody_up(link_bytes_s: float, trip_s: float) -> None:
    """At least what one round trip carries; beyond that no more than the allowance."""
    window = Window(LEAST, MOST)
    settle(window, link_bytes_s, trip_s)
    carried = link_bytes_s * trip_s
    assert carried <= window.size_bytes * 1.01
    assert window.size_bytes <= max(LEAST, link_bytes_s * (trip_s + ALLOWANCE_S) * 1.01)


def test_it_begins_with_the_least_and_is_offered_at_once() -> None:
    """A connection begins with what the kernel thinks right."""
    window = Window(LEAST, MOST)
    assert window.received(1, 5.0)
    assert window.adapt(0.02) == LEAST
    assert not window.received(1, 5.1)


def test_what_others_came_to_is_where_it_begins() -> None:
    """Within its limits, and from there as ever."""
    window = Window(LEAST, MOST)
    assert window.received(1, 5.0)
    assert window.adapt(0.02, 900 * KIB) == 900 * KIB
    settle(window, 10e6, 0.02)
    assert window.size_bytes < 300 * KIB
    other = Window(LEAST, MOST)
    assert other.received(1, 5.0)
    assert other.adapt(0.02, 2 * MOST) == MOST


def test_it_shrinks_when_the_link_does() -> None:
    """Within some looks."""
    window = Window(LEAST, MOST)
    settle(window, 37.5e6, 0.02)
    wide = window.size_bytes
    settle(window, 10e6, 0.02)
    assert window.size_bytes < wide / 2


def test_a_pause_is_no_slow_link() -> None:
    """What stood still for readers is not measured."""
    window = Window(LEAST, MOST)
    settle(window, 37.5e6, 0.02)
    wide = window.size_bytes
    for minute in range(1, 20):
        window.pause()
        assert not window.received(window.size_bytes, 1000.0 + minute * 60)
    assert window.size_bytes == wide


@given(st.lists(st.tuples(st.integers(1, 1 << 24), st.floats(0, 10), st.floats(0, 1)), max_size=60))
def test_whatever_comes_it_stays_between_its_limits(events: list[tuple[int, float, float]]) -> None:
    """And never grows by more than half at a time."""
    window, now_s = Window(LEAST, MOST), 0.0
    for size, pause_s, trip_s in events:
        now_s += pause_s
        before = window.size_bytes
        if window.received(size, now_s):
            assert LEAST <= window.adapt(trip_s) <= min(MOST, before * 1.5 + 1)


def test_the_kernel_offers_what_it_is_told() -> None:
    """A sender whose reader reads nothing gets rid of about as much; later of more."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
        with near, far:
            assert 0 <= round_trip_s(near.fileno()) < 1
            offer(near.fileno(), 64 * KIB)
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * KIB)
            far.setblocking(False)
            sent = 0
            with pytest.raises(BlockingIOError):
                while True:
                    sent += far.send(bytes(16 * KIB))
            assert sent < 512 * KIB
            assert near.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 128 * KIB
            offer(near.fileno(), 96 * KIB)
            assert near.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 192 * KIB


def test_what_is_no_socket_is_no_error() -> None:
    """A connection may have gone meanwhile."""
    with open("/dev/null") as file:
        offer(file.fileno(), LEAST)
        assert round_trip_s(file.fileno()) == 0.0
