"""Events of resident bytes are answered: a socket is the kernel, the files are real."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from struct import Struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdefs import fanotify as abi
from cdefs import files
from cdefs._abi import lib
from cdefs.attend import ATTENDED, SLOT_WORDS, Attendant
from tests.transport.group import record

ALLOWED = Struct("=iI")
BLOCK = 4096
BLOCKS = 32
SLOTS = 2


class Desk:
    """An attendant, and the other ends of all that it has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.write_bytes(b"")
        os.truncate(path, BLOCKS * BLOCK)
        self.inode = path.stat().st_ino
        self.kernel, self._group = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._group.setblocking(False)
        self.end = os.eventfd(0)
        self.told, self.teller = os.pipe2(os.O_NONBLOCK)
        self.slots = memoryview(mmap.mmap(-1, SLOTS * SLOT_WORDS * 8))
        self.attendant = Attendant(self._group.fileno(), self.end, self.teller, self.slots)

    def close(self) -> None:
        self.kernel.close()
        self._group.close()
        for fd in (self.end, self.told, self.teller):
            os.close(fd)

    def close_group(self) -> None:
        """As if it had never been."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._group.fileno())

    def has_fiemap(self) -> bool:
        """Whether the file system tells where data is."""
        self.attendant.know(self.inode)
        found = self.answers()
        self.forget()
        return found

    def forget(self) -> None:
        """All that was answered and told."""
        self.heard()
        with contextlib.suppress(BlockingIOError):
            os.read(self.told, 65536)

    def fill(self, first: int, count: int) -> None:
        """Bytes that are on the disk: an extent that waits to be written is not data yet."""
        with self.path.open("r+b") as file:
            os.pwrite(file.fileno(), b"x" * count * BLOCK, first * BLOCK)
            os.fsync(file.fileno())

    def ask(self, event: bytes | None = None, offset: int = 0, count: int = BLOCK) -> int:
        """An event of the file; its descriptor."""
        fd = os.open(self.path, os.O_RDWR)
        made = event or record(offset, count)
        self.kernel.send(made[:16] + fd.to_bytes(4, "little") + made[20:])
        return fd

    def answers(self, event: bytes | None = None, offset: int = 0, count: int = BLOCK) -> bool:
        """Whether such an event is answered. What comes behind it never is: it has no range."""
        asked, behind = self.ask(event, offset, count), self.ask(record())
        assert self.attendant.attend(1)
        left = self.number()
        if left == asked:
            assert self.attendant.attend(1)
        assert self.number() == behind
        for fd in {left, behind}:
            os.close(fd)
        return left != asked

    def number(self) -> int:
        """Of the event in slot 1."""
        assert int(self.slots.cast("Q")[2 * SLOT_WORDS - 1]) == self.inode
        return int(abi.METADATA.unpack_from(self.slots, SLOT_WORDS * 8)[5])

    def heard(self) -> list[bytes]:
        """The answers."""
        self.kernel.setblocking(False)
        heard = []
        with contextlib.suppress(BlockingIOError):
            while True:
                heard.append(self.kernel.recv(64))
        return heard


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    found = Desk(tmp_path / "blob")
    found.fill(0, 2)
    if not found.has_fiemap():
        found.close()
        pytest.skip(f"{tmp_path} is on a file system without FIEMAP, where nothing is answered")
    yield found
    found.close()


def test_what_is_in_the_file_is_answered_and_told(desk: Desk) -> None:
    """Allowed, told with its bytes, its descriptor closed; the other slot is as it was."""
    asked = desk.ask(offset=100, count=BLOCK)
    behind = desk.ask(record())
    assert desk.attendant.attend(1)
    assert desk.number() == behind
    os.close(behind)
    assert desk.heard() == [ALLOWED.pack(asked, lib.FAN_ALLOW)]
    inode, start, end, took_ns = ATTENDED.unpack(os.read(desk.told, 4096))
    assert (inode, start, end) == (desk.inode, 100, 100 + BLOCK) and 0 < took_ns < 10**9
    assert bytes(desk.slots[: SLOT_WORDS * 8]) == bytes(SLOT_WORDS * 8)
    with pytest.raises(OSError):
        os.fstat(asked)


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(record(), id="no range"),
        pytest.param(record(0, 0), id="a range of nothing"),
        pytest.param(record(2 * BLOCK, BLOCK), id="a hole"),
        pytest.param(record(BLOCK, 2 * BLOCK), id="half a hole"),
        pytest.param(record(BLOCKS * BLOCK, BLOCK), id="behind the end"),
        pytest.param(record(0, BLOCK, mask=2), id="another event"),
        pytest.param(record(0, BLOCK)[:4] + b"\4" + record(0, BLOCK)[5:], id="another version"),
        pytest.param(
            record(0, BLOCK)[:20] + os.getpid().to_bytes(4, "little") + record(0, BLOCK)[24:],
            id="a read of our own",
        ),
    ],
)
def test_what_is_left_to_others(desk: Desk, event: bytes) -> None:
    """It lies in the slot, with its file's inode, and nobody is told anything."""
    assert desk.answers(record(0, BLOCK))
    desk.forget()
    assert not desk.answers(event)
    assert desk.heard() == []
    with pytest.raises(BlockingIOError):
        os.read(desk.told, 1)


