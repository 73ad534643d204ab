"""The images bound on this node: what a key of the kernel stands for, and where its bytes are.

A registration names a bootstrap by volume and fsid and brings a source for its data blobs. Images
of one volume (a shared domain) share their blobs: a blob is served from the registration that
brought it first, for as long as that is there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from fscached.fill.blob import Origin
from fscached.fill.objects import LocalBootstrap
from fscached.source import Source
from fscached.store import Image
from fscached.transport import ObjectKey
from rafs_v6 import ImageError
from rafs_v6.blob import ChunkMap
from rafs_v6.layout import BlobEntry

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Registration:
    """One image, bound. `prefetch`: bring its blobs before anybody asks."""

    image: Image
    volume: str
    source: Source
    prefetch: bool

    @property
    def key(self) -> ObjectKey:
        """The bootstrap's key."""
        return ObjectKey(self.volume, self.image.fsid)


class Images:
    """All registrations. `chunks` loads the verified chunk map of one blob of one image."""

    def __init__(self, chunks: Callable[[Registration, BlobEntry], Awaitable[ChunkMap]]) -> None:
        self._load = chunks
        self._by_key: dict[ObjectKey, Registration] = {}
        self._maps: dict[ObjectKey, asyncio.Future[ChunkMap]] = {}

    def __iter__(self) -> Iterator[Registration]:
        return iter(self._by_key.values())

    def __len__(self) -> int:
        return len(self._by_key)

    def bind(self, registration: Registration) -> None:
        """Register an image; the same one again replaces its source, so credentials renew.

        Raises ImageError for a blob that another image of the volume describes differently: one
        of them lies, and its cache file would be the other's.
        """
        for entry in registration.image.blobs:
            owner = self._owner(registration.volume, entry.blob_id)
            if owner is not None and _identity(owner[1]) != _identity(entry):
                raise ImageError(
                    f"blob {entry.blob_id[:12]} is another one in {owner[0].image.reference} of "
                    f"the same domain: mount one of the images in a domain of its own"
                )
        self._by_key[registration.key] = registration

    def unbind(self, volume: str, fsid: str) -> Registration | None:
        """Forget an image. What the kernel has open keeps working."""
        gone = self._by_key.pop(ObjectKey(volume, fsid), None)
        if gone is not None:
            for entry in gone.image.blobs:
                if self._owner(volume, entry.blob_id) is None:
                    self._maps.pop(ObjectKey(volume, entry.blob_id), None)
        return gone

    def get(self, volume: str, fsid: str) -> Registration | None:
        """The registration of a bootstrap."""
        return self._by_key.get(ObjectKey(volume, fsid))

    def lookup(self, key: ObjectKey) -> Origin | LocalBootstrap | None:
        """What a key of the kernel stands for, or None."""
        registration = self._by_key.get(key)
        if registration is not None:
            return LocalBootstrap(registration.image.path, registration.image.size_bytes)
        owner = self._owner(key.volume, key.cookie)
        if owner is None:
            return None
        registration, entry = owner
        return Origin(
            entry.blob_id,
            entry.uncompressed_size,
            registration.source,
            lambda: self._chunks(key, registration, entry),
        )

    def prefetches(self, key: ObjectKey) -> bool:
        """Whether a blob is to be brought before anybody asks."""
        owner = self._owner(key.volume, key.cookie)
        return owner is not None and owner[0].prefetch

    def _owner(self, volume: str, blob_id: str) -> tuple[Registration, BlobEntry] | None:
        for registration in self._by_key.values():
            if registration.volume == volume:
                entry = registration.image.blob(blob_id)
                if entry is not None:
                    return registration, entry
        return None

    async def _chunks(
        self, key: ObjectKey, registration: Registration, entry: BlobEntry
    ) -> ChunkMap:
        """One load per blob however many ask; one that failed is forgotten."""
        future = self._maps.get(key)
        if future is None:
            future = asyncio.ensure_future(self._load(registration, entry))
            self._maps[key] = future
            future.add_done_callback(lambda done: self._loaded(key, done))
        return await asyncio.shield(future)

    def _loaded(self, key: ObjectKey, future: asyncio.Future[ChunkMap]) -> None:
        if future.cancelled() or future.exception() is not None:
            self._maps.pop(key, None)


def _identity(entry: BlobEntry) -> tuple[object, ...]:
    """What decides a cache file's bytes."""
    return (
        entry.uncompressed_size,
        entry.compressed_size,
        entry.compressor,
        entry.digester,
        entry.ci_offset,
        entry.ci_compressed_size,
        entry.toc_digest,
    )
