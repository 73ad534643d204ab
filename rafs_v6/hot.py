"""An image once more, with the chunks that are read first in a blob of their own.

What an image reads first lies scattered over its blobs. Together, in the order of reading, it is a
few requests, and a task that peers can pass on whole; the other blobs stay as they are and go on
being shared with other images. nydus-image's `optimize` has the same idea.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import fsdecode
from typing import BinaryIO

from rafs_v6 import ImageError, codec
from rafs_v6.blob import chunk_info, require_native
from rafs_v6.bootstrap import Bootstrap, Inode
from rafs_v6.build import Image, ImageBuilder
from rafs_v6.layout import (
    BLOCK_BITS,
    COMPRESSOR_FLAGS,
    DIGEST_FLAGS,
    TOC_FLAGS,
    BlobEntry,
    ChunkEntry,
    Compressor,
    FileType,
    Memory,
)
from rafs_v6.owners import Place
from rafs_v6.pack import BlobWriter, Chunk, Chunks, Format
from rafs_v6.tree import Node

Read = Callable[[BlobEntry, int, int], Memory]
"""Bytes [start, end) of a blob file; may raise ImageError, OSError."""


def gather(image: Bootstrap, hot: Iterable[Place], read: Read, output: BinaryIO) -> Image:
    """Write the hot chunks, in this order and each once, to `output`, a blob; the image with it.

    Every chunk is verified before it is written again. What is nowhere in the image is left out. A
    blob of which nothing is read any more leaves the image. The new one is the last of `blobs`;
    the image has no prefetch table. Raises ImageError for an image without chunk table, of blobs
    that are not native, with a damaged chunk, or of which nothing is hot; OSError.
    """
    for entry in image.blobs:
        require_native(entry)
    form = _format(image)
    tree, chunks = _reopened(image)
    there = {
        Place(chunk.layer, chunk.info.offset): chunk
        for each in chunks.of.values()
        for chunk in each
    }
    writer = BlobWriter(len(image.blobs), form, output)
    known: dict[bytes, Chunk] = {}
    moved: dict[Place, Chunk] = {}
    for place in hot:
        if place in there and place not in moved:
            plain = _verified(image.blobs[place.blob_index], there[place], read)
            digest = codec.digest(form.digester, plain)
            if digest not in known:
                stored = codec.compress(form.compressor, plain) or plain
                known[digest] = writer.add(digest, len(plain), stored)
            moved[place] = known[digest]
    if not moved:
        raise ImageError("none of the chunks to be gathered is in the image")
    chunks.of = {
        node: [moved.get(_place(chunk), chunk) for chunk in each]
        for node, each in chunks.of.items()
    }
    return ImageBuilder.resumed(form, tree, chunks, [*image.blobs, writer.finish()]).finish()


def _place(chunk: Chunk) -> Place:
    return Place(chunk.layer, chunk.info.offset)


def _verified(entry: BlobEntry, chunk: Chunk, read: Read) -> bytearray:
    info = chunk.info
    stored = read(entry, info.remote_offset, info.remote_offset + info.remote_size)
    plain = bytearray(info.size)
    compressor = entry.compressor if info.compressed else Compressor.NONE
    codec.decompress_into(compressor, stored, memoryview(plain))
    if codec.digest(entry.digester, plain) != chunk.digest:
        raise ImageError(
            f"blob {entry.blob_id}: chunk at {info.offset}: wrong bytes (its digest differs): copy "
            "the image again"
        )
    return plain


def _format(image: Bootstrap) -> Format:
    """How the image is written; what is only for reading becomes zstd."""
    flags = image.extended.flags
    (compressor,) = (known for known, flag in COMPRESSOR_FLAGS.items() if flag in flags)
    (digester,) = (known for known, flag in DIGEST_FLAGS.items() if flag in flags)
    if compressor not in TOC_FLAGS:
        compressor = Compressor.ZSTD
    return Format(compressor, digester, image.chunk_bytes)


def _reopened(image: Bootstrap) -> tuple[Node, Chunks]:
    """The tree of an image, without the files' data, and where their chunks are."""
    table = {(row.blob_index, row.chunk_index): row for row in image.chunk_table()}
    chunks, shared = Chunks(), dict[int, Node]()
    directories: dict[bytes, Node] = {}
    for path, inode in image.walk():
        node = shared.get(inode.nid)
        if node is None:
            node = _node(image, inode)
            if node.is_regular:
                shared[inode.nid] = node
                chunks.of[node] = _chunks(image, inode, path, table)
        parent, _, name = path.rpartition(b"/")
        if name:
            directories[parent].children[name] = node
        if node.is_directory:
            directories[path.rstrip(b"/")] = node
    return directories[b""], chunks


def _node(image: Bootstrap, inode: Inode) -> Node:
    kind = inode.type
    device = kind in (FileType.CHARACTER, FileType.BLOCK)
    return Node(
        mode=inode.mode,
        uid=inode.uid,
        gid=inode.gid,
        mtime=inode.mtime,
        mtime_nsec=inode.mtime_nsec,
        xattrs=image.xattrs(inode),
        size=inode.size if kind is FileType.REGULAR else 0,
        target=image.read_link(inode) if kind is FileType.SYMLINK else b"",
        device=inode.rdev if device else (0, 0),
    )


def _chunks(
    image: Bootstrap, inode: Inode, path: bytes, table: dict[tuple[int, int], ChunkEntry]
) -> list[Chunk]:
    found, left = [], inode.size
    for blob_index, chunk_index, block in image.chunks(inode):
        row = table.get((blob_index, chunk_index))
        size = min(left, image.chunk_bytes)
        left -= size
        if row is None or (row.uncompressed_offset, row.uncompressed_size) != (
            block << BLOCK_BITS,
            size,
        ):
            raise ImageError(
                f"{fsdecode(path)}: a chunk of it is not in the chunk table: convert the image anew"
            )
        found.append(Chunk(row.digest, blob_index, chunk_index, chunk_info(row)))
    return found