def test_a_range_that_ends_behind_the_file_is_what_is_in_it(desk: Desk) -> None:
    """Also one that is longer than numbers are."""
    desk.fill(0, BLOCKS)
    assert desk.answers(offset=BLOCK, count=2**64 - 1)
    assert ATTENDED.unpack(os.read(desk.told, 4096))[1:3] == (BLOCK, BLOCKS * BLOCK)


def test_only_known_files_are_answered_for(desk: Desk) -> None:
    """One whose place another has is left to others, until it is known again."""
    assert desk.answers()
    desk.attendant.know(desk.inode + 1024)
    assert not desk.answers()
    desk.attendant.know(desk.inode)
    assert desk.answers()


def test_what_is_allocated_and_not_written_is_no_data(desk: Desk) -> None:
    """It would be read as zeros."""
    with desk.path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 2 * BLOCK, 2 * BLOCK)
    assert not desk.answers(offset=2 * BLOCK)
    desk.fill(2, 1)
    assert desk.answers(offset=2 * BLOCK) and not desk.answers(offset=3 * BLOCK)


def test_what_cannot_be_told_is_left(desk: Desk) -> None:
    """Whoever counts and plans hears of it by its event."""
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(desk.teller, bytes(4096))
    assert not desk.answers()
    os.read(desk.told, 65536)
    assert desk.answers()


def test_an_event_of_no_file_that_can_be_looked_at(desk: Desk) -> None:
    """Its reader waits: it is not lost in an error, but left as one of a file nobody knows."""
    desk.kernel.send(record(0, BLOCK, number=2**31 - 1))
    assert desk.attendant.attend(1)
    words = desk.slots.cast("Q")
    assert words[SLOT_WORDS] and words[2 * SLOT_WORDS - 1] == 0
    assert desk.heard() == []


def test_the_end(desk: Desk) -> None:
    """It is seen before the next event is read."""
    desk.ask()
    os.eventfd_write(desk.end, 1)
    assert not desk.attendant.attend(1)
    assert desk.heard() == []


def test_a_group_that_is_gone(desk: Desk) -> None:
    """Its error is the caller's."""
    desk.kernel.shutdown(socket.SHUT_RDWR)
    desk.close_group()
    with pytest.raises(OSError) as caught:
        desk.attendant.attend(1)
    assert caught.value.errno == errno.EBADF


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    filled=st.sets(st.integers(0, BLOCKS - 1)),
    start=st.integers(0, BLOCKS * BLOCK - 1),
    count=st.integers(1, BLOCKS * BLOCK),
)
def test_nothing_with_a_hole_is_answered(
    desk: Desk, filled: set[int], start: int, count: int
) -> None:
    """What is answered has no hole, by SEEK_HOLE; what has none is answered, unless it is in more
    pieces than are looked at."""
    with desk.path.open("r+b") as file:
        files.punch(file.fileno(), 0, BLOCKS * BLOCK)
        for block in filled:
            os.pwrite(file.fileno(), b"y" * BLOCK, block * BLOCK)
        os.fsync(file.fileno())
        end = min(start + count, BLOCKS * BLOCK)
        whole = start < end <= os.lseek(file.fileno(), start, os.SEEK_HOLE)
    answered = desk.answers(offset=start, count=count)
    assert answered <= whole
    if end - start <= BLOCK:
        assert answered == whole
    desk.forget()
