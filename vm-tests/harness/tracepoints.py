"""The kernel's own count of what it asked and what was answered, for a guest's programs."""

from __future__ import annotations

import re

HISTOGRAM = "/sys/kernel/tracing/events/cachefiles/cachefiles_ondemand_{}/hist"
HITS = re.compile(r"Hits: (\d+)")


def hits(name: str) -> int:
    """How often a tracepoint was passed since `Guest.reset_cachefiles_counts`."""
    with open(HISTOGRAM.format(name)) as file:
        found = HITS.search(file.read())
    return int(found[1]) if found else 0
