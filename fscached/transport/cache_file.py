"""One cache file behind a descriptor: what it holds, and how bytes get into it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from cdefs import files
from fscached.transport import BLOCK_BYTES, CacheFile, ObjectKey

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")

NO_SPACE = frozenset({errno.ENOBUFS, errno.ENOSPC, errno.EDQUOT})


def data_extents(fd: int, end: int) -> Iterator[tuple[int, int]]:
    """Extents [start, end) below byte `end` that are no holes, ascending. Raises OSError."""
    hole = 0
    while hole < end:
        try:
            data = os.lseek(fd, hole, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        if data >= end:
            return
        hole = os.lseek(fd, data, os.SEEK_HOLE)
        yield data, min(hole, end)


def check_blocks(offset: int, memory: memoryview) -> None:
    """Raises OSError for what is not whole blocks at a block's offset."""
    if offset % BLOCK_BYTES or memory.nbytes % BLOCK_BYTES:
        raise OSError(errno.EINVAL, f"{memory.nbytes} bytes at {offset} are not whole blocks")


def write_all(fd: int, offset: int, memory: memoryview) -> None:
    """Write aligned memory, all of it. Raises OSError."""
    while (count := os.pwrite(fd, memory, offset)) < memory.nbytes:
        # A block that was written in part is written again: only whole blocks go down.
        count -= count % BLOCK_BYTES
        if not count:
            raise OSError(errno.EIO, "the write stopped short")
        memory, offset = memory[count:], offset + count


def punch(path: str, start: int, end: int) -> bool:
    """Make whole blocks of a file a hole. False where there is none of that name, or where a part
    of the file system's block would become zeros. Raises OSError."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    with closing(fd):
        return punch_blocks(fd, start, end)


def punch_blocks(fd: int, start: int, end: int) -> bool:
    """The same of a descriptor."""
    if os.fstatvfs(fd).f_bsize > BLOCK_BYTES:
        return False
    files.punch(fd, start, end)
    return True


def described(key: ObjectKey, path: str) -> CacheFile:
    """A file as it lies on the disk. Raises OSError."""
    state = os.lstat(path)
    # st_blocks counts 512 bytes each whatever the file system's blocks are, stat(2).
    return CacheFile(key, path, state.st_size, state.st_blocks * 512, state.st_atime)


def touch(path: str, used_s: float) -> None:
    """Set the atime of a file, if it is there. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        used_ns = round(used_s * 1e9)
        os.utime(path, ns=(used_ns, os.lstat(path).st_mtime_ns), follow_symlinks=False)


def forget_pages() -> None:
    """Drop what the kernel has read of files that were wrong on the disk, and of all others, since
    nothing tells which pages are whose. Raises OSError."""
    _DROP_CACHES.write_text("3")


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    """A descriptor, closed at the end."""
    try:
        yield fd
    finally:
        os.close(fd)


def round_up(size_bytes: int) -> int:
    """The size in whole blocks, in bytes."""
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def worth_a_line(count: int) -> bool:
    """The first, second, fourth, eighth ...: a flood of one kind is a few log lines."""
    return count & (count - 1) == 0
