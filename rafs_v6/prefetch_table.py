"""Another prefetch table for an image that is there: nothing else of it changes.

Every blob, name and inode number stays what it was, so registries and caches go on sharing all of
its data; only the bootstrap is a new one.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from rafs_v6.bootstrap import Bootstrap
from rafs_v6.build import device_slots
from rafs_v6.layout import (
    BLOCK_BYTES,
    DEVICES_OFFSET,
    EXTENDED_OFFSET,
    Memory,
    align_up,
    pack_nids,
)


def with_prefetch(bootstrap: Memory | mmap.mmap, nids: Sequence[int]) -> bytes:
    """The bootstrap with these inodes, in this order, as its prefetch table; none: without one.

    The table goes where nydus-image puts it, between blob table and metadata, if there is room,
    else behind everything. An image without data has none. Raises ImageError for a bootstrap that
    is none and for an inode it does not have.
    """
    image = Bootstrap(bootstrap)
    table = pack_nids(nids)
    for nid in nids:
        image.inode(nid)
    if not image.blobs:
        table = b""
    data = bytearray(memoryview(bootstrap).cast("B"))
    _remove_table(image, data)
    start, end = _gap(image)
    offset = start if start + len(table) <= end else len(data)
    if offset == len(data):
        data += bytes(align_up(len(table)))
    _write(data, offset, table)
    extended = image.extended._replace(
        prefetch_table_offset=offset if table else 0, prefetch_table_size=len(table)
    )
    _write(data, EXTENDED_OFFSET, extended.pack())
    if len(data) != image.size_bytes:
        slots = device_slots(image.blobs, len(data))
        _write(data, DEVICES_OFFSET, b"".join(slot.pack() for slot in slots))
    return bytes(data)


def _gap(image: Bootstrap) -> tuple[int, int]:
    """What is free between the blob table and what follows it."""
    extended = image.extended
    start = extended.blob_table_offset + extended.blob_table_size
    behind = [image.superblock.meta_blkaddr * BLOCK_BYTES, extended.chunk_table_offset]
    return start, min((offset for offset in behind if offset >= start), default=start)


def _remove_table(image: Bootstrap, data: bytearray) -> None:
    extended, (start, end) = image.extended, _gap(image)
    offset, size = extended.prefetch_table_offset, extended.prefetch_table_size
    if start <= offset and offset + size <= end:
        _write(data, offset, bytes(size))
    elif (
        offset
        and offset % BLOCK_BYTES == 0
        and offset >= extended.chunk_table_offset + extended.chunk_table_size
        and align_up(offset + size) == len(data)
    ):
        del data[offset:]


def _write(data: bytearray, offset: int, content: bytes) -> None:
    data[offset : offset + len(content)] = content
