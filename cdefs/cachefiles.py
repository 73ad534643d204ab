"""<linux/cachefiles.h> of Linux 6.1: messages of the on-demand device and the answer to a READ.

Messages are in the machine's byte order. The device's text commands (`bind`, `copen`, ...) are
plain writes and need nothing from here.
"""

from __future__ import annotations

import os
from struct import Struct
from typing import Final

from cdefs._abi import ffi, lib

MESSAGE_BYTES_MAX: Final[int] = lib.CACHEFILES_MSG_MAX_SIZE

OP_OPEN: Final[int] = lib.CACHEFILES_OP_OPEN
OP_CLOSE: Final[int] = lib.CACHEFILES_OP_CLOSE
OP_READ: Final[int] = lib.CACHEFILES_OP_READ

MESSAGE: Final = Struct("=IIII")
"""`struct cachefiles_msg`: msg_id, opcode, len (the whole message, bytes), object_id."""

OPEN: Final = Struct("=IIII")
"""`struct cachefiles_open`, after MESSAGE: volume_key_size, cookie_key_size, fd, flags; then the
volume key (with its NUL) and the cookie key (without)."""

READ: Final = Struct("=IIIIQQ")
"""MESSAGE and `struct cachefiles_read` in one: ..., off, len (bytes)."""


def read_complete(object_fd: int, msg_id: int) -> None:
    """CACHEFILES_IOC_READ_COMPLETE: let the reader of READ `msg_id` look again.

    Raises OSError; EINVAL: the kernel knows no such READ (any more).
    """
    if lib.sys_cachefiles_read_complete(object_fd, msg_id) < 0:
        raise OSError(ffi.errno, f"READ_COMPLETE {msg_id}: {os.strerror(ffi.errno)}")
