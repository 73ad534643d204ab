"""Runs of chunks become bytes of the cache file: all that are right, none that are not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fscached.cache.blob import Run
from fscached.fill import writer as module
from fscached.fill.writer import Landing, Writer
from rafs_v6 import codec
from rafs_v6.layout import Compressor
from tests.fill.conftest import Remote

PAGE = 4096
COMPRESSORS = [Compressor.NONE, Compressor.LZ4_BLOCK, Compressor.ZSTD]


class File:
    """The cache file, and every write to it as (offset, length)."""

    def __init__(self, size_bytes: int) -> None:
        self.data = bytearray(b"\xaa" * size_bytes)
        self.writes: list[tuple[int, int]] = []

    def write(self, offset: int, memory: memoryview) -> None:
        self.writes.append((offset, len(memory)))
        self.data[offset : offset + len(memory)] = memory


def land(remote: Remote, run: Run, verify: bool = True) -> tuple[File, Landing]:
    file = File(len(remote.content))
    start, end = remote.chunks.remote_offset(run.first), remote.chunks[run.end - 1].remote_end
    writer = Writer(remote.chunks, file.write, verify)
    return file, writer.land(run, memoryview(bytes(remote.file[start:end])))


def damage(remote: Remote, index: int, where: float) -> None:
    chunk = remote.chunks[index]
    remote.file[chunk.remote_offset + int(where * (chunk.remote_size - 1))] ^= 0x55


def is_bad(remote: Remote, index: int) -> bool:
    """Some bits of a frame mean nothing."""
    chunk, plain = remote.chunks[index], bytearray(remote.chunks.size(index))
    packed = remote.file[chunk.remote_offset : chunk.remote_end]
    if not chunk.compressed:
        plain[:] = packed
    else:
        try:
            codec.decompress_into(remote.chunks.compressor, packed, memoryview(plain))
        except codec.CodecError:
            return True
    return codec.digest(remote.chunks.digester, plain) != remote.chunks.digest(index)


def check(remote: Remote, run: Run, file: File, landing: Landing, bad: set[int]) -> None:
    """Good chunks are there with their padding, of bad ones and others nothing is."""
    assert {index for index, _ in landing.bad} == bad
    landed = [index for span in landing.landed for index in range(span.first, span.end)]
    assert sorted(landed) == [index for index in range(run.first, run.end) if index not in bad]
    expected = bytearray(b"\xaa" * len(remote.content))
    for index in landed:
        start, end = remote.chunks.offset(index), remote.chunks.padded_end(index)
        expected[start:end] = remote.content[start:end]
    assert file.data == expected
    assert all(offset % PAGE == length % PAGE == 0 for offset, length in file.writes)


@pytest.mark.parametrize("compressor", COMPRESSORS)
@settings(deadline=None)
@given(data=st.data())
def test_what_is_right_lands_and_what_is_not_does_not(compressor: Compressor, data) -> None:
    """Chunks of any sizes, any of them damaged anywhere."""
    sizes = data.draw(st.lists(st.integers(1, 20_000), min_size=1, max_size=12))
    first = data.draw(st.integers(0, len(sizes) - 1))
    run = Run(first, data.draw(st.integers(first + 1, len(sizes))))
    bad = data.draw(st.sets(st.integers(run.first, run.end - 1), max_size=3))
    remote = Remote(sizes, compressor)
    for index in bad:
        damage(remote, index, data.draw(st.floats(0, 1)))
    bad = {index for index in bad if is_bad(remote, index)}
    check(remote, run, *land(remote, run), bad)


def test_small_and_large_chunks_land_together() -> None:
    """Whatever is decoded at once and what is not; no write is longer than a span or a chunk."""
    rng = random.Random(3)
    sizes = [rng.choice([700, 5_000, 60_000, 300_000, 3 << 20]) for _ in range(40)]
    remote = Remote(sizes)
    run = Run(0, len(sizes))
    file, landing = land(remote, run)
    check(remote, run, file, landing, set())
    assert max(length for _, length in file.writes) <= max(module.SPAN_BYTES, 3 << 20)
    assert len(file.writes) < len(sizes)


def test_a_frame_of_another_size_is_bad_among_good_ones() -> None:
    """It says 4,096 bytes where the image says 5,000; its neighbours are none the worse."""
    remote, other = Remote([5_000] * 6), Remote([4_096] * 6)
    start = remote.chunks.remote_offset(2)
    frame = other.file[other.chunks.remote_offset(2) : other.chunks[2].remote_end]
    assert len(frame) <= remote.chunks.remote_size(2)
    remote.file[start : start + len(frame)] = frame
    run = Run(0, 6)
    check(remote, run, *land(remote, run), {2})


def test_without_verification_only_the_digest_is_left_out() -> None:
    """Bytes that decode are taken, others are not."""
    remote = Remote([5_000] * 4, Compressor.NONE)
    damage(remote, 1, 0.5)
    _, landing = land(remote, Run(0, 4), verify=False)
    assert landing.bad == []
    remote = Remote([5_000] * 4, Compressor.ZSTD)
    damage(remote, 1, 0.0)
    file, landing = land(remote, Run(0, 4), verify=False)
    check(remote, Run(0, 4), file, landing, {1})
