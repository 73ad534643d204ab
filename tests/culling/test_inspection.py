"""Cache files compared with what their image says, on a real disk."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from fscached.culling.inspection import SPAN_BYTES, inspect, parts_of_blob, parts_of_bootstrap
from rafs_v6.blob import ChunkMap
from tests.fill.conftest import Remote

SIZES = [5000, 70_000, 4096, 1, 300_000]


@pytest.fixture
def remote() -> Remote:
    return Remote(SIZES)


def offsets(chunks: ChunkMap) -> list[int]:
    return [chunks[index].offset for index in range(chunks.count)]


def make(path: Path, content: bytes, absent: tuple[int, int] = (0, 0)) -> str:
    """A cache file that holds all but these bytes."""
    with path.open("wb") as file:
        os.ftruncate(file.fileno(), len(content))
        for start, end in ((0, absent[0]), (absent[1], len(content))):
            os.pwrite(file.fileno(), content[start:end], start)
        os.fsync(file.fileno())
    return str(path)


def test_a_file_is_right_when_every_chunk_is(tmp_path: Path, remote: Remote) -> None:
    """And all of it was looked at."""
    seen: list[int] = []
    path = make(tmp_path / "blob", remote.content)
    verdict = inspect(path, parts_of_blob(remote.chunks), seen.append)
    assert verdict == (len(SIZES), (), 0, 0) and sum(seen) == sum(SIZES)


@pytest.mark.parametrize("spoiled", range(len(SIZES)))
def test_one_bit_is_enough(tmp_path: Path, remote: Remote, spoiled: int) -> None:
    """The chunk is named by its place in the file."""
    at = offsets(remote.chunks)[spoiled]
    content = bytearray(remote.content)
    content[at + SIZES[spoiled] - 1] ^= 128
    verdict = inspect(make(tmp_path / "blob", content), parts_of_blob(remote.chunks))
    assert verdict.bad == (at,) and verdict.right == len(SIZES) - 1


def test_what_is_absent_is_not_wrong(tmp_path: Path, remote: Remote) -> None:
    """A chunk of which one page is missing is absent, as it is for readers."""
    path = make(tmp_path / "blob", remote.content, (8192 + 4096, 8192 + 8192))
    assert inspect(path, parts_of_blob(remote.chunks)) == (len(SIZES) - 1, (), 0, 1)


def test_without_digests_nothing_is_vouched_for(tmp_path: Path, remote: Remote) -> None:
    """Neither right nor wrong."""
    infos = [remote.chunks[index] for index in range(remote.chunks.count)]
    assert infos
    remote.chunks._digests = None
    path = make(tmp_path / "blob", bytes(len(remote.content)), (0, 4096))
    verdict = inspect(path, parts_of_blob(remote.chunks))
    assert verdict.right == 0 and verdict.bad == () and verdict.unvouched + verdict.absent == 5


def test_a_file_that_ends_too_soon_is_wrong(tmp_path: Path, remote: Remote) -> None:
    """Not an error of the program."""
    path = make(tmp_path / "blob", remote.content[:-4096])
    verdict = inspect(path, parts_of_blob(remote.chunks))
    assert verdict.bad == () and verdict.absent == 1


def test_a_bootstrap_is_compared_with_its_file(tmp_path: Path) -> None:
    """By the megabyte; its last page is padded with zeros or ends."""
    data = os.urandom(2 * SPAN_BYTES + 5000)
    (tmp_path / "image.boot").write_bytes(data)
    parts = list(parts_of_bootstrap(str(tmp_path / "image.boot")))
    good = make(tmp_path / "good", data + bytes(-len(data) % mmap.PAGESIZE))
    assert inspect(good, parts) == (3, (), 0, 0)
    bad = bytearray(data)
    bad[SPAN_BYTES + 7] ^= 1
    assert inspect(make(tmp_path / "bad", bad), parts).bad == (SPAN_BYTES,)
