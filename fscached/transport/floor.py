"""The floor of free space, kept by the daemon itself where the kernel keeps none for it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from fscached.transport import OutOfSpace


class Floor:
    """Percentages of free blocks and free inodes of a file system, in cachefiles' arithmetic
    (cachefiles_has_space), and as there before every write: statvfs(3) takes 2 µs. A file system
    that counts no inodes has enough of them."""

    def __init__(
        self,
        directory: str,
        block_stop_percent: int,
        file_stop_percent: int,
        statvfs: Callable[[str], os.statvfs_result] = os.statvfs,
    ) -> None:
        self._directory = directory
        self._block_percent = block_stop_percent
        self._file_percent = file_stop_percent
        self._statvfs = statvfs

    def require(self, size_bytes: int) -> None:
        """Room for so many bytes more. Raises OutOfSpace, OSError."""
        state = self._statvfs(self._directory)
        floor = state.f_blocks * self._block_percent // 100
        if (state.f_bavail - floor) * state.f_frsize < size_bytes:
            raise self._full(f"{self._block_percent} % of its blocks")

    def require_file(self) -> None:
        """Room for one file more. Raises OutOfSpace, OSError."""
        state = self._statvfs(self._directory)
        if state.f_files and state.f_ffree <= state.f_files * self._file_percent // 100:
            raise self._full(f"{self._file_percent} % of its inodes")

    def _full(self, what: str) -> OutOfSpace:
        text = f"{self._directory}: at most {what} are free; free space on the cache file system"
        return OutOfSpace(errno.ENOSPC, text)
