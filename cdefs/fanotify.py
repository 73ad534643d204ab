"""<linux/fanotify.h> of Linux 6.18: a group that is asked before the content of a file is read.

Records are in the machine's byte order and 8-byte aligned. A record's descriptor is a number in the
table of the process that read it; the answer names that number, whoever writes it.
"""

from __future__ import annotations

import os
from struct import Struct
from typing import Final

from cdefs._abi import ffi, lib

VERSION: Final[int] = lib.FANOTIFY_METADATA_VERSION
PRE_ACCESS: Final[int] = lib.FAN_PRE_ACCESS
INFO_RANGE: Final[int] = lib.FAN_EVENT_INFO_TYPE_RANGE

METADATA: Final = Struct("=IBBHQii")
"""`struct fanotify_event_metadata`: event_len (bytes, records included), vers, reserved,
metadata_len, mask, fd, pid (of the reader, 0 outside of our PID namespace)."""

RANGE: Final = Struct("=BBHIQQ")
"""`struct fanotify_event_info_range`: info_type, pad, len, pad, offset, count (bytes; 0: all)."""

_RESPONSE: Final = Struct("=iI")


def init() -> int:
    """A new group of the pre-content class, close-on-exec, not blocking, its queue unlimited. The
    descriptors that come with its events are open for reading and writing and raise no events.

    Raises OSError; EINVAL: a kernel without the class or without the unlimited queue, EPERM: no
    CAP_SYS_ADMIN.
    """
    flags = lib.FAN_CLASS_PRE_CONTENT | lib.FAN_UNLIMITED_QUEUE | lib.FAN_CLOEXEC | lib.FAN_NONBLOCK
    group_fd: int = lib.sys_fanotify_init(flags, os.O_RDWR | os.O_CLOEXEC)
    if group_fd < 0:
        raise OSError(ffi.errno, f"fanotify_init: {os.strerror(ffi.errno)}")
    return group_fd


def mark(group_fd: int, file_fd: int) -> None:
    """Ask the group before a read of this file, wherever it is open from now on.

    Raises OSError; EINVAL: a kernel before 6.14, EOPNOTSUPP: not on this file system.
    """
    _mark(group_fd, lib.FAN_MARK_ADD, file_fd)


def unmark(group_fd: int, file_fd: int) -> None:
    """Ask no more. Raises OSError; ENOENT: it is not marked."""
    _mark(group_fd, lib.FAN_MARK_REMOVE, file_fd)


def allow(group_fd: int, event_fd: int) -> None:
    """Let the reader of an event go on. Raises OSError; ENOENT: no such event."""
    os.write(group_fd, _RESPONSE.pack(event_fd, lib.FAN_ALLOW))


def deny(group_fd: int, event_fd: int, errno: int) -> None:
    """Let the reader of an event fail. Raises OSError; ENOENT: no such event, EINVAL: an errno
    other than EIO, EPERM, EBUSY, ETXTBSY, EAGAIN, ENOSPC, EDQUOT; the reader waits on then."""
    os.write(group_fd, _RESPONSE.pack(event_fd, lib.FAN_DENY | errno << lib.FAN_ERRNO_SHIFT))


def _mark(group_fd: int, flags: int, file_fd: int) -> None:
    if lib.sys_fanotify_mark(group_fd, flags, lib.FAN_PRE_ACCESS, file_fd) < 0:
        raise OSError(ffi.errno, f"fanotify_mark: {os.strerror(ffi.errno)}")
