"""A full cache file system, over both transports: readers fail, nothing wrong is kept, space freed
is enough.

Stand-ins for the kernel's end are those of `tests/transport`: real files, and a write(2) that says
what a full disk says. What a hole of a real kernel does is tried in `tests/native` and `vm-tests`.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from cdefs import fanotify as abi
from fscached.fill.blob import Limits, Origin
from fscached.fill.crew import Crew
from fscached.fill.memory import Pool
from fscached.fill.objects import Objects
from fscached.transport import ObjectId, ObjectKey, Opened, Transport
from fscached.transport import cachefiles as module
from rafs_v6.layout import Compressor
from tests.fill.conftest import KEY, MIB, MemorySource, Remote, Scene, settled, until
from tests.transport.device import Kernel, read_message
from tests.transport.group import Group, event

pytestmark = pytest.mark.asyncio

CODES = [errno.ENOBUFS, errno.ENOSPC, errno.EDQUOT]
CHUNK = 65536
COUNT = 4


class End(Protocol):
    """The kernel's end of a transport with one blob."""

    transport: Transport
    path: Path
    key: ObjectKey

    def begin(self, size_bytes: int) -> Opened:
        """The blob is mounted."""
        ...

    async def ask(self, start: int) -> bool:
        """A reader asks for 4 KiB; whether it was told that they are there."""
        ...


class Device:
    """cachefiles: an answer only says "look again", and a hole is EIO then."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._kernel = Kernel(directory)
        self.transport = self._kernel.transport
        self.path, self.key = self._kernel.path, ObjectKey("dom", "blob")
        self._tickets = itertools.count(10)
        self._answered: list[int] = []
        monkeypatch.setattr(module, "read_complete", lambda _, id: self._answered.append(id))

    def begin(self, size_bytes: int) -> Opened:
        fd = self._kernel.open()
        os.ftruncate(fd, size_bytes)
        return Opened(ObjectId(5), self.key)

    async def ask(self, start: int) -> bool:
        ticket = next(self._tickets)
        self._kernel.send(read_message(start, 4096, ticket))
        await until(lambda: ticket in self._answered)
        with self.path.open("rb") as file:
            try:
                return os.lseek(file.fileno(), start, os.SEEK_DATA) == start
            except OSError:
                return False


class Files:
    """fanotify: an answer allows or denies."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._group = Group(directory, monkeypatch)
        for call in ("mark", "unmark"):
            monkeypatch.setattr(abi, call, lambda *_: None)
        self.transport = self._group.transport
        self.key = ObjectKey("dom", "blob")
        self.path = directory / "dom" / "blob"

    def begin(self, size_bytes: int) -> Opened:
        [opened] = self.transport.offer(self.key, size_bytes)
        assert isinstance(opened, Opened)
        return opened

    async def ask(self, start: int) -> bool:
        answers = self._group.answers
        count = len(answers)
        event(self._group, self.path, start)
        await until(lambda: len(answers) > count)
        return answers[-1][1] == 0


class Node:
    """A daemon's half over one of them."""

    def __init__(self, end: End, remote: Remote) -> None:
        self.end, self.remote = end, remote
        self.source = MemorySource(remote.file)
        self.crew = Crew(2, Pool(64 * MIB))
        limits = Limits(MIB, 8 * MIB, deadline_s=30.0, refusal_s=0.0, verify=True)
        self.objects = Objects(end.transport, self._lookup, limits, self.crew)
        self.objects.handle(end.begin(len(remote.content)))
        asyncio.get_running_loop().add_reader(end.transport.fileno(), self._drain)

    @property
    def held_bytes(self) -> int:
        """What the file takes on disk."""
        return self.end.path.stat().st_blocks * 512

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.end.transport.fileno())
        self.objects.close()
        self.end.transport.close()
        self.crew.close()

    def _drain(self) -> None:
        self.objects.heed(self.end.transport.drain())

    def _lookup(self, key: ObjectKey) -> Origin:
        async def chunks():
            return self.remote.chunks

        return Origin(key.cookie, len(self.remote.content), self.source, chunks)


class Disk:
    """write(2) as this process sees it; `code` is what it says while the disk is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.code = 0
        self.refused = 0
        self._write = os.pwrite
        monkeypatch.setattr(os, "pwrite", self.pwrite)

    def pwrite(self, fd: int, memory: memoryview, offset: int) -> int:
        if self.code:
            self.refused += 1
            raise OSError(self.code, os.strerror(self.code))
        return self._write(fd, memory, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    return Disk(monkeypatch)


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("kind", [Device, Files], ids=["cachefiles", "fanotify"])
async def test_a_full_disk_fails_reads_until_space_is_freed(
    kind: type[Device] | type[Files],
    code: int,
    disk: Disk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is there stays readable, what is not fails and nothing of it is kept; afterwards every
    byte is right, without a restart."""
    node = Node(kind(tmp_path, monkeypatch), Remote([CHUNK] * COUNT, Compressor.NONE))
    try:
        disk.code = code
        assert not await node.end.ask(0)
        await settled(node.objects)
        tally = node.objects.tallies[node.end.key]
        assert (tally.reads, tally.reads_failed, tally.landed_bytes) == (1, 1, 0)
        assert node.held_bytes == 0 and disk.refused
        assert not await node.end.ask(2 * CHUNK)
        await settled(node.objects)
        assert "blob: a fetch failed" in caplog.text and os.strerror(code) in caplog.text

        disk.code = 0
        assert await node.end.ask(0)
        await settled(node.objects)
        asked = len(node.source.asked)
        assert node.end.path.read_bytes() == node.remote.content
        assert tally.landed_bytes == node.held_bytes == COUNT * CHUNK
        assert (tally.reads_completed, tally.reads_failed, tally.bad_chunks) == (1, 2, 0)

        disk.code = code
        assert await node.end.ask(3 * CHUNK)
        assert len(node.source.asked) == asked and node.objects.waiting == 0
    finally:
        node.close()


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
async def test_a_window_that_cannot_be_written_is_not_fetched_to_its_end(scene, code, caplog):
    """The first write that fails ends the transfer: the rest would be thrown away."""
    here: Scene = scene([CHUNK] * 64, Compressor.NONE, window_bytes=4 * MIB, refusal_s=0.0)
    here.source.piece_bytes = CHUNK
    failed, start = asyncio.Event(), here.crew.start

    def watched(task, ended, urgent=True):
        def told(outcome):
            ended(outcome)
            if isinstance(outcome, OSError):
                failed.set()

        start(task, told, urgent)

    async def one_piece_before_that() -> bool:
        return not here.source.given_bytes or await failed.wait()

    here.crew.start = watched  # type: ignore[method-assign]
    here.source.gate.wait = one_piece_before_that  # type: ignore[method-assign]
    try:
        await here.kernel.open(KEY)
        here.kernel.write_errors = [OSError(code, os.strerror(code))]
        with pytest.raises(OSError):
            await here.kernel.read(KEY, 0, 4096, asks=1)
        await settled(here.objects)
        assert here.source.given_bytes == CHUNK
        assert here.kernel.resident_bytes(KEY) == 0
        assert await here.kernel.read(KEY, 0, 64 * CHUNK) == here.remote.content
        assert here.kernel.rewritten_bytes == 0
    finally:
        here.close()
