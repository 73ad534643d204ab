"""A loop that is no system call, and stands here because it must not need the interpreter.

While the interpreter's lock is taken, each of the four system calls that answer an event in Python
may wait for it (docs/decisions/fanotify.md has the figures).
"""

from __future__ import annotations

import os
from struct import Struct
from typing import Final

from cdefs._abi import ffi, lib

ATTENDED: Final = Struct("=QQQQ")
"""`struct attended`, written to `told_fd` for every event that was answered: inode, start, end
(bytes of the file), took (ns)."""

SLOT_WORDS: Final[int] = lib.SLOT_WORDS
"""Of 64 bits: where an event lies, and in the last the inode of its file."""


class Attendant:
    """Answers the events of a group (docs/decisions/fanotify.md) whose bytes are all in the file,
    of such files as are `known`. The descriptors stay the caller's."""

    def __init__(self, group_fd: int, end_fd: int, told_fd: int, slots: memoryview) -> None:
        """`end_fd` becomes readable to end it, `told_fd` takes an ATTENDED for every answer and
        does not block; `slots` is writable."""
        # Only its address: cffi's buffer objects crash when the garbage collector takes them
        # together with what they are of (CPython 3.11, cffi 2.1).
        self._memory = slots
        self._slots = ffi.cast("uint64_t *", ffi.from_buffer(slots, require_writable=True))
        self._state = ffi.new("struct attendant *")
        self._state.group_fd = group_fd
        self._state.end_fd = end_fd
        self._state.told_fd = told_fd
        self._state.own_pid = os.getpid()

    def know(self, inode: int) -> None:
        """Answer for this file; for one before it, maybe, no more. For good: what is in a file of
        ours is right, whoever has it open."""
        self._state.files[inode % len(self._state.files)] = inode

    def attend(self, slot: int) -> bool:
        """Read events into a slot and answer them until one comes that is another's to answer: it
        lies in the slot then. False when the end has come. Blocks without the interpreter's lock.

        Raises OSError as read(2) of the group does.
        """
        found: int = lib.attend(self._state, self._slots + slot * SLOT_WORDS)
        if found < 0:
            raise OSError(-found, os.strerror(-found))
        return found > 0
