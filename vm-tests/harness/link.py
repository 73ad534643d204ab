"""The link to the origin: a guest's loopback, made as slow and as far as a real one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from harness.guest import Guest

QUEUE_PACKETS = 10_000
QUEUE_BYTES = 64 << 20
BURST_BYTES = 128 << 10
"""A packet on loopback is as long as 64 KiB."""


def can_delay(guest: Guest) -> bool:
    """Whether the kernel can make round trips longer."""
    trial = "tc qdisc add dev lo root netem delay 1ms && tc qdisc del dev lo root"
    return guest.run(trial, check=False).returncode == 0


@contextmanager
def shaped(guest: Guest, *, bytes_per_s: int, round_trip_ms: float = 0.0) -> Iterator[None]:
    """Let `bytes_per_s` over the guest's loopback, for both directions together, and let an answer
    take at least `round_trip_ms`."""
    rate = f"rate {bytes_per_s * 8}"
    shape = f"tbf {rate} burst {BURST_BYTES} limit {QUEUE_BYTES}"
    if round_trip_ms:
        # Not in every kernel, so only where it is needed.
        shape = f"netem delay {round_trip_ms / 2}ms {rate} limit {QUEUE_PACKETS}"
    guest.run(f"tc qdisc replace dev lo root {shape}")
    try:
        yield
    finally:
        guest.run("tc qdisc del dev lo root")
