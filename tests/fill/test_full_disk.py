"""A full cache file system, over both transports: readers fail, nothing wrong is kept, space freed
is enough.

Stand-ins for the kernel's end are those of `tests/transport`: real files, and a write(2) that says
what a full disk says. What a hole of a real kernel does is tried in `tests/native` and `vm-tests`.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rafs_v6.layout import Compressor
from tests.fill.conftest import KEY, MIB, Remote, Scene, settled
from tests.fill.ends import ENDS, Device, Files, Node

pytestmark = pytest.mark.asyncio

CODES = [errno.ENOBUFS, errno.ENOSPC, errno.EDQUOT]
CHUNK = 65536
COUNT = 4


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
@ENDS
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
