"""What has been counted: plain integers, read by `status` and the metrics."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from fscached.source import Answer, Giver

LATENCIES_S: Final = (0.001, 0.02, 0.05, 0.1, 0.5, 1.0, 2.0)
SIZES_BYTES: Final = (1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20)
"""Bounds of nydusd's metrics: a latency is at most the one, a size is below the other."""


def _zeros() -> list[int]:
    return [0] * (len(LATENCIES_S) + 1)


@dataclass(slots=True)
class Latencies:
    """How often something took how long: counts by LATENCIES_S, and all seconds together."""

    counts: list[int] = field(default_factory=_zeros)
    seconds: float = 0.0

    def count(self, seconds: float) -> None:
        """Once more."""
        self.counts[bisect_left(LATENCIES_S, seconds)] += 1
        self.seconds += seconds

    def add(self, other: Latencies) -> None:
        """And all of another's."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.seconds += other.seconds


@dataclass(slots=True)
class SourceTally:
    """What was read of one source: ranges by their sizes (SIZES_BYTES) and how long each took."""

    requests: int = 0
    received_bytes: int = 0
    failures: int = 0
    by_size: list[Latencies] = field(default_factory=lambda: [Latencies() for _ in _zeros()])

    def count(self, answer: Answer, range_bytes: int) -> None:
        """A range has come."""
        self.requests += answer.requests
        self.received_bytes += answer.received_bytes
        self.by_size[bisect_right(SIZES_BYTES, range_bytes)].count(answer.seconds)

    def add(self, other: SourceTally) -> None:
        """And all of another's."""
        self.requests += other.requests
        self.received_bytes += other.received_bytes
        self.failures += other.failures
        for mine, its in zip(self.by_size, other.by_size, strict=True):
            mine.add(its)


@dataclass(slots=True)
class Tally:
    """Counts since the daemon started, of one object or of all."""

    opens: int = 0
    closes: int = 0
    reads: int = 0
    reads_completed: int = 0
    reads_failed: int = 0
    hits: int = 0
    """READs whose bytes had come meanwhile."""
    joined: int = 0
    """READs for which nothing was fetched that was not on its way."""
    slow_reads: int = 0
    latencies: Latencies = field(default_factory=Latencies)
    """Of READs, from the kernel's question to the answer."""
    fetches: int = 0
    fetched_s: float | None = None
    """When something was fetched last because somebody read it, on the event loop's clock."""
    prefetches: int = 0
    prefetches_stopped: int = 0
    """Those that were slow to bring what a reader waited for."""
    landed_bytes: int = 0
    bad_chunks: int = 0
    requests: int = 0
    received_bytes: int = 0
    source_errors: int = 0
    unknown_reads: int = 0
    given: Counter[Giver] = field(default_factory=Counter)
    """Bytes by who gave them."""
    sources: defaultdict[str, SourceTally] = field(default_factory=lambda: defaultdict(SourceTally))
    """By their names."""

    @property
    def misses(self) -> int:
        """READs for which something was fetched."""
        return max(0, self.reads - self.hits - self.joined)


def total(tallies: Iterable[Tally]) -> Tally:
    """What READs of many objects were, how long they took, and of whom was read."""
    whole = Tally()
    for tally in tallies:
        whole.reads += tally.reads
        whole.reads_failed += tally.reads_failed
        whole.hits += tally.hits
        whole.joined += tally.joined
        whole.latencies.add(tally.latencies)
        for name, spent in tally.sources.items():
            whole.sources[name].add(spent)
    return whole
