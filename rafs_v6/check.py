"""Say everything that is wrong with an image.

Looks at all of a bootstrap, and at all of the blob files it is given. What the kernel, the daemon
or the field's builder would stumble over is a finding; an image without findings is one that they
all take.
"""

from __future__ import annotations

import hashlib
import mmap
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

from rafs_v6 import ImageError, codec
from rafs_v6.blob import (
    DATA_NAME,
    TOC_NAME,
    BlobMeta,
    ChunkMap,
    has_trusted_toc,
    tail_entries,
    unpack_toc,
)
from rafs_v6.bootstrap import Bootstrap, Inode
from rafs_v6.layout import (
    BLOCK_BITS,
    CHUNK_FORMAT_BITS,
    TAIL_HEADER_BYTES,
    TOC_FLAGS,
    BlobEntry,
    BlobFeatures,
    ChunkEntry,
    ChunkIndex,
    FileType,
    Memory,
    TocEntry,
)

MAX_PART_BYTES = 256 << 20
"""Most memory for one part of a blob file, uncompressed: a bootstrap, at the largest."""
_TOC_COMPRESSORS = {flags: compressor for compressor, flags in TOC_FLAGS.items()}


class Finding(NamedTuple):
    """Something wrong: where in the image, and what."""

    where: str
    problem: str


def check(
    bootstrap: Memory | mmap.mmap,
    blobs: Mapping[str, Memory | mmap.mmap] | None = None,
    own_blob_id: str | None = None,
) -> list[Finding]:
    """All findings in a bootstrap and in those of its blob files that are given, by blob id.

    `own_blob_id` as for `Bootstrap`: the blob that holds this very bootstrap.
    """
    try:
        image = Bootstrap(bootstrap, own_blob_id)
    except ImageError as error:
        return [Finding("bootstrap", str(error))]
    findings = list(_check_chunk_table(image))
    findings += _check_tree(image)
    for entry in image.blobs:
        if blobs and entry.blob_id in blobs:
            memory = memoryview(blobs[entry.blob_id]).cast("B")
            findings += _check_blob(image, entry, memory)
    return findings


def _check_chunk_table(image: Bootstrap) -> Iterator[Finding]:
    where = "chunk table"
    if image.blobs and not image.extended.chunk_table_size:
        yield Finding(where, "missing: the image can be mounted, but not merged or verified")
        return
    try:
        keys = [(row.digest, row.blob_index) for row in image.chunk_table()]
        for entry in image.blobs:
            ChunkMap.from_chunk_table(entry, image.chunk_table(entry.blob_index))
    except ImageError as error:
        yield Finding(where, str(error))
        return
    if not all(before < key for before, key in pairwise(keys)):
        yield Finding(where, "not sorted by digest and blob, or one of them is there twice")


def _check_tree(image: Bootstrap) -> Iterator[Finding]:
    names: Counter[int] = Counter()
    directories: dict[bytes, int] = {}
    inodes: dict[int, tuple[bytes, Inode]] = {}
    table = _chunk_table(image)
    total = 0
    try:
        for path, inode in image.walk():
            total += 1
            parent = path.rpartition(b"/")[0] or b"/"
            if inode.type is FileType.DIRECTORY:
                directories[path] = inode.nid
                names[inode.nid] += 2
                if path != b"/":
                    names[directories[parent]] += 1
                yield from _check_dots(image, path, inode, directories[parent])
            else:
                names[inode.nid] += 1
            if inode.nid not in inodes:
                inodes[inode.nid] = path, inode
                yield from _check_inode(image, path, inode, table)
    except ImageError as error:
        yield Finding("tree", f"{error}; what comes behind was not looked at")
        return
    for path, inode in inodes.values():
        if inode.nlink != names[inode.nid]:
            yield Finding(
                _name(path), f"has {names[inode.nid]} links, its inode says {inode.nlink}"
            )
    if total != image.superblock.inos:
        yield Finding("superblock", f"says {image.superblock.inos} inodes, there are {total}")
    yield from _check_prefetch(image, inodes)


def _check_dots(image: Bootstrap, path: bytes, inode: Inode, parent: int) -> Iterator[Finding]:
    there = {entry.name: entry.nid for entry in image.dirents(inode)}
    for name, nid in ((b".", inode.nid), (b"..", parent)):
        if there.get(name) != nid:
            yield Finding(
                _name(path), f"{name.decode()!r} is inode {there.get(name)} instead of {nid}"
            )


_Table = dict[tuple[int, int], ChunkEntry]


def _chunk_table(image: Bootstrap) -> _Table:
    try:
        return {(row.blob_index, row.chunk_index): row for row in image.chunk_table()}
    except ImageError:
        return {}


def _check_inode(image: Bootstrap, path: bytes, inode: Inode, table: _Table) -> Iterator[Finding]:
    try:
        image.xattrs(inode)
        if inode.type is FileType.SYMLINK:
            image.read_link(inode)
        if inode.type is FileType.REGULAR:
            chunks = list(image.chunks(inode))
            yield from _check_file(image, path, inode, chunks, table)
    except ImageError as error:
        yield Finding(_name(path), str(error))


