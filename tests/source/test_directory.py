"""Blobs as local files."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from fscached.source import Fault, Priority, SourceError
from fscached.source.directory import OPEN_FILES_LIMIT, PIECE_BYTES, Directory
from tests.source.conftest import BLOB

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def directory(tmp_path: Path) -> AsyncIterator[Directory]:
    """One that holds BLOB as `blob`."""
    (tmp_path / "blob").write_bytes(BLOB)
    directory = Directory(tmp_path)
    yield directory
    await directory.close()


async def collect(directory: Directory, blob_id: str, start: int, end: int) -> bytes:
    got = bytearray()
    answer = await directory.read(blob_id, start, end, Priority.DEMAND, got.extend, 20)
    assert answer.received_bytes == len(got) and answer.requests == 0
    return bytes(got)


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, len(BLOB)), (1, PIECE_BYTES + 2), (5, 6), (len(BLOB) - 1, len(BLOB)), (7, 7)],
)
async def test_ranges(directory: Directory, start: int, end: int) -> None:
    """Bytes arrive exactly, by both ways."""
    assert await collect(directory, "blob", start, end) == BLOB[start:end]
    into = memoryview(bytearray(len(BLOB)))
    assert directory.read_now("blob", start, end, into) == end - start
    assert into[: end - start] == BLOB[start:end]


async def test_other_places(tmp_path: Path) -> None:
    """A blob that is not in the directory is looked for in the others; a file is a blob itself."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    (tmp_path / "second" / "blob").write_bytes(BLOB)
    absent = Directory(tmp_path / "absent", [tmp_path / "first", tmp_path / "second"])
    alone = Directory(tmp_path / "second" / "blob")
    for directory in (absent, alone):
        assert await collect(directory, "blob", 5, 99) == BLOB[5:99]
    with pytest.raises(SourceError, match="absent/other: No such file"):
        await collect(absent, "other", 0, 1)
    await absent.close()
    await alone.close()


async def test_readers_at_once(directory: Directory) -> None:
    """Readers do not share memory."""
    starts = range(0, 2 * PIECE_BYTES, PIECE_BYTES // 4)
    got = await asyncio.gather(
        *(collect(directory, "blob", start, start + PIECE_BYTES) for start in starts)
    )
    assert got == [BLOB[start : start + PIECE_BYTES] for start in starts]


@pytest.mark.parametrize("blob_id", ["../secret", "/etc/passwd", "", ".", "a\0b", "x" * 999])
async def test_hostile_ids(directory: Directory, blob_id: str) -> None:
    """An id is the name of a file in the directory and never a path."""
    with pytest.raises(SourceError, match="no id") as caught:
        await collect(directory, blob_id, 0, 1)
    assert caught.value.fault is Fault.PROTOCOL


async def test_faults(directory: Directory, tmp_path: Path) -> None:
    """What is missing, too short or no file is a fault of LOCAL that names it; nothing hangs."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for blob_id, says in (
        ("gone", "No such file"),
        ("pipe", "not a regular file"),
        ("folder", "not a regular file"),
    ):
        with pytest.raises(SourceError, match=f"{blob_id}: .*{says}") as caught:
            await collect(directory, blob_id, 0, 1)
        assert caught.value.fault is Fault.LOCAL
    with pytest.raises(SourceError, match=rf"blob: has {len(BLOB)} bytes, {len(BLOB) + 1}"):
        await collect(directory, "blob", 0, len(BLOB) + 1)


async def test_many_blobs(tmp_path: Path) -> None:
    """Open files are bounded."""
    directory = Directory(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(OPEN_FILES_LIMIT + 20):
        (tmp_path / f"b{number}").write_bytes(b"%04d" % number)
        assert await collect(directory, f"b{number}", 0, 4) == b"%04d" % number
    assert len(os.listdir("/proc/self/fd")) - before <= OPEN_FILES_LIMIT
    assert await collect(directory, "b0", 0, 4) == b"0000"
    await directory.close()
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_what_feed_raises(directory: Directory) -> None:
    """An error of the consumer's is the reader's."""

    def feed(_: memoryview) -> None:
        raise TimeoutError("of the consumer")

    with pytest.raises(TimeoutError, match="of the consumer"):
        await directory.read("blob", 0, 1, Priority.DEMAND, feed, 20)
