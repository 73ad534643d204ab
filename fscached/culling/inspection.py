"""Whether what a cache file holds is what its image says."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from fscached.cache.extents import Extents
from fscached.transport.cache_file import closing, data_extents, round_up
from rafs_v6 import codec
from rafs_v6.blob import ChunkMap

SPAN_BYTES = 1024 * 1024
"""A bootstrap has no chunks: it is compared by so much at a time."""

TRIES = 2
"""Of a chunk that is not right: it may be being written."""

Watch = Callable[[int], None]
"""Told of every so many bytes that were looked at."""


class Part(NamedTuple):
    """Bytes of a cache file, and how to tell that they are right; None where nobody can."""

    offset: int
    size: int
    padded_end: int
    is_right: Callable[[memoryview], bool] | None


class Verdict(NamedTuple):
    """What is right and what is not, in chunks. `bad` are offsets in the cache file; of the
    `unvouched` the image has no digest."""

    right: int
    bad: tuple[int, ...]
    unvouched: int
    absent: int


def parts_of_blob(chunks: ChunkMap) -> Iterable[Part]:
    """Every chunk, to be compared with its digest."""
    for index in range(chunks.count):
        chunk, expected = chunks[index], chunks.digest(index)

        def is_right(data: memoryview, expected: bytes | None = expected) -> bool:
            return codec.digest(chunks.digester, data) == expected

        check = is_right if expected is not None else None
        yield Part(chunk.offset, chunk.size, chunk.padded_end, check)


def parts_of_bootstrap(path: str) -> Iterable[Part]:
    """All of it, to be compared with the verified file at `path`. Raises OSError."""
    bootstrap = Path(path).read_bytes()
    for start in range(0, len(bootstrap), SPAN_BYTES):
        expected = bootstrap[start : start + SPAN_BYTES]

        def is_right(data: memoryview, expected: bytes = expected) -> bool:
            return data == expected

        yield Part(start, len(expected), start + round_up(len(expected)), is_right)


def inspect(path: str, parts: Iterable[Part], watch: Watch = lambda count: None) -> Verdict:
    """Look at everything that is resident, past the page cache: on the disk. Raises OSError."""
    right, bad, unvouched, absent = 0, list[int](), 0, 0
    flags = os.O_RDONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC
    with closing(os.open(path, flags)) as fd:
        extents = Extents(data_extents(fd, round_up(os.fstat(fd).st_size)))
        for part in parts:
            watch(part.size)
            if not extents.covers(part.offset, part.padded_end):
                absent += 1
            elif part.is_right is None:
                unvouched += 1
            elif any(part.is_right(_read(fd, part)) for _ in range(TRIES)):
                right += 1
            else:
                bad.append(part.offset)
    return Verdict(right, tuple(bad), unvouched, absent)


def _read(fd: int, part: Part) -> memoryview:
    """The part; shorter where the file ends."""
    memory = mmap.mmap(-1, part.padded_end - part.offset)
    count = os.preadv(fd, [memory], part.offset)
    return memoryview(memory)[: min(part.size, count)]
