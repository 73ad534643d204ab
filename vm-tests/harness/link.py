"""The link to the origin: a guest's loopback, made as slow and as far as a real one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from harness.guest import Guest

QUEUE_PACKETS = 10_000


@contextmanager
def shaped(guest: Guest, *, bytes_per_s: int, round_trip_ms: float = 0.0) -> Iterator[None]:
    """Let `bytes_per_s` over the guest's loopback, for both directions together, and let an answer
    take at least `round_trip_ms`."""
    shape = f"delay {round_trip_ms / 2}ms rate {bytes_per_s * 8} limit {QUEUE_PACKETS}"
    guest.run(f"tc qdisc replace dev lo root netem {shape}")
    try:
        yield
    finally:
        guest.run("tc qdisc del dev lo root")
