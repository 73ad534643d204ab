"""Events without an answer, in shared memory that outlives the process.

The kernel writes each event straight into a slot (`read(2)` into a MAP_SHARED memfd: the record is
complete even if the reader of it dies with the call, tried on 6.18), and a slot is cleared only
after its answer. So whoever holds the memfd next knows every number that still waits.

A slot is eight words of 64 bits: the record in seven of them, then the file's inode number, or 0
as long as nobody has looked.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cdefs.attend import SLOT_WORDS
from cdefs.fanotify import METADATA

SLOT_BYTES = SLOT_WORDS * 8
RECORD_BYTES = SLOT_BYTES - 8

_INODE = SLOT_WORDS - 1


class Left(NamedTuple):
    """An event that a predecessor has read and not answered."""

    slot: int
    record: bytes
    inode: int

    @property
    def number(self) -> int:
        """Of the event's descriptor, in the table of the process that is gone."""
        return int(METADATA.unpack_from(self.record)[5])


class Slots:
    """A fixed number of slots in a memfd, which is to be given to a holder. One thread takes them,
    any thread clears them."""

    def __init__(self, fd: int | None, count: int) -> None:
        """`fd`: what a predecessor left, with as many slots as it had; None: `count` new ones.

        Raises OSError.
        """
        if fd is None:
            fd = os.memfd_create("fscached-slots", os.MFD_CLOEXEC)
            os.ftruncate(fd, count * SLOT_BYTES)
        self.fd = fd
        self.count = os.fstat(fd).st_size // SLOT_BYTES
        # Populated: a page fault inside read(2) that fails would deny the event.
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._memory = memoryview(mmap.mmap(fd, self.count * SLOT_BYTES, flags))
        self._words = self._memory.cast("Q")
        taken = {left.slot for left in self.left()}
        self._free = [index for index in range(self.count) if index not in taken]
        for index in self._free:
            self._words[index * SLOT_WORDS + _INODE] = 0

    def left(self) -> Iterator[Left]:
        """The slots that are taken, as they are in memory."""
        for index in range(self.count):
            if self._words[index * SLOT_WORDS]:
                record = bytes(self.record(index))
                yield Left(index, record, self._words[index * SLOT_WORDS + _INODE])

    def take(self) -> int | None:
        """A free slot, its memory zeros; None when there is none."""
        return self._free.pop() if self._free else None

    def record(self, index: int) -> memoryview:
        """The memory to read an event into."""
        start = index * SLOT_BYTES
        return self._memory[start : start + RECORD_BYTES]

    @property
    def memory(self) -> memoryview:
        """All of them."""
        return self._memory

    def inode(self, index: int) -> int:
        """Which file the event in a slot is about."""
        return self._words[index * SLOT_WORDS + _INODE]

    def note(self, index: int, inode: int) -> None:
        """Say which file the event in a slot is about; the record itself does not."""
        self._words[index * SLOT_WORDS + _INODE] = inode

    def clear(self, index: int) -> None:
        """An event is answered. Its first word, whose zero says so, is one store."""
        self._words[index * SLOT_WORDS] = 0
        self._words[index * SLOT_WORDS + _INODE] = 0
        self._free.append(index)


def reserve(numbers: Iterable[int], holdings: dict[str, int]) -> set[int]:
    """Keep these numbers from being handed out again: the kernel matches answers by number, and an
    answer meant for an old event would let a new one go on. Those of our own holdings that lie on
    one move away (`holdings` is changed). The numbers that are ours to close now.

    To be called before anything else is opened or read.
    """
    wanted, reserved = set(numbers), set[int]()
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for number in wanted:
        if _is_free(number):
            # Beyond our limit of descriptors nobody gets it.
            with contextlib.suppress(OSError):
                reserved.add(os.dup2(null, number, inheritable=False))
    for name, fd in holdings.items():
        if fd in wanted:
            holdings[name] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
            reserved.add(os.dup2(null, fd, inheritable=False))
    if null in wanted:
        reserved.add(null)
    else:
        os.close(null)
    return reserved


def _is_free(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return True
    return False
