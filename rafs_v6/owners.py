"""Which files a chunk belongs to: the way back from a blob to names.

A bootstrap leads from names to chunks only. One walk answers for a set of chunks at once, in time
bounded by the bootstrap and memory bounded by the question, so that a hostile image in which
everybody shares one chunk costs no more than an honest one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from rafs_v6.bootstrap import Bootstrap, Inode
from rafs_v6.layout import BLOCK_BITS, FileType

OWNERS_LIMIT = 8
"""Names kept per chunk; of more only the number is known."""


class Place(NamedTuple):
    """A chunk: its blob's position in the blob table, and its offset in bytes in the cache file."""

    blob_index: int
    offset: int


class File(NamedTuple):
    """A regular file: its first path with the leading slash, its inode and its different chunks."""

    path: bytes
    nid: int
    size_bytes: int
    chunk_count: int


class Owners(NamedTuple):
    """The files that have a chunk: the first of them by path, and how many there are."""

    files: tuple[File, ...]
    total: int


def files(image: Bootstrap) -> Iterator[tuple[File, list[Place]]]:
    """Every regular file with data and its chunks in order, by path; of hard links the first.

    Raises ImageError where `Bootstrap.walk` and `Bootstrap.chunks` do.
    """
    linked: set[int] = set()
    for path, inode in image.walk():
        if inode.type is not FileType.REGULAR or not inode.size:
            continue
        if inode.nlink > 1:
            if inode.nid in linked:
                continue
            linked.add(inode.nid)
        places = _places(image, inode)
        yield File(path, inode.nid, inode.size, len(set(places))), places


def owners(image: Bootstrap, wanted: Collection[Place]) -> dict[Place, Owners]:
    """The owners of those chunks that have any. Raises ImageError as `files` does."""
    wanted = frozenset(wanted)
    found: dict[Place, tuple[list[File], int]] = {}
    for file, places in files(image):
        for place in wanted.intersection(places):
            known, count = found.get(place, ([], 0))
            if count < OWNERS_LIMIT:
                known.append(file)
            found[place] = known, count + 1
    return {place: Owners(tuple(known), count) for place, (known, count) in found.items()}


def _places(image: Bootstrap, inode: Inode) -> list[Place]:
    return [Place(blob, block << BLOCK_BITS) for blob, _, block in image.chunks(inode)]
