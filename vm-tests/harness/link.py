"""The link to the origin: a guest's loopback, made as slow and as far as a real one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from harness.guest import Guest

QUEUE_PACKETS = 10_000
QUEUE_BYTES = 64 << 20
BURST_BYTES = 128 << 10
"""A packet on loopback is as long as 64 KiB."""

FROM_ORIGIN = "1:2"
"""The class of what comes from an origin, its sockets' priority in `harness.proxy` (tc-htb(8))."""


def can_delay(guest: Guest) -> bool:
    """Whether the kernel can make round trips longer."""
    trial = "tc qdisc add dev lo root netem delay 1ms && tc qdisc del dev lo root"
    return guest.run(trial, check=False).returncode == 0


@contextmanager
def shaped(guest: Guest, *, bytes_per_s: int) -> Iterator[None]:
    """Let `bytes_per_s` over the guest's loopback, for both directions together."""
    shape = f"tbf rate {bytes_per_s * 8} burst {BURST_BYTES} limit {QUEUE_BYTES}"
    yield from _replaced(guest, f"tc qdisc replace dev lo root {shape}")


@contextmanager
def far(guest: Guest, *, bytes_per_s: int, round_trip_ms: float) -> Iterator[None]:
    """Let `bytes_per_s` over the guest's loopback in either direction, and let an answer take at
    least `round_trip_ms`. What a ledger sends is one direction, all else the other: as on a line
    of a real network a request does not queue behind the bytes that come the other way."""
    shape = f"netem delay {round_trip_ms / 2}ms rate {bytes_per_s * 8} limit {QUEUE_PACKETS}"
    script = "tc qdisc replace dev lo root handle 1: htb default 1"
    for direction in ("1:1", FROM_ORIGIN):
        # As fast as can be: only the choice of the queue is htb's.
        script += f" && tc class add dev lo parent 1: classid {direction} htb rate 10gbit"
        script += f" && tc qdisc add dev lo parent {direction} {shape}"
    yield from _replaced(guest, script)


def _replaced(guest: Guest, script: str) -> Iterator[None]:
    guest.run(script)
    try:
        yield
    finally:
        guest.run("tc qdisc del dev lo root")
