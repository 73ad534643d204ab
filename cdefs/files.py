"""<linux/falloc.h> and <linux/sched.h> of Linux 6.1: holes in files, a thread's own directory."""

from __future__ import annotations

import os

from cdefs._abi import ffi, lib


def punch(fd: int, start: int, end: int) -> None:
    """Make bytes [start, end) of a file a hole; parts of blocks become zeros instead.

    Raises OSError; EOPNOTSUPP: not on this file system.
    """
    mode = lib.FALLOC_FL_PUNCH_HOLE | lib.FALLOC_FL_KEEP_SIZE
    if lib.sys_fallocate(fd, mode, start, end - start) < 0:
        raise OSError(ffi.errno, f"fallocate [{start}, {end}): {os.strerror(ffi.errno)}")


def own_directory() -> None:
    """From now on the calling thread has a working directory of its own. Raises OSError."""
    if lib.sys_unshare(lib.CLONE_FS) < 0:
        raise OSError(ffi.errno, f"unshare: {os.strerror(ffi.errno)}")
