"""How much of a connection's bytes may be under way: what fills the link, and hardly more.

A receiver can only stop a sender by the window it offers. Whatever is under way when a reader
comes is in front of its bytes, so prefetch offers a window of one round trip at the speed that
it has, and a little: less leaves the link idle (128 KiB at 20 ms are 6 MB/s), and what passes in
one round trip has passed when the first byte of the reader's answer could be here; what is more
holds it up by ALLOWANCE_S at most.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

ALLOWANCE_S: Final = 0.005
"""On top of a round trip: where the window is what holds bytes up, it grows by this; and answers
are never as punctual as the shortest round trip."""
GROWTH_LIMIT: Final = 1.5
"""At a time: a speed may have been a burst from a buffer."""
LOOKS: Final = 4
"""The best speed of so many looks counts: machines have other things to do."""
_LOOK_WINDOWS: Final = 2
"""How much to receive before the window is looked at again."""
_RCVBUFFORCE: Final = 33  # SO_RCVBUFFORCE of asm-generic/socket.h; Python has no name for it
_MIN_RTT: Final = struct.Struct("<148xI")  # tcpi_min_rtt of linux/tcp.h's tcp_info, microseconds


class Window:
    """That of one connection, in bytes between two limits. Times are in seconds."""

    def __init__(self, least_bytes: int, most_bytes: int) -> None:
        self.size_bytes = least_bytes
        self._least_bytes = least_bytes
        self._most_bytes = max(least_bytes, most_bytes)
        self._began_s: float | None = None
        self._speeds: deque[float] = deque(maxlen=LOOKS)
        self._received_bytes = 0
        self._offered = False

    def pause(self) -> None:
        """It is not the link that holds up what comes next."""
        self._began_s = None

    def received(self, size_bytes: int, now_s: float) -> bool:
        """So many bytes have come; whether it is time to `adapt`."""
        if self._began_s is None:
            self._began_s, self._received_bytes = now_s, 0
            return not self._offered
        self._received_bytes += size_bytes
        if self._received_bytes < _LOOK_WINDOWS * self.size_bytes or now_s <= self._began_s:
            return False
        self._speeds.append(self._received_bytes / (now_s - self._began_s))
        self._began_s, self._received_bytes = now_s, 0
        return True

    def adapt(self, round_trip_s: float, known_bytes: int = 0) -> int:
        """The window to offer from now on; at first what others to the same server came to, if that
        is known."""
        if self._offered:
            wanted = max(self._speeds, default=0.0) * (round_trip_s + ALLOWANCE_S)
            wanted = min(wanted, self.size_bytes * GROWTH_LIMIT)
        else:
            self._offered, wanted = True, known_bytes
        self.size_bytes = round(min(max(wanted, self._least_bytes), self._most_bytes))
        return self.size_bytes


def round_trip_s(fd: int) -> float:
    """The shortest that the kernel has seen on a connection; 0 where it does not say."""
    with suppress(OSError), _borrowed(fd) as connection:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT.size)
        if len(info) == _MIN_RTT.size:
            return float(_MIN_RTT.unpack(info)[0]) / 1e6
    return 0.0


def server(fd: int) -> object:
    """Who is at the other end of a connection; None where the kernel does not say."""
    with suppress(OSError), _borrowed(fd) as connection:
        return connection.getpeername()
    return None


def offer(fd: int, size_bytes: int) -> None:
    """Have the kernel offer this window from now on (tcp(7)): it doubles a buffer's size for its
    own needs, and does not let a clamp follow. Without CAP_NET_ADMIN no more than
    net.core.rmem_max."""
    with suppress(OSError), _borrowed(fd) as connection:
        try:
            connection.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, size_bytes)
        except PermissionError:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size_bytes)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, size_bytes)


@contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=fd)
    try:
        yield connection
    finally:
        connection.detach()
