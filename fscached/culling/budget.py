"""How much has to go, and which files: whole ones, those not used for longest first."""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterable
from typing import NamedTuple

from fscached.config import Cache
from fscached.transport import CacheFile, ObjectKey


class Excess(NamedTuple):
    """What is too much; zeros: nothing."""

    allocated_bytes: int
    files: int

    def __bool__(self) -> bool:
        return self.allocated_bytes > 0 or self.files > 0

    def without(self, file: CacheFile) -> Excess:
        """What is left when this file is gone."""
        return Excess(self.allocated_bytes - file.allocated_bytes, self.files - 1)


NOTHING = Excess(0, 0)


def excess(used_bytes: int, space: os.statvfs_result, limits: Cache) -> Excess:
    """By the configured budget, and by the free blocks and files of the cache's file system: below
    `cull` percent of them so much goes that there are `run` percent again. In cachefiles' own
    arithmetic (cachefiles_has_space in fs/cachefiles/cache.c), which wants culling there too, and
    leaves it to us."""
    over = used_bytes - limits.budget_bytes if limits.budget_bytes else 0
    blocks = _lack(
        space.f_bavail, space.f_blocks, limits.block_cull_percent, limits.block_run_percent
    )
    files = _lack(space.f_ffree, space.f_files, limits.file_cull_percent, limits.file_run_percent)
    return Excess(max(over, blocks * space.f_frsize, 0), files)


def oldest_first(files: Iterable[CacheFile], needed: Container[ObjectKey]) -> list[CacheFile]:
    """The files that nobody has bound, in the order in which they may go."""
    return sorted((file for file in files if file.key not in needed), key=lambda file: file.used_s)


def _lack(free: int, whole: int, cull_percent: int, run_percent: int) -> int:
    """How many are missing. A file system that counts none has enough."""
    if not whole or free >= whole * cull_percent // 100:
        return 0
    return math.ceil(whole * run_percent / 100) - free
