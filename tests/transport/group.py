"""A stand-in for a fanotify group: a pipe that becomes readable, real files, a list of answers."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from cdefs import fanotify as abi
from fscached.transport.fanotify import Fanotify
from fscached.transport.floor import Floor
from fscached.transport.folder import Folder
from fscached.transport.slots import RECORD_BYTES, Slots


def record(
    offset: int = 0, count: int | None = None, number: int = 9, mask: int = abi.PRE_ACCESS
) -> bytes:
    """An event as the kernel writes it; without a count it has no range."""
    extent = b"" if count is None else abi.RANGE.pack(abi.INFO_RANGE, 0, 24, 0, offset, count)
    head = abi.METADATA.pack(24 + len(extent), abi.VERSION, 0, 24, mask, number, 1)
    return (head + extent).ljust(RECORD_BYTES, b"\0")


class Group:
    """The kernel's end. `answers` are (descriptor, errno), 0 for allowed."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[tuple[int, int]] = []
        self.answered = threading.Event()
        self.waiting: set[int] = set()
        monkeypatch.setattr(abi, "allow", lambda _, number: self.answer(number, 0))
        monkeypatch.setattr(abi, "deny", lambda _, number, code: self.answer(number, code))
        self._read, self.write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.slots = Slots(None, 4)
        self.folder = Folder(self._read, directory, Floor(str(directory), 1, 1))
        self.transport = Fanotify(self._read, self.slots, self.folder)

    def answer(self, number: int, code: int) -> None:
        if number not in self.waiting:
            raise OSError(errno.ENOENT, "no such event")
        self.waiting.remove(number)
        self.answers.append((number, code))
        self.answered.set()


def event(group: Group, path: Path, offset: int = 0) -> int:
    """A read of a file, in the pipe; its descriptor."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    group.waiting.add(fd)
    os.write(group.write, record(offset, 4096, fd))
    return fd
