"""What has been counted: plain integers, read by `status` and the metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fscached.source import Giver


@dataclass(slots=True)
class Tally:
    """Counts since the daemon started, of one object or of all."""

    opens: int = 0
    closes: int = 0
    reads: int = 0
    reads_completed: int = 0
    reads_failed: int = 0
    slow_reads: int = 0
    fetches: int = 0
    fetched_s: float | None = None
    """When something was fetched last because somebody read it, on the event loop's clock."""
    prefetches: int = 0
    landed_bytes: int = 0
    bad_chunks: int = 0
    requests: int = 0
    received_bytes: int = 0
    source_errors: int = 0
    unknown_reads: int = 0
    given: Counter[Giver] = field(default_factory=Counter)
    """Bytes by who gave them."""