def _check_file(
    image: Bootstrap, path: bytes, inode: Inode, chunks: list[ChunkIndex], table: _Table
) -> Iterator[Finding]:
    extent_bytes = 1 << (inode.u & CHUNK_FORMAT_BITS) + BLOCK_BITS
    chunk_blocks = image.chunk_bytes >> BLOCK_BITS
    for position, index in enumerate(chunks):
        if extent_bytes > image.chunk_bytes and (
            index.blob_index != chunks[0].blob_index
            or index.start_block != chunks[0].start_block + position * chunk_blocks
        ):
            yield Finding(
                _name(path),
                f"chunk {position} does not follow its first, yet the kernel is told they are one "
                f"extent of {extent_bytes} bytes",
            )
        size = min(image.chunk_bytes, inode.size - position * image.chunk_bytes)
        row = table.get((index.blob_index, index.chunk_index))
        if table and (
            row is None
            or row.uncompressed_offset != index.start_block << BLOCK_BITS
            or row.uncompressed_size != size
        ):
            yield Finding(
                _name(path), f"chunk {position} ({index}, {size} bytes) is not in the chunk table"
            )


def _check_prefetch(image: Bootstrap, there: Collection[int]) -> Iterator[Finding]:
    for position, nid in enumerate(image.prefetch_nids()):
        if nid not in there:
            problem = f"entry {position}: inode {nid} has no name in the image"
            yield Finding("prefetch table", problem)


def _check_blob(image: Bootstrap, entry: BlobEntry, blob: memoryview) -> Iterator[Finding]:
    where = f"blob {entry.blob_id}"
    whole_file = BlobFeatures.CAP_TAR_TOC in entry.features
    if whole_file and len(blob) < entry.compressed_size:
        yield Finding(where, f"has {len(blob)} of {entry.compressed_size} bytes: cut off")
        return
    if BlobFeatures.HAS_TAR_HEADER in entry.features:
        yield from _check_parts(entry, blob, where)
    try:
        told = read_meta(entry, blob)
        known = ChunkMap.from_chunk_table(entry, image.chunk_table(entry.blob_index))
    except ImageError as error:
        yield Finding(where, str(error))
        return
    yield from _check_same(told, known, where)
    if not told.verifiable and not known.count:
        yield Finding(where, "neither chunk table nor a trusted ToC: nobody vouches for its chunks")
    yield from _check_chunks(told if told.verifiable else known, blob, where)


def read_meta(entry: BlobEntry, blob: Memory) -> ChunkMap:
    """The chunks of a blob file that is at hand. Raises ImageError, as `BlobMeta` does."""
    meta = BlobMeta(entry)
    while meta.wanted:
        start, end = meta.wanted[0]
        meta.feed(start, blob[start:end])
    return meta.chunks()


def _check_parts(entry: BlobEntry, blob: memoryview, where: str) -> Iterator[Finding]:
    try:
        parts = tail_entries(blob)
    except ImageError as error:
        yield Finding(where, str(error))
        return
    if not parts or parts[0].name != TOC_NAME:
        if BlobFeatures.HAS_TOC in entry.features:
            yield Finding(where, f"does not end with {TOC_NAME}")
        return
    if has_trusted_toc(entry) and len(blob) != entry.compressed_size:
        yield Finding(where, f"has {len(blob)} bytes instead of {entry.compressed_size}")
    try:
        toc = unpack_toc(blob[parts[0].start :], where)
    except ImageError as error:
        yield Finding(where, str(error))
        return
    for name, part in toc.items():
        try:
            found = _part_digest(entry, part, blob)
        except ImageError as error:
            yield Finding(where, f"{name}: {error}")
            continue
        if found != part.digest:
            yield Finding(where, f"{name}: not the content its table of contents promises (sha256)")


def _part_digest(entry: BlobEntry, part: TocEntry, blob: memoryview) -> bytes:
    if part.name == DATA_NAME:
        # Its ToC offset is where it ends: the field's builder subtracts nothing from the cursor.
        if part.uncompressed_size != entry.uncompressed_size:
            raise ImageError(
                f"a cache file of {part.uncompressed_size} bytes, {entry.uncompressed_size} in "
                "the bootstrap"
            )
        return hashlib.sha256(blob[: part.compressed_size + TAIL_HEADER_BYTES]).digest()
    if part.uncompressed_size > MAX_PART_BYTES:
        raise ImageError(f"{part.uncompressed_size} bytes: over the limit of {MAX_PART_BYTES}")
    content = bytearray(part.uncompressed_size)
    start = part.compressed_offset
    codec.decompress_into(
        _TOC_COMPRESSORS[part.flags],
        blob[start : start + part.compressed_size],
        memoryview(content),
    )
    return hashlib.sha256(content).digest()


def _check_same(told: ChunkMap, known: ChunkMap, where: str) -> Iterator[Finding]:
    for index in range(known.count):
        offset = known.offset(index)
        try:
            other = told.find(offset)
        except IndexError:
            yield Finding(where, f"has no chunk at {offset}, the chunk table has")
            continue
        if _placement(told, other) != _placement(known, index) or (
            told.verifiable and told.digest(other) != known.digest(index)
        ):
            yield Finding(where, f"its chunk at {offset} is not that of the chunk table")


def _placement(chunks: ChunkMap, index: int) -> tuple[int, int, int, int, bool]:
    return (
        chunks.offset(index),
        chunks.size(index),
        chunks.remote_offset(index),
        chunks.remote_size(index),
        chunks.compressed(index),
    )


def _check_chunks(chunks: ChunkMap, blob: memoryview, where: str) -> Iterator[Finding]:
    for index in range(chunks.count):
        start = chunks.remote_offset(index)
        remote = blob[start : start + chunks.remote_size(index)]
        plain = bytearray(chunks.size(index))
        try:
            if chunks.compressed(index):
                codec.decompress_into(chunks.compressor, remote, memoryview(plain))
            else:
                plain = bytearray(remote)
        except ImageError as error:
            yield Finding(where, f"chunk {index}: {error}")
            continue
        if codec.digest(chunks.digester, plain) != chunks.digest(index):
            yield Finding(where, f"chunk {index} at {start}: wrong bytes (its digest differs)")


def _name(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")
