"""Whether all of an image is here, so that it needs no source."""

from __future__ import annotations

import asyncio
import os

from fscached.cache.extents import Extents
from fscached.fill.objects import Objects
from fscached.source import SourceError
from fscached.source.nobody import Nobody
from fscached.store import Image, Store
from fscached.transport import Files, ObjectKey
from fscached.transport.cache_file import closing, data_extents, round_up
from rafs_v6.blob import ChunkMap
from rafs_v6.layout import BlobEntry


async def missing(volume: str, image: Image, objects: Objects, files: Files, store: Store) -> str:
    """What of an image's blobs is not in the cache, in words; empty: nothing."""
    opened = objects.blobs(volume)
    for entry in image.blobs:
        blob = opened[entry.blob_id].blob if entry.blob_id in opened else None
        if blob is not None and blob.complete:
            continue
        try:
            chunks = await store.chunks(image, entry, Nobody("not here"), False, 1.0)
            path = files.path(ObjectKey(volume, entry.blob_id))
            count = await asyncio.to_thread(_absent, path, entry, chunks)
        except (SourceError, OSError):
            return f"blob {entry.blob_id[:12]}, all of it"
        if count:
            return f"{count} of {chunks.count} chunks of blob {entry.blob_id[:12]}"
    return ""


def _absent(path: str, entry: BlobEntry, chunks: ChunkMap) -> int:
    """How many chunks are not all data. Raises OSError."""
    with closing(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
        extents = Extents(data_extents(fd, round_up(entry.uncompressed_size)))
    ranges = ((chunks.offset(index), chunks.padded_end(index)) for index in range(chunks.count))
    return sum(not extents.covers(start, end) for start, end in ranges)
