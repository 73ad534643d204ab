"""How many descriptors a daemon may come to need, and the limit that lets it have them."""

from __future__ import annotations

import resource
from typing import Final

from fscached.config import Cache, Kernel

SPARE: Final = 1024
"""For connections, pipes and files, on top of one descriptor per open object."""


def needed(cache: Cache, kernel: Kernel) -> int:
    """The most that these settings allow."""
    return cache.open_objects + kernel.unanswered_reads + SPARE


def allow(count: int) -> int:
    """Raise this process's limit of open descriptors to `count` or as near as it may, and return
    it: every open object is one, and daemons are started with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(hard, count)))
        except (ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
